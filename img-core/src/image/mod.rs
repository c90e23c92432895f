//! What users hold: an opened chain of layers, read and written as one disk.
//!
//! `name` and `open` turn names into layers; `merged` keeps the map of the layers that do not change; `read`
//! and `write` move guest bytes over the map, `codec` decodes, and `gate` holds requests back while the whole
//! image changes (`whole`: resize, snapshots, close). `plane` is for threads that move the bytes themselves and must
//! not wait, and `lookaside` what such a thread remembers of the map.

#[cfg(test)]
mod chain_tests;
mod change_log;
mod codec;
mod flat;
#[cfg(test)]
pub(crate) mod flat_model;
mod gate;
mod host;
mod lookaside;
mod merged;
mod name;
mod null_node;
mod open;
mod overlay;
mod path;
mod plane;
mod raw_node;
mod read;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod whole;
mod write;

pub use change_log::{Change, ChangeLog, NoteId};
pub(crate) use host::data_file_path;
pub use lookaside::Lookaside;
pub use name::ImageName;
pub(crate) use open::probe;
pub use open::{CacheMode, OpenOptions, Warning};
pub use path::{full_backing_name, protocol};
pub use plane::{Commit, FlushTicket, TableTicket, Ticket, WriteTicket};
pub(crate) use read::decode as decode_unit;

use std::{ops::Range, sync::Arc};

use change_log::Noted;
use codec::DecodedUnits;
use gate::Gate;
pub(crate) use gate::Pass;
use merged::MergedMap;
use open::{Opened, OpenedLayer};

use crate::{
    Error, Result,
    format::{CheckReport, CheckWatch, Extent, Finding, HostFile, Layer, Lease, Place, Repair},
    storage::{DetectZeroes, Storage},
    sync::Mutex,
    text,
};

/// The deepest chain that is opened: far beyond what people build, far below what exhausts descriptors.
pub const MAX_CHAIN_DEPTH: usize = 1000;

/// An opened disk: a top layer and all layers below it. Shared by many threads.
#[derive(Debug)]
pub struct Image {
    layers: Vec<Arc<dyn Layer>>,
    /// As the reference prints them, one a layer.
    names: Vec<String>,
    warnings: Vec<Warning>,
    /// The layers that do not change: all, or all but a writable top.
    frozen: MergedMap,
    decoded: DecodedUnits,
    gate: Gate,
    /// Nobody said that the top is raw: its first and its last sector must not begin to look like another format.
    guards_ends: bool,
    /// Held between the look at a guarded sector and the write to it: two writes, harmless each, might make
    /// another format's magic number together.
    ends: Mutex<()>,
    /// Every write is flushed before it returns.
    writes_through: bool,
    /// What becomes of a write of nothing but zeroes.
    zeroes: DetectZeroes,
    /// Whether space is given back that nothing needs any more.
    discards: bool,
    noted: Noted,
}

/// A run of guest bytes and the layer that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageExtent {
    /// First guest byte.
    pub guest_offset: u64,
    /// How many.
    pub len_bytes: u64,
    /// Index into [`Image::layers`] of the layer that answers; the top is 0. For `Unallocated`, see `place`.
    pub depth: usize,
    /// Where in that layer. [`Place::Unallocated`] when no layer says anything (reads as zeroes; `depth` is
    /// then the lowest layer).
    pub place: Place,
}

impl ImageExtent {
    /// The guest byte behind it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.guest_offset.saturating_add(self.len_bytes)
    }

    /// Whether it reads as zeroes without looking at any bytes.
    #[must_use]
    pub fn reads_as_zeroes(&self) -> bool {
        matches!(self.place, Place::Zero { .. } | Place::Unallocated)
    }

    /// Appends `self` to `extents`, merging it with the last one where it continues it.
    fn push_to(self, extents: &mut Vec<Self>) {
        if let Some(last) = extents.last_mut()
            && last.depth == self.depth
            && last.end() == self.guest_offset
            && last.place.continues(last.len_bytes, self.place)
        {
            last.len_bytes += self.len_bytes;
            return;
        }
        extents.push(self);
    }

    /// Leaves what of it lies in a range. False where nothing does.
    fn cut_to(&mut self, guest_bytes: &Range<u64>) -> bool {
        let (start, end) = (self.guest_offset.max(guest_bytes.start), self.end().min(guest_bytes.end));
        if start >= end {
            return false;
        }
        self.place = self.place.advanced(start - self.guest_offset);
        (self.guest_offset, self.len_bytes) = (start, end - start);
        true
    }
}

impl Image {
    /// Opens the disk called `name` with its chain.
    ///
    /// # Errors
    /// [`Error::Open`] around what went wrong; one [`Error::Backing`] for each step down the chain.
    pub fn open(name: &ImageName, options: &OpenOptions) -> Result<Self> {
        open::open(name, options)
    }

    /// Like [`Self::open`], from an internal snapshot of the top layer, read-only. The disk has its present size, not
    /// the one that it had: what came later reads as if nothing was written there.
    ///
    /// # Errors
    /// As [`Self::open`]; [`Error::NoSuchSnapshot`] and [`Error::Unsupported`] without [`Error::Open`]
    /// around them.
    pub fn open_snapshot(name: &ImageName, options: &OpenOptions, id_or_name: &str) -> Result<Self> {
        open::open_snapshot(name, options, id_or_name)
    }

