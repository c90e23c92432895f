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

/// What became of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offloaded {
    /// The host copied all of it.
    Done,
    /// Some of it does not lie in host files as it is, or the target needs more bytes around it.
    NotHere,
    /// The host does not copy between these files.
    Refused,
}

/// Copies what `reserved` covers of `guest_bytes` on the host. Where that is not done the target's bytes are
/// undefined, and the caller reads and writes.
pub(super) fn copy(
    sources: &Sources<'_>,
    guest_bytes: Range<u64>,
    target: &Target<'_>,
    reserved: &[Reserved<'_>],
) -> Result<Offloaded> {
    let Some(source) = sources.get(sources.index_at(guest_bytes.start)) else {
        return Ok(Offloaded::NotHere);
    };
    let Source { image, base, part, .. } = source;
    if guest_bytes.end - base > part.end - part.start {
        return Ok(Offloaded::NotHere);
    }
    // Looked at before anything is copied in vain.
    if reserved.iter().any(|piece| piece.step().fills()) {
        return Ok(Offloaded::NotHere);
    }
    let in_image = |guest: u64| guest - base + part.start;
    for piece in reserved {
        let step = piece.step();
        let mut extents = Vec::new();
        image.map_range(in_image(step.guest_bytes.start)..in_image(step.guest_bytes.end), &mut extents)?;
        let mut to = step.at.0;
        for extent in &extents {
            let Some((from, at)) = host_place(image.layers(), extent) else {
                return Ok(Offloaded::NotHere);
            };
            if target.file(step.file)?.copy_from(from, at, to, extent.len_bytes)? < extent.len_bytes {
                return Ok(Offloaded::Refused);
            }
            to += extent.len_bytes;
        }
    }
    Ok(Offloaded::Done)
}

fn host_place<'a>(
    layers: &'a [std::sync::Arc<dyn crate::format::Layer>],
    extent: &ImageExtent,
) -> Option<(&'a dyn Storage, u64)> {
    let Place::Data { file, at: HostOffset(at), .. } = extent.place else { return None };
    let storage = layers.get(extent.depth)?.file(file)?;
    Some((storage.as_ref(), at))
}
