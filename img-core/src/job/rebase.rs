//! Standing an overlay on another backing file without changing what its guest reads.
//!
//! Where the overlay holds nothing the guest reads through to the backing file. Those clusters that would read
//! differently through the new one are written into the overlay first; then the name in it changes.

use std::ops::Range;

use super::{
    Progress, WINDOW_BYTES,
    compress::Compressor,
    cores,
    ordered::{Done, First, StopOnPanic, Turn, Turns},
    status::Walk,
    windows,
};
use crate::{
    Error, JobStep, Result,
    format::{Backing, Codec, Extent, HostFile, Layer, Lease, Place},
    image::Image,
    sync::{
        atomic::{AtomicU64, Ordering},
        thread,
    },
    zeroes::is_zero,
};

/// What may be written at once, and is kept of the old backing file until then.
const PIECE_BYTES: u64 = 1 << 20;

/// Bytes of both backing files that are read and compared while they are in the cache of the core that read them.
const STEP_BYTES: u64 = 64 << 10;

/// The unit of writing for formats without clusters.
const DEFAULT_UNIT_BYTES: u32 = 65536;

/// The least unit of writing: less is not worth telling apart.
const LEAST_UNIT_BYTES: u64 = 4096;

/// Threads beyond the number of cores, that have work while others wait for their turn to write.
const SPARE_THREADS: usize = 1;

/// Writes into the top layer of `image` what it needs to read the same over `new`, or over nothing. The name in
/// the image is not changed yet: see [`set_backing`].
///
/// All cores compare; windows are written in order, so that the image comes out the same at any number of them.
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
    let cluster = u64::from(top.cluster_size_bytes().unwrap_or(DEFAULT_UNIT_BYTES));
    let unit = match top.writer() {
        // Parts of a cluster that the layer holds on their own stay silent on their own.
        Some(writer) if !compress => writer.zero_granularity_bytes().max(LEAST_UNIT_BYTES).min(cluster),
        _ => cluster,
    };
    let below = old.iter().chain(new).flat_map(Image::layers);
    // Compressed clusters are decoded whole.
    let clusters = below.filter_map(|layer| layer.cluster_size_bytes()).map(u64::from);
    let step = clusters.fold(STEP_BYTES.max(unit), u64::max);
    let job = Rebase {
        image,
        top: &**top,
        old,
        new,
        unit,
        step,
        compress: top.compression().filter(|_| compress),
        next: AtomicU64::new(0),
        turns: Turns::default(),
        failed: First::new(),
        done: Done::default(),
        progress,
    };
    let size = image.virtual_size_bytes();
    progress.advance(0, size);
    let work = || {
        let _stop = StopOnPanic(&job.turns);
        job.work();
    };
    let threads = size.div_ceil(job.window_bytes()).min((cores() + SPARE_THREADS) as u64);
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    if let Some(error) = job.failed.into_inner() {
        return Err(error);
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
    /// Guest bytes that are read and compared together, a multiple of it.
    step: u64,
    compress: Option<Codec>,
    /// The window that is looked at next: its number is the ticket.
    next: AtomicU64,
    turns: Turns,
    failed: First<Error>,
    done: Done,
    progress: &'a dyn Progress,
}

/// What a thread keeps between windows.
struct Hands<'a> {
    ticket: u64,
    /// From the first write of a window to its end.
    turn: Option<Turn<'a>>,
    compressor: Option<Compressor>,
    old: Vec<u8>,
    new: Vec<u8>,
}

/// Why a thread ends before everything is done.
enum Stop {
    /// Somebody else failed, and the reason is kept there.
    Other,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Rebase<'_> {
    fn window_bytes(&self) -> u64 {
        WINDOW_BYTES.max(self.unit)
    }

    fn work(&self) {
        let mut hands = Hands { ticket: 0, turn: None, compressor: None, old: Vec::new(), new: Vec::new() };
        let size = self.image.virtual_size_bytes();
        loop {
            hands.ticket = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(start) = hands.ticket.checked_mul(self.window_bytes()).filter(|start| *start < size)
            else {
                return;
            };
            let window = start..start.saturating_add(self.window_bytes()).min(size);
            let len = window.end - window.start;
            match self.window(window, &mut hands).and_then(|()| self.take_turn(&mut hands)) {
                Ok(()) => {
                    hands.turn = None;
                    self.done.add(hands.ticket, len, |sum| self.progress.advance(sum, size));
                }
                Err(Stop::Other) => return,
                Err(Stop::Failed(error)) => {
                    self.failed.offer(hands.ticket, error);
                    // Before the turn is passed on: nobody writes behind what failed.
                    self.turns.stop_from(hands.ticket);
                    return;
                }
            }
        }
    }

