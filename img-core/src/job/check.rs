//! The audit of an image, watched.

use super::Progress;
use crate::{
    Error, Result,
    format::{CheckReport, Finding, Repair},
    image::Image,
};

/// Audits the top layer and repairs what `repair` allows; see [`Image::check`].
///
/// # Errors
/// As [`Image::check`]; [`Error::Cancelled`] while tables are counted.
pub fn check(
    image: &Image,
    repair: Repair,
    findings: &mut dyn FnMut(Finding),
    progress: &dyn Progress,
) -> Result<CheckReport> {
    let watch = |done: u64, total: u64| {
        progress.advance(done, total);
        if progress.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    };
    image.check_watched(repair, findings, &watch)
}
