//! How a run is controlled: by QMP, by signals, and by what happens to its disks.
//!
//! - `runner`: what is controlled. It outlives machines: a guest that resets gets a new one.
//! - `failures`: what the disks of the host did not do, told to clients.
//! - `commands`: QMP's view of it; the protocol and the commands about disks are the data plane's
//!   ([`blk_backend::control`]).

mod commands;
mod failures;
mod runner;

pub use runner::{Runner, Status};
