//! The header: parsed once into a checked [`Header`], of which single fields are written back.
//!
//! Spec: QEMU `docs/interop/qed_spec.rst`, "Header". The header clusters hold the fixed fields and, anywhere
//! behind them, the backing file name; what else stands there is not ours to change.

use std::{fmt, ops::RangeInclusive};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::little_endian::{U32, U64},
};

use super::geometry::Geometry;
use crate::{Error, Result, format::Backing, storage::Storage, text};

/// The fixed fields, little-endian.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: [u8; 4],
    pub(super) cluster_size: U32,
    pub(super) table_size: U32,
    pub(super) header_size: U32,
    pub(super) features: U64,
    pub(super) compat_features: U64,
    pub(super) autoclear_features: U64,
    pub(super) l1_table_offset: U64,
    pub(super) image_size: U64,
    pub(super) backing_filename_offset: U32,
    pub(super) backing_filename_size: U32,
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// The first four bytes of every image.
pub(super) const MAGIC: [u8; 4] = *b"QED\0";
/// All fixed fields.
pub(super) const HEADER_BYTES: usize = 64;
/// Bytes of a cluster ("Header", `cluster_size`).
pub(super) const CLUSTER_BYTES: RangeInclusive<u64> = 4096..=(64 << 20);
/// Clusters of a table ("Header", `table_size`).
pub(super) const TABLE_CLUSTERS: RangeInclusive<u64> = 1..=16;
/// Guest disks are whole sectors ("Header", `image_size`).
pub(super) const SECTOR_BYTES: u64 = 512;
/// Room of a name that is put into an image that exists: two of them, one behind the other, and the fixed fields
/// fit into the smallest cluster.
const NAME_ROOM_BYTES: u32 = 1920;
const _: () = assert!(HEADER_BYTES + 2 * (NAME_ROOM_BYTES as usize) <= 4096);

/// Bytes of a backing file name: what the host takes as a path.
pub(super) const MAX_BACKING_NAME_BYTES: u64 = 4095;

/// Bits of `features`: an image with others is not opened.
pub(super) mod feature {
    /// There is a backing file.
    pub(in super::super) const BACKING_FILE: u64 = 1;
    /// Whoever wrote last did not close the image.
    pub(in super::super) const NEED_CHECK: u64 = 1 << 1;
    /// The backing file is raw, whatever it begins with.
    pub(in super::super) const BACKING_FORMAT_NO_PROBE: u64 = 1 << 2;
    /// All of them.
    pub(super) const KNOWN: u64 = BACKING_FILE | NEED_CHECK | BACKING_FORMAT_NO_PROBE;
}

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) geometry: Geometry,
    /// Clusters before the first regular one; at least 1, and fewer than 4 GiB in bytes.
    pub(super) header_clusters: u32,
    /// Bits of [`feature`]; none unknown.
    pub(super) features: u64,
    /// Bits that mean nothing to this build and change nothing.
    pub(super) compat_features: u64,
    /// Bits that a writer that does not know them clears; none is known.
    pub(super) autoclear_features: u64,
    /// Host offset of the L1 table, which stands inside the file, behind the header.
    pub(super) l1_offset: u64,
    /// Whole sectors, below 2^63, within what L1 can root.
    pub(super) virtual_size_bytes: u64,
    /// Where the backing file name stands, as the fields say, used or not.
    name_place: (u32, u32),
    pub(super) backing: Option<Backing>,
}

impl Header {
    /// The header of a new image: one cluster, and the L1 table behind it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that does not fit.
    pub(super) fn new(geometry: Geometry, virtual_size_bytes: u64, backing: Option<Backing>) -> Result<Self> {
        let (mut features, mut name_place) = (0, (0, 0));
        if let Some(Backing { name, format }) = &backing {
            let name_bytes = text::to_bytes(name).len() as u64;
            let room = (geometry.cluster_bytes() - HEADER_BYTES as u64).min(MAX_BACKING_NAME_BYTES);
            if name_bytes > room {
                return Err(Error::Invalid(format!(
                    "The backing file name has {name_bytes} bytes, the header has room for {room}"
                )));
            }
            let fits = |bytes: u64| u32::try_from(bytes).expect("at most a path");
            name_place = (fits(HEADER_BYTES as u64), fits(name_bytes));
            features |= feature::BACKING_FILE;
            if format.as_deref() == Some("raw") {
                features |= feature::BACKING_FORMAT_NO_PROBE;
            }
        }
        Ok(Self {
            geometry,
            header_clusters: 1,
            features,
            compat_features: 0,
            autoclear_features: 0,
            l1_offset: geometry.cluster_bytes(),
            virtual_size_bytes,
            name_place,
            backing,
        })
    }

