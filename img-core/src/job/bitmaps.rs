//! Copying the persistent dirty bitmaps of an image into another one.

use crate::{
    Error, Result,
    format::{BitmapInfo, Bitmaps, DirtyMap, Layer, NewBitmap},
    image::Image,
};

/// Asks, before anything is made, whether the bitmaps of `source` can be copied.
///
/// # Errors
/// [`Error::Invalid`], in the reference's words: the format or its version has no bitmaps; one of them is
/// inconsistent, and `skip_broken` is not set.
pub fn check_bitmaps(source: &Image, skip_broken: bool) -> Result<()> {
    for info in listed(source)? {
        if info.inconsistent && !skip_broken {
            return Err(Error::Invalid(format!(
                "Cannot copy inconsistent bitmap '{}'\n\
                 Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
                info.name
            )));
        }
    }
    Ok(())
}

/// Asks whether `target` can hold bitmaps.
///
/// # Errors
/// [`Error::Invalid`], in the reference's words.
pub fn check_bitmap_target(target: &Image) -> Result<()> {
    bitmaps_of(target).map(|_| ())
}

/// Copies the bitmaps of the top layer of `source`: granularity, whether they are enabled, and bits. Those that
/// are inconsistent are left out, and `skipped` is told their names.
///
/// # Errors
/// [`Error::Invalid`], in the reference's words, when the target has a bitmap of that name or is of another
/// size; when bitmaps cannot be read or stored. Those that were copied before stay.
pub fn copy_bitmaps(source: &Image, target: &Image, skipped: &mut dyn FnMut(&str)) -> Result<()> {
    let from = source.layers()[0].bitmaps();
    let to = bitmaps_of(target)?;
    // The list is gone through as the reference goes through it, and stored in the order of the source.
    let mut copied = Vec::new();
    let mut result = Ok(());
    for info in listed(source)? {
        if info.inconsistent {
            skipped(&info.name);
            continue;
        }
        let from = from.expect("it was listed");
        match readable(from, to, &info, target) {
            Ok(map) => copied.push((info, map)),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    let new: Vec<NewBitmap<'_>> = copied
        .iter()
        .rev()
        .map(|(info, map)| NewBitmap { name: &info.name, enabled: info.enabled, map })
        .collect();
    if !new.is_empty() {
        to.store(&new)?;
    }
    result
}

/// The bits of one, which the target can take.
fn readable(from: &dyn Bitmaps, to: &dyn Bitmaps, info: &BitmapInfo, target: &Image) -> Result<DirtyMap> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        Error::Invalid(format!("Failed to {what} bitmap {}: {error}", info.name))
    };
    if to.list()?.iter().any(|there| there.name == info.name) {
        return Err(failed("create", &format_args!("Bitmap already exists: {}", info.name)));
    }
    let map = from.read(&info.name)?;
    let new = DirtyMap::new(target.virtual_size_bytes(), info.granularity_bytes)
        .map_err(|error| failed("create", &error))?;
    new.merge(&map).map_err(|error| failed("populate", &error))?;
    Ok(new)
}

/// The bitmaps of an image, last one first.
fn listed(source: &Image) -> Result<Vec<BitmapInfo>> {
    let Some(bitmaps) = source.layers()[0].bitmaps() else {
        return Err(Error::Invalid("Source lacks bitmap support".to_owned()));
    };
    let mut list = bitmaps.list()?;
    list.reverse();
    Ok(list)
}

fn bitmaps_of(target: &Image) -> Result<&dyn Bitmaps> {
    let layer: &dyn Layer = target.layers()[0].as_ref();
    layer.bitmaps().ok_or_else(|| {
        Error::Invalid(format!("Format driver '{}' does not support bitmaps", layer.driver().name()))
    })
}
