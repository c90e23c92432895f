//! An opened VMDK: its extents one behind the other, and the [`Layer`] that the rest of the library sees.

use std::{fmt, ops::Range, path::Path, sync::Arc};

use serde_json::Value;

use super::{Vmdk, check, descriptor::Descriptor, details, open, sparse::Sparse, write::State};
use crate::{
    Error, Result,
    format::{
        Backing, CheckReport, CheckWatch, Codec, CompressedWrites, Driver, Extent, Finding, HostFile,
        HostOffset, Layer, LayerWriter, MissingTable, OpenMode, Place, Repair, halt::Halt, table_cache::lock,
        waiters::Waiters,
    },
    storage::Storage,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// A part of the disk.
#[derive(Debug)]
pub(super) struct GuestExtent {
    /// First guest byte.
    pub(super) start_bytes: u64,
    /// The guest byte behind it. That of the last extent changes when the disk grows.
    end_bytes: AtomicU64,
    /// The guest byte behind the last one that the map answers for: its end, or further while the disk grows.
    reach_bytes: AtomicU64,
    pub(super) kind: Kind,
    /// The type in the descriptor; empty when the image file is the extent.
    pub(super) type_name: String,
    /// The descriptor wants no writes here.
    pub(super) read_only: bool,
}

impl GuestExtent {
    pub(super) fn new(guest_bytes: Range<u64>, kind: Kind, type_name: String, read_only: bool) -> Self {
        Self {
            start_bytes: guest_bytes.start,
            end_bytes: AtomicU64::new(guest_bytes.end),
            reach_bytes: AtomicU64::new(guest_bytes.end),
            kind,
            type_name,
            read_only,
        }
    }

    /// The guest byte behind it.
    pub(super) fn end_bytes(&self) -> u64 {
        self.end_bytes.load(Ordering::Relaxed)
    }

    /// The guest byte behind the last one that the map answers for.
    pub(super) fn reach_bytes(&self) -> u64 {
        self.reach_bytes.load(Ordering::Relaxed)
    }

    /// Nothing is in flight, and it is the last one.
    pub(super) fn set_reach_bytes(&self, reach_bytes: u64) {
        self.reach_bytes.store(reach_bytes, Ordering::Relaxed);
    }

    /// Nothing is in flight, and it is the last one.
    pub(super) fn set_end_bytes(&self, end_bytes: u64) {
        self.end_bytes.store(end_bytes, Ordering::Relaxed);
        self.set_reach_bytes(end_bytes);
    }
}

/// What an extent is made of.
#[derive(Debug)]
pub(super) enum Kind {
    /// Guest bytes as they are, from `at_bytes` of a file on.
    Flat { file: HostFile, at_bytes: u64 },
    /// Grains.
    Sparse(Box<Sparse>),
    /// Nothing: zeroes.
    Zero,
}

/// The descriptor as it stands now, and where.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) descriptor: Descriptor,
    /// In the image file.
    pub(super) at_bytes: u64,
}

/// An opened image.
///
/// Lock order: `state`, `content`, then those inside the extents. Readers of the map take none of the first.
pub(super) struct VmdkLayer {
    pub(super) mode: OpenMode,
    /// By [`HostFile`]; the image file first.
    pub(super) files: Vec<Arc<dyn Storage>>,
    /// In guest order, without gaps.
    pub(super) extents: Vec<GuestExtent>,
    pub(super) create_type: String,
    backing: Option<Backing>,
    content: Mutex<Content>,
    /// The content id is another one than at open, durably.
    pub(super) content_renewed: AtomicBool,
    state: Mutex<State>,
    /// A prepared write has ended.
    pub(super) landed: Waiters,
    /// Whether anything is written any more.
    halt: Halt,
}

impl fmt::Debug for VmdkLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmdkLayer")
            .field("file", &self.path())
            .field("mode", &self.mode)
            .field("extents", &self.extents.len())
            .finish_non_exhaustive()
    }
}

