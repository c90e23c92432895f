//! Opening a chain: names, formats, loops, locks.

use super::{Image, ImageName};
use crate::{
    Result,
    format::{OpenMode, OptionSet},
};

pub use crate::storage::CacheMode;

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
