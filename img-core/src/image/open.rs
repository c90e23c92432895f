//! Opening a chain: names, formats, loops, locks.

use super::{Image, ImageName};
use crate::{
    Result,
    format::{OpenMode, OptionSet},
};

/// How the host page cache is used, by the reference's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// O_DIRECT; flushes are honoured.
    None,
    /// Page cache; flushes are honoured.
    #[default]
    Writeback,
    /// Page cache; every write is flushed.
    Writethrough,
    /// O_DIRECT; every write is flushed.
    Directsync,
    /// Page cache; flushes are ignored.
    Unsafe,
}

/// What an image is opened for, and how.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// What for.
    pub mode: OpenMode,
    /// The format, or `None` to probe.
    pub format: Option<String>,
    /// Cache mode of the top layer; layers below use `writeback` without writing.
    pub cache: CacheMode,
    /// Take no locks (`-U`).
    pub force_share: bool,
    /// Whether the layers below the top are opened too.
    pub backing: bool,
    /// Runtime options for the top layer's format.
    pub options: OptionSet,
}

/// Something the user should know, that did not stop the open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// In the reference's words, without `warning: `.
    pub text: String,
    /// Further lines without a prefix.
    pub hints: Vec<String>,
}

pub(super) fn open(name: &ImageName, options: &OpenOptions) -> Result<Image> {
    let _ = (name, options);
    todo!()
}
