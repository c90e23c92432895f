//! How large a new image would be: the target's format counts, the source's map is walked once.

use super::{Progress, status::Walk};
use crate::{
    Error, Result,
    format::{BitmapInfo, Driver, MeasureRequest, MeasureSource, Measured, OptionSet},
    image::Image,
};

/// What the new image is for.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// A disk of so many bytes, nothing written.
    Size(u64),
    /// A copy of this one, and of its bitmaps where its format can keep some.
    Copy(&'a Image, Option<&'a [BitmapInfo]>),
}

/// Measures an image that `driver` would make with `options` (without `size`), over a backing file or not.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::Invalid`] for formats that cannot be measured and options that they refuse;
/// [`Error::Job`] when the source's map cannot be read.
pub fn measure(
    driver: &dyn Driver,
    options: &OptionSet,
    has_backing: bool,
    subject: Subject<'_>,
    progress: &dyn Progress,
) -> Result<Measured> {
    match subject {
        Subject::Size(virtual_size_bytes) => {
            driver.measure(&MeasureRequest { virtual_size_bytes, options, has_backing, source: None })
        }
        Subject::Copy(image, bitmaps) => {
            let bytes_in_units = |unit_bytes| bytes_in_units(image, unit_bytes, progress);
            driver.measure(&MeasureRequest {
                virtual_size_bytes: image.virtual_size_bytes(),
                options,
                has_backing,
                source: Some(MeasureSource { bytes_in_units: &bytes_in_units, bitmaps }),
            })
        }
    }
}

/// See [`MeasureSource::bytes_in_units`].
fn bytes_in_units(image: &Image, unit_bytes: u64, progress: &dyn Progress) -> Result<u64> {
    let mut walk = Walk::new(image, 0, 0, u64::MAX);
    let (mut bytes, mut counted_to) = (0, 0);
    while let Some(status) = walk.next()? {
        progress.advance(status.end(), image.virtual_size_bytes());
        if progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if !status.data || status.zero {
            continue;
        }
        let start = (status.start - status.start % unit_bytes).max(counted_to);
        let end = status.end().checked_next_multiple_of(unit_bytes);
        let end = end.ok_or_else(|| Error::Invalid("a disk of 2^64 bytes".to_owned()))?;
        bytes += end.saturating_sub(start);
        counted_to = counted_to.max(end);
    }
    Ok(bytes)
}
