//! Making a new VMDK, laid out byte for byte as the reference lays it out: header, descriptor, redundant
//! directory and its tables, directory and its tables, up to a multiple of a grain.

use std::{fmt::Write as _, ops::Range, sync::Arc};

use zerocopy::{
    IntoBytes,
    little_endian::{U16, U32, U64},
};

use super::{
    Vmdk,
    descriptor::NO_PARENT,
    header::{DEFLATE, MAGIC, NEWLINES, RawHeader, SECTOR_BYTES, flag},
    open,
    options::CREATE_OPTIONS,
    resize,
};
use crate::{
    Error, Result,
    format::{
        CreateRequest, Driver as _, FILE_OPTIONS, OpenMode, OptionSet, file_preallocation, first_block,
    },
    storage::{Preallocation, Storage},
    text,
};

/// Grains of a new image.
pub(super) const GRAIN_SECTORS: u64 = 128;

/// Entries of its tables.
pub(super) const TABLE_ENTRIES: u64 = 512;

/// Sectors of a table.
const TABLE_SECTORS: u64 = TABLE_ENTRIES * 4 / SECTOR_BYTES;

/// Room for an embedded descriptor.
pub(super) const DESCRIPTOR_SECTORS: u64 = 20;

/// Where the redundant directory of a new extent begins: behind header and descriptor.
const REDUNDANT_DIRECTORY_SECTOR: u64 = 1 + DESCRIPTOR_SECTORS;

/// The largest directory: see the header's limits.
const MAX_DIRECTORY_ENTRIES: u64 = 32 << 20;

/// What kind of image is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Subformat {
    name: &'static str,
    flat: bool,
    /// Extents of [`resize::SPLIT_BYTES`].
    split: bool,
    compressed: bool,
}

static SUBFORMATS: [Subformat; 5] = [
    Subformat { name: "monolithicSparse", flat: false, split: false, compressed: false },
    Subformat { name: "monolithicFlat", flat: true, split: false, compressed: false },
    Subformat { name: "twoGbMaxExtentSparse", flat: false, split: true, compressed: false },
    Subformat { name: "twoGbMaxExtentFlat", flat: true, split: true, compressed: false },
    Subformat { name: "streamOptimized", flat: false, split: false, compressed: true },
];

/// The options of a new image, checked.
struct Wishes<'a> {
    subformat: Subformat,
    adapter: &'a str,
    hardware_version: &'a str,
    tools_version: &'a str,
    zeroed_grains: bool,
    /// Of flat extents.
    preallocation: Preallocation,
}

impl<'a> Wishes<'a> {
    fn read(options: &'a OptionSet, has_backing: bool) -> Result<Self> {
        options.check_names(&[CREATE_OPTIONS, FILE_OPTIONS])?;
        let choice = |text: &str| Error::Invalid(format!("invalid parameter value: {text}"));
        let adapter = options.get("adapter_type").unwrap_or("ide");
        if !["ide", "buslogic", "lsilogic", "legacyESX"].contains(&adapter) {
            return Err(choice(adapter));
        }
        let name = options.get("subformat").unwrap_or("monolithicSparse");
        let subformat =
            SUBFORMATS.iter().find(|known| known.name == name).copied().ok_or_else(|| choice(name))?;
        let hardware_version = match (options.switch("compat6")?.unwrap_or(false), options.get("hwversion")) {
            (true, None | Some("undefined")) => "6",
            (true, Some(_)) => {
                return Err(Error::Invalid("compat6 cannot be enabled with hwversion set".to_owned()));
            }
            (false, None | Some("undefined")) => "4",
            (false, Some(version)) => version,
        };
        let preallocation = file_preallocation(options)?;
        if preallocation != Preallocation::Off && !subformat.flat {
            return Err(Error::Invalid(format!("preallocation of a {name} VMDK is not supported")));
        }
        let zeroed_grains = options.switch("zeroed_grain")?.unwrap_or(false);
        if subformat.flat && has_backing {
            return Err(Error::Invalid("Flat image can't have backing file".to_owned()));
        }
        if subformat.flat && zeroed_grains {
            return Err(Error::Invalid("Flat image can't enable zeroed grain".to_owned()));
        }
        let tools_version = options.get("toolsversion").unwrap_or("2147483647");
        for value in [hardware_version, tools_version] {
            // They stand between quotation marks in a line of text.
            if value.contains(['"', '\n', '\r', '\0']) {
                return Err(choice(value));
            }
        }
        Ok(Self { subformat, adapter, hardware_version, tools_version, zeroed_grains, preallocation })
    }
}

