//! The map of a chain as `img map` shows it.

use std::{ops::Range, path::PathBuf};

use super::status::{Status, Walk};
use crate::{Result, format::DirtyMap, image::Image};

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
    Entries { walk: Some(Walk::new(image, 0, start_bytes, end).showing_kept()), ..Entries::of_nothing(image) }
}

/// Those entries, cut to what `marks`, a bitmap of the image, marks.
pub fn marked_entries<'a>(
    image: &'a Image,
    marks: &'a DirtyMap,
    start_bytes: u64,
    length_bytes: Option<u64>,
) -> Entries<'a> {
    let end = length_bytes.map_or(u64::MAX, |length| start_bytes.saturating_add(length));
    Entries {
        marks: Some((marks, start_bytes..end.min(image.virtual_size_bytes()))),
        ..Entries::of_nothing(image)
    }
}

/// See [`entries`]. Each step may do I/O on tables, and ask the host for holes; what was found is true for the moment
/// in which it was found.
pub struct Entries<'a> {
    image: &'a Image,
    /// `None` after an error, and between two marked ranges.
    walk: Option<Walk<'a>>,
    /// What is to be looked at when the walk has ended: what is marked of a range.
    marks: Option<(&'a DirtyMap, Range<u64>)>,
}

impl<'a> Entries<'a> {
    fn of_nothing(image: &'a Image) -> Self {
        Self { image, walk: None, marks: None }
    }

    /// Goes on to the next marked range.
    fn next_marked(&mut self) -> bool {
        let Some((marks, left)) = &mut self.marks else { return false };
        match marks.next_dirty(left.start).filter(|marked| marked.start < left.end) {
            None => false,
            Some(marked) => {
                left.start = marked.end.min(left.end);
                self.walk = Some(Walk::new(self.image, 0, marked.start, left.start).showing_kept());
                true
            }
        }
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<MapEntry>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(walk) = self.walk.as_mut() {
                let found = merged(walk).transpose();
                if let Some(found) = found {
                    let found = found.map(|status| entry(self.image, &status));
                    if found.is_err() {
                        (self.walk, self.marks) = (None, None);
                    }
                    return Some(found);
                }
                self.walk = None;
            }
            if !self.next_marked() {
                return None;
            }
        }
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
