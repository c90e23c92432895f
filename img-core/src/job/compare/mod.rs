//! Whether two disks read the same.
//!
//! Both maps are walked side by side; what is zero in both, or is the same run of bytes of the same host file,
//! is equal unread. The rest is shared out to threads in pieces, and the lowest piece with something to say
//! decides, so that the answer does not depend on who was faster.

use std::ops::Range;

use super::{
    Progress, cores,
    ordered::{Done, First, lock},
    status::{Status, Walk},
};
use crate::{
    Error, JobStep, Result,
    format::{DirtyMap, Place},
    image::Image,
    sync::{Mutex, thread},
    zeroes::is_zero,
};

#[cfg(test)]
mod tests;

/// What the reference reads of each image at once, which decides where it starts to count sectors anew.
const PIECE_BYTES: u64 = 2 << 20;

/// Bytes of each image that are read and looked at while they are in the cache of the core that read them.
const STEP_BYTES: u64 = 64 << 10;

/// How much that needs no reading is taken at once: little enough to notice that the job was cancelled.
const UNREAD_PIECE_BYTES: u64 = 16 << 30;

/// The unit in which differences are located.
const SECTOR_BYTES: usize = 512;

/// What to compare how.
#[derive(Clone, Copy, Debug, Default)]
pub struct CompareOptions {
    /// Sizes and allocation must agree too.
    pub strict: bool,
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Same contents; sizes may differ by zeroes when not strict.
    Identical,
    /// The first guest byte (its sector's offset, as the reference counts) that differs.
    ContentDiffers(u64),
    /// Strict: the allocation differs here.
    AllocationDiffers(u64),
    /// Strict: the sizes differ.
    SizeDiffers,
}

/// Compares, calling `size_warning` once where sizes differ and `strict` is off, after the part that both have
/// was found equal.
///
/// # Errors
/// [`Error::Job`] that says which image could not be mapped or read; [`Error::Cancelled`].
pub fn compare(
    images: [&Image; 2],
    options: CompareOptions,
    size_warning: &mut dyn FnMut(),
    progress: &dyn Progress,
) -> Result<Comparison> {
    compare_part(images, None, options, size_warning, progress)
}

/// Compares what `marks`, a bitmap of the first image, marks, as [`compare`] does; the rest counts as equal.
///
/// # Errors
/// As [`compare`].
pub fn compare_marked(
    images: [&Image; 2],
    marks: &DirtyMap,
    options: CompareOptions,
    size_warning: &mut dyn FnMut(),
    progress: &dyn Progress,
) -> Result<Comparison> {
    compare_part(images, Some(marks), options, size_warning, progress)
}

fn compare_part(
    images: [&Image; 2],
    marks: Option<&DirtyMap>,
    options: CompareOptions,
    size_warning: &mut dyn FnMut(),
    progress: &dyn Progress,
) -> Result<Comparison> {
    let sizes = images.map(Image::virtual_size_bytes);
    let (common, total) = (sizes[0].min(sizes[1]), sizes[0].max(sizes[1]));
    progress.advance(0, total);
    if options.strict && sizes[0] != sizes[1] {
        return Ok(Comparison::SizeDiffers);
    }
    let both = |part: Range<u64>| {
        Feed::Both(Box::new(Pairs {
            images,
            walks: [0, 1].map(|input| Walk::new(images[input], input, part.start, part.end)),
            heads: [None, None],
            sizes,
            strict: options.strict,
        }))
    };
    if let Some(difference) = run(images, feed(marks, 0..common, &both), 0, progress, total)? {
        return Ok(difference);
    }
    if common < total {
        size_warning();
        let longer = usize::from(sizes[1] > sizes[0]);
        let rest = |part: Range<u64>| {
            Feed::Rest(longer, Box::new(Walk::new(images[longer], longer, part.start, part.end)))
        };
        if let Some(difference) = run(images, feed(marks, common..total, &rest), common, progress, total)? {
            return Ok(difference);
        }
    }
    Ok(Comparison::Identical)
}

/// What to do with a run of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// Known to be equal.
    Nothing,
    /// Read both.
    Both,
    /// This one must read as zeroes.
    IsZero(usize),
}

