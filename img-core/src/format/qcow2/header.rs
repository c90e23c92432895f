//! The header: parsed once into a checked [`Header`], encoded again as a whole.
//!
//! Spec: QEMU `docs/interop/qcow2.rst`, "Header", "Header extensions", "Feature name table". The header
//! cluster holds the fixed fields, the extensions, and behind them the backing file name.
//! [`RawHeader`] has every field in file order; [`Header`] what the rest of the driver works with.

use std::{fmt, ops::RangeInclusive, path::Path};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

use super::{
    extension::{self, BitmapsExtension, EncryptionPointer, Extensions, Rules, UnknownExtension, kind},
    feature::{self, FeatureName, autoclear, incompatible},
    geometry::Geometry,
    head::Head,
};
use crate::{
    Error, Result,
    format::{Backing, Codec, OpenMode},
    storage::Storage,
    text::to_bytes,
};

/// The fixed fields, big-endian. Version 2 ends after `snapshots_offset` (72 bytes); version 3 images may
/// end after `header_length` (104 bytes).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: [u8; 4],
    pub(super) version: U32,
    pub(super) backing_file_offset: U64,
    pub(super) backing_file_size: U32,
    pub(super) cluster_bits: U32,
    pub(super) size: U64,
    pub(super) crypt_method: U32,
    pub(super) l1_size: U32,
    pub(super) l1_table_offset: U64,
    pub(super) refcount_table_offset: U64,
    pub(super) refcount_table_clusters: U32,
    pub(super) nb_snapshots: U32,
    pub(super) snapshots_offset: U64,
    pub(super) incompatible_features: U64,
    pub(super) compatible_features: U64,
    pub(super) autoclear_features: U64,
    pub(super) refcount_order: U32,
    pub(super) header_length: U32,
    pub(super) compression_type: u8,
    pub(super) padding: [u8; 7],
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// The first four bytes of every qcow2 image.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// All fields we know.
pub(super) const HEADER_BYTES: usize = 112;
/// Version 2 has no further fields.
const VERSION_2_BYTES: usize = 72;
/// Version 3 has at least the fields up to `header_length`.
pub(super) const VERSION_3_MIN_BYTES: u32 = 104;

/// Cluster sizes, as powers of two (the reference's upper limit; the lower one is the format's).
pub(super) const CLUSTER_BITS: RangeInclusive<u32> = 9..=21;
/// Clusters with extended L2 entries have at least 32 subclusters of 512 bytes.
pub(super) const EXTENDED_L2_MIN_CLUSTER_BITS: u32 = 14;
/// Widest reference count: 2^6 bits.
pub(super) const MAX_REFCOUNT_ORDER: u32 = 6;
/// Bytes of an L1 table, active or a snapshot's (the reference's limit: bounds the memory of an open).
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Bytes of the refcount table (the reference's limit, for the same reason).
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Snapshots of an image (the reference's limit).
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// Bytes of the fixed part of a snapshot table entry.
pub(super) const SNAPSHOT_HEADER_BYTES: u64 = 40;
/// Bytes of a backing file name.
pub(super) const MAX_BACKING_NAME_BYTES: u64 = 1023;

/// The reference writes the feature name table where at least this much of the cluster is left.
const FEATURE_TABLE_MIN_ROOM_BYTES: usize = 4096;

/// How guest data is encrypted ("crypt_method").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CryptMethod {
    /// Not at all.
    None,
    /// The old AES-CBC with a key from the password.
    Aes,
    /// By an embedded LUKS header.
    Luks,
}

/// A checked header. Fields that name places in the file satisfy the limits above; what they point to has
/// not been looked at, and may lie past the end of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) geometry: Geometry,
    pub(super) virtual_size_bytes: u64,
    /// Host offset of the active L1 table, aligned to clusters.
    pub(super) l1_offset: u64,
    /// Entries of the active L1 table: enough for the virtual size, at most [`MAX_L1_BYTES`].
    pub(super) l1_entries: u32,
    /// Host offset of the refcount table, aligned to clusters.
    pub(super) refcount_table_offset: u64,
    /// Its size, at most [`MAX_REFCOUNT_TABLE_BYTES`]; 0 only in [`OpenMode::Check`].
    pub(super) refcount_table_clusters: u32,
    /// Host offset of the snapshot table. Not checked in [`OpenMode::Check`].
    pub(super) snapshots_offset: u64,
    /// Entries of the snapshot table. Not checked in [`OpenMode::Check`].
    pub(super) snapshot_count: u32,
    /// Bits of [`feature::incompatible`]; none unknown.
    pub(super) incompatible: u64,
    /// Bits of [`feature::compatible`] and unknown ones.
    pub(super) compatible: u64,
    /// Bits of [`feature::autoclear`] and unknown ones, until [`Self::prepare_for_writing`].
    pub(super) autoclear: u64,
    pub(super) compression: Codec,
    pub(super) crypt_method: CryptMethod,
    pub(super) backing: Option<Backing>,
    /// The recorded name of the external data file.
    pub(super) data_file: Option<String>,
    pub(super) encryption: Option<EncryptionPointer>,
    /// Present only while the autoclear bit vouches for it.
    pub(super) bitmaps: Option<BitmapsExtension>,
    /// The image has a bitmaps extension that its autoclear bit does not vouch for. It goes away when the
    /// header is written; its clusters are leaked.
    pub(super) stale_bitmaps: bool,
    /// Names the image gives to feature bits.
    pub(super) feature_names: Vec<FeatureName>,
    /// Extensions we do not know, in the order of the file.
    pub(super) unknown_extensions: Vec<UnknownExtension>,
    /// Bytes 105 to 111, for which there are no fields yet.
    pub(super) padding: [u8; 7],
    /// Fields behind byte 112, as they stand.
    pub(super) unknown_fields: Vec<u8>,
}

