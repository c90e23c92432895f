//! What a lane counts. One thread writes, any thread reads: plain loads and stores, no locked instruction.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crate::request::Op;

/// Buckets for each power of two: a latency is known to an eighth.
const STEPS: u64 = 1 << STEPS_LOG2;
const STEPS_LOG2: u32 = 3;

/// Latencies of 2^40 ns (18 minutes) and more share the last buckets.
const MAX_LOG2: u32 = 40;

/// One for each value below [`STEPS`], then [`STEPS`] for each power of two.
const BUCKETS: usize = ((MAX_LOG2 - 1) as usize) << STEPS_LOG2;

/// The kinds of requests that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// [`Op::Read`] and [`Op::Cache`].
    Read,
    /// [`Op::Write`].
    Write,
    /// [`Op::Flush`].
    Flush,
    /// [`Op::Discard`].
    Discard,
    /// [`Op::WriteZeroes`].
    WriteZeroes,
}

impl OpKind {
    /// All of them, in the order of [`LaneSnapshot::ops`].
    pub const ALL: [Self; 5] = [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes];

    /// A short name: `read`, `write`, `flush`, `discard`, `write_zeroes`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write_zeroes",
        }
    }

    fn of(op: Op) -> Self {
        match op {
            Op::Read | Op::Cache => Self::Read,
            Op::Write { .. } => Self::Write,
            Op::Flush => Self::Flush,
            Op::Discard { .. } => Self::Discard,
            Op::WriteZeroes { .. } => Self::WriteZeroes,
        }
    }
}

/// A number that one thread counts up.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, by: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(by), Relaxed);
    }

    pub(super) fn set(&self, to: u64) {
        self.0.store(to, Relaxed);
    }

    fn read(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The counters of one lane.
#[derive(Debug, Default)]
pub(crate) struct LaneStats {
    ops: [OpCounters; 5],
    /// Requests under way.
    pub(super) depth: Counter,
    pub(super) depth_max: Counter,
    /// Given to a worker.
    pub(super) handed_over: Counter,
    /// Of them, because a table was not in memory.
    pub(super) misses: Counter,
    /// Pieces of tables that the ring has read.
    pub(super) table_reads: Counter,
    /// Waited for the clusters of another change.
    pub(super) parked: Counter,
    /// Times that the lane slept.
    pub(super) sleeps: Counter,
    /// Times that work came while the lane polled, before it slept.
    pub(super) poll_hits: Counter,
    /// Calls of the kernel to submit or to wait.
    pub(super) enters: Counter,
}

#[derive(Debug)]
struct OpCounters {
    done: Counter,
    failed: Counter,
    bytes: Counter,
    nanoseconds: Counter,
    buckets: [Counter; BUCKETS],
}

impl Default for OpCounters {
    fn default() -> Self {
        Self {
            done: Counter::default(),
            failed: Counter::default(),
            bytes: Counter::default(),
            nanoseconds: Counter::default(),
            buckets: [const { Counter(AtomicU64::new(0)) }; BUCKETS],
        }
    }
}

impl LaneStats {
    /// A request has ended.
    pub(super) fn done(&self, op: Op, bytes: u64, took: Duration, succeeded: bool) {
        let counters = &self.ops[OpKind::of(op) as usize];
        if !succeeded {
            counters.failed.add(1);
            return;
        }
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        counters.done.add(1);
        counters.bytes.add(bytes);
        counters.nanoseconds.add(nanoseconds);
        counters.buckets[bucket(nanoseconds)].add(1);
    }

    /// One more, or one less, is under way.
    pub(super) fn depth_is(&self, depth: usize) {
        let depth = depth as u64;
        self.depth.set(depth);
        if depth > self.depth_max.read() {
            self.depth_max.set(depth);
        }
    }

    /// The counts so far.
    pub(crate) fn snapshot(&self) -> LaneSnapshot {
        LaneSnapshot {
            ops: OpKind::ALL.map(|kind| self.ops[kind as usize].snapshot()),
            depth: self.depth.read(),
            depth_max: self.depth_max.read(),
            handed_over: self.handed_over.read(),
            misses: self.misses.read(),
            table_reads: self.table_reads.read(),
            parked: self.parked.read(),
            sleeps: self.sleeps.read(),
            poll_hits: self.poll_hits.read(),
            enters: self.enters.read(),
        }
    }
}

impl OpCounters {
    fn snapshot(&self) -> OpStats {
        OpStats {
            done: self.done.read(),
            failed: self.failed.read(),
            bytes: self.bytes.read(),
            nanoseconds: self.nanoseconds.read(),
            latency: Histogram { counts: self.buckets.iter().map(Counter::read).collect() },
        }
    }
}

/// What lanes have counted since they began, read at one moment; sums of several lanes add up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaneSnapshot {
    /// By [`OpKind::ALL`].
    pub ops: [OpStats; 5],
    /// Requests under way.
    pub depth: u64,
    /// The most that ever were, in one lane.
    pub depth_max: u64,
    /// Requests given to a worker.
    pub handed_over: u64,
    /// Of them, because tables were not in memory or somebody held them.
    pub misses: u64,
    /// Pieces of tables that were not in memory, and that lanes have read themselves.
    pub table_reads: u64,
    /// Requests that waited for the clusters of another change.
    pub parked: u64,
    /// Times that a lane slept.
    pub sleeps: u64,
    /// Times that work came while a lane polled, before it slept.
    pub poll_hits: u64,
    /// Calls of the kernel to submit or to wait.
    pub enters: u64,
}

