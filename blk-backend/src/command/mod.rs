//! The commands, one file each: parse, build what is to run, run it, print.

use std::{
    fmt::Display,
    io::{self, Write},
    process::ExitCode,
};

pub(crate) mod bench;
mod bench_target;
pub(crate) mod control_options;
pub(crate) mod disk_options;
pub(crate) mod engine_options;
pub(crate) mod host;
pub(crate) mod nbd;
pub(crate) mod sandbox_options;
mod signals;
pub(crate) mod vhost_user;

/// Why a command stopped.
#[derive(Debug)]
pub(crate) enum Failure {
    /// To be told on standard error.
    Text(String),
    /// Nobody reads the output any more: no error.
    ClosedPipe,
    /// By a signal, before there was anything to serve: no error either.
    AskedToEnd,
}

impl Failure {
    /// Says `why`.
    pub(crate) fn new(why: impl Display) -> Self {
        Self::Text(why.to_string())
    }

    /// Tells the user, and gives the exit code.
    pub(crate) fn tell(&self, err: &mut dyn Write) -> ExitCode {
        match self {
            Self::ClosedPipe | Self::AskedToEnd => ExitCode::SUCCESS,
            Self::Text(why) => {
                // Where standard error is closed only the exit code can speak.
                writeln!(err, "blk-backend: {why}").ok();
                ExitCode::FAILURE
            }
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Self::ClosedPipe } else { Self::new(error) }
    }
}

impl From<img_core::Error> for Failure {
    fn from(error: img_core::Error) -> Self {
        Self::new(error)
    }
}

/// Tells who reads standard output that a daemon serves. It does so, too, where nobody can be told.
fn announce(out: &mut dyn Write, tell: impl FnOnce(&mut dyn Write) -> io::Result<()>) {
    match tell(out).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => warn(&format!("standard output: {error}")),
        _ => {}
    }
}

/// Tells the user something that stops nothing.
fn warn(text: &str) {
    // Where standard error is closed nobody wants to know.
    writeln!(io::stderr().lock(), "blk-backend: {text}").ok();
}
