//! What ends the sleep of a lane, and of others who wait for descriptors.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    event::{EventfdFlags, eventfd},
    io::Errno,
};

/// An eventfd on watch.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> Result<Self, Errno> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// From any thread. The counter is never read and cannot overflow in any life time: it only has to change.
    pub(crate) fn ring(&self) {
        rustix::io::write(&self.0, &1u64.to_ne_bytes()).expect("an eventfd that is far from full");
    }
}

impl AsFd for Bell {
    /// Becomes readable, again, each time that it is rung.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
