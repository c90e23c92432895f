//! From requests to bytes, without waiting on the way.
//!
//! - [`Lane`]: one queue thread's way to a disk; what a front end talks to. `course`: the way of a request through it.
//! - `slot`: the requests of a lane, each at one place from submission to answer.
//! - `transfer`: the fast way: extents become transfers of the ring, one countdown for each request. `fill`: writes to a
//!   part of a new cluster go it twice.
//! - `ring`: the kernel's ring, and what it may do; `epoll`: how a lane sleeps where there is none; `backend`: which.
//! - `table`: pieces of tables that a read lacks in memory, on the same way.
//! - `worker`: threads for what may wait: decoders, writes that lack tables, flushes that write tables, discards.
//! - `flight`: changes under way, by guest cluster; who would run into one is parked there as a value.
//! - `pause`: how all lanes of a disk are held back.
//! - `mailbox`: how workers, and everybody else, reach a lane that may be asleep; `bell`: what wakes it.
//! - `poll`: how long a lane looks for work before it sleeps.
//! - `memory`: the one place that touches the bytes of a guest.
//! - `stats`: what a lane counts; `clock`: what it spends.

mod backend;
mod bell;
mod clock;
mod course;
mod epoll;
mod fill;
mod flight;
mod lane;
mod mailbox;
mod memory;
mod pause;
mod poll;
mod ring;
mod slot;
mod stats;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod transfer;
mod worker;

pub use backend::{EngineChoice, EngineInUse};
pub use lane::{Event, Lane, LaneOptions, Look, Wait};
pub use mailbox::LaneWaker;
pub use poll::Poll;
pub use stats::{Histogram, LaneSnapshot, OpKind, OpStats};

pub(crate) use bell::Bell;
pub(crate) use clock::{ThreadClock, read_clock};
pub(crate) use flight::Flight;
pub(crate) use mailbox::Mailbox;
pub(crate) use pause::Pauses;
pub(crate) use worker::Workers;

/// Whether this process may use an `io_uring` as lanes need it.
///
/// # Errors
/// Why not, in words: the kernel is too old, or somebody forbids it.
pub fn ring_support() -> Result<(), String> {
    ring::Ring::new(1).map(drop).map_err(|error| backend::why_no_ring(&error))
}
