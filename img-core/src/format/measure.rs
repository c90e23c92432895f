//! How large the file of a new image would be, asked before it is made.

use super::{BitmapInfo, OptionSet};
use crate::Result;

/// What is to be measured.
pub struct MeasureRequest<'a> {
    /// Guest bytes.
    pub virtual_size_bytes: u64,
    /// The create options, checked against [`Driver::create_options`](super::Driver::create_options), without
    /// `size`, `backing_file` and `backing_fmt`.
    pub options: &'a OptionSet,
    /// Whether the new image would have a backing file.
    pub has_backing: bool,
    /// The disk that it would be a copy of; without, nothing is written to it.
    pub source: Option<MeasureSource<'a>>,
}

/// A disk that would be copied into a new image.
pub struct MeasureSource<'a> {
    /// How many bytes the units of so many bytes have together in which something but zeroes is stored.
    pub bytes_in_units: &'a dyn Fn(u64) -> Result<u64>,
    /// Its persistent bitmaps, where its format can keep some.
    pub bitmaps: Option<&'a [BitmapInfo]>,
}

/// How large the file would be, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// As a copy of the source; at most so large.
    pub required_bytes: u64,
    /// With every guest cluster written.
    pub fully_allocated_bytes: u64,
    /// On top of that, for a copy of the bitmaps, where source and new image can keep some.
    pub bitmaps_bytes: Option<u64>,
}
