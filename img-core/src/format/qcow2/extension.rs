//! Header extensions: the typed records between the fixed fields and the backing file name
//! ("Header extensions").

use std::path::Path;

use super::{feature, geometry::Geometry};
use crate::{Error, Result};

/// Types of extensions that mean something to this driver.
pub(super) mod kind {
    /// Ends the area.
    pub(in super::super) const END: u32 = 0;
    /// "Backing file format name string".
    pub(in super::super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// "Feature name table".
    pub(in super::super) const FEATURE_NAMES: u32 = 0x6803_f857;
    /// "Bitmaps extension".
    pub(in super::super) const BITMAPS: u32 = 0x2385_2875;
    /// "Full disk encryption header pointer".
    pub(in super::super) const ENCRYPTION: u32 = 0x0537_be77;
    /// "External data file name string".
    pub(in super::super) const DATA_FILE: u32 = 0x4441_5441;
}

/// Bitmaps an image may have (the reference's limit).
pub(super) const MAX_BITMAPS: u32 = 65535;
/// Bytes of a bitmap directory (the reference's limit: a header and a name of 1000 bytes each).
pub(super) const MAX_BITMAP_DIRECTORY_BYTES: u64 = 1024 * 65535;
/// Backing format names are shorter than this (the reference's buffer).
const BACKING_FORMAT_BYTES: usize = 16;

/// "Bitmaps extension": where the bitmap directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BitmapsExtension {
    /// Bitmaps in the directory; at least 1.
    pub(super) count: u32,
    /// Bytes of the directory.
    pub(super) directory_bytes: u64,
    /// Its host offset, aligned to clusters.
    pub(super) directory_offset: u64,
}

/// "Full disk encryption header pointer": where the LUKS header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EncryptionPointer {
    /// Host offset, aligned to clusters.
    pub(super) offset: u64,
    /// Bytes of the header with its key material.
    pub(super) length_bytes: u64,
}

/// An extension as it stands in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct UnknownExtension {
    /// Its type.
    pub(super) kind: u32,
    /// Its bytes, without padding.
    pub(super) data: Vec<u8>,
}

/// Everything between the fixed fields and the backing file name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Extensions {
    pub(super) backing_format: Option<String>,
    pub(super) data_file: Option<String>,
    pub(super) encryption: Option<EncryptionPointer>,
    pub(super) feature_names: Vec<feature::FeatureName>,
    /// There is a bitmaps extension, consistent or not.
    pub(super) has_bitmaps: bool,
    pub(super) bitmaps: Option<BitmapsExtension>,
    pub(super) unknown: Vec<UnknownExtension>,
}

impl Extensions {
    /// Parses the area `bytes`, which begins at host offset `at` and reaches to the backing file name or
    /// the end of the header cluster.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for an extension that leaves the area or breaks a rule of its own.
    pub(super) fn parse(bytes: &[u8], at: u64, rules: &Rules<'_>) -> Result<Self> {
        let mut found = Self::default();
        let mut position = 0;
        while let Some(head) = bytes.get(position..position + 8) {
            let kind = be32(head, 0);
            if kind == kind::END {
                return Ok(found);
            }
            let length = usize::try_from(be32(head, 4)).expect("u32 fits usize");
            let here = at + position as u64;
            position += 8;
            let Some(data) = bytes[position..].get(..length) else {
                return Err(Error::corrupt(
                    rules.file,
                    "header extension length",
                    here + 4,
                    format_args!("at most {} bytes, the rest of the header cluster", bytes.len() - position),
                    length,
                ));
            };
            found.take(kind, data, here, rules)?;
            // Cannot overflow: both are below the cluster size.
            position += length.next_multiple_of(8);
        }
        if position < bytes.len() {
            return Err(Error::corrupt(
                rules.file,
                "header extension",
                at + position as u64,
                "8 bytes of type and length, or the end of the area",
                format_args!("{} bytes", bytes.len() - position),
            ));
        }
        Ok(found)
    }

    fn take(&mut self, kind: u32, data: &[u8], at: u64, rules: &Rules<'_>) -> Result<()> {
        match kind {
            kind::BACKING_FORMAT => {
                if data.len() >= BACKING_FORMAT_BYTES {
                    return Err(Error::corrupt(
                        rules.file,
                        "backing format name",
                        at,
                        format_args!("fewer than {BACKING_FORMAT_BYTES} bytes"),
                        data.len(),
                    ));
                }
                self.backing_format = Some(text(data, rules.file, "backing format name", at)?);
            }
            kind::DATA_FILE => self.data_file = Some(name(data)),
            kind::FEATURE_NAMES => {
                self.feature_names = feature::parse_names(data);
            }
            kind::ENCRYPTION => self.encryption = Some(encryption_pointer(data, at, rules)?),
            kind::BITMAPS => {
                self.has_bitmaps = true;
                self.bitmaps = bitmaps(data, at, rules)?;
            }
            _ => self.unknown.push(UnknownExtension { kind, data: data.to_vec() }),
        }
        Ok(())
    }
}

