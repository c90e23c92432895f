//! How a daemon, or a load, is asked to end.

use std::{
    io::{self, PipeReader},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
    low_level::pipe,
};

/// What asks a process to end.
const TERMINATION: [i32; 3] = [SIGTERM, SIGINT, SIGHUP];

/// A pipe that becomes readable at the first `SIGTERM`, `SIGINT` or `SIGHUP`.
pub(crate) fn on_termination() -> io::Result<PipeReader> {
    let (asked, ask) = io::pipe()?;
    for signal in TERMINATION {
        pipe::register(signal, ask.try_clone()?)?;
    }
    Ok(asked)
}

/// A flag that the first of these signals sets; the next one ends the process.
pub(crate) fn flag_on_termination() -> io::Result<Arc<AtomicBool>> {
    let asked = Arc::new(AtomicBool::new(false));
    for signal in TERMINATION {
        // In this order: the second signal finds the flag set.
        flag::register_conditional_default(signal, Arc::clone(&asked))?;
        flag::register(signal, Arc::clone(&asked))?;
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
