//! The bits of persistent bitmaps in the file: tables and clusters, read and written ("Bitmaps").
//!
//! A stored bitmap is never changed in place. Those that change get new clusters, and a new directory names
//! them:
//!
//! 1. **new clusters**: bits, tables, and a directory in which the bitmaps are up to date. Counts and contents
//!    are made durable by a drain, and with them the guest data that the bits are about. Until step 2
//!    nothing refers to them: a crash leaves leaks, and the old directory with its marks.
//! 2. **the header** names the new directory, durable. With this the flags `in_use` are gone, all at once.
//! 3. **the old clusters**, of the directory and of the bitmaps replaced, are given up; they are counted down
//!    by the next drain.

use std::{ops::Range, sync::Arc};

use super::{
    alloc::{Freed, State},
    bitmap::{
        Bitmap, GRANULARITY_BITS, MAX_DATA_BYTES, MAX_NAME_BYTES, MAX_TABLE_ENTRIES, encode_directory,
        read_directory,
    },
    entry::OFFSET_MASK,
    extension::{BitmapsExtension, MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, be64},
    feature::autoclear,
    layer::Qcow2Layer,
    overlap::Kind,
    refcount::usize_of,
};
use crate::{
    Error, Result,
    format::{DirtyMap, Layer, NewBitmap},
    sync::atomic::AtomicU64,
};

/// Table entry: the cluster has no place, and all its bits are set.
const ALL_ONES: u64 = 1;

impl Qcow2Layer {
    /// The directory; empty where there is none.
    pub(super) fn bitmap_directory(&self) -> Result<Vec<Bitmap>> {
        let extension = self.header().bitmaps;
        extension
            .map_or(Ok(Vec::new()), |extension| read_directory(self.image_file(), self.geometry, extension))
    }

    /// Entries of the table of a bitmap; `None` where the format cannot hold it.
    pub(super) fn bitmap_table_entries(&self, map: &DirtyMap) -> Option<u32> {
        let bytes = map.bits().div_ceil(64) * 8; // at most 2^32 bits
        let entries = u32::try_from(self.geometry.clusters_for(bytes)).ok()?;
        let fits = entries <= MAX_TABLE_ENTRIES
            && u64::from(entries) << self.geometry.cluster_bits <= MAX_DATA_BYTES
            && GRANULARITY_BITS.contains(&u8::try_from(map.granularity_bytes().trailing_zeros()).ok()?);
        (fits && entries > 0).then_some(entries)
    }

