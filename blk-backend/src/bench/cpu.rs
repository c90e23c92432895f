//! The CPU time of a process: ours, or the one that serves.
#![allow(unsafe_code, reason = "the clock of another process")]

use std::{io, os::fd::AsFd, time::Duration};

use rustix::net::sockopt::socket_peercred;

use super::run::BenchError;
use crate::engine::read_clock;

/// The clock of a process: user and system time of all its threads, also of those that have ended.
#[derive(Clone, Copy, Debug)]
pub struct CpuClock {
    clock: libc::clockid_t,
    /// `None` for our own.
    pid: Option<i32>,
}

impl CpuClock {
    /// Ours.
    #[must_use]
    pub fn own() -> Self {
        Self { clock: libc::CLOCK_PROCESS_CPUTIME_ID, pid: None }
    }

    /// That of the process `pid`.
    ///
    /// # Errors
    /// [`BenchError::Gone`] when there is none.
    pub fn of_process(pid: i32) -> Result<Self, BenchError> {
        // `PID_MAX_LIMIT`: clocks of other numbers would be those of something else.
        if !(1..=1 << 22).contains(&pid) {
            return Err(gone(pid, &io::Error::from(io::ErrorKind::NotFound)));
        }
        let mut clock = 0;
        // SAFETY: the pointer is to a live, exclusively borrowed local of the right type.
        match unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) } {
            0 => Ok(Self { clock, pid: Some(pid) }),
            errno => Err(gone(pid, &io::Error::from_raw_os_error(errno))),
        }
    }

    /// That of the process which made the other end of a connected unix socket, or called `listen` for it; `None`
    /// where that process is gone, or not one that we see.
    ///
    /// # Errors
    /// When the system does not say who it is.
    pub(super) fn of_peer(socket: impl AsFd) -> Result<Option<Self>, BenchError> {
        let peer = socket_peercred(socket).map_err(io::Error::from)?.pid.as_raw_nonzero().get();
        Ok(Self::of_process(peer).ok())
    }

    /// What it says.
    ///
    /// # Errors
    /// [`BenchError::Gone`] when the process is gone.
    pub fn now(&self) -> Result<Duration, BenchError> {
        read_clock(self.clock).map_err(|error| gone(self.pid.unwrap_or(0), &error))
    }
}

fn gone(pid: i32, why: &io::Error) -> BenchError {
    BenchError::Gone(format!("process {pid}: its CPU time cannot be read: {why}"))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, process::Command};

    use super::*;

    #[test]
    fn a_process_has_one_clock_by_any_name() {
        let pid = i32::try_from(std::process::id()).expect("a pid");
        let (socket, _other) = UnixStream::pair().expect("sockets");
        let peer = CpuClock::of_peer(&socket).expect("it is told").expect("it is there");
        let before = CpuClock::own().now().expect("a time");
        let (by_pid, by_peer) = (CpuClock::of_process(pid).expect("we are there").now(), peer.now());
        let after = CpuClock::own().now().expect("a time");
        for now in [by_pid.expect("a time"), by_peer.expect("a time")] {
            assert!(before <= now && now <= after, "{before:?} {now:?} {after:?}");
        }
    }

    #[test]
    fn a_process_that_is_gone_has_none() {
        let mut child = Command::new("true").spawn().expect("it runs");
        let pid = i32::try_from(child.id()).expect("a pid");
        let clock = CpuClock::of_process(pid).expect("it was not waited for");
        child.wait().expect("it ended");
        assert!(matches!(clock.now(), Err(BenchError::Gone(_))));
        for none in [pid, 0, -1, i32::MAX] {
            assert!(matches!(CpuClock::of_process(none), Err(BenchError::Gone(_))), "{none}");
        }
    }
}
