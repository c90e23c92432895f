//! Standing an overlay on another backing file without changing what its guest reads.
//!
//! Where the overlay holds nothing the guest reads through to the backing file. Those clusters that would read
//! differently through the new one are written into the overlay first; then the name in it changes.

use std::ops::Range;

use super::{Progress, WINDOW_BYTES, compress::Compressor, windows};
use crate::{
    Error, JobStep, Result,
    format::{Backing, Extent, HostFile, Layer, Lease, Place},
    image::{Image, ImageExtent},
    zeroes::is_zero,
};

/// How much is compared at once.
const COMPARE_BYTES: u64 = 2 << 20;

/// The unit of writing for formats without clusters.
const DEFAULT_UNIT_BYTES: u32 = 65536;

/// Writes into the top layer of `image` what it needs to read the same over `new`, or over nothing. The name in
/// the image is not changed yet: see [`set_backing`].
///
/// # Errors
/// [`Error::Job`] when something cannot be read or written; the guest reads what it read before.
/// [`Error::Cancelled`].
pub fn rebase(image: &Image, new: Option<&Image>, compress: bool, progress: &dyn Progress) -> Result<()> {
    let top = &image.layers()[0];
    let old = match &image.layers()[1..] {
        [] => None,
        below => Some(Image::from_layers(below.to_vec())?),
    };
    let compressor = match top.compression() {
        Some(codec) if compress => Some(Compressor::new(codec, None)?),
        _ => None,
    };
    let unit = u64::from(top.cluster_size_bytes().unwrap_or(DEFAULT_UNIT_BYTES));
    let mut job = Rebase { image, top: &**top, old, new, unit, compressor, progress };
    let size = image.virtual_size_bytes();
    for window in windows(0..size, WINDOW_BYTES.max(unit)) {
        progress.advance(window.start, size);
        job.window(window)?;
    }
    image.flush()?;
    progress.advance(size, size);
    Ok(())
}

/// Records the backing file of the top layer, durably.
///
/// # Errors
/// [`Error::ReadOnly`]; [`Error::Invalid`], in the reference's words, when the format cannot record it.
pub fn set_backing(image: &Image, backing: Option<&Backing>) -> Result<()> {
    let Some(writer) = image.layers()[0].writer() else {
        return Err(Error::ReadOnly { file: image.layer_name(0).into() });
    };
    writer.set_backing(backing)
}

struct Rebase<'a> {
    image: &'a Image,
    top: &'a dyn Layer,
    old: Option<Image>,
    new: Option<&'a Image>,
    /// Guest bytes that are written together.
    unit: u64,
    compressor: Option<Compressor>,
    progress: &'a dyn Progress,
}

impl Rebase<'_> {
    fn window(&mut self, window: Range<u64>) -> Result<()> {
        let mut silent = Vec::new();
        {
            let _lease = Lease::of(self.top);
            let mut extents: Vec<Extent> = Vec::new();
            self.top
                .map_range(window.clone(), &mut extents)
                .map_err(|error| at(JobStep::Map, window.start, error))?;
            let mut start = window.start;
            for extent in extents {
                if extent.place == Place::Unallocated {
                    silent.push(start..start + extent.len_bytes);
                }
                start += extent.len_bytes;
            }
        }
        for range in silent {
            self.silent(range)?;
        }
        Ok(())
    }

    /// A range of which the overlay holds nothing.
    fn silent(&mut self, range: Range<u64>) -> Result<()> {
        let old = places(self.old.as_ref(), range.clone())?;
        let new = places(self.new, range.clone())?;
        let mut start = range.start;
        let (mut old, mut new) = (old.into_iter().peekable(), new.into_iter().peekable());
        let mut unlike: Vec<Range<u64>> = Vec::new();
        while let (Some(before), Some(after)) = (old.peek(), new.peek()) {
            let end = before.end.min(after.end);
            if !before.is_same_as(after, start) {
                match unlike.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => unlike.push(start..end),
                }
            }
            start = end;
            if before.end == end {
                old.next();
            }
            if new.peek().is_some_and(|after| after.end == end) {
                new.next();
            }
        }
        // Units are compared and written whole, as far as the overlay is silent there.
        let mut done = range.start;
        for part in unlike {
            let start = (part.start - part.start % self.unit).max(done);
            let end = part.end.next_multiple_of(self.unit).min(range.end);
            for piece in windows(start..end.max(start), COMPARE_BYTES.max(self.unit)) {
                self.compare(piece)?;
            }
            done = end.max(start);
        }
        Ok(())
    }

    /// Reads both backing files and writes the units in which they differ.
    fn compare(&mut self, range: Range<u64>) -> Result<()> {
        if self.progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let old = bytes(self.old.as_ref(), &range)?;
        let new = bytes(self.new, &range)?;
        let mut unlike: Option<Range<u64>> = None;
        for unit in windows(range.clone(), self.unit) {
            let index = place(&range, &unit);
            if old[index.clone()] != new[index] {
                match &mut unlike {
                    Some(run) => run.end = unit.end,
                    None => unlike = Some(unit),
                }
            } else if let Some(run) = unlike.take() {
                self.write(run.clone(), &old[place(&range, &run)])?;
            }
        }
        match unlike {
            Some(run) => self.write(run.clone(), &old[place(&range, &run)]),
            None => Ok(()),
        }
    }

    fn write(&mut self, range: Range<u64>, bytes: &[u8]) -> Result<()> {
        let failed = |error| at(JobStep::Write, range.start, error);
        if is_zero(bytes) {
            return self.image.write_zeroes(range.clone(), true).map_err(failed);
        }
        let Some(compressor) = &mut self.compressor else {
            return self.image.write_at(bytes, range.start).map_err(failed);
        };
        let size = self.image.virtual_size_bytes();
        for unit in windows(range.clone(), self.unit) {
            let part = &bytes[place(&range, &unit)];
            let is_whole = unit.start % self.unit == 0 && (unit.end % self.unit == 0 || unit.end == size);
            let mut whole = part.to_vec();
            whole.resize(usize::try_from(self.unit).unwrap_or(part.len()), 0);
            let mut stored = vec![0; whole.len()];
            let written = match compressor.compress(&whole, &mut stored).map_err(failed)? {
                Some(len) if is_whole => self.image.write_compressed(&stored[..len], unit.start),
                _ => self.image.write_at(part, unit.start),
            };
            written.map_err(failed)?;
        }
        Ok(())
    }
}

