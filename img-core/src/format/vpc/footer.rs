//! The footer: 512 bytes that describe the disk ("Hard Disk Footer Format", Virtual Hard Disk Image Format
//! Specification 1.0).
//!
//! A fixed disk has it once, behind the data. Dynamic and differencing disks begin with a copy of it, which
//! counts as the truth, and end with another one. [`Copies`] finds them, and [`Copies::choose`] says which one
//! describes the disk.

use std::{fmt, path::Path};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32, U64},
};

use super::geometry::{Chs, MAX_SECTORS, SECTOR_BYTES};
use crate::{Error, Result, storage::Storage};

/// All fields, big-endian.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub(super) struct RawFooter {
    pub(super) cookie: [u8; 8],
    pub(super) features: U32,
    pub(super) version: U32,
    /// Host offset of the dynamic disk header; all ones for a fixed disk.
    pub(super) data_offset: U64,
    /// Seconds since the start of the year 2000, UTC.
    pub(super) timestamp: U32,
    pub(super) creator_app: [u8; 4],
    pub(super) creator_version: U32,
    pub(super) creator_os: [u8; 4],
    pub(super) original_size: U64,
    pub(super) current_size: U64,
    pub(super) cylinders: U16,
    pub(super) heads: u8,
    pub(super) sectors_per_track: u8,
    pub(super) disk_type: U32,
    pub(super) checksum: U32,
    pub(super) unique_id: [u8; 16],
    pub(super) saved_state: u8,
    pub(super) reserved: [u8; 427],
}
const _: () = assert!(size_of::<RawFooter>() == FOOTER_BYTES);

/// Bytes of a footer, and of the sector that it fills.
pub(super) const FOOTER_BYTES: usize = 512;
/// The first bytes of every footer.
pub(super) const COOKIE: [u8; 8] = *b"conectix";
/// Version 1.0, which is the only one.
pub(super) const VERSION: u32 = 0x0001_0000;
/// The bit that is always set in `features`.
pub(super) const FEATURE_RESERVED: u32 = 2;
/// `data_offset` of a fixed disk.
pub(super) const NO_OFFSET: u64 = u64::MAX;
/// Where the sums stand that are left out of themselves.
const CHECKSUM_AT: usize = 64;
/// Programs before Virtual PC 2004 left out the last byte of the footer.
const OLD_FOOTER_BYTES: u64 = 511;

/// Creators whose disks are as large as `current_size` says; for all others the geometry counts, as in the
/// reference: Hyper-V, `qemu-img` with `force_size`, disk2vhd, and two of XenServer's.
const SIZE_COUNTS: [&[u8; 4]; 5] = [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"];

/// The unique id of a disk, as it stands in the file.
pub(super) type UniqueId = [u8; 16];

/// The kinds of disks that can be opened ("Disk Type").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskType {
    /// All bytes of the disk, then the footer.
    Fixed,
    /// Blocks that are there when they were written.
    Dynamic,
    /// Sectors that differ from those of a parent.
    Differencing,
}

impl DiskType {
    /// The number in the footer.
    pub(super) const fn number(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }

    const fn from_number(number: u32) -> Option<Self> {
        match number {
            2 => Some(Self::Fixed),
            3 => Some(Self::Dynamic),
            4 => Some(Self::Differencing),
            _ => None,
        }
    }
}

/// The runtime option `force_size_calc`: how the size follows from the footer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum SizeRule {
    /// By the creator.
    #[default]
    Creator,
    /// Always the geometry, unless that is the largest there is.
    Chs,
    /// Always `current_size`.
    CurrentSize,
}

/// One's complement of the sum of all bytes, those of the sum itself left out ("Checksum").
pub(super) fn checksum(bytes: &[u8], sum_at: usize) -> u32 {
    let sum_bytes = sum_at..sum_at + 4;
    let bytes = bytes.iter().enumerate().filter(|(at, _)| !sum_bytes.contains(at));
    // At most 1024 bytes: the sum is below 2^18.
    !bytes.map(|(_, byte)| u32::from(*byte)).sum::<u32>()
}