    /// The table of a bitmap, each entry checked: 0, [`ALL_ONES`], or where a cluster stands.
    fn read_bitmap_table(&self, bitmap: &Bitmap) -> Result<Vec<u64>> {
        let corrupt = |at: u64, expected: &str, found: u64| {
            Err(Error::corrupt(self.path(), "bitmap table", at, expected, format_args!("{found:#x}")))
        };
        let file_bytes = self.image_file().len_bytes()?;
        let bytes = u64::from(bitmap.table_entries) * 8; // of a u32
        let at = bitmap.table_offset; // 56 bits
        if at + bytes > file_bytes {
            return corrupt(at, "an end inside the file", at + bytes);
        }
        let mut table = vec![0; usize_of(bytes)];
        self.image_file().read_at(&mut table, at)?;
        let mut entries = Vec::with_capacity(table.len() / 8);
        for index in (0..table.len()).step_by(8) {
            let entry = be64(&table, index);
            let in_place =
                entry & !OFFSET_MASK == 0 && self.geometry.in_cluster(entry) == 0 && entry < file_bytes;
            if entry != ALL_ONES && !in_place {
                return corrupt(at + index as u64, "0, 1 or a cluster inside the file", entry);
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    /// The bits of a bitmap, with memory out of `room`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the table does not belong to a disk of this size, or leads out of the file;
    /// [`Error::Invalid`] when the bits take too much memory.
    pub(super) fn read_bits(&self, bitmap: &Bitmap, room: &Arc<AtomicU64>) -> Result<DirtyMap> {
        let map = DirtyMap::sharing(self.virtual_size_bytes(), bitmap.granularity_bytes(), room)?;
        let expected = self.bitmap_table_entries(&map).unwrap_or(0);
        if bitmap.table_entries != expected {
            let (file, at) = (self.path(), bitmap.table_offset);
            return Err(Error::corrupt(file, "bitmap_table_size", at, expected, bitmap.table_entries));
        }
        let cluster = self.geometry.cluster_bytes();
        let mut bytes = vec![0; usize_of(cluster)];
        for (index, entry) in self.read_bitmap_table(bitmap)?.into_iter().enumerate() {
            match entry {
                0 => continue,
                ALL_ONES => bytes.fill(0xff),
                at => self.image_file().read_at(&mut bytes, at)?,
            }
            map.add_words(index as u64 * (cluster / 8), &bytes)?;
        }
        Ok(map)
    }

    /// The clusters of a stored bitmap.
    fn bitmap_clusters(&self, bitmap: &Bitmap) -> Result<Vec<Range<u64>>> {
        let table = bitmap.table_offset..bitmap.table_offset + u64::from(bitmap.table_entries) * 8;
        let data = self.read_bitmap_table(bitmap)?.into_iter().filter(|entry| *entry > ALL_ONES);
        let data = data.map(|at| at..at + self.geometry.cluster_bytes());
        Ok(std::iter::once(table).chain(data).collect())
    }

    /// Writes the directory anew: with `puts`, which replace bitmaps of their names or are appended, and
    /// without `removed`. See the steps at the top.
    pub(super) fn rewrite_bitmaps(
        &self,
        state: &mut State,
        puts: &[NewBitmap<'_>],
        removed: Option<&str>,
    ) -> Result<()> {
        self.check_writable()?;
        let before = self.header().bitmaps;
        let old = self.bitmap_directory()?;
        let mut given_up = Vec::new();
        for bitmap in &old {
            if removed == Some(&bitmap.name) || puts.iter().any(|put| put.name == bitmap.name) {
                given_up.extend(self.bitmap_clusters(bitmap)?);
            }
        }
        // 1.
        let mut made = Vec::new();
        let result = self.before_allocating(state).and_then(|()| {
            let extension = self.write_directory(state, old, puts, removed, &mut made)?;
            self.drain_locked(state)?;
            Ok(extension)
        });
        let after = match result {
            Ok(after) => after,
            Err(error) => {
                for host in made {
                    self.unallocate(state, host)?;
                }
                return Err(error);
            }
        };
        // 2. When this fails nobody knows which directory the file names: the clusters of neither are freed.
        self.update_header(|header| {
            header.bitmaps = after;
            match after {
                Some(_) => header.autoclear |= autoclear::BITMAPS,
                None => header.autoclear &= !autoclear::BITMAPS,
            }
        })?;
        // 3.
        let place = |extension: BitmapsExtension| {
            extension.directory_offset..extension.directory_offset + extension.directory_bytes
        };
        if let Some(directory) = before.map(place) {
            self.forget_place(Kind::BitmapDirectory, directory.clone());
            given_up.push(directory);
        }
        if let Some(directory) = after.map(place) {
            self.note_place(Kind::BitmapDirectory, directory);
        }
        for host in given_up {
            state.free(Freed::clusters(host, self.runtime.discard_other));
        }
        Ok(())
    }

    /// Step 1: everything new. What was allocated is added to `made`.
    fn write_directory(
        &self,
        state: &mut State,
        mut bitmaps: Vec<Bitmap>,
        puts: &[NewBitmap<'_>],
        removed: Option<&str>,
        made: &mut Vec<Range<u64>>,
    ) -> Result<Option<BitmapsExtension>> {
        bitmaps.retain(|bitmap| removed != Some(&bitmap.name));
        for put in puts {
            let (table_offset, table_entries) = self.write_bits(state, put, made)?;
            let granularity_bytes = put.map.granularity_bytes();
            let known = bitmaps.iter_mut().find(|bitmap| bitmap.name == put.name);
            match known {
                Some(bitmap) if bitmap.granularity_bytes() == granularity_bytes => {
                    bitmap.put(table_offset, table_entries, put.enabled);
                }
                known => {
                    let mut bitmap = Bitmap::new(put.name, granularity_bytes);
                    bitmap.put(table_offset, table_entries, put.enabled);
                    match known {
                        Some(known) => *known = bitmap,
                        None => bitmaps.push(bitmap),
                    }
                }
            }
        }
        if bitmaps.is_empty() {
            return Ok(None);
        }
        let bytes = encode_directory(&bitmaps);
        let count = u32::try_from(bitmaps.len()).ok().filter(|count| *count <= MAX_BITMAPS);
        let count = count.ok_or_else(|| {
            Error::Invalid("Maximum number of persistent bitmaps is already reached".to_owned())
        })?;
        if bytes.len() as u64 > MAX_BITMAP_DIRECTORY_BYTES {
            return Err(Error::Invalid("Not enough space in the bitmap directory".to_owned()));
        }
        let directory_bytes = bytes.len() as u64;
        let directory_offset = self.new_clusters(state, directory_bytes, made)?;
        self.image_file().write_at(&bytes, directory_offset)?;
        Ok(Some(BitmapsExtension { count, directory_bytes, directory_offset }))
    }

    /// Writes the bits and the table of a bitmap, and tells where the table stands and its entries.
    fn write_bits(
        &self,
        state: &mut State,
        put: &NewBitmap<'_>,
        made: &mut Vec<Range<u64>>,
    ) -> Result<(u64, u32)> {
        let entries = self.check_storable(put)?;
        let mut table = vec![0; usize_of(u64::from(entries) * 8)];
        let cluster = self.geometry.cluster_bytes();
        let (mut bytes, bits) = (vec![0; usize_of(cluster)], cluster * 8);
        let mut next = put.map.next_bit(0);
        while let Some(bit) = next {
            let index = bit / bits;
            put.map.write_words(index * (cluster / 8), &mut bytes);
            let at = self.new_clusters(state, cluster, made)?;
            self.image_file().write_at(&bytes, at)?;
            let entry = usize_of(index * 8);
            table[entry..entry + 8].copy_from_slice(&at.to_be_bytes());
            next = put.map.next_bit((index + 1) * bits);
        }
        let at = self.new_clusters(state, table.len() as u64, made)?;
        self.image_file().write_at(&table, at)?;
        Ok((at, entries))
    }

    /// Entries of the table of a bitmap that the format can hold.
    fn check_storable(&self, put: &NewBitmap<'_>) -> Result<u32> {
        let refuse = |why: String| Err(Error::Invalid(why));
        if put.name.is_empty() || put.name.len() > usize::from(MAX_NAME_BYTES) {
            return refuse(format!("Bitmap name is empty or longer than {MAX_NAME_BYTES} bytes"));
        }
        if put.map.disk_bytes() != self.virtual_size_bytes() {
            return refuse(format!(
                "Bitmap '{}' is of a disk of {} bytes, and this one has {}",
                put.name,
                put.map.disk_bytes(),
                self.virtual_size_bytes()
            ));
        }
        let entries = self.bitmap_table_entries(put.map);
        entries.map_or_else(
            || {
                refuse(format!(
                    "Bitmap '{}' with a granularity of {} bytes cannot be stored for a disk of {} bytes",
                    put.name,
                    put.map.granularity_bytes(),
                    put.map.disk_bytes()
                ))
            },
            Ok,
        )
    }

    fn new_clusters(&self, state: &mut State, bytes: u64, made: &mut Vec<Range<u64>>) -> Result<u64> {
        let clusters = self.geometry.clusters_for(bytes);
        let at = self.allocate_searching(state, clusters)?;
        made.push(at..at + clusters * self.geometry.cluster_bytes());
        Ok(at)
    }
}
