//! Images in memory: for what would be too slow, or too dangerous, in files.

use std::sync::Arc;

use img_core::{
    Error, Result,
    format::{Backing, CreateRequest, Driver, OpenContext, OpenMode, OptionSet, raw, registry},
    image::Image,
    storage::Storage,
};

use crate::scenario::Layout;

/// The qcow2 driver.
///
/// # Panics
/// Never: every build has it.
#[must_use]
pub fn qcow2() -> &'static dyn Driver {
    registry::by_name("qcow2").expect("every build has qcow2")
}

/// The driver of `layout`.
///
/// # Panics
/// Never: every build has it.
#[must_use]
pub fn driver(layout: &Layout) -> &'static dyn Driver {
    registry::by_name(layout.format()).expect("every build has it")
}

/// The driver of the image on `storage`; qcow2 where its first bytes say nothing.
fn driver_of(storage: &dyn Storage) -> Result<&'static dyn Driver> {
    let mut head = [0; registry::PROBE_BYTES];
    storage.read_at(&mut head, 0)?;
    let found = registry::probe(&head, storage.path());
    Ok(if found.name() == "raw" { qcow2() } else { found })
}

/// The create options of `layout` by name.
///
/// # Panics
/// Never.
#[must_use]
pub fn create_options(layout: &Layout) -> OptionSet {
    let mut options = OptionSet::new();
    for option in layout.create_options().split(',') {
        let (name, value) = option.split_once('=').expect("the options are written as NAME=VALUE");
        options.set(name, value);
    }
    options
}

/// Makes an image on `storage`.
///
/// # Errors
/// As [`Driver::create`].
pub fn create(storage: &Arc<dyn Storage>, layout: &Layout, virtual_size_bytes: u64) -> Result<()> {
    create_over(storage, layout, virtual_size_bytes, None)
}

/// [`create`] over a backing file, of which the image keeps the name.
///
/// # Errors
/// As [`Driver::create`].
pub fn create_over(
    storage: &Arc<dyn Storage>,
    layout: &Layout,
    virtual_size_bytes: u64,
    below: Option<&Arc<dyn Storage>>,
) -> Result<()> {
    let name = |below: &Arc<dyn Storage>| below.path().display().to_string();
    let request = CreateRequest {
        virtual_size_bytes,
        backing: below.map(|below| Backing { name: name(below), format: Some("raw".to_owned()) }),
        options: &create_options(layout),
        open_file: &refuse_file,
    };
    driver(layout).create(storage, &request)
}

/// [`create`] with the guest's bytes in a file of their own, where there is one.
///
/// # Errors
/// As [`Driver::create`].
pub fn create_beside(
    storage: &Arc<dyn Storage>,
    layout: &Layout,
    virtual_size_bytes: u64,
    data: Option<&Arc<dyn Storage>>,
) -> Result<()> {
    let mut options = create_options(layout);
    if data.is_some() {
        options.set("data_file", "data");
    }
    let open_file = |name: &str, mode: OpenMode| {
        data.map_or_else(|| refuse_file(name, mode), |data| Ok(Arc::clone(data)))
    };
    let request =
        CreateRequest { virtual_size_bytes, backing: None, options: &options, open_file: &open_file };
    driver(layout).create(storage, &request)
}

/// Opens the image on `storage`, without what it may name.
///
/// # Errors
/// As [`Driver::open`].
pub fn open(storage: Arc<dyn Storage>, mode: OpenMode) -> Result<Image> {
    open_with(storage, mode, &OptionSet::new())
}

/// [`open`] with runtime options.
///
/// # Errors
/// As [`Driver::open`].
pub fn open_with(storage: Arc<dyn Storage>, mode: OpenMode, options: &OptionSet) -> Result<Image> {
    open_over(storage, None, mode, options)
}

/// [`open_with`] over a raw backing file.
///
/// # Errors
/// As [`Driver::open`].
pub fn open_over(
    storage: Arc<dyn Storage>,
    below: Option<&Arc<dyn Storage>>,
    mode: OpenMode,
    options: &OptionSet,
) -> Result<Image> {
    let context = OpenContext { mode, options, open_file: &refuse_file };
    let mut layers = vec![driver_of(&*storage)?.open(storage, &context)?];
    if let Some(below) = below {
        let (mode, options) = (OpenMode::Read, &OptionSet::new());
        let context = OpenContext { mode, options, open_file: &refuse_file };
        layers.push(raw::Raw.open(Arc::clone(below), &context)?);
    }
    Image::from_layers(layers)
}

/// [`open_with`] beside the file that holds the guest's bytes, where there is one.
///
/// # Errors
/// As [`Driver::open`].
pub fn open_beside(
    storage: Arc<dyn Storage>,
    data: Option<&Arc<dyn Storage>>,
    mode: OpenMode,
    options: &OptionSet,
) -> Result<Image> {
    let open_file = |name: &str, mode: OpenMode| {
        data.map_or_else(|| refuse_file(name, mode), |data| Ok(Arc::clone(data)))
    };
    let context = OpenContext { mode, options, open_file: &open_file };
    Image::from_layers(vec![driver_of(&*storage)?.open(storage, &context)?])
}

fn refuse_file(name: &str, _mode: OpenMode) -> Result<Arc<dyn Storage>> {
    Err(Error::Invalid(format!("an image in memory has no other files, and names {name:?}")))
}

/// The big-endian word at `at` of a host file.
///
/// # Panics
/// Where nothing can be read.
#[must_use]
pub fn word(storage: &dyn Storage, at: u64) -> u64 {
    let mut bytes = [0; 8];
    storage.read_at(&mut bytes, at).expect("readable");
    u64::from_be_bytes(bytes)
}

/// Writes a big-endian word at `at` of a host file.
///
/// # Panics
/// Where nothing can be written.
pub fn set_word(storage: &dyn Storage, at: u64, word: u64) {
    storage.write_at(&word.to_be_bytes(), at).expect("written");
}
