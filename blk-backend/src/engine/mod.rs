//! From requests to bytes, without waiting on the way.
//!
//! - [`Lane`]: one queue thread's way to a disk; what a front end talks to.
//! - `slot`: the requests of a lane, each at one place from submission to answer.
//! - `epoll`: how a lane sleeps where there is no ring.
//! - `worker`: threads for what may wait: tables that are not in memory, copies, decoders, flushes, discards.
//! - `flight`: changes under way, by guest cluster; who would run into one is parked there as a value.
//! - `mailbox`: how workers, and everybody else, reach a lane that may be asleep.
//! - `memory`: the one place that touches the bytes of a guest.
//! - `stats`: what a lane counts.

mod epoll;
mod flight;
mod lane;
mod mailbox;
mod memory;
mod slot;
mod stats;
#[cfg(test)]
mod tests;
mod worker;

pub use lane::{Event, Lane, LaneOptions, Wait};
pub use mailbox::LaneWaker;
pub use stats::{Histogram, LaneSnapshot, OpKind, OpStats};

pub(crate) use flight::Flight;
pub(crate) use mailbox::Mailbox;
pub(crate) use worker::Workers;

/// Whether this process may use `io_uring`.
///
/// # Errors
/// Why not: the kernel is too old, or somebody forbids it.
pub fn ring_support() -> std::io::Result<()> {
    io_uring::IoUring::new(1).map(drop)
}
