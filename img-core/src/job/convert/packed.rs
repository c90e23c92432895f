//! Units of a buffer in the form in which a target stores them.

use std::ops::Range;

use crate::{Result, format::Codec, job::compress::Compressor, zeroes::is_zero};

/// How units are stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packing {
    /// Guest bytes of a unit.
    pub(super) unit_bytes: usize,
    /// How they are compressed, and at which level, where they are.
    pub(super) compress: Option<(Codec, Option<i32>)>,
    /// Whether units of zeroes are not stored.
    pub(super) drops_zeroes: bool,
}

/// What a thread keeps of the units that it packed last.
#[derive(Default)]
pub(super) struct Packed {
    compressor: Option<Compressor>,
    compressed: Vec<u8>,
    places: Vec<Place>,
}

enum Place {
    Nowhere,
    AsItIs(Range<usize>),
    Compressed(Range<usize>),
}

/// A unit as it is stored.
#[derive(Clone, Copy)]
pub(super) enum Stored<'a> {
    /// Zeroes: not at all.
    Nothing,
    AsItIs(&'a [u8]),
    Compressed(&'a [u8]),
}

impl<'a> Stored<'a> {
    /// What is stored; nothing for a unit of zeroes.
    pub(super) fn bytes(self) -> &'a [u8] {
        match self {
            Self::Nothing => &[],
            Self::AsItIs(bytes) | Self::Compressed(bytes) => bytes,
        }
    }
}

impl Packed {
    /// Packs the units in `units`, a multiple of their size.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a level that the codec does not have.
    pub(super) fn pack(&mut self, units: &[u8], packing: Packing) -> Result<()> {
        self.places.clear();
        let bound = packing.compress.map_or(0, |(how, _)| Compressor::bound(how, packing.unit_bytes));
        let room = units.len() / packing.unit_bytes * bound;
        if self.compressed.len() < room {
            self.compressed.resize(room, 0);
        }
        let mut free = 0;
        for (unit, at) in units.chunks(packing.unit_bytes).zip((0..).step_by(packing.unit_bytes)) {
            let place = if packing.drops_zeroes && is_zero(unit) {
                Place::Nowhere
            } else if let Some(len) = self.compress(unit, packing.compress, free..free + bound)? {
                free += len;
                Place::Compressed(free - len..free)
            } else {
                Place::AsItIs(at..at + unit.len())
            };
            self.places.push(place);
        }
        Ok(())
    }

    /// Compresses a unit to `room`; how long it is then, if it is compressed.
    fn compress(
        &mut self,
        unit: &[u8],
        how: Option<(Codec, Option<i32>)>,
        room: Range<usize>,
    ) -> Result<Option<usize>> {
        let Some((how, level)) = how else { return Ok(None) };
        let compressor = match &mut self.compressor {
            Some(compressor) => compressor,
            none => none.insert(Compressor::new(how, level, unit.len())?),
        };
        compressor.compress(unit, &mut self.compressed[room])
    }

    /// What [`Self::pack`] made of the same `units`, in order.
    pub(super) fn stored<'p>(&'p self, units: &'p [u8]) -> impl Iterator<Item = Stored<'p>> {
        self.places.iter().map(|place| match place {
            Place::Nowhere => Stored::Nothing,
            Place::AsItIs(range) => Stored::AsItIs(&units[range.clone()]),
            Place::Compressed(range) => Stored::Compressed(&self.compressed[range.clone()]),
        })
    }
}
