//! How a lane without a ring sleeps: on an epoll instance, edge-triggered.

use std::{
    fmt,
    os::fd::{BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
    io::Errno,
};

use super::ring::BELL;

/// What is told in one call.
const MAX_READY: usize = 64;

/// The descriptors that a lane watches.
pub(super) struct Epoll {
    fd: OwnedFd,
    /// Not told yet.
    ready: Vec<epoll::Event>,
    calls: u64,
}

impl fmt::Debug for Epoll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Epoll").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl Epoll {
    /// Watches the bell.
    pub(super) fn new(bell: BorrowedFd<'_>) -> Result<Self, Errno> {
        let fd = epoll::create(CreateFlags::CLOEXEC)?;
        let this = Self { fd, ready: Vec::with_capacity(MAX_READY), calls: 0 };
        this.watch(bell, BELL)?;
        Ok(this)
    }

    pub(super) fn watch(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), Errno> {
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.fd, fd, EventData::new_u64(token), flags)
    }

    pub(super) fn unwatch(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        epoll::delete(&self.fd, fd)
    }

    /// Waits until something is ready, at most `timeout` (for ever without one).
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> Result<(), Errno> {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        self.calls += 1;
        self.ready.clear();
        match epoll::wait(&self.fd, rustix::buffer::spare_capacity(&mut self.ready), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// What became ready, one after the other.
    pub(super) fn next(&mut self) -> Option<u64> {
        self.ready.pop().map(|event| event.data.u64())
    }

    pub(super) fn calls(&self) -> u64 {
        self.calls
    }
}
