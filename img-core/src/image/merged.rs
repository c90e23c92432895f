//! The map of the layers that do not change while they are open, merged once and kept.
//!
//! A read through a hundred layers would ask a hundred maps. The layers below a writable top, and all layers
//! of an image opened for reading, stay as they are: their merged answer is built window by window on first
//! use and found by binary search afterwards. Memory is bounded by [`KEPT_EXTENTS`]; windows that were not
//! used for longest make room.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, PoisonError},
};

use super::ImageExtent;
use crate::{
    Result,
    format::{Extent, Layer, MissingTable, Place},
    sync::{
        RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// How many extents are kept over all windows: 64 bytes each, so 8 MiB.
const KEPT_EXTENTS: usize = 128 << 10;

/// What a window costs beside its extents, in extents.
const WINDOW_COST: usize = 4;

/// A window spans this many clusters of the layer with the smallest ones, ...
const WINDOW_CLUSTERS: u64 = 4096;
/// ... within these limits in guest bytes.
const WINDOW_BYTES: (u64, u64) = (1 << 20, 1 << 30);

/// The extents of one window, in order, without gaps.
type Window = Arc<[ImageExtent]>;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct MergedMap {
    layers: Vec<Arc<dyn Layer>>,
    /// Depth of `layers[0]` in the image.
    first_depth: usize,
    window_bytes: u64,
    windows: RwLock<Windows>,
    /// Counts the windows built; the time by which use is told.
    clock: AtomicU64,
}

#[derive(Debug, Default)]
struct Windows {
    by_index: HashMap<u64, Kept>,
    cost: usize,
}

#[derive(Debug)]
struct Kept {
    window: Window,
    used: AtomicU64,
}

impl MergedMap {
    /// `layers` from top to bottom; the first one is at `first_depth` of the image.
    pub(super) fn new(layers: &[Arc<dyn Layer>], first_depth: usize) -> Self {
        let smallest = layers.iter().filter_map(|layer| layer.extent_granularity_bytes()).min();
        let wanted = u64::from(smallest.unwrap_or(u32::MAX)).saturating_mul(WINDOW_CLUSTERS);
        Self {
            layers: layers.to_vec(),
            first_depth,
            window_bytes: wanted.clamp(WINDOW_BYTES.0, WINDOW_BYTES.1),
            windows: RwLock::default(),
            clock: AtomicU64::new(0),
        }
    }

    /// Appends the merged extents of `guest_bytes`. Bytes past the end of the first layer read as zeroes.
    pub(super) fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<ImageExtent>) -> Result<()> {
        match self.layers.len() {
            0 => {
                push_from(extents, guest_bytes, self.first_depth.saturating_sub(1), Place::Unallocated);
                return Ok(());
            }
            // Nothing to merge: the layer's own cache is as good.
            1 => return self.merge(guest_bytes, extents),
            _ => {}
        }
        let mut from = guest_bytes.start;
        while from < guest_bytes.end {
            let index = from / self.window_bytes;
            let window = self.window(index)?;
            let rest = from..guest_bytes.end;
            from = self.visit_window(&window, index, rest, &mut |extent| extent.push_to(extents));
        }
        Ok(())
    }

    /// [`Self::map_range`] from windows that are there, and for a single layer from what it has in memory; false where
    /// that is not enough.
    pub(super) fn map_cached(
        &self,
        guest_bytes: Range<u64>,
        found: &mut dyn FnMut(ImageExtent),
    ) -> Result<bool> {
        let Range { start, end } = guest_bytes;
        let [layer] = &self.layers[..] else { return Ok(self.map_kept(guest_bytes, found)) };
        // Past the end of a short layer there is nothing.
        let size = layer.virtual_size_bytes();
        let depth = self.first_depth;
        let mut at = start;
        let mut found = |len_bytes: u64, place: Place| {
            found(ImageExtent { guest_offset: at, len_bytes, depth, place });
            at += len_bytes;
        };
        if start < end.min(size) {
            let inside = start..end.min(size);
            if !layer.try_map_range(inside, &mut |Extent { len_bytes, place }| found(len_bytes, place))? {
                return Ok(false);
            }
        }
        if size < end {
            found(end - start.max(size), Place::Zero { reserved: None });
        }
        Ok(true)
    }

    /// What [`Self::map_cached`] lacks first, and at which depth. Windows that are not there are for who may wait: they
    /// take whole tables.
    pub(super) fn missing_table(&self, guest_bytes: Range<u64>) -> Option<(usize, MissingTable)> {
        let [layer] = &self.layers[..] else { return None };
        let inside = guest_bytes.start..guest_bytes.end.min(layer.virtual_size_bytes());
        if inside.is_empty() {
            return None;
        }
        layer.missing_table(inside).map(|missing| (self.first_depth, missing))
    }

    /// The kept windows' part of [`Self::map_cached`].
    fn map_kept(&self, guest_bytes: Range<u64>, found: &mut dyn FnMut(ImageExtent)) -> bool {
        if self.layers.is_empty() {
            visit_from(guest_bytes, self.first_depth.saturating_sub(1), Place::Unallocated, found);
            return true;
        }
        let mut from = guest_bytes.start;
        while from < guest_bytes.end {
            let index = from / self.window_bytes;
            let Some(window) = self.kept(index) else { return false };
            from = self.visit_window(&window, index, from..guest_bytes.end, found);
        }
        true
    }

    /// The window, where nobody is making room for others and it is there.
    fn kept(&self, index: u64) -> Option<Window> {
        let windows = self.windows.try_read().ok()?;
        let kept = windows.by_index.get(&index)?;
        kept.used.store(self.clock.load(Ordering::Relaxed), Ordering::Relaxed);
        Some(Arc::clone(&kept.window))
    }

    /// Tells the extents of a range that stand in a window, and returns where what is left of the range starts.
    fn visit_window(
        &self,
        window: &[ImageExtent],
        index: u64,
        guest_bytes: Range<u64>,
        found: &mut dyn FnMut(ImageExtent),
    ) -> u64 {
        let from = guest_bytes.start;
        let until = guest_bytes.end.min((index + 1).saturating_mul(self.window_bytes));
        let first = window.partition_point(|extent| extent.end() <= from);
        for extent in window[first..].iter().take_while(|extent| extent.guest_offset < until) {
            let part = extent.guest_offset.max(from)..extent.end().min(until);
            let place = extent.place.advanced(part.start - extent.guest_offset);
            visit_from(part, extent.depth, place, found);
        }
        until
    }

    fn window(&self, index: u64) -> Result<Window> {
        if let Some(kept) = self.windows.read().unwrap_or_else(PoisonError::into_inner).by_index.get(&index) {
            kept.used.store(self.clock.load(Ordering::Relaxed), Ordering::Relaxed);
            return Ok(Arc::clone(&kept.window));
        }
        // Built outside the lock: two threads may build the same window, and one result is kept.
        let start = index * self.window_bytes; // index was divided by it
        let mut extents = Vec::new();
        self.merge(start..start.saturating_add(self.window_bytes), &mut extents)?;
        let window: Window = extents.into();
        let used = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        let kept = Kept { window: Arc::clone(&window), used: AtomicU64::new(used) };
        windows.cost += kept.cost();
        if let Some(old) = windows.by_index.insert(index, kept) {
            windows.cost -= old.cost();
        }
        if windows.cost > KEPT_EXTENTS {
            windows.make_room(index);
        }
        Ok(window)
    }

    /// Asks each layer once for what the layers above it left open.
    fn merge(&self, guest_bytes: Range<u64>, merged: &mut Vec<ImageExtent>) -> Result<()> {
        let mut open = vec![guest_bytes];
        let mut found = Vec::new();
        let mut answers = Vec::new();
        for (depth, layer) in (self.first_depth..).zip(&self.layers) {
            let (Some(first), Some(last)) = (open.first(), open.last()) else { break };
            let hull = first.start..last.end;
            // Past the end of a short layer nothing of the layers below shows through.
            let size = layer.virtual_size_bytes();
            answers.clear();
            if hull.start < size {
                layer.map_range(hull.start..hull.end.min(size), &mut answers)?;
            }
            let mut still_open = Vec::new();
            let mut at = hull.start;
            let mut next = 0;
            let past_end = hull.end.saturating_sub(hull.start.max(size));
            let beyond = (past_end > 0).then_some((past_end, Place::Zero { reserved: None }));
            for (len_bytes, place) in
                answers.iter().map(|answer| (answer.len_bytes, answer.place)).chain(beyond)
            {
                let end = at + len_bytes;
                while let Some(range) = open.get(next)
                    && range.start < end
                {
                    let part = range.start.max(at)..range.end.min(end);
                    if place == Place::Unallocated {
                        push_range(&mut still_open, part);
                    } else {
                        push_from(&mut found, part.clone(), depth, place.advanced(part.start - at));
                    }
                    if range.end > end {
                        break;
                    }
                    next += 1;
                }
                at = end;
            }
            open = still_open;
        }
        let last_depth = self.first_depth + self.layers.len() - 1;
        for range in open {
            push_from(&mut found, range, last_depth, Place::Unallocated);
        }
        found.sort_unstable_by_key(|extent| extent.guest_offset);
        for extent in found {
            extent.push_to(merged);
        }
        Ok(())
    }
}

impl Windows {
    /// Forgets the half that was not used for longest, but never `keep`.
    fn make_room(&mut self, keep: u64) {
        let mut by_use: Vec<(u64, u64)> =
            self.by_index.iter().map(|(index, kept)| (kept.used.load(Ordering::Relaxed), *index)).collect();
        by_use.sort_unstable();
        for (_, index) in by_use {
            if self.cost <= KEPT_EXTENTS / 2 {
                break;
            }
            if index != keep
                && let Some(kept) = self.by_index.remove(&index)
            {
                self.cost -= kept.cost();
            }
        }
    }
}

impl Kept {
    fn cost(&self) -> usize {
        self.window.len() + WINDOW_COST
    }
}

fn push_from(extents: &mut Vec<ImageExtent>, guest_bytes: Range<u64>, depth: usize, place: Place) {
    visit_from(guest_bytes, depth, place, &mut |extent| extent.push_to(extents));
}

fn visit_from(guest_bytes: Range<u64>, depth: usize, place: Place, found: &mut dyn FnMut(ImageExtent)) {
    let len_bytes = guest_bytes.end.saturating_sub(guest_bytes.start);
    if len_bytes > 0 {
        found(ImageExtent { guest_offset: guest_bytes.start, len_bytes, depth, place });
    }
}

/// Appends a range, merged with the last one where it follows it.
fn push_range(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}
