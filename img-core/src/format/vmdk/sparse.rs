//! A sparse extent's tables: the grain directory names grain tables, a grain table names grains.
//!
//! Hosted sparse extents and COWD have 32-bit entries that count sectors; seSparse has 64-bit entries of its
//! own making. A stream that is being written, or whose footer is lost, keeps its tables in memory.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, PoisonError},
};

use super::{
    header::{GRAIN_MARKER_BYTES, SECTOR_BYTES},
    sesparse,
};
use crate::{
    Error, Result,
    format::{Codec, Extent, HostFile, HostOffset, MissingTable, Place, table_cache::SliceCache},
    storage::Storage,
    sync::{
        RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
};

/// Bytes of tables that are kept, clean: enough for the tables of 4 GiB of disk at once.
const TABLE_CACHE_BYTES: u64 = 512 << 10;

/// What is read at once of the tables of an extent that does not change.
const READ_SLICE_BYTES: u64 = 4096;

/// The unit in which tables that change are kept and written. Tables begin on any sector and data may follow
/// on the next one: a larger slice would write back data that has changed meanwhile.
const WRITE_SLICE_BYTES: u64 = SECTOR_BYTES;

/// No place in a file.
const NOWHERE: u64 = u64::MAX;

/// The entry of a grain that reads as zeroes, where the header allows it ("zeroed-grain GTE").
pub(super) const ZEROED_GRAIN: u32 = 1;

/// How an extent's entries are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryForm {
    /// 32 bits: the sector where the table or grain begins, 0 for none.
    Sectors {
        /// Whether [`ZEROED_GRAIN`] has its meaning.
        zeroed_grains: bool,
    },
    /// 64 bits, see [`sesparse`].
    SeSparse(sesparse::Bases),
}

/// Where the grain directory is.
#[derive(Debug)]
pub(super) enum Directory {
    /// In the file, from this byte on.
    File(u64),
    /// In memory, by the index of the table; what is not there has no table.
    Kept(BTreeMap<u64, KeptTable>),
}

/// A grain table that a directory in memory names.
#[derive(Debug)]
pub(super) enum KeptTable {
    /// In the file, from this byte on.
    Stored(u64),
    /// In memory, as the file will have it.
    Entries(Box<[u32]>),
}

/// A sparse extent. Offsets and lengths are the extent's own: its first guest byte is 0.
#[derive(Debug)]
pub(super) struct Sparse {
    pub(super) file: HostFile,
    pub(super) storage: Arc<dyn Storage>,
    capacity_bytes: AtomicU64,
    pub(super) grain_bytes: u64,
    /// Grains a table.
    pub(super) table_entries: u64,
    /// Tables a directory.
    directory_entries: AtomicU64,
    directory: RwLock<Directory>,
    /// The second directory, whose tables say the same; [`NOWHERE`] for none.
    redundant_at: AtomicU64,
    pub(super) form: EntryForm,
    pub(super) tables: SliceCache,
    pub(super) compressed: bool,
    pub(super) markers: bool,
    /// How long the file of an extent is that holds no grain yet.
    pub(super) overhead_bytes: u64,
    /// Whether it was opened for writing and can be.
    pub(super) writable: bool,
    /// How long the file was when it was opened.
    pub(super) opened_bytes: u64,
    /// The file is at least so long.
    end_bytes: AtomicU64,
    /// Where header, descriptor, directories and tables stand, sorted; found before the first write.
    pub(super) metadata: RwLock<Option<Vec<Range<u64>>>>,
}

/// What a grain table says of a grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grain {
    /// Nothing: the parent shows through.
    Unallocated,
    /// Zeroes.
    Zero,
    /// It begins at this byte of the file: its data, or the marker in front of them.
    At(u64),
}

/// The numbers that make a [`Sparse`]; checked by who read them.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) capacity_bytes: u64,
    pub(super) grain_bytes: u64,
    pub(super) table_entries: u64,
    pub(super) directory_entries: u64,
    pub(super) directory: Directory,
    pub(super) redundant_at: Option<u64>,
    pub(super) form: EntryForm,
    pub(super) compressed: bool,
    pub(super) markers: bool,
    pub(super) overhead_bytes: u64,
}

