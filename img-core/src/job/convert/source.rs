//! The sources, one behind the other, read as one disk.

use std::ops::Range;

use super::Salvaged;
use crate::{Error, JobStep, Result, image::Image};

const SECTOR_BYTES: usize = 512;

/// All sources. Each begins on a sector: what is missing to that at the end of the one before is zero.
pub(super) struct Sources<'a> {
    list: Vec<Source<'a>>,
}

/// A part of an image, mostly all of it.
pub(super) struct Source<'a> {
    pub(super) image: &'a Image,
    /// Where it begins in all sources.
    pub(super) base: u64,
    /// Which part of the image it is.
    pub(super) part: Range<u64>,
    /// How long it is in all sources.
    pub(super) padded_bytes: u64,
}

/// Told of what was given up.
pub(super) type OnSalvaged<'a> = Option<&'a (dyn Fn(Salvaged, &Error) + Sync)>;

impl<'a> Sources<'a> {
    /// Whole images.
    pub(super) fn new(images: &'a [Image]) -> Result<Self> {
        Self::of_parts(images.iter().map(|image| (image, 0..image.virtual_size_bytes())))
    }

    /// Parts of images, each inside its disk.
    pub(super) fn of_parts(parts: impl IntoIterator<Item = (&'a Image, Range<u64>)>) -> Result<Self> {
        let mut list = Vec::new();
        let mut base = 0_u64;
        for (image, part) in parts {
            let too_big = || Error::Invalid("The sources together are larger than 2^63 bytes".to_owned());
            let padded_bytes =
                (part.end - part.start).checked_next_multiple_of(SECTOR_BYTES as u64).ok_or_else(too_big)?;
            list.push(Source { image, base, part, padded_bytes });
            base =
                base.checked_add(padded_bytes).filter(|end| *end <= i64::MAX as u64).ok_or_else(too_big)?;
        }
        Ok(Self { list })
    }

    /// Of all together.
    pub(super) fn len_bytes(&self) -> u64 {
        self.list.last().map_or(0, |last| last.base + last.padded_bytes)
    }

    /// Which source has byte `at`.
    pub(super) fn index_at(&self, at: u64) -> usize {
        self.list.partition_point(|source| source.base + source.padded_bytes <= at)
    }

    /// A source by its number.
    pub(super) fn get(&self, index: usize) -> Option<&Source<'a>> {
        self.list.get(index)
    }

    /// Fills `buf` from `at` on. With `on_salvaged`, sectors that cannot be read become zeroes.
    pub(super) fn read(&self, mut buf: &mut [u8], mut at: u64, on_salvaged: OnSalvaged<'_>) -> Result<()> {
        let mut index = self.index_at(at);
        while !buf.is_empty() {
            let source = &self.list[index];
            let inside = at - source.base;
            let in_source = usize::try_from(source.padded_bytes - inside).unwrap_or(usize::MAX);
            let (part, rest) = buf.split_at_mut(in_source.min(buf.len()));
            source.read(part, inside, index, on_salvaged)?;
            at += part.len() as u64;
            buf = rest;
            index += 1;
        }
        Ok(())
    }
}

impl Source<'_> {
    fn read(&self, buf: &mut [u8], inside: u64, index: usize, on_salvaged: OnSalvaged<'_>) -> Result<()> {
        let inside = self.part.start + inside;
        let stored = usize::try_from(self.part.end.saturating_sub(inside))
            .map_or(buf.len(), |stored| stored.min(buf.len()));
        let (stored, padding) = buf.split_at_mut(stored);
        padding.fill(0);
        if stored.is_empty() {
            return Ok(());
        }
        let error = match self.image.read_at(stored, inside) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let Some(on_salvaged) = on_salvaged else {
            let at_bytes = self.base + (inside - self.part.start);
            return Err(Error::Job { step: JobStep::Read, input: index, at_bytes, source: Box::new(error) });
        };
        for (sector, offset_bytes) in stored.chunks_mut(SECTOR_BYTES).zip((inside..).step_by(SECTOR_BYTES)) {
            if let Err(error) = self.image.read_at(sector, offset_bytes) {
                sector.fill(0);
                on_salvaged(Salvaged { source: index, offset_bytes, step: JobStep::Read }, &error);
            }
        }
        Ok(())
    }
}
