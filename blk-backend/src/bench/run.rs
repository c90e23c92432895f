//! Running a job.

use std::{
    io,
    sync::{Arc, Barrier},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

use super::{
    job::{Job, Requests},
    memory::Blocks,
};
use crate::{
    disk::Disk,
    engine::{Event, Lane, LaneOptions, Wait},
    request::{Errno, Op, Request, Segments, Submitted},
};

/// Latencies are counted in nanoseconds, to three digits.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Nothing longer is told apart.
const LONGEST: Duration = Duration::from_secs(86_400);

/// What came of the requests of one kind.
#[derive(Clone, Debug)]
pub struct OpResult {
    /// `read`, `write`, `discard` or `flush`.
    pub name: &'static str,
    /// Bytes moved, or discarded.
    pub bytes: u64,
    /// From the submission to the answer, in nanoseconds; under a fixed rate from the moment at which it was due.
    pub latency_ns: Histogram<u64>,
}

/// What came of a job.
#[derive(Clone, Debug)]
pub struct RunResult {
    /// The longest of the queues.
    pub elapsed: Duration,
    /// User and system time of this process meanwhile.
    pub cpu: Duration,
    /// By kind, those that were asked.
    pub ops: Vec<OpResult>,
}

/// Why a job did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// It cannot be run on this disk.
    #[error("{0}")]
    Job(String),
    /// A request failed.
    #[error("{op} of {len_bytes} bytes at {offset:#x}: {errno}")]
    Request {
        /// What it did.
        op: &'static str,
        /// Where.
        offset: u64,
        /// How much.
        len_bytes: u64,
        /// Why it failed.
        errno: Errno,
    },
    /// The system has no descriptors, memory or threads left.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Runs `job` on `disk`, one lane for each queue.
///
/// # Errors
/// [`BenchError`]: the first that a queue met.
pub fn run(disk: &Arc<Disk>, job: &Job, lane: &LaneOptions) -> Result<RunResult, BenchError> {
    let blocks = disk.size_bytes().checked_div(job.block_bytes).unwrap_or(0);
    if blocks < u64::from(job.queues) || job.queues == 0 || job.depth == 0 {
        return Err(BenchError::Job(format!(
            "{} queues of depth {} need a disk of as many blocks of {} bytes, and it has {} bytes",
            job.queues,
            job.depth,
            job.block_bytes,
            disk.size_bytes()
        )));
    }
    if job.pattern.changes() && disk.is_read_only() {
        return Err(BenchError::Job(format!("the disk is read-only, and {} writes", job.pattern.name())));
    }
    let options = LaneOptions { depth: job.depth, ..*lane };
    let start = Barrier::new(usize::try_from(job.queues).unwrap_or(usize::MAX));
    let before = cpu_time();
    let results: Vec<Result<Queue, BenchError>> = std::thread::scope(|scope| {
        let one = |queue| {
            let start = &start;
            let options = &options;
            scope.spawn(move || run_queue(disk, job, options, queue, blocks, start))
        };
        let threads: Vec<_> = (0..job.queues).map(one).collect();
        let ended = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread
                .join()
                .unwrap_or_else(|_| Err(BenchError::Job("the thread of a queue panicked".to_owned())))
        };
        threads.into_iter().map(ended).collect()
    });
    let cpu = cpu_time().saturating_sub(before);
    let mut total = RunResult { elapsed: Duration::ZERO, cpu, ops: Vec::new() };
    for result in results {
        let queue = result?;
        total.elapsed = total.elapsed.max(queue.elapsed);
        for op in queue.ops {
            match total.ops.iter_mut().find(|known| known.name == op.name) {
                Some(known) => {
                    known.bytes += op.bytes;
                    known.latency_ns.add(&op.latency_ns).expect("histograms without an upper bound");
                }
                None => total.ops.push(op),
            }
        }
    }
    Ok(total)
}

/// What a queue counted.
struct Queue {
    elapsed: Duration,
    ops: Vec<OpResult>,
}

#[derive(Clone, Copy)]
struct UnderWay {
    op: Op,
    offset: u64,
    since: Instant,
}