    /// Reads and checks the header of `storage`.
    ///
    /// # Errors
    /// [`Error::Invalid`] in the reference's words without the magic number and for unknown features;
    /// [`Error::Corrupt`] for the first field outside its limits.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        let mut bytes = [0; HEADER_BYTES];
        storage.read_at(&mut bytes, 0)?;
        let raw = RawHeader::read_from_bytes(&bytes).expect("as long as the header");
        Self::check(storage, &raw)
    }

    fn check(storage: &dyn Storage, raw: &RawHeader) -> Result<Self> {
        let file = storage.path();
        let corrupt = |field, at, expected: &dyn fmt::Display, found: u64| {
            Err(Error::corrupt(file, field, at, expected, format_args!("{found:#x}")))
        };
        if raw.magic != MAGIC {
            return Err(Error::Invalid("Image not in QED format".to_owned()));
        }
        let features = raw.features.get();
        if features & !feature::KNOWN != 0 {
            return Err(Error::Invalid(format!(
                "Unsupported QED features: {:x}",
                features & !feature::KNOWN
            )));
        }
        let cluster_bytes = u64::from(raw.cluster_size.get());
        if !cluster_bytes.is_power_of_two() || !CLUSTER_BYTES.contains(&cluster_bytes) {
            return corrupt("header.cluster_size", 4, &"a power of two, 4 KiB to 64 MiB", cluster_bytes);
        }
        let table_clusters = u64::from(raw.table_size.get());
        if !table_clusters.is_power_of_two() || !TABLE_CLUSTERS.contains(&table_clusters) {
            return corrupt("header.table_size", 8, &"a power of two, 1 to 16 clusters", table_clusters);
        }
        let geometry = Geometry {
            cluster_bits: cluster_bytes.trailing_zeros(),
            table_bits: table_clusters.trailing_zeros(),
        };
        let header_clusters = raw.header_size.get();
        let header_bytes = u64::from(header_clusters) * cluster_bytes; // u32 × 2^26 fits
        if header_clusters == 0 || header_bytes > u64::from(u32::MAX) {
            let expected = "at least one cluster, and less than 4 GiB in all";
            return corrupt("header.header_size", 12, &expected, u64::from(header_clusters));
        }
        let virtual_size_bytes = raw.image_size.get();
        if !virtual_size_bytes.is_multiple_of(SECTOR_BYTES)
            || i64::try_from(virtual_size_bytes).is_err()
            || u128::from(virtual_size_bytes) > geometry.max_virtual_bytes()
        {
            let most = geometry.max_virtual_bytes().min(1 << 63);
            let expected = format_args!("whole sectors of 512 bytes, below 2^63, at most {most:#x}");
            return corrupt("header.image_size", 48, &expected, virtual_size_bytes);
        }
        let l1_offset = raw.l1_table_offset.get();
        let file_end = geometry.cluster_start(storage.len_bytes()?);
        let l1_end = l1_offset.checked_add(geometry.table_bytes());
        if geometry.in_cluster(l1_offset) != 0
            || l1_offset < header_bytes
            || l1_end.is_none_or(|end| end > file_end)
        {
            let expected = format_args!(
                "a multiple of the cluster size, behind the header of {header_bytes:#x} bytes, with the whole \
                 table below {file_end:#x}"
            );
            return corrupt("header.l1_table_offset", 40, &expected, l1_offset);
        }
        let name_place = (raw.backing_filename_offset.get(), raw.backing_filename_size.get());
        let backing = if features & feature::BACKING_FILE == 0 {
            None
        } else {
            let (at, len) = (u64::from(name_place.0), u64::from(name_place.1));
            if at + len > header_bytes {
                let expected = format_args!("a name inside the header of {header_bytes:#x} bytes");
                return corrupt("header.backing_filename_offset", 56, &expected, at);
            }
            if len > MAX_BACKING_NAME_BYTES {
                let expected = format_args!("at most {MAX_BACKING_NAME_BYTES:#x}");
                return corrupt("header.backing_filename_size", 60, &expected, len);
            }
            read_backing(storage, at, len, features)?
        };
        Ok(Self {
            geometry,
            header_clusters,
            features,
            compat_features: raw.compat_features.get(),
            autoclear_features: raw.autoclear_features.get(),
            l1_offset,
            virtual_size_bytes,
            name_place,
            backing,
        })
    }

    /// Bytes before the first regular cluster.
    pub(super) fn header_bytes(&self) -> u64 {
        u64::from(self.header_clusters) << self.geometry.cluster_bits
    }

    /// Names another backing file, or none, and gives back the bytes of the name and the place in the first
    /// clusters where they belong, which is not that of the name before.
    ///
    /// # Errors
    /// [`Error::Invalid`], in the reference's words, when the name is too long.
    pub(super) fn set_backing(&mut self, backing: Option<&Backing>) -> Result<Option<(u64, Vec<u8>)>> {
        let name = backing.map(|backing| text::to_bytes(&backing.name).into_owned());
        self.features &= !(feature::BACKING_FILE | feature::BACKING_FORMAT_NO_PROBE);
        self.backing = backing.cloned();
        let Some(name) = name else {
            self.name_place = (0, 0);
            return Ok(None);
        };
        let fits = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        // Two places that do not overlap, inside the smallest header.
        let places = [fits(HEADER_BYTES), fits(HEADER_BYTES) + NAME_ROOM_BYTES];
        let (old_at, old_end) = (self.name_place.0, self.name_place.0.saturating_add(self.name_place.1));
        let is_free = |at: &u32| *at >= old_end || at + fits(name.len()) <= old_at;
        let place = places.into_iter().find(is_free).filter(|_| fits(name.len()) <= NAME_ROOM_BYTES);
        let Some(at) = place else {
            return Err(Error::Invalid("No space left in the file header".to_owned()));
        };
        self.name_place = (at, fits(name.len()));
        self.features |= feature::BACKING_FILE;
        if backing.is_some_and(|backing| backing.format.as_deref() == Some("raw")) {
            self.features |= feature::BACKING_FORMAT_NO_PROBE;
        }
        Ok(Some((u64::from(at), name)))
    }

    /// The fixed fields as they stand in the file.
    pub(super) fn encode(&self) -> RawHeader {
        let fits = "within the limits of the header";
        RawHeader {
            magic: MAGIC,
            cluster_size: u32::try_from(self.geometry.cluster_bytes()).expect(fits).into(),
            table_size: u32::try_from(self.geometry.table_clusters()).expect(fits).into(),
            header_size: self.header_clusters.into(),
            features: self.features.into(),
            compat_features: self.compat_features.into(),
            autoclear_features: self.autoclear_features.into(),
            l1_table_offset: self.l1_offset.into(),
            image_size: self.virtual_size_bytes.into(),
            backing_filename_offset: self.name_place.0.into(),
            backing_filename_size: self.name_place.1.into(),
        }
    }

    /// Writes the fixed fields, which stand in one sector; what follows them stays. Not durable before a flush.
    pub(super) fn write(&self, storage: &dyn Storage) -> Result<()> {
        storage.write_at(self.encode().as_bytes(), 0)
    }
}

