//! Opening the host files of a chain: cache mode, lock, and what an image may name.

use std::sync::Arc;

use super::{
    CacheMode,
    flat::Flat,
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

/// `cache.direct` and `cache.no-flush` of a node, where given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CacheChoice {
    pub(super) direct: Option<bool>,
    pub(super) no_flush: Option<bool>,
}

impl CacheChoice {
    pub(super) fn take(flat: &mut Flat) -> Result<Self> {
        Ok(Self { direct: flat.take_switch("cache.direct")?, no_flush: flat.take_switch("cache.no-flush")? })
    }

    /// What `other` says where `self` says nothing.
    pub(super) fn or(self, other: Self) -> Self {
        Self { direct: self.direct.or(other.direct), no_flush: self.no_flush.or(other.no_flush) }
    }

    /// The cache mode that it makes of `cache`, which counts where it says nothing.
    fn over(self, cache: CacheMode) -> Result<CacheMode> {
        let direct = self.direct.unwrap_or(cache.is_direct());
        let no_flush = self.no_flush.unwrap_or(cache == CacheMode::Unsafe);
        match (direct, no_flush, cache.writes_through()) {
            (true, true, _) => {
                Err(Error::Invalid("cache.direct with cache.no-flush is not supported".to_owned()))
            }
            (true, false, false) => Ok(CacheMode::None),
            (true, false, true) => Ok(CacheMode::Directsync),
            (false, true, _) => Ok(CacheMode::Unsafe),
            (false, false, false) => Ok(CacheMode::Writeback),
            (false, false, true) => Ok(CacheMode::Writethrough),
        }
    }
}

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
        let cache = node.file_cache.or(node.cache).over(self.cache)?;
        if node.native_aio && !cache.is_direct() {
            return Err(Error::Invalid(
                "aio=native was specified, but it requires cache.direct=on, which was not specified."
                    .to_owned(),
            ));
        }
        Ok(Self { cache, locked: self.locked && !node.force_share && !node.unlocked, ..self })
    }

    /// The access to the image below `node`, which `self` is for. Nothing is written there; what goes around the host's
    /// cache does so in every layer, as in the reference.
    pub(super) fn below(self, node: &Node) -> Result<Self> {
        let mode = match self.mode {
            OpenMode::Inspect => OpenMode::Inspect,
            OpenMode::Read | OpenMode::Write | OpenMode::Check { .. } => OpenMode::Read,
        };
        let is_direct = node.cache.over(self.cache)?.is_direct();
        let cache = if is_direct { CacheMode::None } else { CacheMode::Writeback };
        Ok(Self { mode, cache, locked: self.locked && !node.force_share, ..self })
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
