//! What every format provides: [`Driver`] makes and opens, [`Layer`] answers.

use std::{fmt, ops::Range, path::Path, sync::Arc};

use serde_json::Value;

use super::{
    Bitmaps, Codec, Extent, FrontReader, FrontRequest, FrontWriter, HostFile, HostOffset, LayerWriter,
    MeasureRequest, Measured, OptionDescription, OptionSet,
};
use crate::{
    Error, Result,
    storage::{Storage, StreamStorage},
};

/// A format: how its images are recognised, made and opened. One static value each, listed in the
/// [`registry`](super::registry).
pub trait Driver: Send + Sync + fmt::Debug {
    /// The name users give to `-f`.
    fn name(&self) -> &'static str;

    /// How sure the driver is that a file which starts with `head` (up to 2048 bytes) and is called
    /// `name` is its own: 0 for no, 100 for a magic number. The highest score wins.
    fn probe(&self, head: &[u8], name: &Path) -> u8;

    /// Whether the last bytes of a file, `tail` (up to 512 of them) of `file_bytes` in all, say that it is the
    /// driver's own, although its start says nothing.
    fn probe_tail(&self, tail: &[u8], file_bytes: u64) -> bool {
        let (_, _) = (tail, file_bytes);
        false
    }

    /// Whether images can be made at all: protocols that stand where a format does can not.
    fn can_create(&self) -> bool {
        true
    }

    /// The options of [`Self::create`], in the order in which `create` reports them. `size` is among them,
    /// and `backing_file` and `backing_fmt` where [`Self::has_backing`].
    fn create_options(&self) -> &'static [OptionDescription];

    /// The options that [`LayerWriter::amend`] changes in an image that exists; none where the format has none.
    fn amend_options(&self) -> &'static [OptionDescription] {
        &[]
    }

    /// Makes a new image on `storage`, which is empty and writable.
    fn create(&self, storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()>;

    /// Opens the image on `storage`.
    fn open(&self, storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Arc<dyn Layer>>;

    /// What the image on `storage` says of itself and of other files, without opening any of them.
    ///
    /// # Errors
    /// As [`Self::open`].
    fn outline(&self, storage: Arc<dyn Storage>) -> Result<Outline> {
        look_alone(|context| self.open(storage, context)).map(Outline::of)
    }

    /// Whether images can name a backing file.
    fn has_backing(&self) -> bool;

    /// Whether images can stand on one of the format called `below`.
    fn can_stand_on(&self, below: &str) -> bool {
        let _ = below;
        self.has_backing()
    }

    /// Whether compressed clusters can be written.
    fn can_compress(&self) -> bool;

    /// Whether images can be checked at all.
    fn can_check(&self) -> bool;

    /// How large the file of a new image would be.
    ///
    /// # Errors
    /// [`Error::Invalid`] in the reference's words when the format cannot say, or refuses an option.
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let _ = request;
        let name = self.name();
        Err(Error::Invalid(format!("Block driver '{name}' does not support size measurement")))
    }

    /// Lays a new image out front to back, for a pipe.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the format cannot be written so, or refuses an option.
    fn front_writer(&self, request: &FrontRequest<'_>) -> Result<Box<dyn FrontWriter>> {
        let _ = request;
        let name = self.name();
        Err(Error::Invalid(format!(
            "{name} images cannot be written to a pipe: they are not laid out front to back"
        )))
    }

    /// Reads an image that comes out of a stream.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the format is not laid out front to back, else as [`Self::open`].
    fn front_reader(&self, stream: Arc<StreamStorage>) -> Result<Box<dyn FrontReader>>;

    /// What this driver does and the reference's driver of that name refuses: whoever stands in for the reference
    /// refuses it too.
    fn beyond_reference(&self) -> Beyond {
        Beyond::default()
    }
}

