//! Where the data of an image lives, as numbers for a picture: what has each part of the guest's disk, and what each
//! part of the host files is used for.
//!
//! A space is cut into at most [`MAX_CELLS`] cells of equal size, and bytes are counted by cell and owner as the maps
//! are walked: memory does not grow with the disk.

use std::{path::PathBuf, sync::Arc};

use super::{map::entries, windows};
use crate::{
    Error, JobStep, Result,
    format::{Extent, HostFile, HostUse, Layer, Lease, Place},
    image::Image,
};

/// The most cells of a space.
pub const MAX_CELLS: u64 = 2048;
/// The smallest cell.
const MIN_CELL_BYTES: u64 = 512;
/// So many host files are shown.
const MAX_FILES: usize = 8;
/// Units of allocation that are mapped in one call, and guest bytes where a layer has no such unit.
const WINDOW_UNITS: u64 = 8192;
const WINDOW_BYTES: u64 = 1 << 40;

/// What has a part of a space; in the order in which it is listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// Of the guest's disk: data, which that layer has.
    Layer(usize),
    /// Of the guest's disk: a layer says that it is zero.
    Zero,
    /// Of the guest's disk: no layer says anything.
    Nowhere,
    /// Of a file: the guest's data.
    Data,
    /// Of a file: the guest's data, compressed.
    Compressed,
    /// Of a file: kept for guest bytes that read as zeroes.
    Kept,
    /// Of a file: header and tables.
    Tables,
    /// Of a file: reference counts.
    Refcounts,
    /// Of a file: what only internal snapshots have.
    Snapshots,
    /// Of a file: in use, and none of the above: bitmaps, the rest of a cluster with compressed data, leaks.
    Other,
    /// Of a file: nothing.
    Free,
}

impl Owner {
    /// Whether there is nothing to see.
    #[must_use]
    pub fn is_blank(self) -> bool {
        matches!(self, Self::Nowhere | Self::Free)
    }
}

/// A disk or a file in cells.
#[derive(Clone, Debug)]
pub struct Space {
    len_bytes: u64,
    cell_bytes: u64,
    shares: Vec<Share>,
}

/// What one owner has of a space.
#[derive(Clone, Debug)]
pub struct Share {
    /// Who.
    pub owner: Owner,
    /// How many bytes in all.
    pub bytes: u64,
    /// How many of each cell.
    pub cells: Vec<u64>,
}

impl Space {
    fn new(len_bytes: u64) -> Self {
        let cell_bytes = len_bytes.div_ceil(MAX_CELLS).max(MIN_CELL_BYTES).next_power_of_two();
        Self { len_bytes, cell_bytes, shares: Vec::new() }
    }

    /// Bytes of the disk or file.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Bytes of a cell; the last one may be shorter.
    #[must_use]
    pub fn cell_bytes(&self) -> u64 {
        self.cell_bytes
    }

    /// How many cells there are.
    #[must_use]
    pub fn cells(&self) -> usize {
        usize::try_from(self.len_bytes.div_ceil(self.cell_bytes)).expect("at most MAX_CELLS")
    }

    /// Who has what, in the order of owners.
    #[must_use]
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    fn share(&mut self, owner: Owner) -> &mut Share {
        let at = match self.shares.binary_search_by_key(&owner, |share| share.owner) {
            Ok(at) => at,
            Err(at) => {
                self.shares.insert(at, Share { owner, bytes: 0, cells: vec![0; self.cells()] });
                at
            }
        };
        &mut self.shares[at]
    }

    /// Counts a part; what lies behind the end is passed over.
    fn add(&mut self, owner: Owner, start: u64, len: u64) {
        let end = start.saturating_add(len).min(self.len_bytes);
        let cell_bytes = self.cell_bytes;
        if start >= end {
            return;
        }
        let share = self.share(owner);
        share.bytes += end - start;
        for part in windows(start..end, cell_bytes) {
            let cell = usize::try_from(part.start / cell_bytes).expect("at most MAX_CELLS");
            share.cells[cell] += part.end - part.start;
        }
    }

    /// Gives what nobody has to `owner`.
    fn fill(&mut self, owner: Owner) {
        for cell in 0..self.cells() {
            let cell_bytes = self.cell_bytes.min(self.len_bytes - cell as u64 * self.cell_bytes);
            let known: u64 = self.shares.iter().map(|share| share.cells[cell]).sum();
            let rest = cell_bytes.saturating_sub(known);
            if rest > 0 {
                let share = self.share(owner);
                share.cells[cell] += rest;
                share.bytes += rest;
            }
        }
    }
}

/// A host file of a layer.
#[derive(Clone, Debug)]
pub struct FilePlot {
    /// Its name.
    pub path: PathBuf,
    /// The layer it belongs to; 0 is the top.
    pub depth: usize,
    /// What it is used for.
    pub space: Space,
}

/// Everything.
#[derive(Clone, Debug)]
pub struct Plot {
    /// The guest's disk.
    pub guest: Space,
    /// The host files, top layer first.
    pub files: Vec<FilePlot>,
    /// Files that are left out, as there are too many.
    pub omitted_files: usize,
}

/// Walks the maps of the image and of all its layers.
///
/// # Errors
/// [`Error::Job`] when tables cannot be read.
pub fn plot(image: &Image) -> Result<Plot> {
    let mut guest = Space::new(image.virtual_size_bytes());
    for entry in entries(image, 0, None) {
        let entry = entry?;
        let owner = match (entry.data, entry.present) {
            (true, _) => Owner::Layer(entry.depth),
            (false, true) => Owner::Zero,
            (false, false) => Owner::Nowhere,
        };
        guest.add(owner, entry.start_bytes, entry.length_bytes);
    }
    let (mut files, mut omitted_files) = (Vec::new(), 0);
    for (depth, layer) in image.layers().iter().enumerate() {
        // They are numbered without gaps.
        let count = (0..).map(HostFile).take_while(|file| layer.file(*file).is_some()).count();
        if files.len() + count > MAX_FILES {
            omitted_files += count;
            continue;
        }
        files.extend(layer_files(layer, depth)?);
    }
    Ok(Plot { guest, files, omitted_files })
}

