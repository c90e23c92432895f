//! Making a new image file, whatever its format.
//!
//! The file is made or taken over, locked, emptied, and handed to the format. What this call made is removed
//! again when it fails; a file that was there before stays, with whatever it holds by then.

use std::{cell::RefCell, path::PathBuf, sync::Arc};

use crate::{
    Error, Result,
    error::os_text,
    format::{Backing, CreateRequest, Driver, OpenMode, OptionSet},
    image::{ImageName, data_file_path},
    limits,
    storage::{FileOptions, FileStorage, Preallocation, Storage, Watcher, lock::Use},
    text,
};

/// Guest disks are whole sectors.
const SECTOR_BYTES: u64 = 512;

/// The hint that new files get where the user has no wish: big enough to keep images in few pieces.
const EXTENT_SIZE_HINT_BYTES: u32 = 1 << 20;

/// What to make.
#[derive(Debug)]
pub struct CreateImage<'a> {
    /// Where.
    pub name: &'a ImageName,
    /// Of which format.
    pub driver: &'static dyn Driver,
    /// How big; rounded up to a multiple of 512.
    pub virtual_size_bytes: u64,
    /// The backing file to record; not opened here.
    pub backing: Option<Backing>,
    /// Options of the format and of the file (`preallocation` of raw, `nocow`, `extent_size_hint`),
    /// without `size`, `backing_file`, `backing_fmt`.
    pub options: OptionSet,
}

/// What this call did to the host.
#[derive(Debug, Default)]
struct Made {
    /// Files that it made and that go when it fails.
    paths: RefCell<Vec<PathBuf>>,
    warnings: RefCell<Vec<String>>,
}

impl Made {
    /// All went well.
    fn keep(&self) -> Created {
        Created { warnings: self.warnings.take(), files: self.paths.take() }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in self.paths.get_mut() {
            // The error that brought us here is the one to tell; a file that is gone already is as well.
            if std::fs::remove_file(&*path).is_err() {}
        }
    }
}

/// What [`create`] did beside what it was asked for.
#[derive(Debug, Default)]
pub struct Created {
    /// Wishes that the host did not grant.
    pub warnings: Vec<String>,
    /// The files that were not there before: the image's, and those of its extents.
    pub files: Vec<PathBuf>,
}

/// Makes the image, replacing the contents of an existing file. A failure removes the files that this call
/// made.
///
/// # Errors
/// [`Error::CreateFile`] when the system refuses the file; [`Error::Locked`] when another process uses it;
/// [`Error::Invalid`] for options that the format refuses.
pub fn create(request: &CreateImage<'_>) -> Result<Created> {
    create_watched(request, None)
}

/// The same, told to `watcher` where space is taken by writing, which it may stop.
///
/// # Errors
/// As [`create`]; [`Error::Cancelled`].
pub fn create_watched(request: &CreateImage<'_>, watcher: Option<&Arc<dyn Watcher>>) -> Result<Created> {
    let path = request.name.path_to_create()?;
    let virtual_size_bytes = request
        .virtual_size_bytes
        .checked_next_multiple_of(SECTOR_BYTES)
        .filter(|bytes| i64::try_from(*bytes).is_ok())
        .ok_or_else(|| Error::Invalid("Could not resize image: Image size cannot be negative".to_owned()))?;
    let mut options = request.options.clone();
    let wishes = Wishes {
        nocow: options.switch("nocow")?.unwrap_or(false),
        extent_size_hint: options.size("extent_size_hint")?,
    };
    options.take("nocow");
    options.take("extent_size_hint");

    let made = Made::default();
    let storage = take_file(path, wishes, &made)?;
    if !storage.is_regular() && request.driver.name() == "raw" {
        check_device(&storage, virtual_size_bytes, &options)?;
        return Ok(made.keep());
    }
    let watched = |storage: FileStorage| -> Arc<dyn Storage> {
        watcher.into_iter().for_each(|watcher| storage.watch_filling(watcher));
        Arc::new(storage)
    };
    let storage = watched(storage);
    let open_file = |name: &str, mode: OpenMode| -> Result<Arc<dyn Storage>> {
        let path = data_file_path(path, name)?;
        if mode.writes() {
            let file = take_file(&path, wishes, &made)?;
            if file.identity() == storage.identity() {
                return Err(Error::Invalid(format!("'{path}' cannot be the data file of itself")));
            }
            return Ok(watched(file));
        }
        limits::open_reference(&path, || {
            let file = FileOptions::new().open(text::to_path(&path))?;
            file.lock(Use::Read)?;
            Ok(Arc::new(file))
        })
    };
    request.driver.create(
        &storage,
        &CreateRequest {
            virtual_size_bytes,
            backing: request.backing.clone(),
            options: &options,
            open_file: &open_file,
        },
    )?;
    Ok(made.keep())
}

/// What the user wants of the host file itself.
#[derive(Clone, Copy, Debug, Default)]
struct Wishes {
    nocow: bool,
    extent_size_hint: Option<u64>,
}

/// Makes a file, or takes over the one that is there, locked and empty.
fn take_file(path: &str, wishes: Wishes, made: &Made) -> Result<FileStorage> {
    let host_path = text::to_path(path);
    let storage = match FileOptions::new().create_new(true).open(&host_path) {
        Ok(storage) => {
            made.paths.borrow_mut().push(host_path);
            storage
        }
        Err(Error::CreateFile { source, .. }) if source.kind() == std::io::ErrorKind::AlreadyExists => {
            FileOptions::new().create(true).open(&host_path)?
        }
        Err(error) => return Err(error),
    };
    storage.lock(Use::Create)?;
    if !storage.is_regular() {
        return Ok(storage);
    }
    storage.resize(0, Preallocation::Off)?;
    if wishes.nocow {
        // As in the reference a wish that only btrfs can grant, and no error elsewhere.
        storage.turn_off_copy_on_write().ok();
    }
    match wishes.extent_size_hint.map(u32::try_from) {
        Some(Ok(bytes)) if bytes > 0 => {
            if let Err(error) = storage.set_extent_size_hint(bytes) {
                let why = match &error {
                    Error::Io { source, .. } => os_text(source),
                    other => other.to_string(),
                };
                made.warnings.borrow_mut().push(format!("Failed to set extent size hint: {why}"));
            }
        }
        // Nobody asked: file systems without hints do without.
        None => drop(storage.set_extent_size_hint(EXTENT_SIZE_HINT_BYTES)),
        Some(Err(_)) => return Err(Error::Invalid("Extent size hint is too large".to_owned())),
        Some(Ok(_)) => {} // a new file has none
    }
    Ok(storage)
}

/// A device is as big as it is; a raw image on it needs no writing.
fn check_device(storage: &FileStorage, virtual_size_bytes: u64, options: &OptionSet) -> Result<()> {
    if !matches!(options.get("preallocation"), None | Some("off")) {
        return Err(Error::Invalid("Preallocation can only be used for growing regular files".to_owned()));
    }
    if virtual_size_bytes > storage.len_bytes()? {
        return Err(Error::Invalid("Cannot grow device files".to_owned()));
    }
    Ok(())
}