impl Header {
    /// Reads and checks the header of `storage`.
    ///
    /// # Errors
    /// [`Error::WrongFormat`] without the magic number; [`Error::Invalid`] in the reference's words for an
    /// unknown version or unknown incompatible features; [`Error::Unsupported`] for encrypted images unless
    /// only inspected; [`Error::Corrupt`] for the first field outside its limits.
    pub(super) fn read(storage: &dyn Storage, mode: OpenMode) -> Result<Self> {
        let mut head = Head::read(storage)?;
        let raw = head.fixed_fields()?;
        Self::check(&mut head, &raw, mode)
    }

    #[expect(clippy::too_many_lines, reason = "one rule after the other, in the order of the fields")]
    fn check(head: &mut Head<'_>, raw: &RawHeader, mode: OpenMode) -> Result<Self> {
        let file = head.storage.path();
        let corrupt = |field, at, expected: &dyn fmt::Display, found: &dyn fmt::Display| {
            Err(Error::corrupt(file, field, at, expected, found))
        };
        let checking = matches!(mode, OpenMode::Check { .. });
        let cluster_bits = raw.cluster_bits.get();
        let cluster_bytes = 1_u64 << cluster_bits; // checked by `fixed_fields`
        let header_length = raw.header_length.get();
        if u64::from(header_length) > cluster_bytes {
            return corrupt("header.header_length", 100, &"at most the cluster size", &header_length);
        }
        let backing_offset = raw.backing_file_offset.get();
        if backing_offset > cluster_bytes {
            return corrupt("header.backing_file_offset", 8, &"at most the cluster size", &backing_offset);
        }

        let bits = raw.incompatible_features.get();
        let area_start = u64::from(header_length);
        let area_end = if backing_offset == 0 { cluster_bytes } else { backing_offset };
        let geometry = Geometry {
            version: raw.version.get(),
            cluster_bits,
            refcount_order: raw.refcount_order.get(),
            extended_l2: bits & incompatible::EXTENDED_L2 != 0,
            external_data: bits & incompatible::DATA_FILE != 0,
        };
        let rules = Rules {
            file,
            geometry,
            luks: raw.crypt_method.get() == 2,
            bitmaps_consistent: raw.autoclear_features.get() & autoclear::BITMAPS != 0,
        };
        let area = head.extensions(area_start, area_end)?;
        let parsed = Extensions::parse(area, area_start, &rules);

        let unknown = bits & !incompatible::KNOWN;
        if unknown != 0 {
            // The names are a courtesy: a broken extension area must not hide the refusal.
            let names = parsed.map(|extensions| extensions.feature_names).unwrap_or_default();
            return Err(Error::Invalid(feature::unsupported(&names, unknown)));
        }
        let extensions = parsed?;
        let crypt_method = match raw.crypt_method.get() {
            0 => CryptMethod::None,
            1 => CryptMethod::Aes,
            2 => CryptMethod::Luks,
            other => return Err(Error::unsupported(file, format_args!("encryption method {other}"))),
        };

        let compression = match (raw.compression_type, bits & incompatible::COMPRESSION != 0) {
            (0, false) => Codec::Deflate,
            (1, true) => Codec::Zstd,
            (0 | 1, flag) => {
                let expected = format!("{}, as the incompatible bit says", if flag { "not 0" } else { "0" });
                return corrupt("header.compression_type", 104, &expected, &raw.compression_type);
            }
            (other, _) => return Err(Error::unsupported(file, format_args!("compression type {other}"))),
        };
        if geometry.extended_l2 && cluster_bits < EXTENDED_L2_MIN_CLUSTER_BITS {
            let expected = format!("at least {EXTENDED_L2_MIN_CLUSTER_BITS} with extended L2 entries");
            return corrupt("header.cluster_bits", 20, &expected, &cluster_bits);
        }
        if geometry.refcount_order > MAX_REFCOUNT_ORDER {
            let expected = format!("at most {MAX_REFCOUNT_ORDER}");
            return corrupt("header.refcount_order", 96, &expected, &geometry.refcount_order);
        }
        if mode.writes() && !checking && bits & incompatible::CORRUPT != 0 {
            return Err(Error::Invalid("qcow2: Image is corrupt; cannot be opened read/write".to_owned()));
        }
        if crypt_method != CryptMethod::None && mode != OpenMode::Inspect {
            let name = if crypt_method == CryptMethod::Luks { "LUKS" } else { "AES" };
            return Err(Error::unsupported(file, format_args!("{name} encryption of qcow2 images")));
        }
        if mode != OpenMode::Inspect
            && raw.autoclear_features.get() & autoclear::RAW_DATA != 0
            && !geometry.external_data
        {
            return corrupt(
                "header.autoclear_features",
                88,
                &"no raw external data bit, as there is no external data file",
                &format_args!("{:#x}", raw.autoclear_features.get()),
            );
        }

        let refcount_table_clusters = raw.refcount_table_clusters.get();
        if refcount_table_clusters == 0 && !checking {
            return corrupt("header.refcount_table_clusters", 56, &"at least 1", &0);
        }
        let table = |offset_field, offset_at, offset: u64, count_field, count_at, count: u32, entry, max| {
            check_table(
                file,
                geometry,
                &Table { offset_field, offset_at, offset, count_field, count_at, count, entry, max },
            )
        };
        table(
            "header.refcount_table_offset",
            48,
            raw.refcount_table_offset.get(),
            "header.refcount_table_clusters",
            56,
            refcount_table_clusters,
            cluster_bytes,
            MAX_REFCOUNT_TABLE_BYTES,
        )?;
        if !checking {
            table(
                "header.snapshots_offset",
                64,
                raw.snapshots_offset.get(),
                "header.nb_snapshots",
                60,
                raw.nb_snapshots.get(),
                SNAPSHOT_HEADER_BYTES,
                u64::from(MAX_SNAPSHOTS) * SNAPSHOT_HEADER_BYTES,
            )?;
        }
        let l1_entries = raw.l1_size.get();
        table(
            "header.l1_table_offset",
            40,
            raw.l1_table_offset.get(),
            "header.l1_size",
            36,
            l1_entries,
            8,
            MAX_L1_BYTES,
        )?;
        let virtual_size_bytes = raw.size.get();
        if i64::try_from(virtual_size_bytes).is_err() {
            return corrupt("header.size", 24, &"below 2^63", &virtual_size_bytes);
        }
        let needed = geometry.l1_entries_for(virtual_size_bytes);
        if u64::from(l1_entries) < needed {
            let expected = format!("at least {needed} for a disk of {virtual_size_bytes} bytes");
            return corrupt("header.l1_size", 36, &expected, &l1_entries);
        }

        let mut unknown_extensions = extensions.unknown;
        let backing = match head.backing_name(raw)? {
            Some(name) => Some(Backing { name, format: extensions.backing_format }),
            None => {
                // A format without a name means nothing today, but is not ours to drop.
                if let Some(format) = extensions.backing_format {
                    let data = format.into_bytes();
                    unknown_extensions.push(UnknownExtension { kind: kind::BACKING_FORMAT, data });
                }
                None
            }
        };
        Ok(Self {
            geometry,
            virtual_size_bytes,
            l1_offset: raw.l1_table_offset.get(),
            l1_entries,
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters,
            snapshots_offset: raw.snapshots_offset.get(),
            snapshot_count: raw.nb_snapshots.get(),
            incompatible: bits,
            compatible: raw.compatible_features.get(),
            autoclear: raw.autoclear_features.get(),
            compression,
            crypt_method,
            backing,
            data_file: extensions.data_file,
            encryption: extensions.encryption,
            stale_bitmaps: extensions.has_bitmaps && extensions.bitmaps.is_none(),
            bitmaps: extensions.bitmaps,
            feature_names: extensions.feature_names,
            unknown_extensions,
            padding: raw.padding,
            unknown_fields: head.bytes(HEADER_BYTES as u64, u64::from(header_length))?.to_vec(),
        })
    }

