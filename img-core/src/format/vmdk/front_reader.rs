//! streamOptimized from a stream: the grains as their markers name them, up to the end-of-stream marker. Tables,
//! directory and footer are passed over: they say the same once more.

use std::sync::Arc;

use zerocopy::FromBytes as _;

use super::{
    descriptor::Descriptor,
    header::{GRAIN_MARKER_BYTES, Header, RawMarker, SECTOR_BYTES, marker},
    open,
};
use crate::{
    Error, Result,
    format::{Codec, FrontReader, FrontRun, HostFile, HostOffset, Place},
    storage::{Storage as _, StreamStorage},
};

/// See the module.
pub(super) struct MarkerStream {
    stream: Arc<StreamStorage>,
    header: Header,
    at: u64,
    /// Sectors before this one have been there: grains come in order.
    next_sector: u64,
    is_complete: bool,
}

impl MarkerStream {
    /// # Errors
    /// [`Error::Unsupported`] for an image over a parent; [`Error::Corrupt`] for a descriptor that breaks the rules.
    pub(super) fn new(stream: Arc<StreamStorage>, header: Header) -> Result<Self> {
        let (text, at) = open::embedded_text(&*stream, &header)?;
        let descriptor = Descriptor::parse(&text, stream.path(), at)?;
        if open::expects_parent(&descriptor) {
            let name = descriptor.parent_hint.unwrap_or_default();
            let feature = format!("reading a VMDK over a parent ('{name}') from a pipe");
            return Err(Error::unsupported(stream.path(), feature));
        }
        let at = header.overhead_bytes.max(header.descriptor.as_ref().map_or(0, |place| place.end));
        Ok(Self { stream, header, at, next_sector: 0, is_complete: false })
    }

    /// Takes the next marker; the grain that follows it, if one does.
    fn marker(&mut self) -> Result<Option<FrontRun>> {
        let path = self.stream.path();
        let wrong = |at, expected: &str, found: &dyn std::fmt::Display| {
            Err(Error::corrupt(path, "stream marker", at, expected, found))
        };
        let mut sector = [0; 512];
        self.stream.read_at(&mut sector, self.at)?;
        let raw = RawMarker::read_from_bytes(&sector).expect("a sector");
        let (value, size_bytes, kind) = (raw.value.get(), raw.size_bytes.get(), raw.kind.get());
        if size_bytes == 0 {
            let behind =
                value.checked_mul(SECTOR_BYTES).and_then(|bytes| bytes.checked_add(self.at + SECTOR_BYTES));
            match (kind, behind) {
                (marker::END_OF_STREAM, _) if value == 0 => self.is_complete = true,
                (marker::GRAIN_TABLE | marker::GRAIN_DIRECTORY | marker::FOOTER, Some(behind)) => {
                    self.at = behind
                }
                (marker::GRAIN_TABLE | marker::GRAIN_DIRECTORY | marker::FOOTER, None) => {
                    return wrong(self.at, "a number of sectors", &value);
                }
                _ => return wrong(self.at, "one of the five kinds", &kind),
            }
            return Ok(None);
        }
        let header = &self.header;
        let is_next = value % header.grain_sectors == 0
            && (self.next_sector..header.capacity_sectors).contains(&value)
            && u64::from(size_bytes) <= 2 * header.grain_bytes();
        if !is_next {
            let found = format!("{size_bytes} bytes for sector {value}");
            return wrong(self.at, "a grain of the disk, behind the one before", &found);
        }
        self.next_sector = value + header.grain_sectors;
        let guest_offset = value * SECTOR_BYTES; // below 2^63, as the capacity is
        let place = Place::Encoded {
            file: HostFile::IMAGE,
            at: HostOffset(self.at + GRAIN_MARKER_BYTES as u64),
            stored_bytes: size_bytes,
            decoded_bytes: u32::try_from(header.grain_bytes()).expect("at most 2 MiB"),
            skip_bytes: 0,
            how: Codec::Zlib,
        };
        self.at += (GRAIN_MARKER_BYTES as u64 + u64::from(size_bytes)).next_multiple_of(SECTOR_BYTES);
        let len_bytes = header.grain_bytes().min(header.capacity_bytes() - guest_offset);
        Ok(Some(FrontRun { guest_offset, len_bytes, place }))
    }
}

impl FrontReader for MarkerStream {
    fn virtual_size_bytes(&self) -> Option<u64> {
        Some(self.header.capacity_bytes())
    }

    fn unit_bytes(&self) -> u64 {
        self.header.grain_bytes()
    }

    fn next(&mut self, runs: &mut Vec<FrontRun>) -> Result<()> {
        while runs.is_empty() && !self.is_complete {
            runs.extend(self.marker()?);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.stream.drain().map(drop)
    }
}
