//! What the black-box tests share.
//!
//! The promises themselves are the files of `tests/tests/`, one each, named as a sentence. Here is what they
//! run with: the built `img` and the reference tools ([`command`]), recognisable guest data ([`pattern`]),
//! hand-made images whose every byte is under control ([`craft`]), the same command lines in two
//! directories ([`twin`]).

pub mod command;
pub mod craft;
pub mod pattern;
pub mod twin;

use std::path::Path;

use img_core::{
    Result,
    format::{OpenMode, OptionSet},
    image::{CacheMode, Image, ImageName, OpenOptions},
};

/// Opens an image of a named format with its chain, in `writeback` mode and with locks.
///
/// # Errors
/// As [`Image::open`].
pub fn open(path: &Path, format: Option<&str>, mode: OpenMode) -> Result<Image> {
    let name = ImageName::parse(path.to_str().expect("the tests' own paths are UTF-8"))?;
    Image::open(
        &name,
        &OpenOptions {
            mode,
            format: format.map(str::to_owned),
            cache: CacheMode::Writeback,
            force_share: false,
            backing: true,
            options: OptionSet::new(),
        },
    )
}

/// All guest bytes.
///
/// # Errors
/// As [`Image::read_at`].
pub fn read_all(image: &Image) -> Result<Vec<u8>> {
    let size = usize::try_from(image.virtual_size_bytes()).expect("test disks fit in memory");
    let mut guest = vec![0; size];
    image.read_at(&mut guest, 0)?;
    Ok(guest)
}