impl fmt::Debug for RawFooter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawFooter")
            .field("disk_type", &self.disk_type.get())
            .field("current_size", &self.current_size.get())
            .field("creator_app", &self.creator_app)
            .field("unique_id", &self.unique_id)
            .finish_non_exhaustive()
    }
}

impl RawFooter {
    /// The footer in a sector, whatever it says.
    pub(super) fn from_sector(sector: &[u8; FOOTER_BYTES]) -> Self {
        zerocopy::transmute!(*sector)
    }

    /// Whether the sum is that of the other fields.
    pub(super) fn is_intact(&self) -> bool {
        self.checksum.get() == checksum(self.as_bytes(), CHECKSUM_AT)
    }

    /// The same with the sum that belongs to the other fields.
    pub(super) fn summed(mut self) -> Self {
        self.checksum = checksum(self.as_bytes(), CHECKSUM_AT).into();
        self
    }

    /// The geometry that it records.
    pub(super) fn chs(&self) -> Chs {
        Chs { cylinders: self.cylinders.get(), heads: self.heads, sectors: self.sectors_per_track }
    }

    /// Whether the size of the disk is `current_size` rather than what the geometry spans.
    pub(super) fn size_counts(&self, rule: SizeRule) -> bool {
        let by_rule = match rule {
            SizeRule::Creator => SIZE_COUNTS.contains(&&self.creator_app),
            SizeRule::Chs => false,
            SizeRule::CurrentSize => true,
        };
        by_rule || self.chs() == Chs::MAX
    }

    /// Sectors that the guest sees.
    pub(super) fn virtual_sectors(&self, rule: SizeRule) -> u64 {
        if self.size_counts(rule) {
            self.current_size.get() / SECTOR_BYTES
        } else {
            self.chs().span_sectors()
        }
    }

    /// The kind of disk.
    fn disk_type(&self) -> Option<DiskType> {
        DiskType::from_number(self.disk_type.get())
    }

    /// Whether it describes a fixed disk whose data ends at `end_bytes`.
    fn is_fixed_up_to(&self, end_bytes: u64) -> bool {
        self.disk_type() == Some(DiskType::Fixed)
            && self.current_size.get().checked_next_multiple_of(SECTOR_BYTES) == Some(end_bytes)
    }
}

/// What stands where a copy of the footer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "two of them are made for each image")]
pub(super) enum Copy {
    /// Something else.
    Absent,
    /// A footer whose sum is wrong.
    Broken {
        /// The sum in it.
        found: u32,
        /// The sum of its bytes.
        expected: u32,
    },
    /// A footer.
    Intact(RawFooter),
}

impl Copy {
    pub(super) fn parse(sector: &[u8; FOOTER_BYTES]) -> Self {
        let footer = RawFooter::from_sector(sector);
        if footer.cookie != COOKIE {
            return Self::Absent;
        }
        if !footer.is_intact() {
            return Self::Broken { found: footer.checksum.get(), expected: footer.summed().checksum.get() };
        }
        Self::Intact(footer)
    }
}

/// The places where a footer may be, and what is there.
#[derive(Clone, Debug)]
pub(super) struct Copies {
    /// At the start of the file.
    pub(super) front: Copy,
    /// At its end.
    pub(super) back: Copy,
    /// Host offset of the one at the end.
    pub(super) back_at: u64,
    /// Length of the file.
    pub(super) file_bytes: u64,
}

/// The footer that describes a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Footer {
    pub(super) raw: RawFooter,
    pub(super) disk_type: DiskType,
    /// Host offset of the copy that was believed.
    pub(super) at_bytes: u64,
}

