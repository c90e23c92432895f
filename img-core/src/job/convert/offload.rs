//! Letting the host copy (`-C`): `copy_file_range`, which shares blocks where the file system can.

use std::ops::Range;

use super::source::{Source, Sources};
use crate::{
    Result,
    format::{HostOffset, Place},
    image::ImageExtent,
    job::target::{Reserved, Target},
    storage::Storage,
};

/// Copies what `reserved` covers of `guest_bytes` on the host. False, with the target's bytes undefined, where
/// some of it does not lie in host files as it is, or the host refuses: the caller then reads and writes.
pub(super) fn copy(
    sources: &Sources<'_>,
    guest_bytes: Range<u64>,
    target: &Target<'_>,
    reserved: &[Reserved<'_>],
) -> Result<bool> {
    let Some(source) = sources.get(sources.index_at(guest_bytes.start)) else { return Ok(false) };
    let Source { image, base, part, .. } = source;
    if guest_bytes.end - base > part.end - part.start {
        return Ok(false);
    }
    let in_image = |guest: u64| guest - base + part.start;
    for piece in reserved {
        let step = piece.step();
        if step.fills() {
            return Ok(false);
        }
        let mut extents = Vec::new();
        image.map_range(in_image(step.guest_bytes.start)..in_image(step.guest_bytes.end), &mut extents)?;
        let mut to = step.at.0;
        for extent in &extents {
            let Some((from, at)) = host_place(image.layers(), extent) else { return Ok(false) };
            if target.file(step.file)?.copy_from(from, at, to, extent.len_bytes)? < extent.len_bytes {
                return Ok(false);
            }
            to += extent.len_bytes;
        }
    }
    Ok(true)
}

fn host_place<'a>(
    layers: &'a [std::sync::Arc<dyn crate::format::Layer>],
    extent: &ImageExtent,
) -> Option<(&'a dyn Storage, u64)> {
    let Place::Data { file, at: HostOffset(at), .. } = extent.place else { return None };
    let storage = layers.get(extent.depth)?.file(file)?;
    Some((storage.as_ref(), at))
}
