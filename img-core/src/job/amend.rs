//! Other options for an image that exists.

use super::Progress;
use crate::{Error, Result, format::OptionSet, image::Image};

/// Gives the top layer of an image the options `wanted`, which
/// [`Driver::amend_options`](crate::format::Driver::amend_options) names.
///
/// Each change is durable before the next begins, and after some of them the image has to be opened anew: `open`
/// opens it for writing. Between two changes it is not locked; a stop there leaves what another run finishes.
///
/// # Errors
/// [`Error::Invalid`], in the reference's words, when the format refuses one of the options: then nothing was
/// changed. [`Error::Cancelled`] between two changes.
pub fn amend<E: From<Error>>(
    mut open: impl FnMut() -> Result<Image, E>,
    wanted: &OptionSet,
    progress: &dyn Progress,
) -> Result<(), E> {
    // What is left shrinks from one opening to the next; the first one saw all of it.
    let mut all = None;
    let mut tell = |done: u64, left: u64| {
        let all = *all.get_or_insert(left);
        progress.advance(all - left + done, all);
    };
    loop {
        let image = open()?;
        let driver = image.layers()[0].driver();
        if driver.amend_options().is_empty() {
            let name = driver.name();
            return Err(
                Error::Invalid(format!("Format driver '{name}' does not support option amendment")).into()
            );
        }
        if !image.amend(wanted, &mut tell)? {
            return image.close().map_err(E::from);
        }
        if progress.is_cancelled() {
            return Err(Error::Cancelled.into());
        }
    }
}