/// Opens an image to look at it, and no other file.
pub(super) fn look_alone<T>(open: impl FnOnce(&OpenContext<'_>) -> Result<T>) -> Result<T> {
    let open_file = |name: &str, _: OpenMode| -> Result<Arc<dyn Storage>> {
        Err(Error::Invalid(format!("'{name}' is another file, and is not opened")))
    };
    open(&OpenContext { mode: OpenMode::Inspect, options: &OptionSet::new(), open_file: &open_file })
}

/// See [`Driver::outline`].
#[derive(Debug)]
pub struct Outline {
    /// Guest-visible size.
    pub virtual_size_bytes: u64,
    /// The files that the image names.
    pub references: Vec<Reference>,
    /// The image, opened to be looked at; `None` where its data or its tables are in files that it names, without which
    /// there is nothing to open.
    pub layer: Option<Arc<dyn Layer>>,
}

impl Outline {
    /// The outline of an image whose only references are to its backing file.
    #[must_use]
    pub fn of(layer: Arc<dyn Layer>) -> Self {
        let mut references = Vec::new();
        if let Some(Backing { name, format }) = layer.backing() {
            let names = std::iter::once(name).chain(layer.other_backing_names());
            references.extend(names.map(|name| Reference {
                kind: ReferenceKind::Backing { format: format.clone() },
                name: name.clone(),
            }));
        }
        Self { virtual_size_bytes: layer.virtual_size_bytes(), references, layer: Some(layer) }
    }
}

/// A file that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// What for.
    pub kind: ReferenceKind,
    /// As it stands in the image.
    pub name: String,
}

/// What a file is to the image that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReferenceKind {
    /// The image below, or one of the names under which it may be found.
    Backing {
        /// The recorded format, if any.
        format: Option<String>,
    },
    /// The guest's data as they are.
    DataFile,
    /// A part of the disk.
    Extent {
        /// Whether the file has tables of its own, which say where data are.
        has_tables: bool,
    },
}

/// See [`Driver::beyond_reference`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Beyond {
    /// Recording a backing file in a new image.
    pub backing: bool,
    /// Auditing.
    pub check: bool,
    /// Mending what an audit finds.
    pub repair: bool,
    /// Changing the size.
    pub resize: bool,
}

/// Opens another host file that an image names (external data file, extent), under the policy of the
/// caller. The name is as it stands in the image.
pub type OpenFile<'a> = dyn Fn(&str, OpenMode) -> Result<Arc<dyn Storage>> + 'a;

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// Metadata only: no guest data is read, and no other file is opened but those that hold metadata. Works on
    /// images that this build could not read (encrypted ones, say).
    Inspect,
    /// Reading.
    Read,
    /// Reading and writing; a dirty image is repaired first.
    Write,
    /// Auditing: a dirty or corrupt image is opened as it is, without repair at open.
    Check {
        /// Whether the audit may change the image.
        repair: bool,
    },
}

impl OpenMode {
    /// Whether the file is opened for writing.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Check { repair: true })
    }
}

/// What a driver needs to open an image.
pub struct OpenContext<'a> {
    /// What for.
    pub mode: OpenMode,
    /// Runtime options by QEMU's names (`l2-cache-size`, `lazy-refcounts`, ...), already split; a driver
    /// refuses those it does not know.
    pub options: &'a OptionSet,
    /// Opens files the image names.
    pub open_file: &'a OpenFile<'a>,
}

/// What a driver needs to make an image.
pub struct CreateRequest<'a> {
    /// Guest bytes; already rounded up to a multiple of 512.
    pub virtual_size_bytes: u64,
    /// The backing file to record, if any.
    pub backing: Option<Backing>,
    /// The format's own options, checked against [`Driver::create_options`], defaults not filled in.
    /// `size`, `backing_file` and `backing_fmt` are taken out.
    pub options: &'a OptionSet,
    /// Makes (`OpenMode::Write`: an empty or existing file is opened for writing) files the image will name.
    pub open_file: &'a OpenFile<'a>,
}

/// The backing file as an image records it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The name, uninterpreted.
    pub name: String,
    /// The recorded format, if any.
    pub format: Option<String>,
}

/// A proof that map answers taken after it are still true: while it lives, no cluster that was mapped is
/// given out again. Dropping it ends the claim.
#[must_use = "map answers are only valid while the lease lives"]
#[derive(Debug)]
pub struct Lease<'a> {
    layer: &'a dyn Layer,
    token: LeaseToken,
}

