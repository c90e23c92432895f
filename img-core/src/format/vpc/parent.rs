//! Whether a file is the parent that a differencing disk was made on.

use std::path::Path;

use super::{
    footer::{Copies, Footer, RawFooter, UniqueId},
    header::Header,
};
use crate::{
    Error, Result,
    format::{HostFile, Layer},
    storage::Storage,
    text,
};

/// The start of the year 2000, from which time stamps count, in seconds since 1970.
const EPOCH_SECONDS: i64 = 946_684_800;

/// A time as image files store it; times outside the 136 years that fit are 0.
pub(super) fn timestamp(unix_seconds: i64) -> u32 {
    u32::try_from(unix_seconds.saturating_sub(EPOCH_SECONDS)).unwrap_or(0)
}

/// The footer of a parent.
///
/// # Errors
/// When the file is no VHD.
pub(super) fn footer(storage: &dyn Storage) -> Result<Footer> {
    Copies::read(storage)?.choose(storage.path())
}

/// The time stamp that a child records of a parent: when the file was last changed, or else made.
pub(super) fn modified(storage: &dyn Storage, footer: &RawFooter) -> Result<u32> {
    Ok(storage.modified_unix_seconds()?.map_or(footer.timestamp.get(), timestamp))
}

/// Compares what `header`, of the image at `path`, knows of its parent with `below`. The unique id has to be that
/// of the parent. The time stamp tells of changes made to the parent since, but copying a file changes it as
/// well: where it is neither that of the file nor the one in the parent's footer there is a warning.
///
/// # Errors
/// [`Error::Corrupt`] when it is another disk.
pub(super) fn check(path: &Path, header: &Header, below: &dyn Layer) -> Result<Option<String>> {
    let Some(storage) = below.file(HostFile::IMAGE) else { return Ok(None) };
    let parent = footer(&**storage)?.raw;
    let wanted = header.raw.parent_unique_id;
    if parent.unique_id != wanted {
        let offset = std::mem::offset_of!(super::header::RawHeader, parent_unique_id) as u64;
        return Err(Error::corrupt(
            path,
            "header.parent_unique_id",
            header.at_bytes + offset,
            format_args!("{}, the id of '{}'", id_text(&parent.unique_id), text::from_path(storage.path())),
            id_text(&wanted),
        ));
    }
    let recorded = header.raw.parent_timestamp.get();
    if recorded == parent.timestamp.get() || recorded == modified(&**storage, &parent)? {
        return Ok(None);
    }
    Ok(Some(format!(
        "'{}' has another time stamp than '{}' recorded of it: it may have been changed since",
        text::from_path(storage.path()),
        text::from_path(path)
    )))
}

/// An id in the usual form of hexadecimal digits.
pub(super) fn id_text(id: &UniqueId) -> String {
    let mut text = String::new();
    for (index, byte) in id.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}
