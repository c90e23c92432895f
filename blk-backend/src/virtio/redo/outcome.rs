//! What notes come to: for each guest byte that they speak of the last of them.
//!
//! Only that is done again. What an earlier note says of the same bytes is past, and must not be written: a table that
//! reached the disk without a flush may name the place of the last one already.

use std::{collections::BTreeMap, ops::Range};

use img_core::{
    Result,
    format::{HostFile, HostOffset, Place},
    image::Image,
};

/// Bytes that are moved at once, and the boundaries at which they are cut: whole clusters of every size.
const STEP_BYTES: u64 = 8 << 20;

/// What became of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Became {
    /// They stand there.
    Mapped { file: HostFile, place: u64 },
    /// Zeroes.
    Zeroed,
    /// They were discarded.
    Discarded,
}

impl Became {
    /// Of the bytes from `by` on.
    fn behind(self, by: u64) -> Self {
        match self {
            Self::Mapped { file, place } => Self::Mapped { file, place: place + by },
            other => other,
        }
    }
}

/// The guest bytes of which notes speak, by their first one: ends, and what became of them.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    parts: BTreeMap<u64, (u64, Became)>,
}

impl Outcome {
    /// What a note says, behind all that was noted before. `in_place` is of a format that puts zeroes and discards where
    /// bytes are stored, and then has nothing to say of them in its map.
    pub(super) fn add(&mut self, guest_bytes: Range<u64>, became: Became, in_place: bool) {
        match became {
            Became::Discarded if in_place => {}
            Became::Zeroed if in_place => {
                for gap in self.not_mapped(guest_bytes) {
                    self.put(gap, became);
                }
            }
            _ => self.put(guest_bytes, became),
        }
    }

    fn put(&mut self, range: Range<u64>, became: Became) {
        self.cut_at(range.start);
        self.cut_at(range.end);
        let covered: Vec<u64> = self.parts.range(range.clone()).map(|(start, _)| *start).collect();
        for start in covered {
            self.parts.remove(&start);
        }
        self.parts.insert(range.start, (range.end, became));
    }

    /// Makes a part end, and another one begin, at `at`, where one goes on.
    fn cut_at(&mut self, at: u64) {
        let Some((start, part)) = self.parts.range_mut(..at).next_back() else { return };
        let (start, (end, became)) = (*start, *part);
        if end > at {
            part.0 = at;
            self.parts.insert(at, (end, became.behind(at - start)));
        }
    }

    /// What is left of a range without what is mapped.
    fn not_mapped(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let (mut at, mut gaps) = (range.start, Vec::new());
        let before = self.parts.range(..range.start).next_back();
        for (&start, &(end, became)) in before.into_iter().chain(self.parts.range(range.clone())) {
            if matches!(became, Became::Mapped { .. }) && end > at {
                if start > at {
                    gaps.push(at..start);
                }
                at = end;
            }
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }

    /// Brings it about.
    ///
    /// # Errors
    /// Those of the image.
    pub(super) fn bring_about(&self, image: &Image) -> Result<()> {
        for (&start, &(end, became)) in &self.parts {
            match became {
                Became::Mapped { file, place } => {
                    let mut at = start;
                    while at < end {
                        let next = (at - at % STEP_BYTES + STEP_BYTES).min(end);
                        move_there(image, at..next, file, place + (at - start))?;
                        at = next;
                    }
                }
                Became::Zeroed => {
                    for part in not_in_place(image, start..end)? {
                        image.write_zeroes(part, true)?;
                    }
                }
                Became::Discarded => image.discard(start..end)?,
            }
        }
        Ok(())
    }
}

/// Writes guest bytes that stand at `place`, where the map does not say so already.
fn move_there(image: &Image, guest_bytes: Range<u64>, file: HostFile, place: u64) -> Result<()> {
    let mut extents = Vec::new();
    image.map_range(guest_bytes.clone(), &mut extents)?;
    let is_there = extents.iter().all(|extent| {
        let here = HostOffset(place + (extent.guest_offset - guest_bytes.start));
        extent.depth == 0
            && matches!(extent.place, Place::Data { file: found, at, .. } if found == file && at == here)
    });
    if is_there {
        return Ok(());
    }
    let storage = image.storage(0, file).expect("the note was read for a file that is there");
    let length = usize::try_from(guest_bytes.end - guest_bytes.start).expect("at most STEP_BYTES");
    let mut bytes = vec![0; length];
    storage.read_at(&mut bytes, place)?;
    image.write_at(&bytes, guest_bytes.start)
}

/// The parts of a range of which the map has to say that they are zero. Where zeroes were put in place they stand in the
/// file, or, by now, what was written over them: nobody noted that, and it must not become zero again.
fn not_in_place(image: &Image, guest_bytes: Range<u64>) -> Result<Vec<Range<u64>>> {
    if !image.layers()[0].zeroes_in_place() {
        return Ok(vec![guest_bytes]);
    }
    let mut extents = Vec::new();
    image.map_range(guest_bytes, &mut extents)?;
    let is_stored = |place: &Place| matches!(place, Place::Data { .. });
    let parts = extents.iter().filter(|extent| extent.depth > 0 || !is_stored(&extent.place));
    Ok(parts.map(|part| part.guest_offset..part.guest_offset + part.len_bytes).collect())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        /// Byte by byte, the last note counts; in place, zeroes count where nothing is mapped, and discards nowhere.
        #[test]
        fn the_last_note_counts(
            notes in vec((0u64..60, 1u64..20, 0u8..3), 0..20), in_place: bool,
        ) {
            let mut outcome = Outcome::default();
            let mut model = [None; 80];
            for (number, (start, length, kind)) in (0u64..).zip(notes) {
                let became = match kind {
                    0 => Became::Mapped { file: HostFile::IMAGE, place: 1000 * number },
                    1 => Became::Zeroed,
                    _ => Became::Discarded,
                };
                outcome.add(start..start + length, became, in_place);
                for byte in 0..length {
                    let known = &mut model[usize::try_from(start + byte).expect("small")];
                    let is_mapped = matches!(known, Some(Became::Mapped { .. }));
                    match became {
                        Became::Discarded if in_place => {}
                        Became::Zeroed if in_place && is_mapped => {}
                        _ => *known = Some(became.behind(byte)),
                    }
                }
            }
            let mut found = [None; 80];
            for (start, (end, became)) in outcome.parts {
                prop_assert!(start < end);
                for byte in start..end {
                    let at = usize::try_from(byte).expect("small");
                    prop_assert_eq!(found[at], None, "parts overlap");
                    found[at] = Some(became.behind(byte - start));
                }
            }
            prop_assert_eq!(found, model);
        }
    }
}