/// Names a lease inside its layer. Made and understood by the layer only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseToken(pub u64);

impl<'a> Lease<'a> {
    /// A lease on the map of `layer`. No I/O, never blocks for long.
    pub fn of(layer: &'a dyn Layer) -> Self {
        Self { token: layer.begin_lease(), layer }
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.layer.end_lease(self.token);
    }
}

/// A piece of a table that a layer lacks in memory; see [`Layer::missing_table`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingTable {
    /// The file it stands in.
    pub file: HostFile,
    /// Where.
    pub at: HostOffset,
    /// How long it is.
    pub len_bytes: u32,
    /// Which of the layer's caches lacks it.
    pub(super) level: u8,
    /// Tells whether anything may have become of it since.
    pub(super) age: u64,
}

/// One opened image file. All methods may do blocking I/O on tables unless they say otherwise; none moves
/// guest data. Shared by many threads.
pub trait Layer: Send + Sync + fmt::Debug {
    /// The format.
    fn driver(&self) -> &'static dyn Driver;

    /// Guest-visible size. No I/O.
    fn virtual_size_bytes(&self) -> u64;

    /// The unit of allocation in guest bytes, where the format has one. No I/O.
    fn cluster_size_bytes(&self) -> Option<u32>;

    /// The smallest unit in which the map usually changes, in guest bytes, where there is one: as much of the map
    /// is asked for at once as can be held when each unit differs from its neighbours. No I/O.
    fn extent_granularity_bytes(&self) -> Option<u32> {
        self.cluster_size_bytes()
    }

    /// A host file of this layer. No I/O. [`HostFile::IMAGE`] always exists.
    fn file(&self, file: HostFile) -> Option<&Arc<dyn Storage>>;

    /// The host files beside [`HostFile::IMAGE`] and what the reference calls their nodes. No I/O.
    fn other_files(&self) -> Vec<(String, HostFile)> {
        Vec::new()
    }

    /// The codec of the compressed clusters it can be given; `None` when it takes none. No I/O.
    fn compression(&self) -> Option<Codec> {
        None
    }

    /// What becomes of data that should be compressed. No I/O.
    fn compressed_writes(&self) -> CompressedWrites {
        if self.compression().is_some() { CompressedWrites::Accepted } else { CompressedWrites::Refused }
    }

    /// The backing file it names. No I/O.
    fn backing(&self) -> Option<&Backing>;

    /// Further names under which the backing file may be found, best first: they are tried in order where
    /// there is no file under the one before. No I/O.
    fn other_backing_names(&self) -> &[String] {
        &[]
    }

    /// Compares the layer that was opened under one of its names with what this one knows of its backing file,
    /// and returns what is worth a warning.
    ///
    /// # Errors
    /// When it is another one.
    fn check_backing(&self, below: &dyn Layer) -> Result<Option<String>> {
        let _ = below;
        Ok(None)
    }

    /// Whether host holes under [`Data`](super::Place::Data) are worth asking the storage about (raw,
    /// preallocated images).
    fn has_sparse_data(&self) -> bool;

    /// Whether a hole on the host is one in the layer, because the layer is nothing but its file: under any other
    /// map a hole is data that reads as zeroes.
    fn is_its_file(&self) -> bool {
        false
    }

    /// The `format-specific` object of `info`: QEMU's `type` and `data`, or `None`.
    fn details(&self) -> Result<Option<Value>>;

    /// Facts of `info` beside the details.
    fn is_dirty(&self) -> bool {
        false
    }

    /// Whether the image says of itself that its tables may be damaged.
    fn is_marked_corrupt(&self) -> bool {
        false
    }

