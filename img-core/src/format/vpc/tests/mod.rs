//! What the tests share: footers and images in memory.

mod crash;
mod hostile;
mod model;

use std::sync::Arc;

use zerocopy::FromZeros as _;

use super::{
    Vpc, create,
    footer::{COOKIE, DiskType, FEATURE_RESERVED, FOOTER_BYTES, NO_OFFSET, RawFooter, VERSION},
    geometry::Chs,
    header::RawHeader,
};
use crate::{
    Error, Result,
    format::{Backing, CreateRequest, Driver, Layer, OpenContext, OpenMode, OptionSet},
    storage::Storage,
};

/// A footer with a right sum.
pub(super) fn footer(disk_type: DiskType, current_size: u64, creator: &[u8; 4]) -> RawFooter {
    let is_fixed = disk_type == DiskType::Fixed;
    let chs = Chs::holding(current_size / 512);
    RawFooter {
        cookie: COOKIE,
        features: FEATURE_RESERVED.into(),
        version: VERSION.into(),
        data_offset: if is_fixed { NO_OFFSET } else { FOOTER_BYTES as u64 }.into(),
        creator_app: *creator,
        current_size: current_size.into(),
        cylinders: chs.cylinders.into(),
        heads: chs.heads,
        sectors_per_track: chs.sectors,
        disk_type: disk_type.number().into(),
        unique_id: [7; 16],
        ..RawFooter::new_zeroed()
    }
    .summed()
}

/// Makes an image with small blocks, as nobody does, so that a small disk has many of them. `parent` makes it a
/// differencing one.
pub(super) fn create_small(
    storage: &Arc<dyn Storage>,
    size_bytes: u64,
    block_bytes: u32,
    parent: Option<&RawFooter>,
) -> Result<()> {
    let disk_type = if parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic };
    let mut header = RawHeader { block_size: block_bytes.into(), ..RawHeader::empty() };
    let mut locators = Vec::new();
    if let Some(parent) = parent {
        header.parent_unique_id = parent.unique_id;
        locators = super::locator::record("parent.vhd")?.locators;
    }
    create::sparse(&**storage, &footer(disk_type, size_bytes, b"qem2"), header, locators)
}

/// Makes an image with these options; `parent` is what it stands on.
pub(super) fn create(
    storage: &Arc<dyn Storage>,
    size_bytes: u64,
    options: &[(&str, &str)],
    parent: Option<&Arc<dyn Storage>>,
) -> Result<()> {
    let mut set = OptionSet::new();
    options.iter().for_each(|(name, value)| set.set(*name, *value));
    let open_file = |_: &str, _: OpenMode| parent.cloned().ok_or_else(no_files);
    let backing = parent.map(|_| Backing { name: "parent.vhd".to_owned(), format: Some("vpc".to_owned()) });
    let request =
        CreateRequest { virtual_size_bytes: size_bytes, backing, options: &set, open_file: &open_file };
    Vpc.create(storage, &request)
}

/// Opens an image.
pub(super) fn open(storage: &Arc<dyn Storage>, mode: OpenMode) -> Result<Arc<dyn Layer>> {
    let options = OptionSet::new();
    let context = OpenContext { mode, options: &options, open_file: &|_, _| Err(no_files()) };
    Vpc.open(Arc::clone(storage), &context)
}

fn no_files() -> Error {
    Error::Invalid("no other files here".to_owned())
}
