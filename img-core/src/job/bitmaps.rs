//! The persistent dirty bitmaps of an image: copied into another one, or changed one by one.

use std::ops::RangeInclusive;

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

/// What the persistent bitmap called `name` of the top layer marks.
///
/// # Errors
/// [`Error::Invalid`] when there is none of that name, it is inconsistent, or the format or its version has no
/// bitmaps.
pub fn marks(image: &Image, name: &str) -> Result<DirtyMap> {
    bitmaps_of(image)?.read(name)
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

/// A change of one bitmap.
#[derive(Clone, Copy)]
pub enum Change<'a> {
    /// Makes it, empty and enabled.
    Add {
        /// Guest bytes that a bit stands for; as the reference chooses when absent.
        granularity_bytes: Option<u64>,
    },
    /// Takes it out of the image.
    Remove,
    /// Forgets its bits.
    Clear,
    /// Notes changes of the disk in it from now on.
    Enable,
    /// Notes no changes in it any more.
    Disable,
    /// Adds the bits of another one.
    Merge {
        /// The name of the other one.
        source: &'a str,
        /// The image that has it.
        from: &'a Image,
    },
}

/// Granularities that bitmaps may have.
const GRANULARITY_BYTES: RangeInclusive<u64> = 512..=1 << 31;

/// What the reference chooses, within these limits, is the cluster size.
const DEFAULT_GRANULARITY_BYTES: (u32, u32) = (4096, 65536);

/// Changes one bitmap of the top layer of an image opened for writing, and makes the change durable.
///
/// # Errors
/// [`Error::Invalid`], in the reference's words, when there is no such bitmap, or one already, or it is
/// inconsistent, or the format cannot hold it.
pub fn change(image: &Image, name: &str, change: Change<'_>) -> Result<()> {
    if let Change::Add { granularity_bytes } = change {
        return add(image, name, granularity_bytes);
    }
    let (bitmaps, info) = find(image, name)?;
    let store = |enabled, map: &DirtyMap| bitmaps.store(&[NewBitmap { name, enabled, map }]);
    match change {
        Change::Add { .. } => Ok(()),
        Change::Remove => bitmaps.remove(name),
        Change::Clear => {
            // Only one that can be read is cleared: what is inconsistent stays so until it is removed.
            bitmaps.read(name)?;
            store(info.enabled, &DirtyMap::new(image.virtual_size_bytes(), info.granularity_bytes)?)
        }
        Change::Enable => store(true, &bitmaps.read(name)?),
        Change::Disable => store(false, &bitmaps.read(name)?),
        Change::Merge { source, from } => {
            let map = bitmaps.read(name)?;
            map.merge(&find(from, source)?.0.read(source)?)?;
            store(info.enabled, &map)
        }
    }
}

/// The bitmap of that name.
fn find<'a>(image: &'a Image, name: &str) -> Result<(&'a dyn Bitmaps, BitmapInfo)> {
    let not_found = || Error::Invalid(format!("Dirty bitmap '{name}' not found"));
    let bitmaps = image.layers()[0].bitmaps().ok_or_else(not_found)?;
    let info = bitmaps.list()?.into_iter().find(|info| info.name == name).ok_or_else(not_found)?;
    Ok((bitmaps, info))
}

fn add(image: &Image, name: &str, granularity_bytes: Option<u64>) -> Result<()> {
    let layer = &image.layers()[0];
    if name.is_empty() {
        return Err(Error::Invalid("Bitmap name cannot be empty".to_owned()));
    }
    let granularity_bytes = granularity_bytes.unwrap_or_else(|| {
        let (least, most) = DEFAULT_GRANULARITY_BYTES;
        u64::from(layer.cluster_size_bytes().unwrap_or(most).clamp(least, most))
    });
    if !granularity_bytes.is_power_of_two() || !GRANULARITY_BYTES.contains(&granularity_bytes) {
        return Err(Error::Invalid("Granularity must be power of 2 and at least 512".to_owned()));
    }
    let bitmaps = layer.bitmaps().ok_or_else(|| {
        let name = image.layer_name(0);
        Error::Invalid(format!("Can't store persistent bitmaps to {name}: Operation not supported"))
    })?;
    if bitmaps.list()?.iter().any(|info| info.name == name) {
        return Err(Error::Invalid(format!("Bitmap already exists: {name}")));
    }
    let map = DirtyMap::new(image.virtual_size_bytes(), granularity_bytes)?;
    bitmaps.store(&[NewBitmap { name, enabled: true, map: &map }])
}