    /// How guest data are encrypted, in the format's word for it.
    fn encryption(&self) -> Option<&'static str> {
        None
    }

    /// Whether guest data is encrypted.
    fn is_encrypted(&self) -> bool {
        self.encryption().is_some()
    }

    /// Whether a place that held guest bytes may come to hold something else while the image is open: those of other
    /// guest bytes, or a table. Whoever looks at a place for longer than a [`Lease`] lasts has to know. No I/O.
    fn reuses_places(&self) -> bool {
        false
    }

    /// Whether zeroes and discards leave guest bytes that are stored where they are, and change them there, so that the
    /// map says the same as before. No I/O.
    fn zeroes_in_place(&self) -> bool {
        false
    }

    /// Begins a [`Lease`], which the caller ends with [`Self::end_lease`]. No I/O, never blocks, takes no memory.
    /// A layer whose map never gives a place to someone else has nothing to do.
    fn begin_lease(&self) -> LeaseToken {
        LeaseToken::default()
    }

    /// Ends a lease. As [`Self::begin_lease`].
    fn end_lease(&self, token: LeaseToken) {
        let LeaseToken(_) = token;
    }

    /// Appends extents that together cover `guest_bytes` exactly, in order, merged where they continue
    /// each other. The range lies inside the disk. Takes only shared locks where tables are cached.
    fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<Extent>) -> Result<()>;

    /// [`Self::map_range`] from memory alone: no I/O, no lock that somebody holds across I/O. The caller holds a
    /// [`Lease`], unless nobody writes to the layer. False where memory is not enough; what `found` was told is then
    /// good for nothing. Extents that continue each other may come apart. An error is one that [`Self::map_range`] will
    /// meet again, and is not acted upon here.
    fn try_map_range(&self, guest_bytes: Range<u64>, found: &mut dyn FnMut(Extent)) -> Result<bool> {
        let (_, _) = (guest_bytes, found);
        Ok(false)
    }

    /// Counts what may change an answer of the map, of which answers can be remembered: it grows before the change can be
    /// seen, and before anything that the change gives up is given out again. It may grow for less. `None` where nobody
    /// counts. No I/O, never blocks.
    fn map_changes(&self) -> Option<u64> {
        None
    }

    /// The first piece of a table for lack of which [`Self::try_map_range`] cannot answer, so that somebody who must not
    /// wait for it can read it himself, and [offer](Self::offer_table) it, and ask again. As [`Self::try_map_range`] in
    /// all else. `None` where something else is the matter, or the layer takes no offers.
    fn missing_table(&self, guest_bytes: Range<u64>) -> Option<MissingTable> {
        let _ = guest_bytes;
        None
    }

    /// Takes the bytes of a missing piece as the caller read them, all of them after it was told missing and under the
    /// same [`Lease`]. No I/O, and no lock that somebody holds across I/O. Whether they are kept: not where they may be
    /// old by now.
    fn offer_table(&self, missing: &MissingTable, bytes: Box<[u8]>) -> bool {
        let (_, _) = (missing, bytes);
        false
    }

    /// The space that is kept behind guest bytes of which the layer says nothing (subclusters of a cluster that others
    /// of its subclusters made it allocate): where that of the first byte stands, if it has any, and for how many
    /// bytes that answer goes on, at least one. `guest_bytes` is not empty, and unallocated.
    fn kept_behind(&self, guest_bytes: Range<u64>) -> Result<(u64, Option<(HostFile, HostOffset)>)> {
        Ok((guest_bytes.end - guest_bytes.start, None))
    }

    /// The side that changes the map; `None` when opened without write access.
    fn writer(&self) -> Option<&dyn LayerWriter>;

    /// Tells what the image file is used for beside the guest's data, each place once unless the image is damaged: what
    /// is neither told nor data belongs to snapshots and bitmaps, or leaks. False where the layer cannot tell: then
    /// what is not data is headers and tables.
    ///
    /// # Errors
    /// When tables cannot be read.
    fn host_uses(&self, _visit: &mut dyn FnMut(HostUse, Range<u64>)) -> Result<bool> {
        Ok(false)
    }

    /// Internal snapshots, where the format has them.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }

    /// The dirty bitmaps that the image keeps, where the format and its version have them.
    fn bitmaps(&self) -> Option<&dyn Bitmaps> {
        None
    }

    /// Audits the image and repairs what `repair` allows, telling each finding as it is met. One pass: the
    /// caller checks again to see what repair left. Exclusive: no other call runs meanwhile.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the format has no audit.
    fn check(&self, repair: Repair, findings: &mut dyn FnMut(Finding)) -> Result<CheckReport> {
        self.check_watched(repair, findings, &unwatched)
    }

    /// [`Self::check`] that tells how far it is, and ends where `watch` says so.
    ///
    /// # Errors
    /// As [`Self::check`], and whatever `watch` returns.
    fn check_watched(
        &self,
        repair: Repair,
        findings: &mut dyn FnMut(Finding),
        watch: &CheckWatch<'_>,
    ) -> Result<CheckReport> {
        let (_, _, _) = (repair, findings, watch);
        Err(Error::unsupported(
            self.file(HostFile::IMAGE).map_or(Path::new(""), |file| file.path()),
            format_args!("checking {} images", self.driver().name()),
        ))
    }
}