/// The backing file that the header names; an empty name names none.
fn read_backing(storage: &dyn Storage, at: u64, len: u64, features: u64) -> Result<Option<Backing>> {
    let mut name = vec![0; usize::try_from(len).expect("at most a path")];
    storage.read_at(&mut name, at)?;
    // The reference takes the name as a C string.
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    let name = text::from_bytes(&name[..end]);
    let is_raw = features & feature::BACKING_FORMAT_NO_PROBE != 0;
    let format = is_raw.then(|| "raw".to_owned());
    Ok((!name.is_empty()).then_some(Backing { name, format }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    const CLUSTER: u64 = 4096;

    /// A header with one L1 cluster behind it, `change` made to it.
    fn read(change: impl FnOnce(&mut RawHeader)) -> Result<Header> {
        let geometry = Geometry { cluster_bits: 12, table_bits: 0 };
        let backing = Backing { name: "base.raw".to_owned(), format: Some("raw".to_owned()) };
        let mut raw = Header::new(geometry, 1 << 20, Some(backing)).expect("a short name").encode();
        change(&mut raw);
        let mut bytes = vec![0; 4 * 4096];
        bytes[..HEADER_BYTES].copy_from_slice(raw.as_bytes());
        bytes[HEADER_BYTES..HEADER_BYTES + 8].copy_from_slice(b"base.raw");
        Header::read(&MemoryStorage::from_bytes("x.qed", &bytes))
    }

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let header = read(|raw| raw.compat_features = u64::MAX.into()).expect("valid");
        assert_eq!(
            header.backing,
            Some(Backing { name: "base.raw".to_owned(), format: Some("raw".to_owned()) })
        );
        assert_eq!((header.virtual_size_bytes, header.l1_offset), (1 << 20, CLUSTER));
        assert_eq!(header.compat_features, u64::MAX);
    }

    /// A backing file whose format is not raw has none recorded ("Feature bits").
    #[test]
    fn only_raw_is_recorded_as_a_format() {
        let header = read(|raw| raw.features = feature::BACKING_FILE.into()).expect("valid");
        assert_eq!(header.backing, Some(Backing { name: "base.raw".to_owned(), format: None }));
    }

    #[test]
    fn every_field_has_its_limits() {
        type Change = fn(&mut RawHeader);
        let refused: [(&str, Change); 20] = [
            ("not in QED format", |raw| raw.magic = *b"QED\x01"),
            ("Unsupported QED features: 8", |raw| raw.features = 8.into()),
            ("header.cluster_size", |raw| raw.cluster_size = 0.into()),
            ("header.cluster_size", |raw| raw.cluster_size = 2048.into()),
            ("header.cluster_size", |raw| raw.cluster_size = 4097.into()),
            ("header.cluster_size", |raw| raw.cluster_size = (128 << 20).into()),
            ("header.table_size", |raw| raw.table_size = 0.into()),
            ("header.table_size", |raw| raw.table_size = 3.into()),
            ("header.table_size", |raw| raw.table_size = 32.into()),
            ("header.header_size", |raw| raw.header_size = 0.into()),
            ("header.header_size", |raw| raw.header_size = (1 << 20).into()),
            ("header.image_size", |raw| raw.image_size = 513.into()),
            ("header.image_size", |raw| raw.image_size = ((512 * 512 * CLUSTER) + 512).into()),
            ("header.image_size", |raw| raw.image_size = (u64::MAX - 511).into()),
            ("header.l1_table_offset", |raw| raw.l1_table_offset = 0.into()),
            ("header.l1_table_offset", |raw| raw.l1_table_offset = (CLUSTER + 512).into()),
            ("header.l1_table_offset", |raw| raw.l1_table_offset = (4 * CLUSTER).into()),
            ("header.l1_table_offset", |raw| raw.l1_table_offset = (u64::MAX - 4095).into()),
            ("header.backing_filename_offset", |raw| raw.backing_filename_offset = 4089.into()),
            ("header.backing_filename_size", |raw| {
                raw.header_size = 2.into();
                raw.l1_table_offset = (3 * CLUSTER).into();
                raw.backing_filename_size = 4096.into();
            }),
        ];
        for (words, change) in refused {
            let error = read(change).expect_err(words).to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
    }

    /// The largest tables root far more than 2^63 bytes; the size is bounded all the same.
    #[test]
    fn the_largest_geometry_does_not_overflow() {
        let geometry = Geometry { cluster_bits: 26, table_bits: 4 };
        assert_eq!(geometry.max_virtual_bytes(), 1 << 80);
        assert_eq!(geometry.l1_entries_for(i64::MAX as u64), 1024);
        assert_eq!(geometry.end_of_table(geometry.table_entries()), u64::MAX);
    }
}
