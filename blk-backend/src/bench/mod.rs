//! The load generator: jobs in fio's terms, on an image in this process or on whoever serves one.
//!
//! - `job` is what is asked, `run` asks it, each queue on a thread of its own, and counts latencies in HdrHistograms.
//! - `target` is what it asks: `image` in this process (through [`Lane`](crate::engine::Lane)s, with `memory` of their
//!   own), `vhost` a device behind a vhost-user socket, `nbd` an export behind an NBD URI.
//! - `stamp`, `ledger`, `journal` and `verify` see to it that what was written is there, also after a crash.
//! - `report` shows the result and writes it as JSON; `compare` sets two of those side by side; `cpu` is what the
//!   work costs whoever does it.

mod compare;
mod cpu;
mod image;
mod job;
mod journal;
mod ledger;
mod memory;
mod nbd;
mod noise;
mod report;
mod run;
mod stamp;
mod target;
#[cfg(test)]
mod tests;
mod verify;
mod vhost;

pub use compare::compare;
pub use cpu::CpuClock;
pub use image::ImageTarget;
pub use job::{Job, Limit, Pattern};
pub use journal::Journal;
pub use nbd::NbdTarget;
pub use report::{SCHEMA, to_json, write_table};
pub use run::{BenchError, OpResult, RunResult, run, run_until};
pub use stamp::Mismatch;
pub use target::{Done, Facts, Shape, Target, TargetQueue};
pub use verify::{Verified, Verify, verify};
pub use vhost::{VhostOptions, VhostTarget};