/// What a part of an image file is used for beside the guest's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostUse {
    /// The header, and the tables of the disk.
    Tables,
    /// Reference counts.
    Refcounts,
    /// Tables of internal snapshots.
    Snapshots,
    /// Anything else.
    Other,
    /// Nothing.
    Free,
}

/// What a layer does with data that should be compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressedWrites {
    /// It has no place for them.
    Refused,
    /// It takes them, and keeps them as they are.
    StoredPlain,
    /// It takes compressed clusters beside others, in any order.
    Accepted,
    /// It takes nothing else, and in guest order.
    OnlyInOrder,
}

/// What an audit may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    Nothing,
    /// Give leaked space back.
    Leaks,
    /// Leaks, and everything that is wrong.
    All,
}

/// Told how much of its tables an audit has behind it, and of how many, in a unit of its own; an error ends the audit,
/// which changes nothing more. Called from several threads.
pub type CheckWatch<'a> = dyn Fn(u64, u64) -> Result<()> + Sync + 'a;

/// No one watches.
pub(super) fn unwatched(_done: u64, _total: u64) -> Result<()> {
    Ok(())
}

/// One line of an audit, in the reference's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The line, without a newline.
    pub text: String,
    /// Whether the reference prints its own name and a colon before it.
    pub with_program_name: bool,
}

/// The counts of an audit, as `check --output=json` names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Errors that kept the audit from finishing.
    pub check_errors: u64,
    /// Found and still there.
    pub corruptions: u64,
    /// Clusters with a reference count too high.
    pub leaks: u64,
    /// Repaired.
    pub corruptions_fixed: u64,
    /// Repaired.
    pub leaks_fixed: u64,
    /// Host offset behind the last cluster in use.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Of them, allocated.
    pub allocated_clusters: u64,
    /// Of them, not following their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Of them, compressed.
    pub compressed_clusters: u64,
}

/// What is known of an internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique id, a decimal number in practice.
    pub id: String,
    /// The user's name for it.
    pub name: String,
    /// Size of the saved machine state.
    pub vm_state_bytes: u64,
    /// When it was taken: seconds and nanoseconds since 1970.
    pub date: (u32, u32),
    /// Guest clock, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Guest instruction count, where recorded.
    pub icount: Option<u64>,
    /// Guest-visible size at that time.
    pub virtual_size_bytes: u64,
}

/// Internal snapshots. Those that change the image need a layer opened for writing and no request in
/// flight (the [`image`](crate::image) sees to that), and are durable when they return.
pub trait Snapshots {
    /// All of them, in the order of the table.
    fn list(&self) -> Result<Vec<SnapshotInfo>>;

    /// Takes one. `date` as in [`SnapshotInfo::date`].
    fn create(&self, name: &str, date: (u32, u32)) -> Result<()>;

    /// Makes the disk as it was, its size included.
    fn apply(&self, id_or_name: &str) -> Result<()>;

    /// Forgets one and gives its space back.
    fn delete(&self, id_or_name: &str) -> Result<()>;

    /// A read-only view of the disk as it was, in the size that the disk has now.
    fn view(&self, id_or_name: &str) -> Result<Arc<dyn Layer>>;
}
