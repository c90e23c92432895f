//! Copying whole disks: sources, one behind the other, into a target.

use super::Progress;
use crate::{Error, Result, image::Image};

/// How to copy.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// Runs of zeroes at least this long become holes; 0 writes everything.
    pub sparse_bytes: u64,
    /// Write compressed clusters.
    pub compress: bool,
    /// Compression level, or the format's default.
    pub level: Option<i32>,
    /// Threads, or as many as pay.
    pub threads: Option<usize>,
    /// Whether writes may happen out of guest order.
    pub out_of_order: bool,
    /// Ask the host to copy (`-C`).
    pub copy_offload: bool,
    /// The target is known to read as zeroes.
    pub target_is_zero: bool,
    /// The target's backing file holds what the source leaves unallocated: skip it (`-B`).
    pub target_has_backing: bool,
    /// Replace what cannot be read by zeroes.
    pub salvage: bool,
    /// Bytes per second, if limited.
    pub rate_bytes: Option<u64>,
}

/// Copies `sources` into `target`, which is at least as big as they are together, and flushes it.
/// `salvaged` is told of each range that could not be read.
pub fn convert(
    sources: &[Image],
    target: &Image,
    options: &ConvertOptions,
    salvaged: &(dyn Fn(u64, &Error) + Sync),
    progress: &dyn Progress,
) -> Result<()> {
    let _ = (sources, target, options, salvaged, progress);
    todo!()
}
