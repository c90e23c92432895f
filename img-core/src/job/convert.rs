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

/// What `salvage` had to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Salvaged {
    /// Which source, counted from 0.
    pub source: usize,
    /// The sector's offset in that source, as the reference counts.
    pub offset_bytes: u64,
    /// [`JobStep::Read`](crate::JobStep::Read): the sector became zeroes. [`JobStep::Map`](crate::JobStep::Map):
    /// it was read although the map could not say where it is.
    pub step: crate::JobStep,
}

/// Copies `sources` into `target`, which is at least as big as they are together, and flushes it.
/// `salvaged` is told of each range that could not be read.
pub fn convert(
    sources: &[Image],
    target: &Image,
    options: &ConvertOptions,
    salvaged: &(dyn Fn(Salvaged, &Error) + Sync),
    progress: &dyn Progress,
) -> Result<()> {
    let _ = (sources, target, options, salvaged, progress);
    todo!()
}