/// What was counted of one kind of request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpStats {
    /// Ended well.
    pub done: u64,
    /// Ended with an error; counted nowhere else.
    pub failed: u64,
    /// Guest bytes.
    pub bytes: u64,
    /// From submission to answer, all together.
    pub nanoseconds: u64,
    /// The same, one by one.
    pub latency: Histogram,
}

impl LaneSnapshot {
    /// Adds the counts of another lane.
    pub fn add(&mut self, other: &Self) {
        for (sum, one) in self.ops.iter_mut().zip(&other.ops) {
            sum.done += one.done;
            sum.failed += one.failed;
            sum.bytes += one.bytes;
            sum.nanoseconds += one.nanoseconds;
            sum.latency.add(&one.latency);
        }
        self.depth += other.depth;
        self.depth_max = self.depth_max.max(other.depth_max);
        self.handed_over += other.handed_over;
        self.misses += other.misses;
        self.table_reads += other.table_reads;
        self.parked += other.parked;
        self.sleeps += other.sleeps;
        self.poll_hits += other.poll_hits;
        self.enters += other.enters;
    }

    /// What was counted of `kind`.
    #[must_use]
    pub fn op(&self, kind: OpKind) -> &OpStats {
        &self.ops[kind as usize]
    }
}

/// How many requests took how long; each bucket is an eighth of a power of two wide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Empty, or one count a bucket.
    counts: Vec<u64>,
}

impl Histogram {
    /// The upper end (exclusive, in nanoseconds) and the count of each bucket that holds any, in order.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let all = self.counts.iter().enumerate().map(|(index, count)| (bucket_end(index), *count));
        all.filter(|(_, count)| *count > 0)
    }

    /// An upper bound of the latency of the fraction `share` of all requests; `None` without any.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let total: u64 = self.counts.iter().sum();
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let rank = (share.clamp(0.0, 1.0) * total as f64).ceil() as u64;
        let mut seen = 0;
        self.buckets().find_map(|(end, count)| {
            seen += count;
            (seen >= rank).then(|| Duration::from_nanos(end))
        })
    }

    fn add(&mut self, other: &Self) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (sum, one) in self.counts.iter_mut().zip(&other.counts) {
            *sum += one;
        }
    }
}

/// The bucket of a latency.
fn bucket(nanoseconds: u64) -> usize {
    let value = nanoseconds.min((1 << (MAX_LOG2 + 1)) - 1);
    let index = if value < STEPS {
        value
    } else {
        let log2 = value.ilog2();
        u64::from(log2 - STEPS_LOG2 + 1) * STEPS + ((value >> (log2 - STEPS_LOG2)) & (STEPS - 1))
    };
    usize::try_from(index).expect("below BUCKETS")
}

/// Where bucket `index` ends, exclusive.
fn bucket_end(index: usize) -> u64 {
    let index = index as u64;
    if index < STEPS {
        return index + 1;
    }
    // The first power of two with steps begins at STEPS itself, with steps of 1.
    (STEPS + index % STEPS + 1) << (index / STEPS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_is_below_the_end_of_its_bucket_and_not_below_the_one_before() {
        for shift in 0..45 {
            for offset in 0..3u64 {
                let value = ((1u64 << shift) + offset).saturating_sub(1);
                let index = bucket(value);
                assert!(index < BUCKETS, "{value}");
                if shift <= MAX_LOG2 {
                    assert!(value < bucket_end(index), "{value}");
                    assert!(index == 0 || value >= bucket_end(index - 1), "{value}");
                }
            }
        }
    }

    #[test]
    fn quantiles_are_upper_bounds() {
        let stats = LaneStats::default();
        for microseconds in 1..=100 {
            stats.done(Op::Read, 512, Duration::from_micros(microseconds), true);
        }
        stats.done(Op::Read, 512, Duration::from_secs(1), false);
        let mut sum = stats.snapshot();
        sum.add(&stats.snapshot());
        let read = sum.op(OpKind::Read);
        assert_eq!((read.done, read.failed, read.bytes), (200, 2, 102_400));
        let median = read.latency.quantile(0.5).expect("there are some");
        assert!((50..58).contains(&median.as_micros()), "{median:?}");
        assert_eq!(sum.op(OpKind::Write).latency.quantile(0.5), None);
    }
}
