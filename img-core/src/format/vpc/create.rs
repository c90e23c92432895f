//! New images, laid out as the reference lays them out.
//!
//! Dynamic: the footer's copy, the header, the table, the footer. A differencing disk, which the reference does
//! not make, has its parent locators between the table and the footer. Fixed: the data as a hole, the footer.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::rand::{GetRandomFlags, getrandom};
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::{
    Vpc,
    footer::{
        COOKIE, DiskType, FEATURE_RESERVED, FOOTER_BYTES, NO_OFFSET, RawFooter, SizeRule, UniqueId, VERSION,
    },
    geometry::{Chs, MAX_SECTORS, SECTOR_BYTES},
    header::{ENTRY_BYTES, HEADER_BYTES, RawHeader, RawLocator, UNUSED},
    locator, parent,
};
use crate::{
    Error, Result,
    format::{
        Backing, CreateRequest, Driver as _, OpenMode, OptionDescription, OptionKind, OptionSet,
        file_preallocation, first_block,
    },
    storage::{Preallocation, Storage},
};

/// In the order in which `create` reports them. Names of parents are ours alone.
pub(super) static CREATE_OPTIONS: &[OptionDescription] = &[
    OptionDescription::new("size", OptionKind::Size, "Virtual disk size"),
    OptionDescription::new("backing_file", OptionKind::Text, "File name of a base image").beyond_reference(),
    OptionDescription::new("backing_fmt", OptionKind::Text, "Image format of the base image")
        .beyond_reference(),
    OptionDescription::new(
        "subformat",
        OptionKind::Text,
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
    OptionDescription::new(
        "force_size",
        OptionKind::Switch,
        "Force disk size calculation to use the actual size specified, rather than using the nearest \
         CHS-based calculation",
    ),
];

/// Creator of disks whose geometry counts, and of those whose size does.
const CREATOR: [[u8; 4]; 2] = [*b"qemu", *b"qem2"];
/// 5.3, as all that the reference makes.
const CREATOR_VERSION: u32 = 0x0005_0003;
/// Windows.
const CREATOR_OS: [u8; 4] = *b"Wi2k";

/// Makes the image.
pub(super) fn create(storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()> {
    let mut options = request.options.clone();
    let preallocation = file_preallocation(&options)?;
    options.take("preallocation");
    options.check_names(&[CREATE_OPTIONS])?;
    let force_size = options.switch("force_size")?.unwrap_or(false);
    let disk_type = type_without_parent(&options)?;
    if let Some(backing) = &request.backing {
        if disk_type == DiskType::Fixed {
            return Err(Error::Invalid("A fixed VHD cannot have a backing file".to_owned()));
        }
        return differencing(&**storage, request, backing, force_size);
    }
    let footer = new_footer(disk_type, request.virtual_size_bytes, force_size)?;
    match disk_type {
        DiskType::Fixed => fixed(&**storage, &footer, preallocation),
        DiskType::Dynamic | DiskType::Differencing => {
            sparse(&**storage, &footer, RawHeader::empty(), Vec::new())
        }
    }
}

/// What the options call for where there is no parent.
pub(super) fn type_without_parent(options: &OptionSet) -> Result<DiskType> {
    match options.get("subformat") {
        None | Some("dynamic") => Ok(DiskType::Dynamic),
        Some("fixed") => Ok(DiskType::Fixed),
        Some(other) => Err(Error::Invalid(format!("Parameter 'subformat' does not accept value '{other}'"))),
    }
}

/// The footer of a new disk of at least that size.
pub(super) fn new_footer(
    disk_type: DiskType,
    virtual_size_bytes: u64,
    force_size: bool,
) -> Result<RawFooter> {
    let asked = virtual_size_bytes.div_ceil(SECTOR_BYTES);
    let chs = if force_size { Chs::MAX } else { Chs::holding(asked) };
    let sectors = if chs == Chs::MAX { asked } else { chs.span_sectors() };
    if sectors > MAX_SECTORS {
        // The caller says "too large" in the reference's words.
        let too_large = std::io::Error::from(std::io::ErrorKind::FileTooLarge);
        return Err(Error::Io {
            file: std::path::PathBuf::new(),
            operation: "make a disk of more than 2040 GiB",
            at_bytes: None,
            source: too_large,
        });
    }
    footer(disk_type, chs, sectors * SECTOR_BYTES, CREATOR[usize::from(force_size)])
}

fn footer(disk_type: DiskType, chs: Chs, size_bytes: u64, creator: [u8; 4]) -> Result<RawFooter> {
    let data_offset = if disk_type == DiskType::Fixed { NO_OFFSET } else { FOOTER_BYTES as u64 };
    // A clock before 1970 is no better than none.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Ok(RawFooter {
        cookie: COOKIE,
        features: FEATURE_RESERVED.into(),
        version: VERSION.into(),
        data_offset: data_offset.into(),
        timestamp: parent::timestamp(i64::try_from(now).unwrap_or(0)).into(),
        creator_app: creator,
        creator_version: CREATOR_VERSION.into(),
        creator_os: CREATOR_OS,
        original_size: size_bytes.into(),
        current_size: size_bytes.into(),
        cylinders: chs.cylinders.into(),
        heads: chs.heads,
        sectors_per_track: chs.sectors,
        disk_type: disk_type.number().into(),
        unique_id: new_unique_id()?,
        ..RawFooter::new_zeroed()
    }
    .summed())
}

