//! Block status: what a metadata context says about a range, as descriptors.

use img_core::{
    Result,
    format::DirtyMap,
    image::Image,
    job::map::{self, MapEntry},
};

use super::{
    context::Context,
    reply::Descriptor,
    wire::{STATE_DIRTY, STATE_HOLE, STATE_ZERO},
};

/// The most runs in one reply: 64 KiB of descriptors. "The server MAY return fewer descriptors than would be required";
/// the client asks again from there.
const MAX_DESCRIPTORS: usize = 4096;

/// How a request wants its answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Query {
    pub(super) offset: u64,
    /// Not 0; inside the disk.
    pub(super) len_bytes: u64,
    /// One run is enough.
    pub(super) one: bool,
}

/// The runs from the start of the range on, neighbours being different; not empty, at most the range, and shorter where
/// there would be too many.
///
/// # Errors
/// When tables cannot be read.
pub(super) fn descriptors(image: &Image, context: &Context, query: &Query) -> Result<Vec<Descriptor>> {
    let mut runs = Runs { runs: Vec::new(), most: if query.one { 1 } else { MAX_DESCRIPTORS } };
    let mut fill = |flags: fn(&MapEntry) -> u32| {
        let entries = map::entries(image, query.offset, Some(query.len_bytes));
        runs.fill(entries.map(|entry| entry.map(|entry| (entry.length_bytes, flags(&entry)))))
    };
    match context {
        Context::Allocation => fill(allocation)?,
        Context::Depth => fill(depth)?,
        Context::Bitmap(bitmap) => {
            let map = bitmap.map().expect("contexts are fixed when they are selected");
            runs.fill(dirty(map, query.offset, query.len_bytes).map(Ok))?;
        }
    }
    if runs.runs.is_empty() {
        // The disk became shorter since the request was checked.
        runs.runs.push(Descriptor { len_bytes: query.len_bytes, flags: 0 });
    }
    Ok(runs.runs)
}

/// "`base:allocation` metadata context", as the reference fills it.
fn allocation(entry: &MapEntry) -> u32 {
    let hole = if entry.data { 0 } else { STATE_HOLE };
    let zero = if entry.zero { STATE_ZERO } else { 0 };
    hole | zero
}

/// QEMU `docs/interop/nbd.rst`, `qemu:allocation-depth`.
fn depth(entry: &MapEntry) -> u32 {
    if entry.present { u32::try_from(entry.depth + 1).expect("chains are bounded") } else { 0 }
}

/// The runs of a bitmap inside a range; what is behind its disk is not dirty.
fn dirty(map: &DirtyMap, offset: u64, len_bytes: u64) -> impl Iterator<Item = (u64, u32)> {
    let (mut at, end) = (offset, offset + len_bytes);
    std::iter::from_fn(move || {
        if at == end {
            return None;
        }
        let next = map.next_dirty(at).filter(|range| range.start < end).unwrap_or(end..end);
        let (until, flags) = if next.start > at { (next.start, 0) } else { (next.end.min(end), STATE_DIRTY) };
        let len = until - at;
        at = until;
        Some((len, flags))
    })
}

struct Runs {
    runs: Vec<Descriptor>,
    most: usize,
}

impl Runs {
    fn fill(&mut self, found: impl Iterator<Item = Result<(u64, u32)>>) -> Result<()> {
        for found in found {
            let (len_bytes, flags) = found?;
            let full = self.runs.len() == self.most;
            match self.runs.last_mut() {
                Some(last) if last.flags == flags => last.len_bytes += len_bytes,
                _ if full => break,
                _ => self.runs.push(Descriptor { len_bytes, flags }),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        /// The runs of a bitmap are its bits, one by one.
        #[test]
        fn bitmap_runs_are_the_bits(
            set in vec((0_u64..64, 1_u64..5), 0..8), offset in 0_u64..65536, len in 1_u64..65536,
        ) {
            let map = DirtyMap::new(100_000, 1024).unwrap();
            for (granule, count) in set {
                map.set(granule * 1024..(granule + count) * 1024).unwrap();
            }
            let mut runs = Runs { runs: Vec::new(), most: usize::MAX };
            runs.fill(dirty(&map, offset, len).map(Ok)).unwrap();
            let mut at = offset;
            for pair in runs.runs.windows(2) {
                prop_assert_ne!(pair[0].flags, pair[1].flags);
            }
            for run in &runs.runs {
                for byte in (at..at + run.len_bytes).step_by(256) {
                    prop_assert_eq!(map.is_dirty(byte), run.flags == STATE_DIRTY, "{}", byte);
                }
                at += run.len_bytes;
            }
            prop_assert_eq!(at, offset + len);
        }
    }

    #[test]
    fn runs_are_joined_and_cut_off() {
        let mut runs = Runs { runs: Vec::new(), most: 2 };
        let found = [(1, 0), (2, 0), (3, 1), (4, 1), (5, 0), (6, 0)];
        runs.fill(found.into_iter().map(Ok)).unwrap();
        assert_eq!(runs.runs, [Descriptor { len_bytes: 3, flags: 0 }, Descriptor { len_bytes: 7, flags: 1 }]);
    }
}
