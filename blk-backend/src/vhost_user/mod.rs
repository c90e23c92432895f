//! The device in a process of its own: the back-end side of the vhost-user protocol.
//!
//! A front end (QEMU, cloud-hypervisor, …) connects to the [`Server`] of a device and hands over guest memory,
//! rings and descriptors; from then on the queues work without it. `session` is what one connection has set up;
//! `memory` the guest memory that it shared; `message` those messages that the `vhost` crate does not carry.
//!
//! Two promises to who restarts things:
//! - A front end that goes away takes nothing with it: what is under way ends, its memory is let go, and the next
//!   one may connect.
//! - A back end that dies leaves its requests in the inflight memory that the front end keeps
//!   ([`inflight`](crate::virtio::inflight)); the next one does them again before anything new. It cannot start
//!   before the last request of the dead one has reached the file: those requests hold the file open, and with it
//!   the image's lock.

mod memory;
mod message;
mod server;
mod session;

pub use server::{Listening, Server, Told};

/// The most guest memory slots of a front end that adds them one by one (libvhost-user has 509 and QEMU asks for no
/// more).
const MAX_MEMORY_SLOTS: u64 = 509;