/// A random id (RFC 9562, version 4).
fn new_unique_id() -> Result<UniqueId> {
    let mut id = [0; 16];
    // Sixteen bytes are never cut short.
    getrandom(&mut id, GetRandomFlags::empty())
        .map_err(|error| Error::io("".as_ref(), "ask for random bytes", error))?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

fn fixed(storage: &dyn Storage, footer: &RawFooter, preallocation: Preallocation) -> Result<()> {
    let size_bytes = footer.current_size.get();
    storage.resize(size_bytes, preallocation)?;
    if preallocation != Preallocation::Full {
        first_block(storage, size_bytes)?;
    }
    storage.write_at(footer.as_bytes(), size_bytes)
}

/// A disk without blocks. `header` lacks only what follows from the footer; `locators` stand behind the table.
pub(super) fn sparse(
    storage: &dyn Storage,
    footer: &RawFooter,
    mut header: RawHeader,
    locators: Vec<([u8; 4], Vec<u8>)>,
) -> Result<()> {
    let sectors = footer.virtual_sectors(SizeRule::Creator);
    let block_sectors = u64::from(header.block_size.get()) / SECTOR_BYTES;
    let entries = sectors.div_ceil(block_sectors); // below 2^20 with blocks of the usual size
    let table_at = (FOOTER_BYTES + HEADER_BYTES) as u64;
    let table_bytes = (entries * ENTRY_BYTES).next_multiple_of(SECTOR_BYTES);
    header.table_offset = table_at.into();
    header.max_table_entries = u32::try_from(entries).expect("below 2^32, as sectors are").into();
    let mut end = table_at + table_bytes;
    for (slot, (platform_code, name)) in header.locators.iter_mut().zip(&locators) {
        let space = (name.len() as u64).next_multiple_of(SECTOR_BYTES);
        *slot = RawLocator {
            platform_code: *platform_code,
            // In bytes, as Windows writes it, whatever the specification says.
            data_space: u32::try_from(space).expect("names are short").into(),
            data_length: u32::try_from(name.len()).expect("names are short").into(),
            reserved: 0.into(),
            data_offset: end.into(),
        };
        storage.write_at(name, end)?;
        end += space;
    }
    storage.write_at(&vec![0xff; usize::try_from(table_bytes).expect("at most 4 MiB")], table_at)?;
    debug_assert_eq!(UNUSED, u32::MAX);
    storage.write_at(header.summed().as_bytes(), FOOTER_BYTES as u64)?;
    storage.write_at(footer.as_bytes(), end)?;
    storage.write_at(footer.as_bytes(), 0)
}

/// A disk over another VHD, as large as that.
fn differencing(
    storage: &dyn Storage,
    request: &CreateRequest<'_>,
    backing: &Backing,
    force_size: bool,
) -> Result<()> {
    if let Some(format) = backing.format.as_deref().filter(|format| !Vpc.can_stand_on(format)) {
        return Err(Error::Invalid(format!("The backing file of a VHD is a VHD (vpc), not {format}")));
    }
    let file = (request.open_file)(&backing.name, OpenMode::Read)?;
    let below = parent::footer(&*file)?;
    let size_bytes = below.virtual_size_bytes(file.path(), SizeRule::Creator)?;
    if force_size || request.virtual_size_bytes != size_bytes {
        return Err(Error::Invalid(format!(
            "A differencing VHD has the size of its backing file, {size_bytes} bytes"
        )));
    }
    let recorded = locator::record(&backing.name)?;
    let header = RawHeader {
        parent_unique_id: below.raw.unique_id,
        parent_timestamp: parent::modified(&*file, &below.raw)?.into(),
        parent_name: recorded.parent_name,
        ..RawHeader::empty()
    };
    let creator = CREATOR[usize::from(below.raw.size_counts(SizeRule::Creator))];
    let footer = footer(DiskType::Differencing, below.raw.chs(), size_bytes, creator)?;
    sparse(storage, &footer, header, recorded.locators)
}
