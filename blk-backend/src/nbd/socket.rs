//! A connected stream socket that never blocks by itself.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recvmsg, sendmsg, shutdown,
    },
};

/// A client's end.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// What is there, into the two parts of memory in order; `None` when nothing is. 0 is the end.
    pub(super) fn receive(&self, first: &mut [u8], second: &mut [u8]) -> io::Result<Option<usize>> {
        let mut parts = [IoSliceMut::new(first), IoSliceMut::new(second)];
        let mut nothing = RecvAncillaryBuffer::default();
        match recvmsg(&self.0, &mut parts, &mut nothing, RecvFlags::empty()) {
            Ok(received) => Ok(Some(received.bytes)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// As much of `parts` as there is room for; `None` when there is none. With `more`, other bytes follow at once.
    pub(super) fn send(&self, parts: &[IoSlice<'_>], more: bool) -> io::Result<Option<usize>> {
        let mut nothing = SendAncillaryBuffer::default();
        let flags = if more { SendFlags::NOSIGNAL | SendFlags::MORE } else { SendFlags::NOSIGNAL };
        match sendmsg(&self.0, parts, &mut nothing, flags) {
            Ok(sent) => Ok(Some(sent)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Ends the client's side: it is heard no more, but may still be answered. Wakes who waits for it.
    pub(super) fn stop_hearing(&self) {
        // A client that is gone already is what is wanted.
        shutdown(&self.0, Shutdown::Read).ok();
    }

    /// Ends the connection.
    pub(super) fn hang_up(&self) {
        shutdown(&self.0, Shutdown::Both).ok();
    }

    /// The same socket for a dialogue in turns, which must be over by `deadline`.
    pub(super) fn until(&self, deadline: Instant) -> Dialogue<'_> {
        Dialogue { socket: self, deadline }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// See [`Socket::until`].
pub(super) struct Dialogue<'a> {
    socket: &'a Socket,
    deadline: Instant,
}

impl Dialogue<'_> {
    fn wait(&self, flags: PollFlags) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut fds = [PollFd::new(self.socket, flags)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => Err(io::Error::new(io::ErrorKind::TimedOut, "the handshake took too long")),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Read for Dialogue<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(received) = self.socket.receive(bytes, &mut [])? {
                return Ok(received);
            }
            self.wait(PollFlags::IN)?;
        }
    }
}

impl Write for Dialogue<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            if let Some(sent) = self.socket.send(&[IoSlice::new(bytes)], false)? {
                return Ok(sent);
            }
            self.wait(PollFlags::OUT)?;
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
