//! The virtio block device (virtio 1.2, section 5.2), whatever transport carries it.
//!
//! [`features`] and [`config`] are what it says of itself; [`chain`] follows a descriptor chain and [`command`]
//! understands it; [`ring`] gives chains back; [`worker`] is the loop of one queue on one
//! [`Lane`](crate::engine::Lane), made of a [`setup`] and reached by [`orders`], and `requests` are what it has under
//! way; [`device`] is what queues share, [`failure`] what becomes of requests that the host failed. [`inflight`],
//! [`redo`] and [`dirty_log`] are what a device remembers for others. [`driver`] is the other side of a ring, for load
//! generators and tests.
//!
//! Everything that a guest wrote is hostile: copied out of its memory once, checked, then used. What can be
//! answered is answered with the status of section 5.2.6; what cannot breaks the queue, and the device asks for a
//! reset. No byte outside the guest's memory is ever touched for it.

pub mod chain;
pub mod command;
#[cfg(test)]
mod command_tests;
pub mod config;
pub mod device;
pub mod dirty_log;
pub mod driver;
pub mod failure;
pub mod features;
pub mod inflight;
pub mod orders;
pub mod redo;
mod requests;
pub mod ring;
pub mod setup;
pub mod worker;

pub use command::Status;
pub use device::{Device, DeviceEvent, DeviceOptions};
pub use failure::{Action, Failure, OnError};
pub use features::Features;

/// The memory of a guest, mapped into this process.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