/// What memory lacks to tell of a grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lacking {
    /// The entry at this byte.
    Entry(u64),
    /// A sense in what is there, or the length of the file by now: for who may wait.
    Sense,
}

/// Why an entry of a grain table means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadEntry {
    /// It is none of the types there are.
    Unknown,
    /// The grain would begin behind the end of the file.
    Outside,
}

impl Sparse {
    /// # Errors
    /// [`Error::Corrupt`] when a directory does not lie inside the file.
    pub(super) fn new(
        file: HostFile,
        storage: Arc<dyn Storage>,
        shape: Shape,
        writable: bool,
    ) -> Result<Self> {
        let slice_bytes = if writable { WRITE_SLICE_BYTES } else { READ_SLICE_BYTES };
        let file_bytes = storage.len_bytes()?;
        let sparse = Self {
            file,
            capacity_bytes: AtomicU64::new(shape.capacity_bytes),
            grain_bytes: shape.grain_bytes,
            table_entries: shape.table_entries,
            directory_entries: AtomicU64::new(shape.directory_entries),
            redundant_at: AtomicU64::new(shape.redundant_at.unwrap_or(NOWHERE)),
            form: shape.form,
            tables: SliceCache::new(slice_bytes, TABLE_CACHE_BYTES),
            compressed: shape.compressed,
            markers: shape.markers,
            overhead_bytes: shape.overhead_bytes,
            writable,
            opened_bytes: file_bytes,
            end_bytes: AtomicU64::new(file_bytes),
            metadata: RwLock::new(None),
            storage,
            directory: RwLock::new(shape.directory),
        };
        let primary = match *sparse.directory() {
            Directory::File(at) => Some(at),
            Directory::Kept(_) => None,
        };
        for (name, at) in [("grain directory", primary), ("redundant grain directory", sparse.redundant_at())]
        {
            let Some(at) = at else { continue };
            let end = at.checked_add(sparse.directory_entries() * sparse.entry_bytes()); // at most 2^25 × 8
            if !end.is_some_and(|end| sparse.is_inside(end)) {
                let expected = format!("{} entries inside the file", sparse.directory_entries());
                return Err(Error::corrupt(sparse.storage.path(), name, at, expected, "its end"));
            }
        }
        Ok(sparse)
    }

