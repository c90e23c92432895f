//! Copying whole disks: sources, one behind the other, into a target.
//!
//! One walk over the sources' maps makes a `plan`; threads take pieces of it, read (`source`), find zeroes
//! (`pieces`), compress, wait for their turn to reserve places in the target in guest order, and move their
//! bytes and commit beside each other. The result is the same file at any number of threads; with
//! `out_of_order` nobody waits. `offload` lets the host copy; `front` writes into pipes, `stream` reads
//! out of them into a `stream_sink`; `packed` is what both compress. Start at [`convert`].

mod copy;
mod front;
mod offload;
mod packed;
mod pieces;
mod plan;
mod source;
mod stream;
mod stream_sink;

#[cfg(test)]
mod front_tests;
#[cfg(test)]
mod tests;

pub use front::convert_to_pipe;
pub use stream::{StreamOptions, StreamTarget, convert_stream};

use std::ops::Range;

use self::{
    copy::Copy,
    plan::{Class, Cut, Plan, Rules},
    source::Sources,
};
use super::{
    Progress,
    target::{Target, write_error},
};
use crate::{Error, JobStep, Result, format::DirtyMap, image::Image};

/// How to copy.
#[derive(Clone, Copy, Debug)]
pub struct ConvertOptions {
    /// Runs of zeroes at least this long (a multiple of 512) become holes; 0 writes everything.
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

impl Default for ConvertOptions {
    /// What a plain `convert` into a new image does.
    fn default() -> Self {
        Self {
            sparse_bytes: 4096,
            compress: false,
            level: None,
            threads: None,
            out_of_order: false,
            copy_offload: false,
            target_is_zero: true,
            target_has_backing: false,
            salvage: false,
            rate_bytes: None,
        }
    }
}

/// What `salvage` had to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Salvaged {
    /// Which source, counted from 0.
    pub source: usize,
    /// The sector's offset in that source, as the reference counts.
    pub offset_bytes: u64,
    /// [`JobStep::Read`]: the sector became zeroes. [`JobStep::Map`]: it was read although the map could not
    /// say where it is.
    pub step: JobStep,
}

/// Copies `sources` into `target`, which is at least as big as they are together, and flushes it.
/// `salvaged` is told of each range that could not be read.
///
/// Takes at most [`MAX_BUFFER_BYTES`] for buffers, 16 MiB for the plan, and what the images' own caches take.
///
/// # Errors
/// [`Error::Job`] with the step and the place; of several that fail, the first in guest order is told.
/// [`Error::Cancelled`]; [`Error::Invalid`] and [`Error::Unsupported`] for options that do not go together or
/// that the target cannot do. The target's contents are then undefined.
pub fn convert(
    sources: &[Image],
    target: &Image,
    options: &ConvertOptions,
    salvaged: &(dyn Fn(Salvaged, &Error) + Sync),
    progress: &dyn Progress,
) -> Result<()> {
    copy_sources(&Sources::new(sources)?, None, target, options, salvaged, progress)
}

/// Copies what `marks`, a bitmap of the source, marks, zeroes included; the rest of `target` is left as it is. Where
/// compressed clusters are written, a cluster that is marked in part is copied whole.
///
/// # Errors
/// As [`convert`].
pub fn convert_marked(
    source: &Image,
    marks: &DirtyMap,
    target: &Image,
    options: &ConvertOptions,
    salvaged: &(dyn Fn(Salvaged, &Error) + Sync),
    progress: &dyn Progress,
) -> Result<()> {
    let sources = Sources::of_parts([(source, 0..source.virtual_size_bytes())])?;
    copy_sources(&sources, Some(marks), target, options, salvaged, progress)
}

/// Copies a part of one disk to the start of `target`, as [`convert`] does. The part lies inside the source.
///
/// # Errors
/// As [`convert`].
pub fn convert_part(
    source: &Image,
    part: Range<u64>,
    target: &Image,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<()> {
    if part.start > part.end || part.end > source.virtual_size_bytes() {
        return Err(Error::Invalid(format!("bytes {}..{} are not inside the disk", part.start, part.end)));
    }
    copy_sources(&Sources::of_parts([(source, part)])?, None, target, options, &|_, _| {}, progress)
}

fn copy_sources(
    sources: &Sources<'_>,
    marks: Option<&DirtyMap>,
    target: &Image,
    options: &ConvertOptions,
    salvaged: &(dyn Fn(Salvaged, &Error) + Sync),
    progress: &dyn Progress,
) -> Result<()> {
    if sources.len_bytes() > target.virtual_size_bytes() {
        return Err(Error::Invalid("output file is smaller than input file".to_owned()));
    }
    let image = target;
    let target = Target::new(target)?;
    let on_lost = |source: usize, offset_bytes: u64, error: &Error| {
        salvaged(Salvaged { source, offset_bytes, step: JobStep::Map }, error);
    };
    let sparseness = pieces::Sparseness { run_bytes: options.sparse_bytes };
    let compression = target.compression(options.compress)?;
    let is_local = compression.is_some() || options.sparse_bytes == 0 || sparseness.is_local();
    let rules = Rules {
        // What is marked is copied from wherever the source has it, not from its top alone.
        target_backing_bytes: (options.target_has_backing && marks.is_none())
            .then(|| image.layers().get(1).map_or(u64::MAX, |backing| backing.virtual_size_bytes())),
        join: is_local,
        on_lost: options.salvage.then_some(&on_lost),
        marks,
    };
    let plan = Plan::new(sources, rules, compression.map(|_| target.cluster_bytes))?;

    let mut all = plan.pieces();
    let mut to_copy = 0;
    while let Some(piece) = all.next(Cut::Nowhere, |_| false)? {
        if piece.class == Class::Data || (piece.class == Class::Zero && options.sparse_bytes == 0) {
            to_copy += piece.len;
        }
    }
    progress.advance(0, to_copy);

    let on_salvaged: source::OnSalvaged<'_> = if options.salvage { Some(salvaged) } else { None };
    Copy::new(sources, target, &plan, options, compression, is_local, on_salvaged)?.run(progress, to_copy)?;
    if compression.is_some() {
        target.pad_to_sector().map_err(|error| write_error(sources.len_bytes(), error))?;
    }
    image.flush()
}

/// The most bytes of buffers a conversion holds, at the largest number of threads.
pub const MAX_BUFFER_BYTES: usize = copy::MAX_BUFFER_BYTES;
