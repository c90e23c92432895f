//! Opening the host files of a chain: cache mode, lock, and what an image may name.

use std::sync::Arc;

use super::{
    CacheMode,
    name::Node,
    path::{full_backing_name, protocol},
};
use crate::{
    Error, Result,
    format::OpenMode,
    limits,
    storage::{FileOptions, Identity, Storage, lock::Use},
    text,
};

/// How the files of one layer are opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostAccess {
    pub(super) mode: OpenMode,
    pub(super) cache: CacheMode,
    /// Whether locks are taken.
    pub(super) locked: bool,
    /// Whether others are kept from writing raw data too.
    pub(super) exclusive: bool,
}

impl HostAccess {
    /// The access that a node's own options turn `self` into.
    pub(super) fn for_node(self, node: &Node) -> Result<Self> {
        if node.read_only && self.mode.writes() {
            return Err(Error::Invalid("Block node is read-only".to_owned()));
        }
        if node.force_share && self.mode.writes() {
            return Err(Error::Invalid("force-share=on can only be used with read-only images".to_owned()));
        }
        let direct = node.direct.unwrap_or(self.cache.is_direct());
        let no_flush = node.no_flush.unwrap_or(self.cache == CacheMode::Unsafe);
        let cache = match (direct, no_flush, self.cache.writes_through()) {
            (true, true, _) => {
                return Err(Error::Invalid("cache.direct with cache.no-flush is not supported".to_owned()));
            }
            (true, false, false) => CacheMode::None,
            (true, false, true) => CacheMode::Directsync,
            (false, true, _) => CacheMode::Unsafe,
            (false, false, false) => CacheMode::Writeback,
            (false, false, true) => CacheMode::Writethrough,
        };
        Ok(Self { cache, locked: self.locked && !node.force_share && !node.unlocked, ..self })
    }

    /// Opens a file without locking it yet: its identity is looked at first.
    pub(super) fn open(self, path: &str) -> Result<Arc<dyn Storage>> {
        let file =
            FileOptions::new().write(self.mode.writes()).cache(self.cache).open(text::to_path(path))?;
        Ok(Arc::new(file))
    }

    /// Takes the lock that goes with the mode. Raw data has no metadata that a second writer could
    /// spoil: as in the reference, others may use it unless the caller minds.
    pub(super) fn lock(self, storage: &dyn Storage, raw: bool) -> Result<()> {
        let wanted = match self.mode {
            _ if !self.locked => Use::Nothing,
            OpenMode::Inspect if raw => Use::Nothing,
            OpenMode::Read | OpenMode::Check { repair: false } if raw && !self.exclusive => Use::SharedRead,
            OpenMode::Write | OpenMode::Check { repair: true } if raw && !self.exclusive => Use::SharedResize,
            OpenMode::Inspect => Use::Inspect,
            OpenMode::Read | OpenMode::Check { repair: false } => Use::Read,
            OpenMode::Write | OpenMode::Check { repair: true } => Use::Write,
        };
        storage.lock(wanted)
    }

    /// Opens a file that the image at `image_path` names as holding its data. Names with a protocol other
    /// than `file:` are refused: an image has no say in how the host is reached.
    pub(super) fn open_named(
        self,
        image_path: &str,
        image: Option<Identity>,
        name: &str,
        mode: OpenMode,
    ) -> Result<Arc<dyn Storage>> {
        let path = data_file_path(image_path, name)?;
        let access = Self { mode, ..self };
        let storage = limits::open_reference(&path, || access.open(&path))?;
        if image.is_some() && storage.identity() == image {
            return Err(Error::Invalid(format!("'{path}' is named as the data file of itself")));
        }
        access.lock(&*storage, false)?;
        Ok(storage)
    }
}

/// The host path of a file that the image at `image_path` names.
pub(crate) fn data_file_path(image_path: &str, name: &str) -> Result<String> {
    let name = match protocol(name) {
        Some("file") => &name["file:".len()..],
        Some(_) => {
            return Err(Error::Invalid(format!(
                "'{name}' is refused as the name of a data file: only plain file names are allowed there"
            )));
        }
        None => name,
    };
    if name.is_empty() || name.contains('\0') {
        return Err(Error::Invalid("The 'file' block driver requires a file name".to_owned()));
    }
    // A colon behind the prefix is part of the name.
    let name = if protocol(name).is_some() { format!("./{name}") } else { name.to_owned() };
    Ok(full_backing_name(image_path, &name))
}