/// Makes the image, and the files of its extents beside it.
///
/// # Errors
/// [`Error::Invalid`] in the reference's words for options that it refuses.
pub(super) fn create(storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()> {
    let wishes = Wishes::read(request.options, request.backing.is_some())?;
    let parent = match &request.backing {
        None => None,
        Some(backing) => {
            if backing.format.as_deref().is_some_and(|format| !Vmdk.can_stand_on(format)) {
                return Err(Error::Invalid("backing_file must be a vmdk image".to_owned()));
            }
            if text::to_bytes(&backing.name).len() > 1023 || backing.name.contains(['"', '\n', '\r', '\0']) {
                return Err(Error::Invalid(format!("'{}' cannot be recorded as a parent", backing.name)));
            }
            let below = (request.open_file)(&backing.name, OpenMode::Read)?;
            Some((backing.name.as_str(), open::content_id(&*below)?))
        }
    };
    let size = request.virtual_size_bytes;
    let mut lines = String::new();
    for (index, range) in (1u32..).zip(extents(size, wishes.subformat)) {
        let len_bytes = range.end - range.start;
        let name = extent_name(storage, wishes.subformat, index)?;
        let own_file = match wishes.subformat {
            Subformat { flat: false, split: false, .. } => None,
            _ => Some((request.open_file)(&super::plain_name(&name), OpenMode::Write)?),
        };
        let file = own_file.as_ref().unwrap_or(storage);
        let sectors = len_bytes / SECTOR_BYTES;
        let line = if wishes.subformat.flat {
            file.resize(len_bytes, wishes.preallocation)?;
            if wishes.preallocation != Preallocation::Full {
                first_block(&**file, len_bytes)?;
            }
            writeln!(lines, "RW {sectors} FLAT \"{name}\" 0")
        } else {
            write_sparse(&**file, sectors, &wishes)?;
            writeln!(lines, "RW {sectors} SPARSE \"{name}\"")
        };
        line.expect("a String takes everything");
    }
    let text = descriptor(&wishes, size, parent, &lines);
    let bytes = text::to_bytes(&text);
    let is_embedded = !wishes.subformat.flat && !wishes.subformat.split;
    if is_embedded {
        check_embedded(&text)?;
    }
    storage.write_at(&bytes, if is_embedded { SECTOR_BYTES } else { 0 })
}

/// The descriptor of a new streamOptimized image without a parent whose only extent is `line`, and whether its
/// grains may be marked as zeroes.
///
/// # Errors
/// As [`create`].
pub(super) fn stream_descriptor(options: &OptionSet, size: u64, line: &str) -> Result<(String, bool)> {
    let wishes = Wishes::read(options, false)?;
    let text = descriptor(&wishes, size, None, line);
    check_embedded(&text)?;
    Ok((text, wishes.zeroed_grains))
}

fn check_embedded(descriptor: &str) -> Result<()> {
    if text::to_bytes(descriptor).len() as u64 > DESCRIPTOR_SECTORS * SECTOR_BYTES {
        return Err(Error::Invalid("The descriptor does not fit into its 20 sectors".to_owned()));
    }
    Ok(())
}

/// The extents of a disk of that size. There is always one.
fn extents(size: u64, subformat: Subformat) -> Vec<Range<u64>> {
    let step = if subformat.split { resize::SPLIT_BYTES } else { size };
    let count = if size == 0 { 1 } else { size.div_ceil(step) };
    (0..count).map(|index| index * step..size.min((index + 1).saturating_mul(step))).collect()
}

/// The name of an extent's file: the image's own with something before its ending.
fn extent_name(storage: &Arc<dyn Storage>, subformat: Subformat, index: u32) -> Result<String> {
    let path = text::from_path(storage.path());
    let name = path.rsplit('/').next().unwrap_or_default();
    if name.contains(['"', '\n', '\r', '\0']) {
        return Err(Error::Invalid(format!(
            "'{name}' cannot be the name of a VMDK: quotation marks and line ends cannot be recorded"
        )));
    }
    let (stem, ending) = match name.rfind('.') {
        Some(dot) => name.split_at(dot),
        None => (name, ""),
    };
    Ok(match subformat {
        Subformat { flat: false, split: false, .. } => name.to_owned(),
        Subformat { flat: true, split: false, .. } => format!("{stem}-flat{ending}"),
        Subformat { flat: true, split: true, .. } => format!("{stem}-f{index:03}{ending}"),
        Subformat { flat: false, split: true, .. } => format!("{stem}-s{index:03}{ending}"),
    })
}

/// Header, directories and empty tables.
fn write_sparse(file: &dyn Storage, capacity_sectors: u64, wishes: &Wishes<'_>) -> Result<()> {
    let compressed = wishes.subformat.compressed;
    let tables = capacity_sectors.div_ceil(GRAIN_SECTORS).div_ceil(TABLE_ENTRIES);
    if tables > MAX_DIRECTORY_ENTRIES {
        let too_large = rustix::io::Errno::FBIG.raw_os_error();
        return Err(Error::io(file.path(), "create", std::io::Error::from_raw_os_error(too_large)));
    }
    let directory_sectors = (tables * 4).div_ceil(SECTOR_BYTES);
    let both_sectors = directory_sectors + tables * TABLE_SECTORS;
    let directory_sector = REDUNDANT_DIRECTORY_SECTOR + both_sectors;
    let overhead_sectors = (directory_sector + both_sectors).next_multiple_of(GRAIN_SECTORS);
    let mut flags = flag::NEWLINE_TEST | flag::REDUNDANT_DIRECTORY;
    if compressed {
        flags |= flag::COMPRESSED | flag::MARKERS;
    }
    if wishes.zeroed_grains {
        flags |= flag::ZEROED_GRAINS;
    }
    let version = match (compressed, wishes.zeroed_grains) {
        (true, _) => 3,
        (false, true) => 2,
        (false, false) => 1,
    };
    let header = RawHeader {
        magic: MAGIC,
        version: U32::new(version),
        flags: U32::new(flags),
        capacity_sectors: U64::new(capacity_sectors),
        grain_sectors: U64::new(GRAIN_SECTORS),
        descriptor_sector: U64::new(1),
        descriptor_sectors: U64::new(DESCRIPTOR_SECTORS),
        table_entries: U32::new(512),
        redundant_directory_sector: U64::new(REDUNDANT_DIRECTORY_SECTOR),
        directory_sector: U64::new(directory_sector),
        overhead_sectors: U64::new(overhead_sectors),
        unclean_shutdown: 0,
        newline_test: NEWLINES,
        compress_algorithm: U16::new(if compressed { DEFLATE } else { 0 }),
        padding: [0; 433],
    };
    file.write_at(header.as_bytes(), 0)?;
    file.resize(overhead_sectors * SECTOR_BYTES, Preallocation::Off)?;
    for start in [REDUNDANT_DIRECTORY_SECTOR, directory_sector] {
        let first = start + directory_sectors;
        let entries = (0..tables).map(|table| first + table * TABLE_SECTORS);
        let mut bytes = Vec::new();
        for sector in entries {
            let sector = u32::try_from(sector).expect("tables of 2^25 × 4 sectors fit");
            bytes.extend_from_slice(&sector.to_le_bytes());
        }
        if !bytes.is_empty() {
            file.write_at(&bytes, start * SECTOR_BYTES)?;
        }
    }
    Ok(())
}

/// The text of a new descriptor.
fn descriptor(wishes: &Wishes<'_>, size: u64, parent: Option<(&str, u32)>, extents: &str) -> String {
    let heads = if wishes.adapter == "ide" { 16 } else { 255 };
    let cylinders = size / (63 * heads * SECTOR_BYTES);
    let mut cid = super::random();
    if cid == NO_PARENT {
        cid = 0;
    }
    let (hint, parent_cid) = match parent {
        Some((name, cid)) => (format!("parentFileNameHint=\"{name}\""), cid),
        None => (String::new(), NO_PARENT),
    };
    let Wishes { subformat, adapter, hardware_version, tools_version, .. } = wishes;
    let create_type = subformat.name;
    format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         CID={cid:08x}\n\
         parentCID={parent_cid:08x}\n\
         createType=\"{create_type}\"\n\
         {hint}\n\
         # Extent description\n\
         {extents}\n\
         # The Disk Data Base\n\
         #DDB\n\
         \n\
         ddb.virtualHWVersion = \"{hardware_version}\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"63\"\n\
         ddb.adapterType = \"{adapter}\"\n\
         ddb.toolsVersion = \"{tools_version}\"\n"
    )
}
