//! The map of a chain as `img map` shows it.

use std::path::PathBuf;

use crate::{Result, image::Image};

/// One row of `map --output=json`, after the reference's merging.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First guest byte.
    pub start_bytes: u64,
    /// Length.
    pub length_bytes: u64,
    /// Layer that answers; 0 is the top.
    pub depth: usize,
    /// Whether any layer allocates it.
    pub present: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// Holds data.
    pub data: bool,
    /// Is stored compressed.
    pub compressed: bool,
    /// Fixed place in `file`, where there is one.
    pub offset_bytes: Option<u64>,
    /// The host file of `offset_bytes`, by the name it was opened under.
    pub file: Option<PathBuf>,
}

/// Calls `row` for each entry of `start..start + length` (cut at the end of the disk), in order.
pub fn map(
    image: &Image,
    start_bytes: u64,
    length_bytes: Option<u64>,
    row: &mut dyn FnMut(&MapEntry) -> Result<()>,
) -> Result<()> {
    let _ = (image, start_bytes, length_bytes, row);
    todo!()
}