/// Where the bytes up to `end` come from.
struct Source {
    start: u64,
    end: u64,
    /// `None`: they read as zeroes.
    place: Option<(Place, Option<(crate::storage::Identity, u64)>)>,
}

impl Source {
    /// Whether both read the same from `at` on, without looking at any bytes.
    fn is_same_as(&self, other: &Self, at: u64) -> bool {
        match (&self.place, &other.place) {
            (None, None) => true,
            (Some((place, Some(file))), Some((other_place, Some(other_file)))) => {
                file == other_file
                    && place.advanced(at - self.start) == other_place.advanced(at - other.start)
            }
            _ => false,
        }
    }
}

/// Where the bytes of `range` come from; behind the end of a disk they read as zeroes.
fn places(image: Option<&Image>, range: Range<u64>) -> Result<Vec<Source>> {
    let size = image.map_or(0, Image::virtual_size_bytes);
    let mut extents: Vec<ImageExtent> = Vec::new();
    let mut sources = Vec::new();
    if let Some(image) = image
        && range.start < size
    {
        let inside = range.start..range.end.min(size);
        image.map_range(inside, &mut extents).map_err(|error| at(JobStep::Map, range.start, error))?;
        for extent in &extents {
            let place = (!extent.reads_as_zeroes()).then(|| {
                let file = match extent.place {
                    Place::Data { file, .. } | Place::Encoded { file, .. } => file,
                    Place::Zero { .. } | Place::Unallocated => HostFile::IMAGE,
                };
                let storage = image.layers()[extent.depth].file(file);
                (extent.place, storage.and_then(|storage| storage.origin()))
            });
            sources.push(Source { start: extent.guest_offset, end: extent.end(), place });
        }
    }
    if range.end > size {
        sources.push(Source { start: range.start.max(size), end: range.end, place: None });
    }
    Ok(sources)
}

/// What a guest would read there; zeroes behind the end.
fn bytes(image: Option<&Image>, range: &Range<u64>) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or(usize::MAX)];
    if let Some(image) = image.filter(|image| range.start < image.virtual_size_bytes()) {
        let inside = range.start..range.end.min(image.virtual_size_bytes());
        let part = &mut bytes[place(range, &inside)];
        image.read_at(part, range.start).map_err(|error| at(JobStep::Read, range.start, error))?;
    }
    Ok(bytes)
}

/// Where `part` of `whole` stands in the bytes of `whole`.
fn place(whole: &Range<u64>, part: &Range<u64>) -> Range<usize> {
    let index = |at: u64| usize::try_from(at - whole.start).unwrap_or(usize::MAX);
    index(part.start)..index(part.end)
}

fn at(step: JobStep, at_bytes: u64, source: Error) -> Error {
    Error::Job { step, input: 0, at_bytes, source: Box::new(source) }
}