impl Copies {
    /// Looks at both ends of a file.
    pub(super) fn read(storage: &dyn Storage) -> Result<Self> {
        let file_bytes = storage.len_bytes()?;
        if file_bytes < OLD_FOOTER_BYTES {
            // In the reference's words; whoever opens it says which file.
            let why = if file_bytes == 0 { "File too small for a VHD header" } else { "invalid VPC image" };
            return Err(Error::Invalid(why.to_owned()));
        }
        let mut sector = [0; FOOTER_BYTES];
        let front = match file_bytes {
            0..SECTOR_BYTES => Copy::Absent,
            _ => {
                storage.read_at(&mut sector, 0)?;
                Copy::parse(&sector)
            }
        };
        let mut back = (Copy::Absent, file_bytes.saturating_sub(SECTOR_BYTES));
        for length in [SECTOR_BYTES, OLD_FOOTER_BYTES] {
            let Some(at) = file_bytes.checked_sub(length) else { continue };
            // Behind the end bytes read as zeroes, which is what the missing byte is.
            storage.read_at(&mut sector, at)?;
            let found = Copy::parse(&sector);
            if found != Copy::Absent {
                back = (found, at);
                break;
            }
        }
        Ok(Self { front, back: back.0, back_at: back.1, file_bytes })
    }

    /// The copy that describes the disk.
    ///
    /// The one at the front does, except where the one at the end describes a fixed disk that fills the file up
    /// to it: then the front is a sector of that disk, and what a guest writes there decides nothing. Where the
    /// front is damaged, the end speaks for the disk.
    ///
    /// # Errors
    /// [`Error::Invalid`] without any; [`Error::Corrupt`] when none is whole.
    pub(super) fn choose(&self, path: &Path) -> Result<Footer> {
        let (raw, at_bytes) = match (&self.front, &self.back) {
            (_, Copy::Intact(back)) if back.is_fixed_up_to(self.back_at) => (back, self.back_at),
            (Copy::Intact(front), _) => (front, 0),
            (_, Copy::Intact(back)) => (back, self.back_at),
            (Copy::Broken { found, expected }, _) => return Err(wrong_sum(path, 0, *expected, *found)),
            (_, Copy::Broken { found, expected }) => {
                return Err(wrong_sum(path, self.back_at, *expected, *found));
            }
            // In the reference's words; whoever opens it says which file.
            (Copy::Absent, Copy::Absent) => return Err(Error::Invalid("invalid VPC image".to_owned())),
        };
        let corrupt = |structure, offset: u64, expected: String, found: String| {
            Err(Error::corrupt(path, structure, at_bytes + offset, expected, found))
        };
        let Some(disk_type) = raw.disk_type() else {
            return Err(Error::unsupported(path, format_args!("disk type {}", raw.disk_type.get())));
        };
        if raw.version.get() >> 16 != VERSION >> 16 {
            return corrupt("footer.version", 12, "1.x".to_owned(), format!("{:#x}", raw.version.get()));
        }
        if disk_type == DiskType::Fixed && at_bytes == 0 && self.back_at != 0 {
            return corrupt(
                "footer.disk_type",
                60,
                "a fixed disk to have its footer at the end alone".to_owned(),
                "one at the start".to_owned(),
            );
        }
        Ok(Footer { raw: *raw, disk_type, at_bytes })
    }
}

impl Footer {
    /// Guest-visible bytes, checked against the largest disk and, for a fixed one, the data that is there.
    ///
    /// # Errors
    /// [`Error::Unsupported`] above 2040 GiB; [`Error::Corrupt`].
    pub(super) fn virtual_size_bytes(&self, path: &Path, rule: SizeRule) -> Result<u64> {
        let sectors = self.raw.virtual_sectors(rule);
        if sectors > MAX_SECTORS {
            return Err(Error::unsupported(path, format_args!("a disk of {sectors} sectors")));
        }
        let bytes = sectors * SECTOR_BYTES; // at most 2040 GiB
        if self.disk_type == DiskType::Fixed && bytes > self.at_bytes {
            return Err(Error::corrupt(
                path,
                "footer.current_size",
                self.at_bytes + 48,
                format_args!("at most the {} bytes before the footer", self.at_bytes),
                bytes,
            ));
        }
        Ok(bytes)
    }
}

