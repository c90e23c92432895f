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

/// What the lane's own bell is called.
const BELL: u64 = u64::MAX;

/// The descriptors that a lane watches.
pub(super) struct Epoll {
    fd: OwnedFd,
    ready: Vec<epoll::Event>,
}

impl fmt::Debug for Epoll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Epoll").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl Epoll {
    /// Watches the bell.
    pub(super) fn new(bell: BorrowedFd<'_>) -> Result<Self, Errno> {
        let this = Self { fd: epoll::create(CreateFlags::CLOEXEC)?, ready: Vec::with_capacity(64) };
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

    /// Waits at most `timeout` (for ever without one) and tells what became ready.
    pub(super) fn wait(
        &mut self,
        timeout: Option<Duration>,
        mut ready: impl FnMut(u64),
    ) -> Result<(), Errno> {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        self.ready.clear();
        let space = rustix::buffer::spare_capacity(&mut self.ready);
        match epoll::wait(&self.fd, space, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        for event in &self.ready {
            let token = event.data.u64();
            if token != BELL {
                ready(token);
            }
        }
        Ok(())
    }
}