/// Where pieces come from.
enum Feed<'a> {
    Both(Box<Pairs<'a>>),
    Rest(usize, Box<Walk<'a>>),
    Marked(Marked<'a>),
}

/// What a bitmap marks of a range, each part fed by a feed of its own.
struct Marked<'a> {
    marks: &'a DirtyMap,
    /// What is still to come.
    left: Range<u64>,
    part: &'a (dyn Fn(Range<u64>) -> Feed<'a> + Sync),
    inside: Option<Box<Feed<'a>>>,
}

/// The feed of a range, or of what is marked of it.
fn feed<'a>(
    marks: Option<&'a DirtyMap>,
    range: Range<u64>,
    part: &'a (dyn Fn(Range<u64>) -> Feed<'a> + Sync),
) -> Feed<'a> {
    match marks {
        None => part(range),
        Some(marks) => Feed::Marked(Marked { marks, left: range, part, inside: None }),
    }
}

impl Marked<'_> {
    fn next(&mut self) -> Result<Option<Found>> {
        loop {
            if let Some(feed) = &mut self.inside
                && let Some(found) = feed.next()?
            {
                return Ok(Some(found));
            }
            self.inside = None;
            if self.left.is_empty() {
                return Ok(None);
            }
            let start = self.left.start;
            let next = self.marks.next_dirty(start).filter(|marked| marked.start < self.left.end);
            match next {
                Some(marked) if marked.start == start => {
                    self.left.start = marked.end.min(self.left.end);
                    self.inside = Some(Box::new((self.part)(start..self.left.start)));
                }
                next => {
                    self.left.start = next.map_or(self.left.end, |marked| marked.start);
                    let len = self.left.start - start;
                    return Ok(Some(Found::Run { start, len, check: Check::Nothing }));
                }
            }
        }
    }
}

/// The two maps, cut where either changes.
struct Pairs<'a> {
    images: [&'a Image; 2],
    walks: [Walk<'a>; 2],
    heads: [Option<Status>; 2],
    sizes: [u64; 2],
    strict: bool,
}

/// A run, or an answer that needs no reading.
enum Found {
    Run { start: u64, len: u64, check: Check },
    Answer(Comparison),
}

impl Feed<'_> {
    fn next(&mut self) -> Result<Option<Found>> {
        match self {
            Self::Both(pairs) => pairs.next(),
            Self::Marked(marked) => marked.next(),
            Self::Rest(input, walk) => Ok(walk.next()?.map(|status| Found::Run {
                start: status.start,
                len: status.len,
                check: if status.zero { Check::Nothing } else { Check::IsZero(*input) },
            })),
        }
    }
}

