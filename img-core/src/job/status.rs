//! What the layers say about guest bytes, in the terms in which the reference's jobs ask.
//!
//! The image's map says which layer holds a run. Map, compare and convert also want to know which part of a
//! raw layer is a hole on the host, and which layer ended the search where none holds anything. Skip this
//! file when you only need `Image::map_range`.

use std::collections::HashMap;

use crate::{
    Error, JobStep, Result,
    format::{HostFile, Lease, Place},
    image::{Image, ImageExtent},
};

/// How many allocation units are mapped in one call: a whole level-two table of a default qcow2 image, so
/// that tables are read in large pieces, and at most about 15 MiB of extents when each of 32 subclusters
/// differs.
const WINDOW_CLUSTERS: u64 = 8192;

/// How much is mapped in one call where no layer has clusters: such layers answer in one extent.
const WINDOW_UNCLUSTERED_BYTES: u64 = 1 << 40;

/// What is known of a run of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) start: u64,
    pub(super) len: u64,
    /// The layer that ended the search.
    pub(super) depth: usize,
    /// Stored bytes stand for it.
    pub(super) data: bool,
    /// Known to read as zeroes.
    pub(super) zero: bool,
    /// The layer at `depth` says so itself.
    pub(super) present: bool,
    /// A hole was looked for on the host, behind a map that calls it data.
    pub(super) looked_through: bool,
    /// Where it is.
    pub(super) place: Place,
}

impl Status {
    pub(super) fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The fixed place of the first byte on the host.
    pub(super) fn host(&self) -> Option<(HostFile, u64)> {
        match self.place {
            Place::Data { file, at, .. } | Place::Zero { reserved: Some((file, at)) } => Some((file, at.0)),
            _ => None,
        }
    }

    pub(super) fn is_compressed(&self) -> bool {
        matches!(self.place, Place::Encoded { .. })
    }

    /// Whether `next`, directly behind, says the same thing and continues the same run of host bytes.
    pub(super) fn continues(&self, next: &Self) -> bool {
        let alike = |s: &Self| (s.depth, s.data, s.zero, s.present, s.looked_through);
        let place = match self.place {
            // Compressed clusters count as one run, as nobody can see where one ends.
            Place::Encoded { .. } => next.is_compressed(),
            place => place.continues(self.len, next.place),
        };
        self.end() == next.start && alike(self) == alike(next) && place
    }

    /// What is left behind `len` bytes.
    pub(super) fn advanced(&self, len: u64) -> Option<Self> {
        self.cut(len).1
    }

    fn cut(&self, len: u64) -> (Self, Option<Self>) {
        let head = Self { len: len.min(self.len), ..*self };
        let tail = (len < self.len).then(|| Self {
            start: self.start + len,
            len: self.len - len,
            place: self.place.advanced(len),
            ..*self
        });
        (head, tail)
    }
}

/// The last answer of a storage: a hole from `from` to `data.0`, then data up to `data.1`.
#[derive(Clone, Copy, Debug)]
struct Allocated {
    from: u64,
    data: (u64, u64),
}

/// Told of a sector, by input and offset, whose place could not be found, when the walk goes on regardless.
pub(super) type OnLost<'a> = &'a (dyn Fn(usize, u64, &Error) + Sync);

/// A walk over the status of an image, or of its top layer alone.
pub(super) struct Walk<'a> {
    image: &'a Image,
    /// Which input of the job it is, for errors.
    input: usize,
    top_only: bool,
    shows_kept: bool,
    at: u64,
    end: u64,
    window_bytes: u64,
    window: Vec<ImageExtent>,
    next_in_window: usize,
    rest: Option<Status>,
    peeked: Option<Status>,
    allocated: HashMap<(usize, HostFile), Allocated>,
    on_lost: Option<OnLost<'a>>,
}

impl<'a> Walk<'a> {
    /// The status of `start..end`, which is cut at the end of the disk.
    pub(super) fn new(image: &'a Image, input: usize, start: u64, end: u64) -> Self {
        let smallest = image.layers().iter().filter_map(|layer| layer.extent_granularity_bytes()).min();
        let window_bytes =
            smallest.map_or(WINDOW_UNCLUSTERED_BYTES, |cluster| u64::from(cluster) * WINDOW_CLUSTERS);
        Self {
            image,
            input,
            top_only: false,
            shows_kept: false,
            at: start,
            end: end.min(image.virtual_size_bytes()),
            window_bytes,
            window: Vec::new(),
            next_in_window: 0,
            rest: None,
            peeked: None,
            allocated: HashMap::new(),
            on_lost: None,
        }
    }

