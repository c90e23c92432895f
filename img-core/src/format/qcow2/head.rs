//! The first bytes of an image: the fixed fields, and what follows them in the header cluster, read as far as
//! it is asked for.

use zerocopy::FromBytes as _;

use super::{
    extension::{be32, kind, name},
    header::{CLUSTER_BITS, HEADER_BYTES, MAGIC, MAX_BACKING_NAME_BYTES, RawHeader, VERSION_3_MIN_BYTES},
};
use crate::{Error, Result, storage::Storage};

/// The first read: holds the whole header of nearly every image.
const FIRST_READ_BYTES: usize = 4096;
/// Type and length of a header extension.
const EXTENSION_HEAD_BYTES: u64 = 8;

/// The bytes of the header cluster, read as far as they were asked for.
pub(super) struct Head<'a> {
    pub(super) storage: &'a dyn Storage,
    bytes: Vec<u8>,
}

impl<'a> Head<'a> {
    pub(super) fn read(storage: &'a dyn Storage) -> Result<Self> {
        let mut bytes = vec![0; FIRST_READ_BYTES];
        storage.read_at(&mut bytes, 0)?;
        Ok(Self { storage, bytes })
    }

    /// The fixed fields, those of version 3 filled in for version 2, absent ones zero. Magic, version,
    /// cluster size and the header's minimal length are checked.
    pub(super) fn fixed_fields(&self) -> Result<RawHeader> {
        let file = self.storage.path();
        let (mut raw, _) = RawHeader::read_from_prefix(&self.bytes).expect("the first read is longer");
        if raw.magic != MAGIC {
            return Err(Error::WrongFormat { file: file.to_owned(), format: "qcow2" });
        }
        let version = raw.version.get();
        if !(2..=3).contains(&version) {
            return Err(Error::Invalid(format!("Unsupported qcow2 version {version}")));
        }
        if !CLUSTER_BITS.contains(&raw.cluster_bits.get()) {
            return Err(Error::corrupt(
                file,
                "header.cluster_bits",
                20,
                format_args!("{} to {}", CLUSTER_BITS.start(), CLUSTER_BITS.end()),
                raw.cluster_bits,
            ));
        }
        if version == 2 {
            raw.incompatible_features = 0.into();
            raw.compatible_features = 0.into();
            raw.autoclear_features = 0.into();
            raw.refcount_order = 4.into();
            raw.header_length = 72.into();
        }
        let length = raw.header_length.get();
        if version >= 3 && length < VERSION_3_MIN_BYTES {
            let expected = format!("at least {VERSION_3_MIN_BYTES}");
            return Err(Error::corrupt(file, "header.header_length", 100, expected, length));
        }
        // Fields behind the stated length are absent, whatever stands there.
        let present = usize::try_from(length).expect("u32 fits usize").min(HEADER_BYTES);
        if present <= 104 {
            raw.compression_type = 0;
        }
        for (index, byte) in raw.padding.iter_mut().enumerate() {
            if 105 + index >= present {
                *byte = 0;
            }
        }
        Ok(raw)
    }

    /// The header extensions in `start..end`, up to the one that ends them: the rest of the area, most of a
    /// cluster, means nothing. Where they do not end inside the area, all of it.
    pub(super) fn extensions(&mut self, start: u64, end: u64) -> Result<&[u8]> {
        let mut at = start;
        while at + EXTENSION_HEAD_BYTES <= end {
            let head = self.bytes(at, at + EXTENSION_HEAD_BYTES)?;
            let (kind, length) = (be32(head, 0), u64::from(be32(head, 4)));
            at += EXTENSION_HEAD_BYTES;
            if kind == kind::END {
                return self.bytes(start, at);
            }
            at += length.next_multiple_of(8);
        }
        self.bytes(start, end)
    }

    /// Bytes `start..end` of the file, at most a cluster; none when `start` is not below `end`.
    pub(super) fn bytes(&mut self, start: u64, end: u64) -> Result<&[u8]> {
        if start >= end {
            return Ok(&[]);
        }
        let fits = "a place in the first cluster";
        let (start, end) = (usize::try_from(start).expect(fits), usize::try_from(end).expect(fits));
        let have = self.bytes.len();
        if end > have {
            self.bytes.resize(end.next_multiple_of(FIRST_READ_BYTES), 0);
            self.storage.read_at(&mut self.bytes[have..], have as u64)?;
        }
        Ok(&self.bytes[start..end])
    }

    /// The backing file name, where there is one.
    pub(super) fn backing_name(&mut self, raw: &RawHeader) -> Result<Option<String>> {
        let offset = raw.backing_file_offset.get();
        if offset == 0 {
            return Ok(None);
        }
        let length = u64::from(raw.backing_file_size.get());
        let room = (1_u64 << raw.cluster_bits.get()) - offset; // checked: at most the cluster size
        let limit = room.min(MAX_BACKING_NAME_BYTES);
        let file = self.storage.path();
        if length > limit {
            return Err(Error::corrupt(
                file,
                "header.backing_file_size",
                16,
                format_args!("at most {limit}"),
                length,
            ));
        }
        let name = name(self.bytes(offset, offset + length)?);
        Ok((!name.is_empty()).then_some(name))
    }
}