/// Whether the last bytes of a file, `file_bytes` long, are the footer of a fixed disk that fills the rest.
pub(super) fn ends_fixed_disk(tail: &[u8], file_bytes: u64) -> bool {
    let Some(sector) = tail.last_chunk::<FOOTER_BYTES>() else { return false };
    let Some(end) = file_bytes.checked_sub(SECTOR_BYTES) else { return false };
    matches!(Copy::parse(sector), Copy::Intact(footer) if footer.is_fixed_up_to(end))
}

fn wrong_sum(path: &Path, at_bytes: u64, expected: u32, found: u32) -> Error {
    Error::corrupt(
        path,
        "footer.checksum",
        at_bytes + CHECKSUM_AT as u64,
        format_args!("{expected:#010x}"),
        format_args!("{found:#010x}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{format::vpc::tests::footer, storage::MemoryStorage};

    fn choose(file: &[u8]) -> Result<Footer> {
        let storage = MemoryStorage::from_bytes("t.vhd", file);
        Copies::read(&storage)?.choose(storage.path())
    }

    /// A footer as its bytes.
    fn sector(disk_type: DiskType, current_size: u64) -> Vec<u8> {
        footer(disk_type, current_size, b"qem2").as_bytes().to_vec()
    }

    #[test]
    fn the_sum_leaves_itself_out() {
        let whole = footer(DiskType::Dynamic, 1 << 20, b"qemu");
        assert!(whole.is_intact());
        let mut other = whole;
        other.saved_state = 1;
        assert!(!other.is_intact() && other.summed().is_intact());
    }

    #[test]
    fn a_fixed_disk_is_described_at_its_end_whatever_its_guest_wrote_in_front() {
        let guest = [sector(DiskType::Differencing, 1 << 20), vec![7; 512]].concat();
        let file = [guest, sector(DiskType::Fixed, 1024)].concat();
        let found = choose(&file).unwrap();
        assert_eq!((found.disk_type, found.at_bytes), (DiskType::Fixed, 1024));
        assert!(ends_fixed_disk(&file, 1536));
        // Where it does not fill the file, the front is the truth.
        let file = [sector(DiskType::Dynamic, 4096), vec![0; 512], sector(DiskType::Fixed, 512)].concat();
        assert_eq!(choose(&file).unwrap().disk_type, DiskType::Dynamic);
        assert!(!ends_fixed_disk(&file, 1536));
    }

    #[test]
    fn either_copy_speaks_for_a_dynamic_disk() {
        let whole = sector(DiskType::Dynamic, 4096);
        let mut broken = whole.clone();
        broken[100] = 1;
        let middle = vec![0; 512];
        for (front, back, at) in [(&whole, &whole, 0), (&whole, &broken, 0), (&broken, &whole, 1024)] {
            let file = [front.clone(), middle.clone(), back.clone()].concat();
            assert_eq!(choose(&file).unwrap().at_bytes, at);
        }
        let error = choose(&[broken.clone(), middle.clone(), broken].concat()).unwrap_err().to_string();
        assert!(error.contains("footer.checksum at byte 0x40"), "{error}");
        assert!(matches!(choose(&middle), Err(Error::Invalid(_))));
    }

    #[test]
    fn footers_of_511_bytes_count() {
        let mut file = vec![7; 1024];
        file.extend(&sector(DiskType::Fixed, 1024)[..511]);
        assert_eq!(choose(&file).unwrap().at_bytes, 1024);
    }

    #[test]
    fn the_creator_decides_which_size_counts() {
        let size = |app: &[u8; 4], rule| {
            let mut raw = footer(DiskType::Dynamic, 100 << 20, app);
            (raw.cylinders, raw.heads, raw.sectors_per_track) = (10.into(), 4, 17);
            raw.virtual_sectors(rule)
        };
        for app in [b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"] {
            assert_eq!(size(app, SizeRule::Creator), 204_800, "{app:?}");
        }
        for app in [b"vpc ", b"qemu", b"vs  ", b"vbox", b"d2v\0"] {
            assert_eq!(size(app, SizeRule::Creator), 680, "{app:?}");
        }
        assert_eq!(size(b"win ", SizeRule::Chs), 680);
        assert_eq!(size(b"vpc ", SizeRule::CurrentSize), 204_800);
    }
}