    /// Looks at the top layer only: what it leaves to others is neither data nor zero.
    pub(super) fn top_only(mut self) -> Self {
        self.top_only = true;
        self
    }

    /// Asks where space is kept behind what nobody allocates.
    pub(super) fn showing_kept(mut self) -> Self {
        self.shows_kept = true;
        self
    }

    /// Takes what cannot be mapped for data, sector by sector, telling `on_lost`.
    pub(super) fn salvaging(mut self, on_lost: OnLost<'a>) -> Self {
        self.on_lost = Some(on_lost);
        self
    }

    /// The run that [`Self::next`] will give.
    pub(super) fn peek(&mut self) -> Result<Option<Status>> {
        if self.peeked.is_none() {
            self.peeked = self.next()?;
        }
        Ok(self.peeked)
    }

    /// The next run, which may continue the one before.
    pub(super) fn next(&mut self) -> Result<Option<Status>> {
        if let Some(peeked) = self.peeked.take() {
            return Ok(Some(peeked));
        }
        let status = match self.rest.take() {
            Some(rest) => rest,
            None => match self.next_extent()? {
                Some(extent) => self.describe(&extent),
                None => return Ok(None),
            },
        };
        let (head, rest) = self.refine(status)?;
        self.rest = rest;
        Ok(Some(head))
    }

    fn next_extent(&mut self) -> Result<Option<ImageExtent>> {
        while self.next_in_window == self.window.len() {
            if self.at >= self.end {
                return Ok(None);
            }
            self.fill_window()?;
        }
        self.next_in_window += 1;
        Ok(Some(self.window[self.next_in_window - 1]))
    }

    fn fill_window(&mut self) -> Result<()> {
        self.window.clear();
        self.next_in_window = 0;
        // Windows end on their own multiples, where tables end too.
        let aligned_end = (self.at / self.window_bytes + 1).saturating_mul(self.window_bytes);
        let mut end = aligned_end.min(self.end);
        loop {
            let error = match self.map(end) {
                Ok(()) => break,
                Err(error) => error,
            };
            self.window.clear();
            // Less and less is asked for, until the bad place is first or alone: what comes before it is good.
            let len = end - self.at;
            if len <= 512 {
                let Some(on_lost) = self.on_lost else { return Err(self.map_error(error)) };
                on_lost(self.input, self.at, &error);
                // A place that is neither a hole nor a known zero: the read will tell.
                let place = Place::Encoded {
                    file: HostFile::IMAGE,
                    at: crate::format::HostOffset(0),
                    stored_bytes: 0,
                    decoded_bytes: 512,
                    skip_bytes: 0,
                    how: crate::format::Codec::Deflate,
                };
                self.window.push(ImageExtent { guest_offset: self.at, len_bytes: len, depth: 0, place });
                break;
            }
            end = self.at + len.div_ceil(4).next_multiple_of(512);
        }
        self.at = end;
        Ok(())
    }

    fn map(&mut self, end: u64) -> Result<()> {
        if !self.top_only {
            return self.image.map_range(self.at..end, &mut self.window);
        }
        let mut extents = Vec::new();
        let layer = &self.image.layers()[0];
        // Held while the answer is turned into ours; the image is read through its own leases later.
        let _lease = Lease::of(&**layer);
        layer.map_range(self.at..end, &mut extents)?;
        let mut guest_offset = self.at;
        for extent in extents {
            self.window.push(ImageExtent {
                guest_offset,
                len_bytes: extent.len_bytes,
                depth: 0,
                place: extent.place,
            });
            guest_offset += extent.len_bytes;
        }
        Ok(())
    }

    fn map_error(&self, error: Error) -> Error {
        Error::Job { step: JobStep::Map, input: self.input, at_bytes: self.at, source: Box::new(error) }
    }

