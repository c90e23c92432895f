//! What a load is made of.

use std::{ops::Range, time::Duration};

use crate::request::Op;

/// Which requests a job makes, by fio's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Reads in order.
    Read,
    /// Writes in order.
    Write,
    /// Reads anywhere.
    RandRead,
    /// Writes anywhere.
    RandWrite,
    /// Reads and writes anywhere.
    RandRw,
    /// Discards anywhere.
    Discard,
}

impl Pattern {
    /// All of them and their names.
    pub const ALL: [(Self, &'static str); 6] = [
        (Self::Read, "read"),
        (Self::Write, "write"),
        (Self::RandRead, "randread"),
        (Self::RandWrite, "randwrite"),
        (Self::RandRw, "randrw"),
        (Self::Discard, "discard"),
    ];

    /// The pattern of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(pattern, _)| *pattern)
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// Whether the disk is changed.
    #[must_use]
    pub fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }

    /// Whether bytes are written.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::RandWrite | Self::RandRw)
    }

    /// Whether blocks are discarded.
    #[must_use]
    pub fn discards(self) -> bool {
        self == Self::Discard
    }
}

/// When a job ends: with the first limit that is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// After so long.
    pub time: Option<Duration>,
    /// After so many requests of each queue.
    pub requests: Option<u64>,
}

/// A load.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// What is asked.
    pub pattern: Pattern,
    /// Of a hundred requests of [`Pattern::RandRw`], so many are reads.
    pub read_percent: u32,
    /// Bytes of a request.
    pub block_bytes: u64,
    /// Requests under way at once in each queue.
    pub depth: u32,
    /// Queues, each with a thread of its own.
    pub queues: u32,
    /// Requests a second of each queue, begun at even intervals; as many as go without.
    pub rate: Option<f64>,
    /// A flush after so many requests that change the disk.
    pub flush_every: Option<u64>,
    /// When it ends.
    pub limit: Limit,
    /// Numbers drawn follow from this alone.
    pub seed: u64,
}

/// The requests of one queue, in order.
#[derive(Debug)]
pub(super) struct Requests {
    pattern: Pattern,
    read_percent: u64,
    block_bytes: u64,
    /// The first block of the queue, and how many blocks are its own where they are shared out.
    first: u64,
    blocks: u64,
    next: u64,
    flush_every: Option<u64>,
    changes: u64,
    random: u64,
}

impl Requests {
    /// Those of queue number `queue` on a disk of `blocks` blocks. Blocks taken in order are shared out between
    /// the queues, which may be no more than there are blocks; others only where they have to be `apart`.
    pub(super) fn new(job: &Job, queue: u32, blocks: u64, apart: bool) -> Self {
        let (queue, queues) = (u64::from(queue), u64::from(job.queues.max(1)));
        let share = (blocks / queues).max(1);
        let in_order = matches!(job.pattern, Pattern::Read | Pattern::Write);
        let (first, blocks) = if in_order || apart { (queue * share % blocks, share) } else { (0, blocks) };
        Self {
            pattern: job.pattern,
            read_percent: u64::from(job.read_percent),
            block_bytes: job.block_bytes,
            first,
            blocks,
            next: 0,
            flush_every: job.flush_every,
            changes: 0,
            random: job.seed.wrapping_add(queue.wrapping_mul(0xa076_1d64_78bd_642f)),
        }
    }

    /// The blocks that it asks for.
    pub(super) fn share(&self) -> Range<u64> {
        self.first..self.first + self.blocks
    }

    /// The next one: what, and from where on. A flush has no place.
    pub(super) fn next(&mut self) -> (Op, u64) {
        if let Some(every) = self.flush_every
            && self.changes >= every
        {
            self.changes = 0;
            return (Op::Flush, 0);
        }
        let block = match self.pattern {
            Pattern::Read | Pattern::Write => {
                self.next += 1;
                (self.next - 1) % self.blocks
            }
            _ => self.draw() % self.blocks,
        };
        let op = match self.pattern {
            Pattern::Read | Pattern::RandRead => Op::Read,
            Pattern::Write | Pattern::RandWrite => Op::Write { fua: false },
            Pattern::RandRw => {
                if self.draw() % 100 < self.read_percent {
                    Op::Read
                } else {
                    Op::Write { fua: false }
                }
            }
            Pattern::Discard => Op::Discard { fua: false },
        };
        self.changes += u64::from(op.changes());
        (op, (self.first + block) * self.block_bytes)
    }

    /// SplitMix64.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.random;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(pattern: Pattern) -> Job {
        Job {
            pattern,
            read_percent: 70,
            block_bytes: 4096,
            depth: 1,
            queues: 2,
            rate: None,
            flush_every: None,
            limit: Limit { time: None, requests: Some(1) },
            seed: 1,
        }
    }

    #[test]
    fn queues_share_out_what_is_taken_in_order() {
        for queue in 0..2 {
            let mut requests = Requests::new(&job(Pattern::Write), queue, 8, false);
            let offsets: Vec<u64> = (0..5).map(|_| requests.next().1 / 4096).collect();
            let first = u64::from(queue) * 4;
            assert_eq!(offsets, [first, first + 1, first + 2, first + 3, first]);
        }
    }

    #[test]
    fn a_mix_is_what_it_says_and_follows_from_the_seed() {
        let draw = |queue| {
            let mut requests = Requests::new(&job(Pattern::RandRw), queue, 1000, false);
            (0..10_000).map(|_| requests.next()).collect::<Vec<_>>()
        };
        let (first, again, other) = (draw(0), draw(0), draw(1));
        assert_eq!(first, again);
        assert_ne!(first, other);
        let reads = first.iter().filter(|(op, _)| *op == Op::Read).count();
        assert!((6800..7200).contains(&reads), "{reads} of 10000 are reads");
        assert!(first.iter().all(|(_, at)| *at < 1000 * 4096 && at % 4096 == 0));
    }

    #[test]
    fn a_flush_comes_after_so_many_changes() {
        let mut requests =
            Requests::new(&Job { flush_every: Some(2), ..job(Pattern::RandWrite) }, 0, 10, false);
        let flushes: Vec<bool> = (0..6).map(|_| requests.next().0 == Op::Flush).collect();
        assert_eq!(flushes, [false, false, true, false, false, true]);
    }
}