impl Pairs<'_> {
    fn next(&mut self) -> Result<Option<Found>> {
        for (head, walk) in self.heads.iter_mut().zip(&mut self.walks) {
            if head.is_none() {
                *head = walk.next()?;
            }
        }
        let [Some(first), Some(second)] = self.heads else { return Ok(None) };
        if self.strict {
            // The reference also compares whether a run reaches the end of its disk.
            let reach = [self.reaches_end(0)?, self.reaches_end(1)?];
            let [Some(first), Some(second)] = self.heads else { return Ok(None) };
            if self.visible(0, &first) != self.visible(1, &second) || reach[0] != reach[1] {
                return Ok(Some(Found::Answer(Comparison::AllocationDiffers(first.start))));
            }
        }
        let len = first.len.min(second.len);
        let check = self.check(&first, &second);
        for head in &mut self.heads {
            *head = head.and_then(|status| status.advanced(len));
        }
        Ok(Some(Found::Run { start: first.start, len, check }))
    }

    fn check(&self, first: &Status, second: &Status) -> Check {
        if first.zero && second.zero {
            return Check::Nothing;
        }
        match (self.is_allocated(0, first), self.is_allocated(1, second)) {
            (true, false) => Check::IsZero(0),
            (false, true) => Check::IsZero(1),
            _ if self.is_same_host_run(first, second) => Check::Nothing,
            _ => Check::Both,
        }
    }

    /// Whether some layer has the last word: a backing file that ends early has it with zeroes.
    fn is_allocated(&self, input: usize, status: &Status) -> bool {
        status.present || status.depth + 1 < self.images[input].layers().len()
    }

    /// All that the reference's strict mode compares, except for the reach.
    fn visible(&self, input: usize, status: &Status) -> [bool; 5] {
        [
            status.data,
            status.zero,
            status.host().is_some(),
            self.is_allocated(input, status),
            status.is_compressed(),
        ]
    }

    /// Whether the run at the head goes on to the end of its disk. Pulls what continues it into the head.
    fn reaches_end(&mut self, input: usize) -> Result<bool> {
        let Some(mut head) = self.heads[input] else { return Ok(false) };
        let limit = self.run_limit(input, &head);
        let size = self.sizes[input];
        while head.end() < size.min(limit) {
            match self.walks[input].peek()? {
                Some(next) if head.continues(&next) => {
                    self.walks[input].next()?;
                    head.len += next.len;
                }
                _ => break,
            }
        }
        self.heads[input] = Some(head);
        Ok(head.end().min(limit) >= size)
    }

    /// The reference maps a layer with tables one 4 KiB slice of a table at a time (less where a cluster is
    /// smaller), and a run ends with its slice.
    fn run_limit(&self, input: usize, status: &Status) -> u64 {
        let top = &self.images[input].layers()[0];
        match top.cluster_size_bytes() {
            None => u64::MAX,
            Some(cluster) => {
                let slice = u64::from(cluster.min(4096) / 8) * u64::from(cluster);
                (status.start / slice + 1).saturating_mul(slice)
            }
        }
    }

    fn is_same_host_run(&self, first: &Status, second: &Status) -> bool {
        let file_of = |input: usize, status: &Status| {
            let file = match status.place {
                Place::Data { file, .. } | Place::Encoded { file, .. } => file,
                Place::Zero { .. } | Place::Unallocated => return None,
            };
            self.images[input].layers()[status.depth].file(file)?.origin()
        };
        let is_same_place = match (first.place, second.place) {
            (Place::Data { at, .. }, Place::Data { at: other, .. }) => at == other,
            (
                Place::Encoded { at, decoded_bytes, skip_bytes, how, .. },
                Place::Encoded {
                    at: other_at,
                    decoded_bytes: other_decoded,
                    skip_bytes: other_skip,
                    how: other_how,
                    ..
                },
            ) => (at, decoded_bytes, skip_bytes, how) == (other_at, other_decoded, other_skip, other_how),
            _ => false,
        };
        is_same_place && file_of(0, first).is_some_and(|file| file_of(1, second) == Some(file))
    }
}

/// Cuts what a feed says into numbered pieces of at most [`PIECE_BYTES`], joining small ones.
struct Pieces<'a> {
    feed: Feed<'a>,
    ahead: Option<Result<Option<Found>>>,
    next_ticket: u64,
}

impl Pieces<'_> {
    fn next_found(&mut self) -> Result<Option<Found>> {
        self.ahead.take().unwrap_or_else(|| self.feed.next())
    }

    /// The next piece with its ticket, the end, or an answer.
    fn claim(&mut self) -> (u64, Result<Option<Found>>) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let (start, mut len, check) = match self.next_found() {
            Ok(Some(Found::Run { start, len, check })) => (start, len, check),
            other => return (ticket, other),
        };
        let most = if check == Check::Nothing { UNREAD_PIECE_BYTES } else { PIECE_BYTES };
        if len > most {
            self.ahead = Some(Ok(Some(Found::Run { start: start + most, len: len - most, check })));
            len = most;
        }
        // Join what follows while sectors go on being counted from the same start.
        while len < most && len.is_multiple_of(SECTOR_BYTES as u64) {
            match self.next_found() {
                Ok(Some(Found::Run { len: more, check: next, .. }))
                    if next == check && len + more <= most =>
                {
                    len += more;
                }
                other => {
                    self.ahead = Some(other);
                    break;
                }
            }
        }
        (ticket, Ok(Some(Found::Run { start, len, check })))
    }
}

/// Works a feed off on all cores. `done_before` bytes of `total` are behind us already.
fn run(
    images: [&Image; 2],
    feed: Feed<'_>,
    done_before: u64,
    progress: &dyn Progress,
    total: u64,
) -> Result<Option<Comparison>> {
    let pieces = Mutex::new(Pieces { feed, ahead: None, next_ticket: 0 });
    let (first, done) = (First::new(), Done::default());
    let work = || {
        let mut buffers = [Vec::new(), Vec::new()];
        loop {
            let (ticket, claimed) = lock(&pieces).claim();
            if first.is_before(ticket) {
                return;
            }
            if progress.is_cancelled() {
                first.offer(ticket, Err(Error::Cancelled));
                return;
            }
            let (start, len, check) = match claimed {
                Ok(None) => return,
                Ok(Some(Found::Run { start, len, check })) => (start, len, check),
                Ok(Some(Found::Answer(answer))) => {
                    first.offer(ticket, Ok(answer));
                    return;
                }
                Err(error) => {
                    first.offer(ticket, Err(error));
                    return;
                }
            };
            match is_equal(images, start, len, check, &mut buffers)
                .map_or_else(|| difference(images, start, len, check), |()| Ok(None))
            {
                Ok(None) => {}
                Ok(Some(at)) => {
                    first.offer(ticket, Ok(Comparison::ContentDiffers(at)));
                    return;
                }
                Err(error) => {
                    first.offer(ticket, Err(error));
                    return;
                }
            }
            done.add(ticket, len, |sum| progress.advance(done_before + sum, total));
        }
    };
    thread::scope(|scope| {
        for _ in 1..cores() {
            scope.spawn(work);
        }
        work();
    });
    first.into_inner().transpose()
}

