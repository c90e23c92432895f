//! Letting the host copy (`-C`): `copy_file_range`, which shares blocks where the file system can.

use std::ops::Range;

use super::{
    source::Sources,
    target::{Reserved, Target},
};
use crate::{
    Error, Result,
    format::{HostOffset, Place},
    image::ImageExtent,
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
    let Some(index) = Some(sources.index_at(guest_bytes.start)) else { return Ok(false) };
    let Some((base, image, _)) = sources.get(index) else { return Ok(false) };
    if guest_bytes.end - base > image.virtual_size_bytes() {
        return Ok(false);
    }
    for piece in reserved {
        let plan = piece.plan();
        if plan.fill_before_bytes != 0 || plan.fill_after_bytes != 0 {
            return Ok(false);
        }
        let mut extents = Vec::new();
        image.map_range(plan.guest_bytes.start - base..plan.guest_bytes.end - base, &mut extents)?;
        let mut to = plan.at.0;
        for extent in &extents {
            let Some((from, at)) = host_place(image.layers(), extent) else { return Ok(false) };
            if !copy_range(from, at, target.file(plan)?, to, extent.len_bytes)? {
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

/// Whether the host copied all of it.
fn copy_range(from: &dyn Storage, from_at: u64, to: &dyn Storage, to_at: u64, len: u64) -> Result<bool> {
    let (Some(from_fd), Some(to_fd)) = (from.as_fd(), to.as_fd()) else { return Ok(false) };
    let (mut from_at, mut to_at, mut left) = (from_at, to_at, len);
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from_fd, Some(&mut from_at), to_fd, Some(&mut to_at), most) {
            // The end of the source file: what is missing reads as zeroes, and is for others to write.
            Ok(0) => return Ok(false),
            Ok(copied) => left -= copied as u64,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) if is_refusal(error) => return Ok(false),
            Err(error) => return Err(Error::io_at(to.path(), "copy range", to_at, error)),
        }
    }
    Ok(true)
}

/// Whether the host says that it cannot copy these files this way, rather than that it failed.
fn is_refusal(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    [Errno::XDEV, Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP, Errno::PERM, Errno::TXTBSY, Errno::OVERFLOW]
        .contains(&error)
}
