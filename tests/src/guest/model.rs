//! A disk as a guest knows it: bytes, and which of them it can rely on.

use super::{Answer, Ask, SECTOR};
use crate::pattern::Random;

/// What a disk of some sectors must read as. A discard leaves zeroes or what was there: both are allowed until the
/// next write.
#[derive(Debug)]
pub struct DiskModel {
    /// What was written last.
    pub bytes: Vec<u8>,
    /// Sectors whose content a discard has made uncertain.
    uncertain: Vec<bool>,
}

impl DiskModel {
    /// A disk of zeroes.
    #[must_use]
    pub fn new(sectors: usize) -> Self {
        Self { bytes: vec![0; sectors * SECTOR], uncertain: vec![false; sectors] }
    }

    /// Does what was asked.
    pub fn apply(&mut self, ask: &Ask) {
        match ask {
            Ask::Write { sector, data } => {
                let first = index(*sector);
                self.bytes[first * SECTOR..][..data.len()].copy_from_slice(data);
                self.uncertain[first..][..data.len() / SECTOR].fill(false);
            }
            Ask::Zero(ranges) => {
                for &(sector, count, _) in ranges {
                    let (first, count) = (index(sector), count as usize);
                    self.bytes[first * SECTOR..][..count * SECTOR].fill(0);
                    self.uncertain[first..][..count].fill(false);
                }
            }
            Ask::Discard(ranges) => {
                for &(sector, count) in ranges {
                    self.uncertain[index(sector)..][..count as usize].fill(true);
                }
            }
            Ask::Read { .. } | Ask::Flush | Ask::Id | Ask::Unknown => {}
        }
    }

    /// Looks at what was read.
    ///
    /// # Panics
    /// With the first sector that a disk with this history cannot have.
    #[track_caller]
    pub fn check(&self, sector: u64, data: &[u8]) {
        for (at, found) in data.chunks(SECTOR).enumerate() {
            let at = index(sector) + at;
            let expected = &self.bytes[at * SECTOR..][..SECTOR];
            let is_zero = found.iter().all(|&byte| byte == 0);
            let is_right = found == expected || (self.uncertain[at] && is_zero);
            assert!(is_right, "sector {at} reads {:02x?}, not {:02x?}", &found[..16], &expected[..16]);
        }
    }

    /// Looks at the answer to `ask`, which must have succeeded.
    ///
    /// # Panics
    /// When it is not what this disk says.
    #[track_caller]
    pub fn check_answer(&self, ask: &Ask, answer: &Answer) {
        match ask {
            Ask::Unknown => assert_eq!(answer.status, 2, "an unknown type is not supported"),
            Ask::Read { sector, .. } => {
                assert_eq!(answer.status, 0, "{ask:?}");
                self.check(*sector, &answer.data);
            }
            _ => assert_eq!(answer.status, 0, "{:.80}", format!("{ask:?}")),
        }
    }
}

fn index(sector: u64) -> usize {
    usize::try_from(sector).expect("a small disk")
}

/// The next thing a guest does, inside `sectors` from `first` on.
#[must_use]
pub fn next_ask(random: &mut Random, first: u64, sectors: u64) -> Ask {
    let mut place = |most: u64| {
        let count = 1 + random.below(most.min(sectors));
        (first + random.below(sectors - count + 1), count)
    };
    let small = place(64);
    let ranges: Vec<_> = (0..3).map(|_| place(200)).collect();
    let count32 = |count: u64| u32::try_from(count).expect("few");
    match random.below(16) {
        0..=5 => Ask::Read { sector: small.0, sectors: index(small.1) },
        6..=11 => {
            let mut data = vec![0; index(small.1) * SECTOR];
            random.fill(&mut data);
            Ask::Write { sector: small.0, data }
        }
        12 => Ask::Flush,
        13 => Ask::Discard(ranges.into_iter().map(|(at, count)| (at, count32(count))).collect()),
        14 => {
            let unmap = random.below(2) == 0;
            Ask::Zero(ranges.into_iter().map(|(at, count)| (at, count32(count), unmap)).collect())
        }
        _ if random.below(4) == 0 => Ask::Unknown,
        _ => Ask::Id,
    }
}
