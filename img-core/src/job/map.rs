//! The map of a chain as `img map` shows it.

use std::path::PathBuf;

use super::status::{Status, Walk};
use crate::{Result, image::Image};

/// One row of `map --output=json`, after the reference's merging.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First guest byte.
    pub start_bytes: u64,
    /// Length.
    pub length_bytes: u64,
    /// Layer that answers; 0 is the top.
    pub depth: usize,
    /// Whether any layer allocates it.
    pub present: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// Holds data.
    pub data: bool,
    /// Is stored compressed.
    pub compressed: bool,
    /// Fixed place in `file`, where there is one.
    pub offset_bytes: Option<u64>,
    /// The host file of `offset_bytes`, by the name it was opened under.
    pub file: Option<PathBuf>,
}

/// Calls `row` for each entry of `start..start + length` (cut at the end of the disk), in order. Where that
/// is no byte at all, one entry of no length is shown, as the reference does.
///
/// # Errors
/// [`Error::Job`](crate::Error::Job) when tables cannot be read, and whatever `row` returns.
pub fn map(
    image: &Image,
    start_bytes: u64,
    length_bytes: Option<u64>,
    row: &mut dyn FnMut(&MapEntry) -> Result<()>,
) -> Result<()> {
    let mut entries = entries(image, start_bytes, length_bytes).peekable();
    if entries.peek().is_none() {
        return row(&nothing_at(start_bytes));
    }
    entries.try_for_each(|entry| row(&entry?))
}

/// The entries of `start..start + length` (cut at the end of the disk), found as they are asked for. None where that
/// is no byte at all; none after an error.
pub fn entries(image: &Image, start_bytes: u64, length_bytes: Option<u64>) -> Entries<'_> {
    let end = length_bytes.map_or(u64::MAX, |length| start_bytes.saturating_add(length));
    Entries { image, walk: Some(Walk::new(image, 0, start_bytes, end).showing_kept()) }
}

/// See [`entries`]. Each step may do I/O on tables, and ask the host for holes; what was found is true for the moment
/// in which it was found.
pub struct Entries<'a> {
    image: &'a Image,
    /// `None` after an error.
    walk: Option<Walk<'a>>,
}

impl Iterator for Entries<'_> {
    type Item = Result<MapEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        let walk = self.walk.as_mut()?;
        let found = merged(walk).map(|status| status.map(|status| entry(self.image, &status))).transpose();
        if matches!(found, Some(Err(_))) {
            self.walk = None;
        }
        found
    }
}

/// The next entry's worth of the walk.
fn merged(walk: &mut Walk<'_>) -> Result<Option<Status>> {
    let Some(mut current) = walk.next()? else { return Ok(None) };
    while let Some(next) = walk.peek()? {
        if !current.merges_with(&next) {
            break;
        }
        current.len += next.len;
        walk.next()?;
    }
    Ok(Some(current))
}

impl Status {
    /// The reference shows two neighbours as one when all it prints of them agrees.
    fn merges_with(&self, next: &Self) -> bool {
        let shown = |s: &Self| (s.depth, s.present, s.zero, s.data, s.is_compressed());
        let place = match (self.host(), next.host()) {
            (None, None) => true,
            (Some((file, at)), Some((next_file, next_at))) => file == next_file && at + self.len == next_at,
            _ => false,
        };
        shown(self) == shown(next) && place
    }
}

fn entry(image: &Image, status: &Status) -> MapEntry {
    let host = status.host();
    let layer = &image.layers()[status.depth];
    let storage = host.and_then(|(file, _)| layer.file(file));
    // The reference looks through raw layers to the file itself.
    let mut offset_bytes = host.map(|(_, at)| at);
    let mut below = storage.filter(|_| layer.is_its_file()).and_then(|storage| storage.below());
    while let Some((storage, start)) = below {
        offset_bytes = offset_bytes.and_then(|at| at.checked_add(start));
        below = storage.below();
    }
    MapEntry {
        start_bytes: status.start,
        length_bytes: status.len,
        depth: status.depth,
        present: status.present,
        zero: status.zero,
        data: status.data,
        compressed: status.is_compressed(),
        offset_bytes,
        file: storage.map(|storage| storage.path().to_owned()),
    }
}

fn nothing_at(start_bytes: u64) -> MapEntry {
    MapEntry {
        start_bytes,
        length_bytes: 0,
        depth: 0,
        present: false,
        zero: false,
        data: false,
        compressed: false,
        offset_bytes: None,
        file: None,
    }
}
