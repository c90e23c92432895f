//! What verified blocks are full of: every sector says where it belongs, which write it came with, and whether it is
//! whole.
//!
//! | bytes | |
//! | --- | --- |
//! | 0-7 | [`MAGIC`] |
//! | 8-15 | the run that wrote it |
//! | 16-23 | its offset on the disk, in bytes |
//! | 24-31 | its generation: 1 for the first write of its block, then one more for each |
//! | 32-35 | CRC-32 (IEEE) of the sector with zeroes here |
//! | 36-511 | bytes that follow from all of that |
//!
//! Integers are little-endian.

use std::{fmt, ops::RangeInclusive};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use super::noise::Noise;

/// The smallest piece that a device writes as a whole; blocks are made of them.
pub(super) const SECTOR_BYTES: usize = 512;

/// How a sector begins that a verified run has written.
const MAGIC: [u8; 8] = *b"blkstamp";

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawStamp {
    magic: [u8; 8],
    run_id: U64,
    offset: U64,
    generation: U64,
    crc: U32,
    body: [u8; 476],
}
const _: () = assert!(size_of::<RawStamp>() == SECTOR_BYTES);

/// What a sector must be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub(super) run_id: u64,
    /// On the disk, in bytes.
    pub(super) offset: u64,
    pub(super) generation: u64,
}

/// A byte that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Mismatch {
    /// The first wrong byte of the disk.
    pub at: u64,
    /// What is wrong with it.
    why: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {:#x} of the disk: {}", self.at, self.why)
    }
}

impl Stamp {
    fn encode(self) -> RawStamp {
        let mut sector = RawStamp {
            magic: MAGIC,
            run_id: self.run_id.into(),
            offset: self.offset.into(),
            generation: self.generation.into(),
            crc: U32::ZERO,
            body: [0; 476],
        };
        let seed = self.run_id ^ self.offset.rotate_left(24) ^ self.generation.rotate_left(48);
        Noise::new(seed).fill(&mut sector.body);
        sector.crc = crc32fast::hash(sector.as_bytes()).into();
        sector
    }
}

/// Fills a block, of whole sectors, that begins where `first` says.
pub(super) fn fill(block: &mut [u8], first: Stamp) {
    let mut stamp = first;
    for sector in block.chunks_exact_mut(SECTOR_BYTES) {
        sector.copy_from_slice(stamp.encode().as_bytes());
        stamp.offset += SECTOR_BYTES as u64;
    }
}

/// Looks at a block that begins at byte `offset` of the disk. Its sectors may be of any of the generations; returns
/// the newest that was met.
///
/// # Errors
/// [`Mismatch`]: the first byte that no write of these generations can have left.
pub(super) fn check(
    block: &[u8],
    run_id: u64,
    offset: u64,
    generations: &RangeInclusive<u64>,
) -> Result<u64, Mismatch> {
    let mut newest = 0;
    for (at, sector) in (offset..).step_by(SECTOR_BYTES).zip(block.chunks_exact(SECTOR_BYTES)) {
        newest = newest.max(check_sector(sector, run_id, at, generations)?);
    }
    Ok(newest)
}

fn check_sector(
    sector: &[u8],
    run_id: u64,
    offset: u64,
    generations: &RangeInclusive<u64>,
) -> Result<u64, Mismatch> {
    let found = RawStamp::read_from_bytes(sector).expect("a sector has the size of a stamp");
    let wrong = |at: usize, why: String| Err(Mismatch { at: offset + at as u64, why });
    if found.magic == MAGIC
        && found.crc.get() == crc32fast::hash(RawStamp { crc: U32::ZERO, ..found }.as_bytes())
    {
        if found.run_id.get() != run_id {
            return wrong(0, "another run wrote what is here".to_owned());
        }
        if found.offset.get() != offset {
            return wrong(0, format!("what is here was written at {:#x}", found.offset));
        }
        let generation = found.generation.get();
        if !generations.contains(&generation) {
            let expected = describe(generations);
            return wrong(0, format!("generation {generation} is here, and {expected} was written"));
        }
        return Ok(generation);
    }
    if sector.iter().all(|byte| *byte == 0) {
        return wrong(0, format!("zeroes are here, and {} was written", describe(generations)));
    }
    // Of the generations that it may be, the one that it says it is.
    let said = found.generation.get();
    let generation = if generations.contains(&said) { said } else { *generations.start() };
    let expected = Stamp { run_id, offset, generation }.encode();
    let differs = |(_, (found, expected)): &(usize, (&u8, &u8))| found != expected;
    let (at, (found, expected)) = sector
        .iter()
        .zip(expected.as_bytes())
        .enumerate()
        .find(differs)
        .expect("what is as expected has its checksum");
    wrong(at, format!("{found:#04x} is here, and generation {generation} has {expected:#04x}"))
}

fn describe(generations: &RangeInclusive<u64>) -> String {
    match (*generations.start(), *generations.end()) {
        (first, last) if first == last => format!("generation {first}"),
        (first, _) => format!("generation {first} or a later one"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 3 << 20;

    fn block(generation: u64) -> Vec<u8> {
        let mut block = vec![0; 2048];
        fill(&mut block, Stamp { run_id: 7, offset: AT, generation });
        block
    }

    #[test]
    fn a_block_is_what_was_written_or_the_byte_is_named() {
        assert_eq!(check(&block(3), 7, AT, &(3..=3)), Ok(3));
        for at in [0, 8, 23, 24, 33, 36, 511, 512, 2047] {
            let mut block = block(3);
            block[at] ^= 0x10;
            let mismatch = check(&block, 7, AT, &(3..=3)).expect_err("a bit is wrong");
            // Of a wrong checksum only the field is known to be wrong.
            assert_eq!(mismatch.at, AT + at as u64, "{mismatch}");
        }
    }

    #[test]
    fn whole_sectors_that_should_not_be_here_are_told_for_what_they_are() {
        let told = |block: &[u8], run_id, at, generations| {
            check(block, run_id, at, &generations).expect_err("it is not right").to_string()
        };
        assert!(told(&block(3), 8, AT, 3..=3).contains("another run"));
        assert!(told(&block(3), 7, AT + 4096, 3..=3).contains("written at 0x300000"));
        assert!(told(&block(3), 7, AT, 4..=4).contains("generation 3 is here, and generation 4"));
        assert!(told(&[0; 512], 7, AT, 4..=u64::MAX).contains("zeroes are here"));
    }

    #[test]
    fn sectors_of_several_generations_make_a_block_that_was_under_way() {
        let mut torn = block(5);
        torn[512..1024].copy_from_slice(&block(4)[512..1024]);
        assert_eq!(check(&torn, 7, AT, &(4..=u64::MAX)), Ok(5));
        let mismatch = check(&torn, 7, AT, &(5..=5)).expect_err("a sector is old");
        assert_eq!(mismatch.at, AT + 512);
    }
}