    fn take_turn<'s>(&'s self, hands: &mut Hands<'s>) -> Result<(), Stop> {
        if hands.turn.is_none() {
            hands.turn = Some(self.turns.wait(hands.ticket).ok_or(Stop::Other)?);
        }
        Ok(())
    }

    fn window<'s>(&'s self, window: Range<u64>, hands: &mut Hands<'s>) -> Result<(), Stop> {
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
            self.silent(range, hands)?;
        }
        Ok(())
    }

    /// A range of which the overlay holds nothing.
    fn silent<'s>(&'s self, range: Range<u64>, hands: &mut Hands<'s>) -> Result<(), Stop> {
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
            for piece in windows(start..end.max(start), PIECE_BYTES.max(self.step)) {
                self.compare(piece, hands)?;
            }
            done = end.max(start);
        }
        Ok(())
    }

    /// Reads both backing files and writes the units in which they differ.
    fn compare<'s>(&'s self, range: Range<u64>, hands: &mut Hands<'s>) -> Result<(), Stop> {
        if self.progress.is_cancelled() {
            return Err(Error::Cancelled.into());
        }
        let mut unlike: Vec<Range<u64>> = Vec::new();
        hands.old.resize(place(&range, &range).len(), 0);
        for step in windows(range.clone(), self.step) {
            let old = &mut hands.old[place(&range, &step)];
            hands.new.resize(old.len(), 0);
            read(self.old.as_ref(), step.start, old)?;
            read(self.new, step.start, &mut hands.new)?;
            if *old == hands.new[..] {
                continue;
            }
            for unit in windows(step.clone(), self.unit) {
                let index = place(&step, &unit);
                if old[index.clone()] != hands.new[index] {
                    match unlike.last_mut() {
                        Some(run) if run.end == unit.start => run.end = unit.end,
                        _ => unlike.push(unit),
                    }
                }
            }
        }
        for run in unlike {
            self.take_turn(hands)?;
            let Hands { old, compressor, .. } = hands;
            self.write(run.clone(), &old[place(&range, &run)], compressor)?;
        }
        Ok(())
    }

    fn write(&self, range: Range<u64>, bytes: &[u8], compressor: &mut Option<Compressor>) -> Result<()> {
        let failed = |error| at(JobStep::Write, range.start, error);
        if is_zero(bytes) {
            return self.image.write_zeroes(range.clone(), true).map_err(failed);
        }
        let Some(codec) = self.compress else {
            return self.image.write_at(bytes, range.start).map_err(failed);
        };
        let compressor = match compressor {
            Some(compressor) => compressor,
            None => {
                let unit_bytes = usize::try_from(self.unit).expect("at most 2 MiB");
                compressor.insert(Compressor::new(codec, None, unit_bytes)?)
            }
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

/// Where the bytes of `range` come from; holes of the host, and what is behind the end of a disk, read as zeroes.
fn places(image: Option<&Image>, range: Range<u64>) -> Result<Vec<Source>> {
    let size = image.map_or(0, Image::virtual_size_bytes);
    let mut sources = Vec::new();
    if let Some(image) = image {
        let mut walk = Walk::new(image, 0, range.start, range.end);
        while let Some(status) = walk.next()? {
            let place = (!status.zero).then(|| {
                let file = match status.place {
                    Place::Data { file, .. } | Place::Encoded { file, .. } => file,
                    Place::Zero { .. } | Place::Unallocated => HostFile::IMAGE,
                };
                let storage = image.layers()[status.depth].file(file);
                (status.place, storage.and_then(|storage| storage.origin()))
            });
            sources.push(Source { start: status.start, end: status.end(), place });
        }
    }
    if range.end > size {
        sources.push(Source { start: range.start.max(size), end: range.end, place: None });
    }
    Ok(sources)
}

/// Reads what a guest would read from `start` on; zeroes behind the end.
fn read(image: Option<&Image>, start: u64, bytes: &mut [u8]) -> Result<()> {
    let left = image.map_or(0, |image| image.virtual_size_bytes().saturating_sub(start));
    let (inside, behind) = bytes.split_at_mut(usize::try_from(left).unwrap_or(bytes.len()).min(bytes.len()));
    behind.fill(0);
    match image {
        Some(image) if !inside.is_empty() => {
            image.read_at(inside, start).map_err(|error| at(JobStep::Read, start, error))
        }
        _ => Ok(()),
    }
}

/// Where `part` of `whole` stands in the bytes of `whole`.
fn place(whole: &Range<u64>, part: &Range<u64>) -> Range<usize> {
    let index = |at: u64| usize::try_from(at - whole.start).unwrap_or(usize::MAX);
    index(part.start)..index(part.end)
}

fn at(step: JobStep, at_bytes: u64, source: Error) -> Error {
    Error::Job { step, input: 0, at_bytes, source: Box::new(source) }
}