    fn new(opened: Opened, cache: CacheMode) -> Self {
        let OpenedLayer { zeroes, discards, .. } = opened.layers[0];
        let (layers, names): (Vec<_>, Vec<_>) =
            opened.layers.into_iter().map(|opened| (opened.layer, opened.name)).unzip();
        Self {
            guards_ends: opened.guessed_raw,
            writes_through: cache.writes_through(),
            zeroes,
            discards,
            warnings: opened.warnings,
            ..Self::over(layers, names)
        }
    }

    /// A disk of layers that the caller opened, top first: images in memory, for tests and fuzzers.
    ///
    /// # Errors
    /// [`Error::Invalid`] without any layer.
    pub fn from_layers(layers: Vec<Arc<dyn Layer>>) -> Result<Self> {
        if layers.is_empty() {
            return Err(Error::Invalid("a disk has at least one layer".to_owned()));
        }
        let name = |layer: &Arc<dyn Layer>| {
            layer.file(HostFile::IMAGE).map_or(String::new(), |file| text::from_path(file.path()))
        };
        let names = layers.iter().map(name).collect();
        Ok(Self::over(layers, names))
    }

    /// `layers` is not empty.
    fn over(layers: Vec<Arc<dyn Layer>>, names: Vec<String>) -> Self {
        let first_frozen = usize::from(layers[0].writer().is_some());
        Self {
            frozen: MergedMap::new(&layers[first_frozen..], first_frozen),
            layers,
            names,
            warnings: Vec::new(),
            decoded: DecodedUnits::default(),
            gate: Gate::default(),
            guards_ends: false,
            ends: Mutex::default(),
            writes_through: false,
            zeroes: DetectZeroes::Off,
            discards: true,
            noted: Noted::default(),
        }
    }

    /// The layers, top first.
    #[must_use]
    pub fn layers(&self) -> &[Arc<dyn Layer>] {
        &self.layers
    }

    /// What to call the layer at `depth`, as the reference prints it: the host file's name, or `json:{…}`
    /// where that would not say it all.
    #[must_use]
    pub fn layer_name(&self, depth: usize) -> &str {
        &self.names[depth]
    }

    /// What was worth a warning at open, for the caller to print.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// What becomes of a write of nothing but zeroes: the option `detect-zeroes` of the top's name.
    #[must_use]
    pub fn detect_zeroes(&self) -> DetectZeroes {
        self.zeroes
    }

    /// Guest-visible size.
    #[must_use]
    pub fn virtual_size_bytes(&self) -> u64 {
        self.layers[0].virtual_size_bytes()
    }

    /// The extents that cover `guest_bytes`, merged over all layers, appended to `extents`.
    ///
    /// The answer holds as long as nobody writes; who moves bytes by it while others write keeps a
    /// [lease](Lease) of the top layer, taken before.
    ///
    /// # Errors
    /// When tables cannot be read or are damaged, or the range is not inside the disk.
    pub fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<ImageExtent>) -> Result<()> {
        let _pass = self.gate.enter();
        self.check_inside(&guest_bytes)?;
        let _lease = Lease::of(&*self.layers[0]);
        self.map_inside(guest_bytes, extents)
    }

    /// [`Self::map_range`] for who holds a pass and a lease.
    fn map_inside(&self, guest_bytes: Range<u64>, extents: &mut Vec<ImageExtent>) -> Result<()> {
        let Some(_) = self.layers[0].writer() else {
            return self.frozen.map_range(guest_bytes, extents);
        };
        let mut top: Vec<Extent> = Vec::new();
        self.layers[0].map_range(guest_bytes.clone(), &mut top)?;
        let mut guest_offset = guest_bytes.start;
        for Extent { len_bytes, place } in top {
            let end = guest_offset + len_bytes;
            if place == Place::Unallocated && self.layers.len() > 1 {
                self.frozen.map_range(guest_offset..end, extents)?;
            } else {
                ImageExtent { guest_offset, len_bytes, depth: 0, place }.push_to(extents);
            }
            guest_offset = end;
        }
        Ok(())
    }

    /// Audits the top layer; see [`Layer::check`].
    ///
    /// # Errors
    /// When the format has no audit, or the audit cannot go on.
    pub fn check(&self, repair: Repair, findings: &mut dyn FnMut(Finding)) -> Result<CheckReport> {
        self.check_watched(repair, findings, &|_, _| Ok(()))
    }

    /// See [`Layer::check_watched`].
    ///
    /// # Errors
    /// As [`Self::check`], and whatever `watch` returns.
    pub fn check_watched(
        &self,
        repair: Repair,
        findings: &mut dyn FnMut(Finding),
        watch: &CheckWatch<'_>,
    ) -> Result<CheckReport> {
        let _alone = self.gate.drain();
        self.decoded.begin_generation();
        self.layers[0].check_watched(repair, findings, watch)
    }

    fn check_inside(&self, guest_bytes: &Range<u64>) -> Result<()> {
        let size = self.virtual_size_bytes();
        if guest_bytes.start <= guest_bytes.end && guest_bytes.end <= size {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{}: bytes {}..{} are not inside the disk of {size} bytes",
            self.names[0], guest_bytes.start, guest_bytes.end
        )))
    }

    /// The range of `length` bytes from `start`, checked.
    fn range_inside(&self, start: u64, length: usize) -> Result<Range<u64>> {
        let end = u64::try_from(length).ok().and_then(|length| start.checked_add(length)).unwrap_or(u64::MAX);
        self.check_inside(&(start..end))?;
        Ok(start..end)
    }

    fn host_file(&self, depth: usize, file: HostFile) -> Result<&Arc<dyn Storage>> {
        self.layers[depth].file(file).ok_or_else(|| {
            Error::Invalid(format!(
                "{}: the map names host file {} that is not open",
                self.names[depth], file.0
            ))
        })
    }
}