    /// A header for a new image, all tables yet to be placed.
    pub(super) fn new(geometry: Geometry, virtual_size_bytes: u64) -> Self {
        let mut bits = 0;
        if geometry.extended_l2 {
            bits |= incompatible::EXTENDED_L2;
        }
        if geometry.external_data {
            bits |= incompatible::DATA_FILE;
        }
        Self {
            geometry,
            virtual_size_bytes,
            l1_offset: 0,
            l1_entries: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshots_offset: 0,
            snapshot_count: 0,
            incompatible: bits,
            compatible: 0,
            autoclear: 0,
            compression: Codec::Deflate,
            crypt_method: CryptMethod::None,
            backing: None,
            data_file: None,
            encryption: None,
            bitmaps: None,
            stale_bitmaps: false,
            feature_names: Vec::new(),
            unknown_extensions: Vec::new(),
            padding: [0; 7],
            unknown_fields: Vec::new(),
        }
    }

    /// Whether an incompatible bit is set.
    pub(super) fn is(&self, incompatible_bit: u64) -> bool {
        self.incompatible & incompatible_bit != 0
    }

    /// What a writer has to take out of the header before it changes anything else: unknown autoclear
    /// bits, and a bitmaps extension that no autoclear bit vouches for. True when there was something:
    /// the header must then be written before the first change.
    #[must_use = "the header must be written when it changed"]
    pub(super) fn prepare_for_writing(&mut self) -> bool {
        let known = self.autoclear & autoclear::KNOWN;
        let changed = known != self.autoclear || self.stale_bitmaps;
        self.autoclear = known;
        self.stale_bitmaps = false;
        changed
    }

