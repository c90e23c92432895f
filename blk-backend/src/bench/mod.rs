//! The load generator: jobs in fio's terms, on an image in this process.
//!
//! `job` is what is asked, `run` asks it, each queue through a [`Lane`](crate::engine::Lane) on a thread of its own,
//! and counts latencies in HdrHistograms; `report` shows the result and writes it as JSON; `compare` sets two of
//! those side by side; `memory` is where the bytes of requests stand.

mod compare;
mod job;
mod memory;
mod report;
mod run;
#[cfg(test)]
mod tests;

pub use compare::compare;
pub use job::{Job, Limit, Pattern};
pub use report::{SCHEMA, to_json, write_table};
pub use run::{BenchError, OpResult, RunResult, run};
