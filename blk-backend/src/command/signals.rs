//! How a daemon is asked to end.

use std::{
    io::{self, PipeReader},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
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

/// Whether the process is asked to end within that time, or was before; waits for it.
pub(crate) fn asked_within(asked: &PipeReader, time: Duration) -> io::Result<bool> {
    let time = Timespec::try_from(time).map_err(|_| io::ErrorKind::InvalidInput)?;
    match poll(&mut [PollFd::new(asked, PollFlags::IN)], Some(&time)) {
        Ok(readable) => Ok(readable > 0),
        // Perhaps by that signal: its pipe is asked next time.
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