/// Looks for the first sector that cannot be read where `buffer` could not be filled from `start` on.
fn unreadable(image: &Image, input: usize, start: u64, buffer: &mut [u8], mut why: Error) -> Error {
    let (mut at, mut len) = (start, buffer.len());
    while len > SECTOR_BYTES {
        let half = (len / 2).next_multiple_of(SECTOR_BYTES);
        match image.read_at(&mut buffer[..half], at) {
            Ok(()) => (at, len) = (at + half as u64, len - half),
            Err(error) => (why, len) = (error, half),
        }
    }
    Error::Job { step: JobStep::Read, input, at_bytes: at, source: Box::new(why) }
}

/// Reads a piece in small steps, for as long as all of it can be read and nothing breaks `check`. Otherwise `None`:
/// what [`difference`] says then counts.
fn is_equal(
    images: [&Image; 2],
    start: u64,
    len: u64,
    check: Check,
    buffers: &mut [Vec<u8>; 2],
) -> Option<()> {
    if check == Check::Nothing {
        return Some(());
    }
    // Compressed clusters are decoded whole.
    let clusters =
        images.iter().flat_map(|image| image.layers()).filter_map(|layer| layer.cluster_size_bytes());
    let step = clusters.map(u64::from).fold(STEP_BYTES, u64::max).min(PIECE_BYTES);
    let mut at = start;
    while at < start + len {
        let upto = (start + len).min((at / step + 1) * step);
        let mut read = |input: usize| {
            let len = usize::try_from(upto - at).expect("a step is at most 2 MiB");
            if buffers[input].len() < len {
                buffers[input].resize(len, 0);
            }
            images[input].read_at(&mut buffers[input][..len], at).ok().map(|()| len)
        };
        let holds = match check {
            Check::Nothing => true,
            Check::IsZero(input) => {
                let len = read(input)?;
                is_zero(&buffers[input][..len])
            }
            Check::Both => {
                let len = read(0).and(read(1))?;
                buffers[0][..len] == buffers[1][..len]
            }
        };
        if !holds {
            return None;
        }
        at = upto;
    }
    Some(())
}

/// The first sector of `start..start + len` that breaks `check`. All of a piece is read before it is looked at, as
/// the reference does: an error in it comes before a difference.
fn difference(images: [&Image; 2], start: u64, len: u64, check: Check) -> Result<Option<u64>> {
    let mut buffers = [Vec::new(), Vec::new()];
    let mut read = |input: usize| {
        let buffer: &mut Vec<u8> = &mut buffers[input];
        let len = usize::try_from(len).expect("a piece is at most 2 MiB");
        buffer.resize(len, 0);
        images[input]
            .read_at(&mut buffer[..len], start)
            .map_err(|error| unreadable(images[input], input, start, &mut buffer[..len], error))?;
        Ok::<_, Error>(len)
    };
    let at = match check {
        Check::Nothing => None,
        Check::IsZero(input) => {
            let len = read(input)?;
            first_sector(len, |sector| is_zero(&buffers[input][sector]))
        }
        Check::Both => {
            read(0)?;
            let len = read(1)?;
            let [first, second] = buffers;
            first_sector(len, |sector| first[sector.clone()] == second[sector])
        }
    };
    Ok(at.map(|at| start + at))
}

/// Where the first sector of `len` bytes begins that is not `good`.
fn first_sector(len: usize, good: impl Fn(Range<usize>) -> bool) -> Option<u64> {
    (0..len).step_by(SECTOR_BYTES).find(|at| !good(*at..len.min(at + SECTOR_BYTES))).map(|at| at as u64)
}
