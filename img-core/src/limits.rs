//! What this process may write and where the images that it opens may lead: set once, before the first is opened, for
//! all of them, as the system's own limits are.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{Error, Result, storage::Storage, text};

/// See the module. `None` is no limit but the library's own.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Layers of a chain, the top included.
    pub chain_depth: Option<usize>,
    /// Bytes written and set aside, over all files and pipes.
    pub output_bytes: Option<u64>,
    /// The directory that files named by images (backing files, data files, extents, parents) have to be in or below,
    /// however they are named.
    pub references_in: Option<PathBuf>,
}

static LIMITS: OnceLock<Limits> = OnceLock::new();

/// What may still be written.
static OUTPUT_LEFT: AtomicU64 = AtomicU64::new(u64::MAX);

/// Sets the limits of this process.
///
/// # Errors
/// When the directory is not there, or limits have been set before.
pub fn set(mut limits: Limits) -> Result<()> {
    if let Some(directory) = &mut limits.references_in {
        let failed = |error| Error::io(directory, "find", error);
        *directory = fs::canonicalize(&*directory).map_err(failed)?;
    }
    let output_bytes = limits.output_bytes;
    LIMITS.set(limits).map_err(|_| Error::Invalid("limits have been set before".to_owned()))?;
    if let Some(bytes) = output_bytes {
        OUTPUT_LEFT.store(bytes, Ordering::Relaxed);
    }
    Ok(())
}

/// How many layers a chain may have.
#[must_use]
pub fn chain_depth() -> usize {
    LIMITS.get().and_then(|limits| limits.chain_depth).unwrap_or(usize::MAX)
}

/// Counts bytes that are about to be written to `file`.
///
/// # Errors
/// [`Error::Invalid`] when they are more than may be written.
pub(crate) fn take_output(file: &Path, bytes: u64) -> Result<()> {
    if OUTPUT_LEFT.load(Ordering::Relaxed) == u64::MAX {
        return Ok(());
    }
    let take = |left: u64| left.checked_sub(bytes);
    OUTPUT_LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).map(drop).map_err(|_| {
        let limit = LIMITS.get().and_then(|limits| limits.output_bytes).unwrap_or(0);
        Error::Invalid(format!(
            "{}: more than the {limit} bytes of output that are allowed would be written",
            text::from_path(file)
        ))
    })
}

/// Where references may lead, links followed, if that was said.
pub(crate) fn references_in() -> Option<&'static Path> {
    LIMITS.get()?.references_in.as_deref()
}

/// Whether an image may lead to the file called `path`.
///
/// # Errors
/// [`Error::Invalid`] when it is outside of the directory where references may lead.
pub(crate) fn check_reference(path: &str) -> Result<()> {
    allowed(path).map(drop)
}

/// The true name of a file that an image names, where names are looked at.
fn allowed(path: &str) -> Result<Option<PathBuf>> {
    let Some(directory) = LIMITS.get().and_then(|limits| limits.references_in.as_ref()) else {
        return Ok(None);
    };
    // What is not there is refused by who opens it.
    let Ok(real) = fs::canonicalize(text::to_path(path)) else { return Ok(None) };
    if real.starts_with(directory) {
        return Ok(Some(real));
    }
    Err(Error::Invalid(format!(
        "'{path}' is refused: it is not in {}, where references have to lead",
        text::from_path(directory)
    )))
}

/// Opens a file that an image names, unless it is outside of where references may lead.
///
/// # Errors
/// As [`check_reference`], and `open`.
pub(crate) fn open_reference(
    path: &str,
    open: impl FnOnce() -> Result<Arc<dyn Storage>>,
) -> Result<Arc<dyn Storage>> {
    let Some(real) = allowed(path)? else { return open() };
    let storage = open()?;
    // A link that was changed in between leads to another file than the one that was looked at.
    let found = fs::symlink_metadata(&real).map_err(|error| Error::io(&real, "stat", error))?;
    let is_same = storage.identity().is_some_and(|it| (it.device, it.inode) == (found.dev(), found.ino()));
    if found.is_file() && is_same {
        return Ok(storage);
    }
    Err(Error::Invalid(format!("'{path}' is refused: it is no file, or changed while it was opened")))
}
