//! How a daemon is asked to end.

use std::io::{self, PipeReader};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    low_level::pipe,
};

/// A pipe that becomes readable at the first `SIGTERM`, `SIGINT` or `SIGHUP`.
pub(crate) fn on_termination() -> io::Result<PipeReader> {
    let (asked, ask) = io::pipe()?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        pipe::register(signal, ask.try_clone()?)?;
    }
    Ok(asked)
}