impl VmdkLayer {
    /// `files` begins with the image file; `extents` stand in guest order without gaps.
    pub(super) fn new(
        mode: OpenMode,
        files: Vec<Arc<dyn Storage>>,
        extents: Vec<GuestExtent>,
        create_type: String,
        content: Content,
    ) -> Self {
        Self {
            mode,
            backing: open::backing(&content.descriptor),
            state: Mutex::new(State::new(&extents)),
            files,
            extents,
            create_type,
            content: Mutex::new(content),
            content_renewed: AtomicBool::new(false),
            landed: Waiters::default(),
            halt: Halt::default(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        self.files[0].path()
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) fn content(&self) -> MutexGuard<'_, Content> {
        lock(&self.content)
    }

    /// Passes on whether the header or the descriptor was written; when it was not, nothing is until the image is
    /// opened again: nobody knows which tables and which size the file has now.
    pub(super) fn or_halt(&self, written: Result<()>) -> Result<()> {
        self.halt.or_halt(written)
    }

    /// Refuses when nothing may be written.
    pub(super) fn check_not_halted(&self) -> Result<()> {
        self.halt.check(self.path())
    }

    pub(super) fn has_backing(&self) -> bool {
        self.backing.is_some()
    }

    pub(super) fn storage(&self, file: HostFile) -> &Arc<dyn Storage> {
        &self.files[file.0 as usize]
    }

    /// The extent that holds a guest byte, for which the map answers.
    pub(super) fn extent_index(&self, guest: u64) -> usize {
        self.extents.partition_point(|extent| extent.reach_bytes() <= guest)
    }

    /// The sparse extents.
    pub(super) fn sparse_extents(&self) -> impl Iterator<Item = &Sparse> {
        self.extents.iter().filter_map(|extent| match &extent.kind {
            Kind::Sparse(sparse) => Some(&**sparse),
            Kind::Flat { .. } | Kind::Zero => None,
        })
    }

    /// The grain of all extents, where they agree on one.
    fn grain_bytes(&self) -> Option<u64> {
        let mut grains = self.extents.iter().map(|extent| match &extent.kind {
            Kind::Sparse(sparse) => Some(sparse.grain_bytes),
            Kind::Flat { .. } | Kind::Zero => None,
        });
        let first = grains.next()??;
        grains.all(|grain| grain == Some(first)).then_some(first)
    }

    /// Refuses extents that share bytes of a file: a write to one would change the other.
    pub(super) fn check_shared_files(&self) -> Result<()> {
        let mut used: Vec<(HostFile, Range<u64>)> = Vec::new();
        for extent in &self.extents {
            let len = extent.end_bytes() - extent.start_bytes;
            match &extent.kind {
                Kind::Zero => {}
                Kind::Sparse(sparse) => used.push((sparse.file, 0..u64::MAX)),
                Kind::Flat { file, at_bytes } => used.push((*file, *at_bytes..at_bytes.saturating_add(len))),
            }
        }
        used.sort_by_key(|(file, range)| (*file, range.start));
        match used.windows(2).find(|pair| pair[0].0 == pair[1].0 && pair[0].1.end > pair[1].1.start) {
            None => Ok(()),
            Some(pair) => Err(Error::corrupt(
                self.path(),
                "descriptor extent line",
                0,
                "extents that share no bytes",
                format_args!("two in '{}'", crate::text::from_path(self.storage(pair[0].0).path())),
            )),
        }
    }
}

impl Layer for VmdkLayer {
    fn driver(&self) -> &'static dyn Driver {
        &Vmdk
    }

    fn virtual_size_bytes(&self) -> u64 {
        self.extents.last().map_or(0, GuestExtent::end_bytes)
    }

    fn cluster_size_bytes(&self) -> Option<u32> {
        self.grain_bytes().and_then(|bytes| u32::try_from(bytes).ok())
    }

    fn zeroes_in_place(&self) -> bool {
        true
    }

    fn file(&self, file: HostFile) -> Option<&Arc<dyn Storage>> {
        self.files.get(file.0 as usize)
    }

    fn other_files(&self) -> Vec<(String, HostFile)> {
        let named = (0..).zip(&self.files).skip(1);
        named.map(|(index, _)| (format!("extents.{}", index - 1), HostFile(index))).collect()
    }

    fn compression(&self) -> Option<Codec> {
        (self.create_type == "streamOptimized").then_some(Codec::Zlib)
    }

    fn compressed_writes(&self) -> CompressedWrites {
        match self.sparse_extents().next() {
            Some(sparse) if sparse.compressed => CompressedWrites::OnlyInOrder,
            Some(_) | None => CompressedWrites::StoredPlain,
        }
    }

    fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// A child is a list of differences to one content of its parent: over another it would be garbage.
    fn check_backing(&self, below: &dyn Layer) -> Result<Option<String>> {
        let content = self.content();
        let Some(file) = below.file(HostFile::IMAGE) else { return Ok(None) };
        if !open::expects_parent(&content.descriptor) || below.driver().name() != self.driver().name() {
            return Ok(None);
        }
        let (expected, found) = (content.descriptor.parent_cid, open::content_id(&**file)?);
        if found == expected {
            return Ok(None);
        }
        Err(Error::corrupt(
            self.path(),
            "descriptor.parentCID",
            content.at_bytes,
            format_args!("the content id {expected:08x} in the parent"),
            format_args!("{found:08x}: the parent has changed since this image was made"),
        ))
    }

    fn has_sparse_data(&self) -> bool {
        self.extents.iter().any(|extent| matches!(extent.kind, Kind::Flat { .. }))
    }

    fn details(&self) -> Result<Option<Value>> {
        Ok(Some(details::details(self)))
    }

    fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        self.each_part(&guest_bytes, |index, inside| {
            let extent = &self.extents[index];
            match &extent.kind {
                Kind::Sparse(sparse) => return sparse.map(inside, extents),
                Kind::Zero => zeroes(&inside).push_to(extents),
                Kind::Flat { file, at_bytes } => {
                    self.flat_data(extent, *file, *at_bytes, &inside).push_to(extents);
                }
            }
            Ok(())
        })
    }

    fn try_map_range(&self, guest_bytes: Range<u64>, found: &mut dyn FnMut(Extent)) -> Result<bool> {
        let mut is_known = true;
        self.each_part(&guest_bytes, |index, inside| {
            let extent = &self.extents[index];
            match &extent.kind {
                Kind::Sparse(sparse) => is_known = is_known && sparse.map_cached(inside, found),
                Kind::Zero => found(zeroes(&inside)),
                Kind::Flat { file, at_bytes } => found(self.flat_data(extent, *file, *at_bytes, &inside)),
            }
            Ok(())
        })?;
        Ok(is_known)
    }

    fn missing_table(&self, guest_bytes: Range<u64>) -> Option<MissingTable> {
        let mut missing = None;
        let asked = self.each_part(&guest_bytes, |index, inside| {
            if let (Kind::Sparse(sparse), None) = (&self.extents[index].kind, &missing) {
                missing = sparse.missing(inside);
            }
            Ok(())
        });
        // Nothing there can fail.
        asked.ok().and(missing)
    }

    fn offer_table(&self, missing: &MissingTable, bytes: Box<[u8]>) -> bool {
        // Where several extents stand in one file, whoever lacks the piece.
        let mut extents = self.sparse_extents().filter(|sparse| sparse.file == missing.file);
        let lacks = extents.find(|sparse| sparse.tables.peek(missing.at.0).is_none());
        lacks.is_some_and(|sparse| sparse.tables.offer(missing, bytes))
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        (self.mode.writes() && self.files[0].is_writable()).then_some(self)
    }

    fn check_watched(
        &self,
        repair: Repair,
        findings: &mut dyn FnMut(Finding),
        watch: &CheckWatch<'_>,
    ) -> Result<CheckReport> {
        check::check(self, repair, findings, watch)
    }
}

/// A part of an extent that is nothing.
fn zeroes(inside: &Range<u64>) -> Extent {
    Extent { len_bytes: inside.end - inside.start, place: Place::Zero { reserved: None } }
}

impl VmdkLayer {
    /// A part of an extent whose bytes stand as they are from `at_bytes` of a file on.
    fn flat_data(&self, extent: &GuestExtent, file: HostFile, at_bytes: u64, inside: &Range<u64>) -> Extent {
        let at = HostOffset(at_bytes + inside.start); // both below 2^63
        let writable = self.mode.writes() && !extent.read_only;
        Extent { len_bytes: inside.end - inside.start, place: Place::Data { file, at, writable } }
    }

    /// Whether this opening has changed the content id already.
    pub(super) fn is_content_renewed(&self) -> bool {
        self.content_renewed.load(Ordering::Acquire)
    }
}
