//! Making a new image file, whatever its format.

use crate::{
    Result,
    format::{Backing, Driver, OptionSet},
    image::ImageName,
};

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

/// Makes the image, replacing the contents of an existing file. A failure removes the file if this call
/// made it.
pub fn create(request: &CreateImage<'_>) -> Result<()> {
    let _ = request;
    todo!()
}