    pub(super) fn directory(&self) -> RwLockReadGuard<'_, Directory> {
        self.directory.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn directory_for_change(&self) -> RwLockWriteGuard<'_, Directory> {
        self.directory.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.load(Ordering::Relaxed)
    }

    /// Tables a directory.
    pub(super) fn directory_entries(&self) -> u64 {
        self.directory_entries.load(Ordering::Relaxed)
    }

    /// The second directory, whose tables say the same.
    pub(super) fn redundant_at(&self) -> Option<u64> {
        Some(self.redundant_at.load(Ordering::Relaxed)).filter(|at| *at != NOWHERE)
    }

    /// The directories that are in the file, where tables are changed in place.
    pub(super) fn directories(&self) -> impl Iterator<Item = u64> {
        let primary = match &*self.directory() {
            Directory::File(at) => Some(*at),
            Directory::Kept(_) => None,
        };
        [primary, self.redundant_at()].into_iter().flatten()
    }

    /// The extent has another size and other directories now. Nothing is in flight.
    pub(super) fn take_shape(
        &self,
        capacity_bytes: u64,
        directory_entries: u64,
        directories: [Option<u64>; 2],
    ) {
        if let [Some(at), redundant_at] = directories {
            *self.directory_for_change() = Directory::File(at);
            self.redundant_at.store(redundant_at.unwrap_or(NOWHERE), Ordering::Relaxed);
        }
        self.directory_entries.store(directory_entries, Ordering::Relaxed);
        self.capacity_bytes.store(capacity_bytes, Ordering::Relaxed);
        // Where metadata stand is found anew.
        *self.metadata.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Bytes of a table entry, and of one of the directory.
    pub(super) fn entry_bytes(&self) -> u64 {
        match self.form {
            EntryForm::Sectors { .. } => 4,
            EntryForm::SeSparse(_) => 8,
        }
    }

    /// Bytes of a grain table.
    pub(super) fn table_bytes(&self) -> u64 {
        self.table_entries * self.entry_bytes() // at most 4096 × 8
    }

    /// Where the data of a grain begin, counted from the grain.
    pub(super) fn lead_bytes(&self) -> u64 {
        if self.compressed && self.markers { GRAIN_MARKER_BYTES as u64 } else { 0 }
    }

    /// How many grains there are; the last may be cut by the end of the extent.
    pub(super) fn grains(&self) -> u64 {
        self.capacity_bytes().div_ceil(self.grain_bytes)
    }

    /// Whether the file reaches up to `end`. It may have grown since it was last looked at.
    pub(super) fn is_inside(&self, end: u64) -> bool {
        if end <= self.end_bytes.load(Ordering::Relaxed) {
            return true;
        }
        // When the host cannot tell the length, the read that follows says why.
        let Ok(len) = self.storage.len_bytes() else { return true };
        self.end_bytes.fetch_max(len, Ordering::Relaxed);
        end <= len
    }

    /// Whether the file was known to reach up to `end` when it was last looked at.
    fn is_known_inside(&self, end: u64) -> bool {
        end <= self.end_bytes.load(Ordering::Relaxed)
    }

    /// [`Self::map`] from memory alone; false where that is not enough. Compressed grains are always for who may wait:
    /// they take a decoder.
    pub(super) fn map_cached(&self, range: Range<u64>, found: &mut dyn FnMut(Extent)) -> bool {
        if self.compressed {
            return false;
        }
        let mut at = range.start;
        while at < range.end {
            let grain = at / self.grain_bytes;
            let end = ((grain + 1) * self.grain_bytes).min(range.end);
            let place = match self.cached_grain(grain) {
                Err(_) => return false,
                Ok(Grain::Unallocated) => Place::Unallocated,
                Ok(Grain::Zero) => Place::Zero { reserved: None },
                Ok(Grain::At(host)) => Place::Data {
                    file: self.file,
                    at: HostOffset(host + (at - grain * self.grain_bytes)),
                    writable: self.writable,
                },
            };
            found(Extent { len_bytes: end - at, place });
            at = end;
        }
        true
    }

    /// The first slice that [`Self::map_cached`] lacks.
    pub(super) fn missing(&self, range: Range<u64>) -> Option<MissingTable> {
        if self.compressed {
            return None;
        }
        let age = self.tables.age();
        let mut grains = range.start / self.grain_bytes..range.end.div_ceil(self.grain_bytes);
        let lacking = grains.find_map(|grain| self.cached_grain(grain).err())?;
        let Lacking::Entry(at) = lacking else { return None };
        let missing = self.tables.missing(0, at..at + self.entry_bytes(), age)?;
        Some(MissingTable { file: self.file, ..missing })
    }

    /// What the tables in memory say of a grain.
    fn cached_grain(&self, grain: u64) -> Result<Grain, Lacking> {
        let (index, within) = (grain / self.table_entries, grain % self.table_entries);
        let table = match &*self.directory() {
            Directory::File(at) => match self.cached_word(at + index * self.entry_bytes())? {
                0 => return Ok(Grain::Unallocated),
                entry => {
                    let table = self.table_of(entry).ok_or(Lacking::Sense)?;
                    let end = table.checked_add(self.table_bytes());
                    let is_inside = end.is_some_and(|end| self.is_known_inside(end));
                    is_inside.then_some(table).ok_or(Lacking::Sense)?
                }
            },
            Directory::Kept(tables) => match tables.get(&index) {
                None => return Ok(Grain::Unallocated),
                Some(KeptTable::Stored(at)) => *at,
                // Of a stream, whose grains are compressed.
                Some(KeptTable::Entries(_)) => return Err(Lacking::Sense),
            },
        };
        let entry = self.cached_word(table + within * self.entry_bytes())?;
        let found = self.grain_of(entry).map_err(|_| Lacking::Sense)?;
        match found {
            Grain::At(host) if !host.checked_add(1).is_some_and(|end| self.is_known_inside(end)) => {
                Err(Lacking::Sense)
            }
            found => Ok(found),
        }
    }

    /// The entry at byte `at`, where it is in memory.
    fn cached_word(&self, at: u64) -> Result<u64, Lacking> {
        let size = usize_of(self.entry_bytes());
        let word = self.tables.look_at(at, |bytes, within| {
            let mut word = [0; 8];
            word[..size].copy_from_slice(&bytes[within..within + size]);
            u64::from_le_bytes(word)
        });
        word.ok_or(Lacking::Entry(at))
    }

    /// Appends the extents of `range`, which lies inside the extent.
    pub(super) fn map(&self, range: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        let mut entries = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let first = at / self.grain_bytes;
            let in_table = self.table_entries - first % self.table_entries;
            let wanted = (range.end - first * self.grain_bytes).div_ceil(self.grain_bytes).min(in_table);
            let chunk_end = ((first + wanted) * self.grain_bytes).min(range.end);
            // One more where there is one: it bounds the length of a compressed grain.
            let looked_at = if self.compressed { in_table.min(wanted + 1) } else { wanted };
            if !self.entries(first, looked_at, &mut entries)? {
                Extent { len_bytes: chunk_end - at, place: Place::Unallocated }.push_to(extents);
                at = chunk_end;
                continue;
            }
            for index in 0..wanted {
                let grain = first + index;
                let end = ((grain + 1) * self.grain_bytes).min(range.end);
                let place = match self.grain(grain, entries[usize_of(index)])? {
                    Grain::Unallocated => Place::Unallocated,
                    Grain::Zero => Place::Zero { reserved: None },
                    Grain::At(host) if self.compressed => {
                        let next = entries.get(usize_of(index + 1)).copied();
                        self.encoded(grain, host, next, at - grain * self.grain_bytes)
                    }
                    Grain::At(host) => Place::Data {
                        file: self.file,
                        at: HostOffset(host + (at - grain * self.grain_bytes)),
                        writable: self.writable,
                    },
                };
                Extent { len_bytes: end - at, place }.push_to(extents);
                at = end;
            }
        }
        Ok(())
    }

    /// The place of a compressed grain whose marker stands at `host`. The entry behind it bounds its length
    /// where grains follow each other; else no stream is longer than twice the grain, as the reference has it.
    fn encoded(&self, grain: u64, host: u64, next: Option<u64>, skip_bytes: u64) -> Place {
        let most = 2 * self.grain_bytes;
        let bound = match next.map(|entry| entry.saturating_mul(SECTOR_BYTES)) {
            Some(next) if next > host && next - host < most => next - host,
            _ => most,
        };
        let decoded = self.grain_bytes.min(self.capacity_bytes() - grain * self.grain_bytes);
        let lead = self.lead_bytes();
        let small = |bytes: u64| u32::try_from(bytes).expect("a compressed grain is at most 2 MiB");
        Place::Encoded {
            file: self.file,
            at: HostOffset(host + lead),
            stored_bytes: small(bound - lead.min(bound)),
            decoded_bytes: small(decoded),
            skip_bytes: small(skip_bytes),
            how: Codec::Zlib,
        }
    }

    /// Reads the entries of `count` grains from `first` on, all of one table; false when there is no table.
    pub(super) fn entries(&self, first: u64, count: u64, out: &mut Vec<u64>) -> Result<bool> {
        out.clear();
        let index = first / self.table_entries;
        let within = first % self.table_entries;
        let at = match &*self.directory() {
            Directory::File(at) => *at,
            Directory::Kept(tables) => match tables.get(&index) {
                None => return Ok(false),
                Some(KeptTable::Entries(entries)) => {
                    let entries = &entries[usize_of(within)..usize_of(within + count)];
                    out.extend(entries.iter().copied().map(u64::from));
                    return Ok(true);
                }
                Some(KeptTable::Stored(at)) => {
                    self.words(at + within * self.entry_bytes(), count, out)?;
                    return Ok(true);
                }
            },
        };
        let Some(table) = self.table_in(at, index)? else { return Ok(false) };
        self.words(table + within * self.entry_bytes(), count, out)?;
        Ok(true)
    }

    /// Host offset of the table at `index` of the directory at `directory_at`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it does not lie inside the file.
    pub(super) fn table_in(&self, directory_at: u64, index: u64) -> Result<Option<u64>> {
        let entry_at = directory_at + index * self.entry_bytes(); // inside the file
        let entry = self.word(entry_at)?;
        let wrong = |expected: &str| {
            let found = format_args!("{entry:#x}");
            Err(Error::corrupt(self.storage.path(), "grain directory entry", entry_at, expected, found))
        };
        if entry == 0 {
            return Ok(None);
        }
        let Some(table) = self.table_of(entry) else { return wrong("the number of a grain table") };
        let end = table.checked_add(self.table_bytes());
        if !end.is_some_and(|end| self.is_inside(end)) {
            return wrong("a table inside the file");
        }
        Ok(Some(table))
    }

    /// Where the table stands that an entry of the directory, not 0, names.
    fn table_of(&self, entry: u64) -> Option<u64> {
        match self.form {
            EntryForm::Sectors { .. } => Some(entry * SECTOR_BYTES), // below 2^41
            EntryForm::SeSparse(bases) => bases.table(entry, self.table_bytes()),
        }
    }

    /// What an entry says.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it says nothing that could be.
    pub(super) fn grain(&self, grain: u64, entry: u64) -> Result<Grain> {
        self.read_entry(entry).map_err(|why| {
            let expected = match why {
                BadEntry::Unknown => "an entry of one of the four types",
                BadEntry::Outside => "a grain inside the file",
            };
            let found = format_args!("{entry:#x} for grain {grain}").to_string();
            Error::corrupt(self.storage.path(), "grain table entry", self.entry_place(grain), expected, found)
        })
    }

    /// [`Self::grain`] with the bare reason.
    pub(super) fn read_entry(&self, entry: u64) -> Result<Grain, BadEntry> {
        let found = self.grain_of(entry)?;
        match found {
            Grain::At(host) if !host.checked_add(1).is_some_and(|end| self.is_inside(end)) => {
                Err(BadEntry::Outside)
            }
            found => Ok(found),
        }
    }

    /// [`Self::read_entry`], wherever the file ends.
    fn grain_of(&self, entry: u64) -> Result<Grain, BadEntry> {
        Ok(match self.form {
            EntryForm::Sectors { .. } if entry == 0 => Grain::Unallocated,
            EntryForm::Sectors { zeroed_grains: true } if entry == u64::from(ZEROED_GRAIN) => Grain::Zero,
            EntryForm::Sectors { .. } => Grain::At(entry * SECTOR_BYTES), // below 2^41
            EntryForm::SeSparse(bases) => return bases.grain(entry).ok_or(BadEntry::Unknown),
        })
    }

    /// Where the entry of a grain stands, for messages; 0 when its table is in memory.
    fn entry_place(&self, grain: u64) -> u64 {
        let (index, within) = (grain / self.table_entries, grain % self.table_entries);
        let table = match &*self.directory() {
            Directory::File(at) => self.table_in(*at, index).ok().flatten(),
            Directory::Kept(tables) => match tables.get(&index) {
                Some(KeptTable::Stored(at)) => Some(*at),
                _ => None,
            },
        };
        table.map_or(0, |table| table + within * self.entry_bytes())
    }

    /// The entry of one grain, and what it says.
    pub(super) fn look_up(&self, grain: u64) -> Result<Grain> {
        let mut entries = Vec::with_capacity(1);
        if !self.entries(grain, 1, &mut entries)? {
            return Ok(Grain::Unallocated);
        }
        self.grain(grain, entries[0])
    }

    fn word(&self, at: u64) -> Result<u64> {
        let mut words = Vec::with_capacity(1);
        self.words(at, 1, &mut words)?;
        Ok(words[0])
    }

    /// `count` entries from byte `at` on.
    pub(super) fn words(&self, mut at: u64, count: u64, out: &mut Vec<u64>) -> Result<()> {
        let size = self.entry_bytes();
        let end = at + count * size;
        while at < end {
            let (slice, within) = self.tables.get(&*self.storage, at)?;
            let until = slice.len().min(within + usize_of(end - at));
            let part = &slice[within..until];
            match size {
                4 => out.extend(part.as_chunks().0.iter().map(|word| u64::from(u32::from_le_bytes(*word)))),
                _ => out.extend(part.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word))),
            }
            at += part.len() as u64;
        }
        Ok(())
    }
}

/// A number of entries or bytes inside a table.
pub(super) fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("bounded by the size of a table")
}