fn run_queue(
    disk: &Arc<Disk>,
    job: &Job,
    options: &LaneOptions,
    number: u32,
    blocks: u64,
    start: &Barrier,
) -> Result<Queue, BenchError> {
    let depth = usize::try_from(job.depth).unwrap_or(usize::MAX);
    let block =
        usize::try_from(job.block_bytes).map_err(|_| BenchError::Job("a block too big".to_owned()))?;
    // Dropped after the lane, which waits for what is under way.
    let memory = Blocks::new(depth, block, job.seed ^ u64::from(number));
    let lane = Lane::new(disk, options);
    // Whatever happened here, the others begin.
    start.wait();
    let mut lane = lane?;
    let mut requests = Requests::new(job, number, blocks);
    let mut free: Vec<usize> = (0..depth).rev().collect();
    let mut slots: Vec<Option<UnderWay>> = vec![None; depth];
    let mut queue = Queue { elapsed: Duration::ZERO, ops: Vec::new() };
    let mut events = Vec::new();
    let begin = Instant::now();
    let end = job.limit.time.map(|time| begin + time);
    let interval = job.rate.map(|rate| Duration::from_secs_f64(1.0 / rate.max(1e-3)));
    let (mut asked, mut due) = (0_u64, begin);
    loop {
        let mut now = Instant::now();
        let is_over =
            end.is_some_and(|end| now >= end) || job.limit.requests.is_some_and(|most| asked >= most);
        while !is_over
            && job.limit.requests.is_none_or(|most| asked < most)
            && (interval.is_none() || due <= now)
            && let Some(slot) = free.pop()
        {
            let (op, offset) = requests.next();
            let since = if interval.is_some() { due } else { now };
            slots[slot] = Some(UnderWay { op, offset, since });
            let run = [memory.run(slot)];
            let segments = if op.moves_bytes() { memory.segments(&run) } else { Segments::NONE };
            let len_bytes = if op == Op::Flush { 0 } else { job.block_bytes };
            let request = Request { tag: slot as u64, op, offset, len_bytes, segments };
            if lane.submit(&request) == Submitted::Full {
                return Err(BenchError::Job("the lane takes fewer requests than the depth".to_owned()));
            }
            asked += 1;
            if let Some(interval) = interval {
                due += interval;
            }
        }
        if free.len() == depth && is_over {
            break;
        }
        let wait = match interval {
            Some(_) if !free.is_empty() && !is_over => Wait::Until(end.map_or(due, |end| due.min(end))),
            _ => Wait::Event,
        };
        lane.run_once(wait, &mut events)?;
        now = Instant::now();
        for event in events.drain(..) {
            let Event::Done { tag, result } = event else { continue };
            let slot = usize::try_from(tag).unwrap_or(usize::MAX);
            let done = slots[slot].take().expect("each request is answered once");
            free.push(slot);
            let name = name(done.op);
            let len_bytes = if done.op == Op::Flush { 0 } else { job.block_bytes };
            result.map_err(|errno| BenchError::Request {
                op: name,
                offset: done.offset,
                len_bytes,
                errno,
            })?;
            queue.note(name, len_bytes, now.duration_since(done.since));
        }
    }
    queue.elapsed = begin.elapsed();
    drop(lane);
    drop(memory);
    Ok(queue)
}

impl Queue {
    fn note(&mut self, name: &'static str, bytes: u64, latency: Duration) {
        let known = self.ops.iter().position(|op| op.name == name).unwrap_or_else(|| {
            let latency_ns = Histogram::new(SIGNIFICANT_DIGITS).expect("three digits are possible");
            self.ops.push(OpResult { name, bytes: 0, latency_ns });
            self.ops.len() - 1
        });
        let op = &mut self.ops[known];
        op.bytes += bytes;
        let ns = u64::try_from(latency.min(LONGEST).as_nanos()).expect("a day");
        op.latency_ns.record(ns).expect("the histogram grows up to a day");
    }
}

fn name(op: Op) -> &'static str {
    match op {
        Op::Read => "read",
        Op::Write { .. } => "write",
        Op::Flush => "flush",
        Op::Discard { .. } => "discard",
        Op::WriteZeroes { .. } => "write-zeroes",
        Op::Cache => "cache",
    }
}

/// User and system time that this process has taken.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
}