/// What the fixed fields say about extensions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules<'a> {
    pub(super) file: &'a Path,
    pub(super) geometry: Geometry,
    /// The header's encryption method is LUKS.
    pub(super) luks: bool,
    /// The autoclear bit vouches for the bitmaps; without it the extension's content is not looked at.
    pub(super) bitmaps_consistent: bool,
}

fn encryption_pointer(data: &[u8], at: u64, rules: &Rules<'_>) -> Result<EncryptionPointer> {
    if !rules.luks {
        return Err(Error::corrupt(
            rules.file,
            "encryption header pointer",
            at,
            "none, as the encryption method is not LUKS",
            "one",
        ));
    }
    if data.len() != 16 {
        return Err(Error::corrupt(rules.file, "encryption header pointer length", at + 4, 16, data.len()));
    }
    let pointer = EncryptionPointer { offset: be64(data, 0), length_bytes: be64(data, 8) };
    if rules.geometry.in_cluster(pointer.offset) != 0 {
        return Err(Error::corrupt(
            rules.file,
            "encryption header offset",
            at + 8,
            "a multiple of the cluster size",
            format_args!("{:#x}", pointer.offset),
        ));
    }
    Ok(pointer)
}

/// `None` when the autoclear bit says that the content means nothing any more.
fn bitmaps(data: &[u8], at: u64, rules: &Rules<'_>) -> Result<Option<BitmapsExtension>> {
    if data.len() != 24 {
        return Err(Error::corrupt(rules.file, "bitmaps extension length", at + 4, 24, data.len()));
    }
    if !rules.bitmaps_consistent {
        return Ok(None);
    }
    let bad = |field, offset, expected: &dyn std::fmt::Display, found: u64| {
        Err(Error::corrupt(rules.file, field, at + 8 + offset, expected, format_args!("{found:#x}")))
    };
    let count = be32(data, 0);
    if count == 0 || count > MAX_BITMAPS {
        return bad("bitmaps extension, nb_bitmaps", 0, &format_args!("1 to {MAX_BITMAPS}"), count.into());
    }
    let reserved = be32(data, 4);
    if reserved != 0 {
        return bad("bitmaps extension, reserved field", 4, &"0", reserved.into());
    }
    let directory_bytes = be64(data, 8);
    if directory_bytes > MAX_BITMAP_DIRECTORY_BYTES {
        let expected = format!("at most {MAX_BITMAP_DIRECTORY_BYTES}");
        return bad("bitmaps extension, bitmap_directory_size", 8, &expected, directory_bytes);
    }
    let directory_offset = be64(data, 16);
    let aligned = rules.geometry.in_cluster(directory_offset) == 0;
    if !aligned || directory_offset == 0 || directory_offset > i64::MAX as u64 - directory_bytes {
        let expected = "a multiple of the cluster size, not 0, below 2^63";
        return bad("bitmaps extension, bitmap_directory_offset", 16, &expected, directory_offset);
    }
    Ok(Some(BitmapsExtension { count, directory_bytes, directory_offset }))
}

/// A name in the file, whatever its bytes. Ends at a zero byte, as it does for the reference.
pub(super) fn name(data: &[u8]) -> String {
    crate::text::from_bytes(data.split(|byte| *byte == 0).next().unwrap_or_default())
}

/// A word in the file, which is text. Ends as a [`name`] does.
pub(super) fn text(data: &[u8], file: &Path, structure: &'static str, at: u64) -> Result<String> {
    let end = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    String::from_utf8(data[..end].to_vec())
        .map_err(|error| Error::corrupt(file, structure, at, "UTF-8 text", error.to_string()))
}

/// Collects the bytes of an extension area.
#[derive(Debug, Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Appends an extension with its padding.
    pub(super) fn push(&mut self, kind: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).expect("an extension is shorter than a cluster");
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend(length.to_be_bytes());
        self.bytes.extend(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The area, with the mark of its end.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.push(kind::END, &[]);
        self.bytes
    }
}

impl BitmapsExtension {
    /// The extension's data.
    pub(super) fn encode(self) -> Vec<u8> {
        let mut data = Vec::with_capacity(24);
        data.extend(self.count.to_be_bytes());
        data.extend([0; 4]);
        data.extend(self.directory_bytes.to_be_bytes());
        data.extend(self.directory_offset.to_be_bytes());
        data
    }
}

impl EncryptionPointer {
    /// The extension's data.
    pub(super) fn encode(self) -> Vec<u8> {
        [self.offset.to_be_bytes(), self.length_bytes.to_be_bytes()].concat()
    }
}

/// The big-endian word at `at`; the caller knows that it is there.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// See [`be32`].
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