    fn describe(&self, extent: &ImageExtent) -> Status {
        let (data, zero, present) = match extent.place {
            Place::Data { .. } | Place::Encoded { .. } => (true, false, true),
            Place::Zero { .. } => (false, true, true),
            Place::Unallocated => (false, false, false),
        };
        Status {
            start: extent.guest_offset,
            len: extent.len_bytes,
            depth: extent.depth,
            data,
            zero,
            present,
            looked_through: false,
            place: extent.place,
        }
    }

    /// Cuts `status` where the host, or the end of a layer, says something new.
    fn refine(&mut self, status: Status) -> Result<(Status, Option<Status>)> {
        match status.place {
            Place::Unallocated => self.refine_unallocated(status),
            Place::Data { file, at, .. } => self.refine_data(status, file, at.0),
            Place::Zero { reserved: None } => self.refine_zero(status),
            Place::Zero { .. } | Place::Encoded { .. } => Ok((status, None)),
        }
    }

    /// The image says zero, in the name of the layer, for what lies behind the end of a short layer. There the
    /// layer above has the last word.
    fn refine_zero(&self, status: Status) -> Result<(Status, Option<Status>)> {
        let layer_end = self.image.layers()[status.depth].virtual_size_bytes();
        if status.start >= layer_end {
            return self.refine_unallocated(Status { place: Place::Unallocated, present: false, ..status });
        }
        Ok(status.cut(layer_end - status.start))
    }

    /// Where all layers are silent, the one without a layer below it that long has the last word.
    fn refine_unallocated(&self, status: Status) -> Result<(Status, Option<Status>)> {
        let layers = self.image.layers();
        let below = |depth: usize| layers.get(depth + 1).map_or(0, |layer| layer.virtual_size_bytes());
        let depth = if self.top_only {
            0
        } else {
            (0..layers.len()).find(|depth| below(*depth) <= status.start).unwrap_or(0)
        };
        let next_cut = (0..layers.len()).map(below).filter(|size| *size > status.start).min();
        let mut len = next_cut.map_or(status.len, |cut| (cut - status.start).min(status.len));
        let mut kept = None;
        let zero = below(depth) <= status.start;
        if self.shows_kept && zero && status.start < layers[depth].virtual_size_bytes() {
            let layer = &layers[depth];
            let end = (status.start + len).min(layer.virtual_size_bytes());
            (len, kept) = layer.kept_behind(status.start..end).map_err(|error| Error::Job {
                step: JobStep::Map,
                input: self.input,
                at_bytes: status.start,
                source: Box::new(error),
            })?;
        }
        let (mut head, rest) = status.cut(len);
        head.depth = depth;
        // Where nothing can be below, silence is no promise.
        head.zero = zero && layers[depth].driver().has_backing();
        if kept.is_some() {
            head.place = Place::Zero { reserved: kept };
        }
        Ok((head, rest))
    }

    fn refine_data(&mut self, status: Status, file: HostFile, at: u64) -> Result<(Status, Option<Status>)> {
        let layer = &self.image.layers()[status.depth];
        if !layer.has_sparse_data() {
            return Ok((status, None));
        }
        let Some(storage) = layer.file(file) else { return Ok((status, None)) };
        let known = self.allocated.get(&(status.depth, file)).copied();
        let known = match known.filter(|known| known.from <= at && at < known.data.1) {
            Some(known) => known,
            None => {
                let found = match storage.next_allocated(at) {
                    Ok(found) => found,
                    Err(error) => {
                        return Err(Error::Job {
                            step: JobStep::Map,
                            input: self.input,
                            at_bytes: status.start,
                            source: Box::new(error),
                        });
                    }
                };
                let data = found.map_or((u64::MAX, u64::MAX), |range| (range.start, range.end));
                let known = Allocated { from: at, data };
                self.allocated.insert((status.depth, file), known);
                known
            }
        };
        let is_hole = at < known.data.0;
        let until = if is_hole { known.data.0 } else { known.data.1 };
        let (mut head, rest) = status.cut(until - at);
        // A raw layer is its file: a hole there is no data. Above a map the map's word stands beside it.
        let is_raw = layer.is_its_file();
        head.looked_through = !is_raw;
        head.zero = is_hole;
        head.data = !(is_hole && is_raw);
        if is_hole && !storage.holes_read_as_zeroes() {
            (head.zero, head.present, head.place) = (false, false, Place::Unallocated);
        }
        Ok((head, rest))
    }
}