    /// The bytes of the header cluster, laid out as the reference does: fields, extensions (backing format,
    /// data file, encryption, feature names, bitmaps, unknown ones), backing file name.
    ///
    /// # Errors
    /// [`Error::Invalid`] when they do not fit into one cluster, or the backing file name is too long.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        let cluster_bytes = usize::try_from(self.geometry.cluster_bytes()).expect("at most 2 MiB");
        let old = self.geometry.version < 3;
        let field_bytes = if old { VERSION_2_BYTES } else { HEADER_BYTES + self.unknown_fields.len() };
        let area = self.encode_extensions(cluster_bytes.saturating_sub(field_bytes));
        let name = to_bytes(self.backing.as_ref().map_or("", |backing| &backing.name));
        let name_at = field_bytes + area.len();
        if name_at + name.len() > cluster_bytes || name.len() as u64 > MAX_BACKING_NAME_BYTES {
            return Err(Error::Invalid(format!(
                "The header needs {} bytes, more than a cluster of {cluster_bytes} bytes can hold",
                name_at + name.len()
            )));
        }
        let fits = "less than a cluster";
        let raw = RawHeader {
            magic: MAGIC,
            version: self.geometry.version.into(),
            backing_file_offset: if name.is_empty() { 0 } else { name_at as u64 }.into(),
            backing_file_size: u32::try_from(name.len()).expect(fits).into(),
            cluster_bits: self.geometry.cluster_bits.into(),
            size: self.virtual_size_bytes.into(),
            crypt_method: match self.crypt_method {
                CryptMethod::None => 0,
                CryptMethod::Aes => 1,
                CryptMethod::Luks => 2,
            }
            .into(),
            l1_size: self.l1_entries.into(),
            l1_table_offset: self.l1_offset.into(),
            refcount_table_offset: self.refcount_table_offset.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.snapshot_count.into(),
            snapshots_offset: self.snapshots_offset.into(),
            incompatible_features: self.incompatible.into(),
            compatible_features: self.compatible.into(),
            autoclear_features: self.autoclear.into(),
            refcount_order: self.geometry.refcount_order.into(),
            header_length: u32::try_from(field_bytes).expect(fits).into(),
            compression_type: match self.compression {
                Codec::Deflate | Codec::Zlib => 0,
                Codec::Zstd => 1,
            },
            padding: self.padding,
        };
        let mut cluster = Vec::with_capacity(cluster_bytes);
        cluster.extend_from_slice(if old { &raw.as_bytes()[..VERSION_2_BYTES] } else { raw.as_bytes() });
        if !old {
            cluster.extend_from_slice(&self.unknown_fields);
        }
        cluster.extend(area);
        cluster.extend_from_slice(&name);
        cluster.resize(cluster_bytes, 0);
        Ok(cluster)
    }

    fn encode_extensions(&self, room_bytes: usize) -> Vec<u8> {
        let mut area = extension::Writer::default();
        if let Some(format) = self.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
            area.push(kind::BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = self.data_file.as_ref().filter(|_| self.geometry.external_data) {
            area.push(kind::DATA_FILE, &to_bytes(name));
        }
        if let Some(pointer) = self.encryption {
            area.push(kind::ENCRYPTION, &pointer.encode());
        }
        if self.geometry.version >= 3 && room_bytes.saturating_sub(area.len()) >= FEATURE_TABLE_MIN_ROOM_BYTES
        {
            area.push(kind::FEATURE_NAMES, &feature::encode_names(&self.feature_names));
        }
        if let Some(bitmaps) = self.bitmaps {
            area.push(kind::BITMAPS, &bitmaps.encode());
        }
        for unknown in &self.unknown_extensions {
            if unknown.kind != kind::BACKING_FORMAT || self.backing.is_none() {
                area.push(unknown.kind, &unknown.data);
            }
        }
        area.finish()
    }

    /// Writes the header cluster. Not durable before a flush.
    pub(super) fn write(&self, storage: &dyn Storage) -> Result<()> {
        storage.write_at(&self.encode()?, 0)
    }
}

/// A table that the header points to.
struct Table {
    offset_field: &'static str,
    offset_at: u64,
    offset: u64,
    count_field: &'static str,
    count_at: u64,
    count: u32,
    /// Bytes of an entry; at most 2^21.
    entry: u64,
    max: u64,
}

/// The rules for every table: not larger than its limit, aligned, below 2^63 to its last byte.
fn check_table(file: &Path, geometry: Geometry, table: &Table) -> Result<()> {
    let size = u64::from(table.count) * table.entry; // u32 × 2^21 fits
    if size > table.max {
        let expected = format!("at most {}", table.max / table.entry);
        return Err(Error::corrupt(file, table.count_field, table.count_at, expected, table.count));
    }
    let past_end = table.offset > i64::MAX as u64 - size; // size is at most 64 MiB here
    if past_end || geometry.in_cluster(table.offset) != 0 {
        let expected = "a multiple of the cluster size, with the table's end below 2^63";
        let found = format!("{:#x}", table.offset);
        return Err(Error::corrupt(file, table.offset_field, table.offset_at, expected, found));
    }
    Ok(())
}
