//! Room to send, for a lane that hears of readable descriptors only.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::event::{Timespec, epoll};

use super::socket::Socket;

/// Tells that a socket has room to send: an epoll instance is readable when it has something to tell.
pub(super) struct RoomWatch(OwnedFd);

impl RoomWatch {
    pub(super) fn new(socket: &Socket) -> io::Result<Self> {
        let fd = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Told nothing before it is armed.
        epoll::add(&fd, socket, epoll::EventData::new_u64(0), epoll::EventFlags::ONESHOT)?;
        Ok(Self(fd))
    }

    /// Tells once, from now on.
    pub(super) fn arm(&self, socket: &Socket) -> io::Result<()> {
        // What it told last time is taken off, or it would have nothing new to tell.
        let mut told =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let nothing_waits = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(&self.0, &mut told, Some(&nothing_waits))?;
        let flags = epoll::EventFlags::OUT | epoll::EventFlags::ONESHOT;
        epoll::modify(&self.0, socket, epoll::EventData::new_u64(0), flags)?;
        Ok(())
    }
}

impl AsFd for RoomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
