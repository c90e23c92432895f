//! The command line as clap defines it: the one source of the parser, the help, the manual pages and the
//! completions.

use clap::{ArgMatches, Args as _, CommandFactory as _, FromArgMatches as _, Parser};

use crate::{
    command::{
        amend, bench, bitmap, check, commit, compare, completions, convert, create, dd, info, inspect, man,
        map, measure, rebase, resize, snapshot,
    },
    context::Context,
    error::{Failure, Outcome},
    limits::LimitArgs,
};

/// Make, inspect, convert and check disk images
///
/// A drop-in for qemu-img: the same commands, options, output and exit codes. Called through a link named
/// qemu-img, messages carry that name.
#[derive(Debug, Parser)]
#[command(
    name = "img",
    version,
    args_override_self = true,
    disable_help_subcommand = true,
    after_help = AFTER_HELP
)]
struct Head {
    /// Trace events, as the reference takes them.
    #[arg(
        short = 'T',
        long,
        value_name = "TRACE",
        help = "Trace events: [[enable=]PATTERN][,events=FILE][,file=FILE]. This program has none"
    )]
    trace: Vec<String>,
}

const AFTER_HELP: &str = "\
Sizes are bytes, or take a suffix: k, M, G, T, P or E (powers of 1024).

Supported image formats:

  raw qcow2 qed vmdk vpc";

/// A command. Its definition is made when it is called: making all of them takes longer than what small
/// commands do.
#[derive(Clone, Copy)]
pub(crate) struct Command {
    /// What the user calls it.
    pub(crate) name: &'static str,
    arguments: fn(clap::Command) -> clap::Command,
    run: fn(&ArgMatches, &Context) -> Outcome,
}

/// The command whose module has its name.
macro_rules! command {
    ($name:ident) => {
        Command {
            name: stringify!($name),
            arguments: <$name::Args as clap::Args>::augment_args,
            run: |matches, context| {
                let args = $name::Args::from_arg_matches(matches).map_err(|error| refusal(&error))?;
                $name::run(&args, context)
            },
        }
    };
}

/// All of them, in the order of the help.
const COMMANDS: &[Command] = &[
    command!(amend),
    command!(bench),
    command!(bitmap),
    command!(check),
    command!(commit),
    command!(compare),
    command!(convert),
    command!(create),
    command!(dd),
    command!(info),
    command!(map),
    command!(measure),
    command!(rebase),
    command!(resize),
    command!(snapshot),
    command!(inspect),
    command!(completions),
    command!(man),
];

impl Command {
    /// The command called `name`.
    pub(crate) fn find(name: &str) -> Option<Self> {
        COMMANDS.iter().find(|command| command.name == name).copied()
    }

    fn definition(self) -> clap::Command {
        LimitArgs::augment_args((self.arguments)(clap::Command::new(self.name))).args_override_self(true)
    }

    /// clap's definition, built.
    pub(crate) fn built(self) -> clap::Command {
        let mut definition = self.definition().bin_name(format!("img {}", self.name));
        definition.build();
        definition
    }

    /// Gives the plain command line its types and runs the command.
    pub(crate) fn run(
        self,
        definition: clap::Command,
        words: impl Iterator<Item = String>,
        context: &Context,
    ) -> Outcome {
        let words = [self.name.to_owned()].into_iter().chain(words);
        let matches = definition.try_get_matches_from(words).map_err(|error| refusal(&error))?;
        LimitArgs::from_arg_matches(&matches).map_err(|error| refusal(&error))?.apply(context)?;
        (self.run)(&matches, context)
    }
}

fn refusal(error: &clap::Error) -> Failure {
    Failure::usage(error.to_string().trim_end().to_owned())
}

/// clap's definition of what may stand before the command, built.
pub(crate) fn head() -> clap::Command {
    let mut head = Head::command();
    head.build();
    head
}

/// clap's definition of everything, built.
pub(crate) fn command() -> clap::Command {
    let mut command = Head::command()
        .subcommand_required(true)
        .subcommands(COMMANDS.iter().map(|command| command.definition()));
    command.build();
    command
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_definitions_are_sound() {
        command().debug_assert();
    }

    /// What the reader of the command line counts on, and what users see.
    #[test]
    fn commands_say_what_they_do_and_options_what_they_mean() {
        let mut said = HashSet::new();
        for command in command().get_subcommands() {
            let about = command.get_about().map(ToString::to_string);
            assert!(
                about.as_ref().is_some_and(|about| said.insert(about.clone())),
                "{}: {about:?}",
                command.get_name()
            );
            for arg in command.get_arguments() {
                let name = format!("{} {}", command.get_name(), arg.get_id());
                assert!(arg.is_positional() || arg.get_long().is_some(), "{name}");
                assert!(arg.get_help().is_some(), "{name}");
            }
        }
    }
}
