//! Writing what an overlay holds into the image below it.

use std::ops::Range;

use super::{
    Progress, WINDOW_BYTES,
    target::{Reserved, Target, write_error},
    throttle::Throttle,
    windows,
};
use crate::{
    Error, JobStep, Result,
    format::Place,
    image::{Image, ImageExtent, Pass},
    storage::Preallocation,
};

/// How much is read before it is written: so much that fewer system calls are made, and in the cache of the core still.
const BATCH_BYTES: u64 = 256 << 10;

/// The same where a cluster of the base is larger, which is then written whole.
const MAX_BATCH_BYTES: u64 = 2 << 20;

/// How a commit is done.
#[derive(Clone, Copy, Debug, Default)]
pub struct CommitOptions {
    /// Bytes a second at most.
    pub rate_bytes: Option<u64>,
}

/// Writes everything that the layers of `overlay` hold into `base`, the disk that stands below the last of them,
/// and makes it durable. `base` grows to the size of the overlay where it is smaller. What no layer of `overlay`
/// holds stays as it is in `base`.
///
/// # Errors
/// [`Error::Job`] when something cannot be read or written; the overlay is unchanged, and a second try does no
/// harm. [`Error::Cancelled`].
pub fn commit(overlay: &Image, base: &Image, options: CommitOptions, progress: &dyn Progress) -> Result<()> {
    let size = overlay.virtual_size_bytes();
    if base.virtual_size_bytes() < size {
        base.resize(size, Preallocation::Off)?;
    }
    let throttle = options.rate_bytes.filter(|rate| *rate > 0).map(Throttle::new);
    let mut writes = Writes::new(base)?;
    let mut extents: Vec<ImageExtent> = Vec::new();
    for window in windows(0..size, WINDOW_BYTES) {
        progress.advance(window.start, size);
        extents.clear();
        overlay
            .map_range(window.clone(), &mut extents)
            .map_err(|error| at(JobStep::Map, window.start, error))?;
        for extent in &extents {
            let range = extent.guest_offset..extent.end();
            match extent.place {
                Place::Unallocated => {}
                Place::Zero { .. } => {
                    writes.land()?;
                    let written = base.write_zeroes(range.clone(), true);
                    written.map_err(|error| write_error(range.start, error))?;
                }
                Place::Data { .. } | Place::Encoded { .. } => {
                    for piece in windows(range, writes.bytes.len() as u64) {
                        if progress.is_cancelled() {
                            return Err(Error::Cancelled);
                        }
                        if let Some(throttle) = &throttle {
                            throttle.pass(piece.end - piece.start, || progress.is_cancelled());
                        }
                        writes.copy(overlay, piece)?;
                    }
                }
            }
        }
    }
    writes.land()?;
    base.flush()?;
    progress.advance(size, size);
    Ok(())
}

/// Pieces on their way into the base. What an overlay holds is scattered over the disk, and takes places one behind the
/// other where the base has none yet: they are written together.
struct Writes<'a> {
    base: &'a Image,
    /// `None` where every write is looked at on its own.
    target: Option<Target<'a>>,
    bytes: Vec<u8>,
    /// Of `bytes`.
    used: usize,
    reserved: Vec<Reserved<'a>>,
    /// While there is something reserved.
    pass: Option<Pass<'a>>,
    /// Where the last piece ends.
    end: u64,
}

impl<'a> Writes<'a> {
    fn new(base: &'a Image) -> Result<Self> {
        let target = if base.looks_at_writes() { None } else { Some(Target::new(base)?.scattered()) };
        let cluster_bytes = base.layers()[0].cluster_size_bytes().map_or(0, u64::from);
        let bytes = vec![0; usize_of(cluster_bytes.clamp(BATCH_BYTES, MAX_BATCH_BYTES))];
        Ok(Self { base, target, bytes, used: 0, reserved: Vec::new(), pass: None, end: 0 })
    }

    /// Reads a piece that is no longer than the buffer, and writes it, or has its place reserved until others follow.
    fn copy(&mut self, overlay: &Image, piece: Range<u64>) -> Result<()> {
        let len = usize_of(piece.end - piece.start);
        let is_in_last_cluster = |target: &Target<'_>| {
            !self.reserved.is_empty()
                && piece.start / target.cluster_bytes == (self.end - 1) / target.cluster_bytes
        };
        // Two reservations in one cluster exclude each other.
        if self.used + len > self.bytes.len() || self.target.as_ref().is_some_and(is_in_last_cluster) {
            self.land()?;
        }
        let bytes = &mut self.bytes[self.used..self.used + len];
        overlay.read_at(bytes, piece.start).map_err(|error| at(JobStep::Read, piece.start, error))?;
        let Some(target) = &self.target else {
            return self.base.write_at(bytes, piece.start).map_err(|error| write_error(piece.start, error));
        };
        let pass = self.pass.get_or_insert_with(|| self.base.pass());
        target.reserve(pass, piece.clone(), self.used, &mut self.reserved)?;
        self.used += len;
        self.end = piece.end;
        Ok(())
    }

    /// Writes what is on its way.
    fn land(&mut self) -> Result<()> {
        if let (Some(target), Some(pass)) = (&self.target, &self.pass) {
            target.write(pass, &self.bytes, &mut self.reserved)?;
        }
        self.pass = None;
        self.used = 0;
        Ok(())
    }
}

/// A number of bytes of a batch.
fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("at most 2 MiB")
}

fn at(step: JobStep, at_bytes: u64, source: Error) -> Error {
    Error::Job { step, input: 0, at_bytes, source: Box::new(source) }
}
