//! What every command needs: who it is called as, and where it prints.

use crate::{error::Failure, output::Out, output::complain};

/// The surroundings of a command.
#[derive(Debug)]
pub(crate) struct Context {
    /// The program as it was called, for usage errors.
    called_as: String,
    /// Standard output.
    pub(crate) out: Out,
}

impl Context {
    /// For the program called `called_as`.
    pub(crate) fn new(called_as: String, out: Out) -> Self {
        Self { called_as, out }
    }

    /// The name in front of messages: the last part of the name the program was called by.
    pub(crate) fn name(&self) -> &str {
        self.called_as.rsplit('/').next().unwrap_or(&self.called_as)
    }

    /// Whether the program stands in for the reference, under whose name nothing but what the reference
    /// prints may appear.
    pub(crate) fn is_reference(&self) -> bool {
        self.name() == "qemu-img"
    }

    /// Prints an error and goes on.
    pub(crate) fn error(&self, text: &str) {
        complain(format_args!("{}: {text}", self.name()));
    }

    /// Prints a warning and goes on.
    pub(crate) fn warning(&self, text: &str) {
        complain(format_args!("{}: warning: {text}", self.name()));
    }

    /// Prints why `command` failed.
    pub(crate) fn report(&self, command: Option<&str>, failure: &Failure) {
        if !failure.text.is_empty() {
            self.error(&failure.text);
        }
        if failure.show_help_hint {
            self.help_hint(command);
        }
    }

    /// Prints an error of the command line itself.
    pub(crate) fn report_usage(&self, command: Option<&str>, text: &str) {
        match command {
            Some(command) => complain(format_args!("{} {command}: {text}", self.called_as)),
            None => complain(format_args!("{}: {text}", self.called_as)),
        }
        self.help_hint(command);
    }

    fn help_hint(&self, command: Option<&str>) {
        let command = command.map(|command| format!(" {command}")).unwrap_or_default();
        complain(format_args!("Try '{}{command} --help' for more info", self.called_as));
    }
}
