//! Writing what an overlay holds into the image below it.

use super::{Progress, WINDOW_BYTES, throttle::Throttle, windows};
use crate::{
    Error, JobStep, Result,
    format::Place,
    image::{Image, ImageExtent},
    storage::Preallocation,
};

/// How much is read and written at once.
const COPY_BYTES: usize = 2 << 20;

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
    let mut buffer = vec![0; COPY_BYTES];
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
                    let written = base.write_zeroes(range.clone(), true);
                    written.map_err(|error| at(JobStep::Write, range.start, error))?;
                }
                Place::Data { .. } | Place::Encoded { .. } => {
                    for piece in windows(range, COPY_BYTES as u64) {
                        if progress.is_cancelled() {
                            return Err(Error::Cancelled);
                        }
                        if let Some(throttle) = &throttle {
                            throttle.pass(piece.end - piece.start, || progress.is_cancelled());
                        }
                        let len = usize::try_from(piece.end - piece.start).unwrap_or(COPY_BYTES);
                        let bytes = &mut buffer[..len];
                        let read = overlay.read_at(bytes, piece.start);
                        read.map_err(|error| at(JobStep::Read, piece.start, error))?;
                        let written = base.write_at(bytes, piece.start);
                        written.map_err(|error| at(JobStep::Write, piece.start, error))?;
                    }
                }
            }
        }
    }
    base.flush()?;
    progress.advance(size, size);
    Ok(())
}

fn at(step: JobStep, at_bytes: u64, source: Error) -> Error {
    Error::Job { step, input: 0, at_bytes, source: Box::new(source) }
}