/// What the host files of one layer are used for.
fn layer_files(layer: &Arc<dyn Layer>, depth: usize) -> Result<Vec<FilePlot>> {
    let mut files = Vec::new();
    for name in (0..).map(HostFile) {
        let Some(storage) = layer.file(name) else { break };
        let space = Space::new(storage.len_bytes()?);
        files.push((name, FilePlot { path: storage.path().to_owned(), depth, space }));
    }
    let mut add = |file: HostFile, owner: Owner, start: u64, len: u64| {
        if let Some((_, plot)) = files.iter_mut().find(|(name, _)| *name == file) {
            plot.space.add(owner, start, len);
        }
    };
    if layer.is_its_file() {
        for entry in entries(&Image::from_layers(vec![Arc::clone(layer)])?, 0, None) {
            let entry = entry?;
            if let (true, Some(at)) = (entry.data, entry.offset_bytes) {
                add(HostFile::IMAGE, Owner::Data, at, entry.length_bytes);
            }
        }
    } else {
        walk(&**layer, &mut add)?;
    }
    let has_uses = layer.host_uses(&mut |owner, range| {
        let owner = match owner {
            HostUse::Tables => Owner::Tables,
            HostUse::Refcounts => Owner::Refcounts,
            HostUse::Snapshots => Owner::Snapshots,
            HostUse::Other => Owner::Other,
            HostUse::Free => Owner::Free,
        };
        add(HostFile::IMAGE, owner, range.start, range.end.saturating_sub(range.start));
    })?;
    let has_snapshots = match layer.snapshots() {
        Some(snapshots) => !snapshots.list()?.is_empty(),
        None => false,
    };
    for (name, plot) in &mut files {
        plot.space.fill(match (layer.is_its_file(), has_uses, *name == HostFile::IMAGE) {
            (true, _, _) | (_, true, false) => Owner::Free,
            (_, true, true) if has_snapshots => Owner::Snapshots,
            (_, true, true) => Owner::Other,
            (_, false, _) => Owner::Tables,
        });
    }
    Ok(files.into_iter().map(|(_, plot)| plot).collect())
}

/// Tells where the guest's bytes stand in the files of a layer.
fn walk(layer: &dyn Layer, add: &mut dyn FnMut(HostFile, Owner, u64, u64)) -> Result<()> {
    let window = layer.extent_granularity_bytes().map_or(WINDOW_BYTES, |unit| u64::from(unit) * WINDOW_UNITS);
    let mut extents: Vec<Extent> = Vec::new();
    // Where compressed clusters stand one behind the other, they share a sector.
    let mut encoded_end = 0;
    for part in windows(0..layer.virtual_size_bytes(), window) {
        extents.clear();
        let _lease = Lease::of(layer);
        layer.map_range(part.clone(), &mut extents).map_err(|error| Error::Job {
            step: JobStep::Map,
            input: 0,
            at_bytes: part.start,
            source: Box::new(error),
        })?;
        for extent in &extents {
            match extent.place {
                Place::Data { file, at, .. } => add(file, Owner::Data, at.0, extent.len_bytes),
                Place::Zero { reserved: Some((file, at)) } => add(file, Owner::Kept, at.0, extent.len_bytes),
                Place::Encoded { file, at, stored_bytes, .. } => {
                    let end = at.0 + u64::from(stored_bytes);
                    let start = if (at.0..end).contains(&encoded_end) { encoded_end } else { at.0 };
                    add(file, Owner::Compressed, start, end - start);
                    encoded_end = end;
                }
                Place::Zero { reserved: None } | Place::Unallocated => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn cells_are_few_and_cover_everything() {
        for len in [0, 1, 512, 1 << 20, (1 << 20) + 1, 16 << 40, i64::MAX.unsigned_abs()] {
            let space = Space::new(len);
            assert!(space.cells() as u64 <= MAX_CELLS, "{len}");
            assert!(space.cells() as u64 * space.cell_bytes() >= len, "{len}");
        }
    }

    proptest! {
        /// Counts by cell are those of a list of bytes, and what is left is filled.
        #[test]
        fn bytes_are_counted_where_they_are(
            len in 1_u64..3_000_000,
            parts in vec((0_u64..3_000_000, 0_u64..4000), 0..20),
        ) {
            let mut space = Space::new(len);
            let mut model = vec![false; usize::try_from(len).unwrap()];
            for (start, part) in parts {
                let range = start.min(len)..(start + part).min(len);
                let bytes = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                // Nothing is counted twice.
                if model[bytes.clone()].iter().any(|is_known| *is_known) {
                    continue;
                }
                model[bytes].fill(true);
                space.add(Owner::Data, start, part);
            }
            space.fill(Owner::Free);
            let total: u64 = space.shares().iter().map(|share| share.bytes).sum();
            prop_assert_eq!(total, len);
            for share in space.shares() {
                prop_assert_eq!(share.cells.iter().sum::<u64>(), share.bytes);
                for (cell, bytes) in model.chunks(usize::try_from(space.cell_bytes()).unwrap()).enumerate() {
                    let data = bytes.iter().filter(|is_data| **is_data == (share.owner == Owner::Data)).count();
                    prop_assert_eq!(share.cells[cell], data as u64);
                }
            }
        }
    }
}
