//! Running a job.

use std::{
    io,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Scope, ScopedJoinHandle, scope},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

use super::{
    cpu::CpuClock,
    job::{Job, Requests},
    ledger::Ledger,
    stamp::Mismatch,
    target::{Done, Facts, Shape, Target, TargetQueue},
    verify::Verify,
};
use crate::request::{Errno, Op};

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
    /// User and system time of the process that did the work; `None` where nobody knows which one that is.
    pub backend_cpu: Option<Duration>,
    /// By kind, those that were asked.
    pub ops: Vec<OpResult>,
    /// Blocks that were read again and were right, when the job was verified.
    pub verified_blocks: Option<u64>,
    /// Whether it was asked to end before a limit of the job was met.
    pub interrupted: bool,
}

/// Why a job did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// It cannot be run on this disk.
    #[error("{0}")]
    Job(String),
    /// The other side does not do what the protocol says.
    #[error("{0}")]
    Protocol(String),
    /// The other side is not there any more.
    #[error("{0}")]
    Gone(String),
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
    /// What was read is not what was written.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// The system has no descriptors, memory or threads left.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Runs `job` on `target`, a thread for each queue. With `verify` what is read is looked at, and in the end all that
/// was written is flushed and read again.
///
/// # Errors
/// [`BenchError`]: the first that a queue met.
pub fn run(target: &dyn Target, job: &Job, verify: Option<&Verify>) -> Result<RunResult, BenchError> {
    run_until(target, job, verify, &AtomicBool::new(false))
}

/// [`run`], which begins no request any more once `asked_to_end` is set; what it has done by then is its result.
///
/// # Errors
/// As [`run`].
pub fn run_until(
    target: &dyn Target,
    job: &Job,
    verify: Option<&Verify>,
    asked_to_end: &AtomicBool,
) -> Result<RunResult, BenchError> {
    let facts = target.facts();
    let blocks = check(&facts, job, verify.is_some())?;
    if let Some(verify) = verify {
        verify.begin(&facts, job)?;
    }
    let parties = usize::try_from(job.queues).unwrap_or(usize::MAX).saturating_add(1);
    let (begin, end) = (Barrier::new(parties), Barrier::new(parties));
    let clocks = || Ok::<_, BenchError>((CpuClock::own().now()?, target.backend_cpu()?));
    let (before, after, results) = scope(|scope| {
        let run = QueueRun { target, job, verify, blocks, begin: &begin, end: &end, asked_to_end };
        let threads: Vec<_> = (0..job.queues).map(|number| run.spawn(scope, number)).collect();
        begin.wait();
        let before = clocks();
        end.wait();
        let after = clocks();
        (before, after, threads.into_iter().map(join).collect::<Vec<_>>())
    });
    // What a queue met says more than the clock of a process that is gone.
    let queues = results.into_iter().collect::<Result<Vec<Queue>, BenchError>>()?;
    let ((own_before, backend_before), (own_after, backend_after)) = (before?, after?);
    if let Some(verify) = verify {
        verify.finish()?;
    }
    let mut total = RunResult {
        elapsed: Duration::ZERO,
        cpu: own_after.saturating_sub(own_before),
        backend_cpu: backend_before.zip(backend_after).map(|(before, after)| after.saturating_sub(before)),
        ops: Vec::new(),
        verified_blocks: verify.map(|_| queues.iter().map(|queue| queue.verified_blocks).sum()),
        interrupted: queues.iter().any(|queue| queue.interrupted),
    };
    for queue in queues {
        total.add(queue);
    }
    Ok(total)
}

impl RunResult {
    fn add(&mut self, queue: Queue) {
        self.elapsed = self.elapsed.max(queue.elapsed);
        for op in queue.ops {
            match self.ops.iter_mut().find(|known| known.name == op.name) {
                Some(known) => {
                    known.bytes += op.bytes;
                    known.latency_ns.add(&op.latency_ns).expect("histograms without an upper bound");
                }
                None => self.ops.push(op),
            }
        }
    }
}

/// Blocks of the disk, if the job can be run on it.
fn check(facts: &Facts, job: &Job, verify: bool) -> Result<u64, BenchError> {
    let refuse = |why: String| Err(BenchError::Job(why));
    let blocks = facts.size_bytes.checked_div(job.block_bytes).unwrap_or(0);
    let name = job.pattern.name();
    if blocks < u64::from(job.queues) || job.queues == 0 || job.depth == 0 {
        return refuse(format!(
            "{} queues of depth {} need a disk of as many blocks of {} bytes, and it has {} bytes",
            job.queues, job.depth, job.block_bytes, facts.size_bytes
        ));
    }
    let (most, why) = facts.most_queues;
    if job.queues > most {
        return refuse(format!("{} queues, and there are {most}: {why}", job.queues));
    }
    if job.block_bytes > facts.most_block_bytes {
        return refuse(format!(
            "blocks of {} bytes, and a request may have {}",
            job.block_bytes, facts.most_block_bytes
        ));
    }
    if job.pattern.changes() && facts.read_only {
        return refuse(format!("the disk is read-only, and {name} writes"));
    }
    if job.pattern.discards() && job.block_bytes > facts.most_discard_bytes {
        return refuse(format!(
            "blocks of {} bytes, and a discard may have {}",
            job.block_bytes, facts.most_discard_bytes
        ));
    }
    if !facts.can_flush && (job.flush_every.is_some() || verify) {
        return refuse("the disk takes no flushes".to_owned());
    }
    if verify && !job.pattern.writes() {
        return refuse(format!("{name} writes nothing that could be verified"));
    }
    if verify && blocks / u64::from(job.queues) < u64::from(job.depth) {
        return refuse(format!(
            "to verify, each queue of depth {} needs as many blocks of its own",
            job.depth
        ));
    }
    Ok(blocks)
}

fn join<T>(thread: ScopedJoinHandle<'_, Result<T, BenchError>>) -> Result<T, BenchError> {
    thread.join().unwrap_or_else(|_| Err(BenchError::Job("the thread of a queue panicked".to_owned())))
}

/// What the queues of a run share.
#[derive(Clone, Copy)]
struct QueueRun<'a> {
    target: &'a dyn Target,
    job: &'a Job,
    verify: Option<&'a Verify>,
    blocks: u64,
    begin: &'a Barrier,
    end: &'a Barrier,
    asked_to_end: &'a AtomicBool,
}

/// Comes to the barrier whatever happens, so that nobody waits there for ever.
struct Arrives<'a>(&'a Barrier);

impl Drop for Arrives<'_> {
    fn drop(&mut self) {
        self.0.wait();
    }
}

/// What a queue counted.
struct Queue {
    elapsed: Duration,
    ops: Vec<OpResult>,
    verified_blocks: u64,
    interrupted: bool,
}

#[derive(Clone, Copy)]
struct UnderWay {
    op: Op,
    offset: u64,
    since: Instant,
}

impl<'a> QueueRun<'a> {
    fn spawn<'scope>(
        self,
        scope: &'scope Scope<'scope, '_>,
        number: u32,
    ) -> ScopedJoinHandle<'scope, Result<Queue, BenchError>>
    where
        'a: 'scope,
    {
        scope.spawn(move || self.run(number))
    }

    fn run(&self, number: u32) -> Result<Queue, BenchError> {
        let job = self.job;
        let too_big = |_| BenchError::Job("more than this machine can address".to_owned());
        let shape = Shape {
            depth: usize::try_from(job.depth).map_err(too_big)?,
            block_bytes: usize::try_from(job.block_bytes).map_err(too_big)?,
            seed: job.seed ^ u64::from(number),
        };
        let begins = Arrives(self.begin);
        let queue = self.target.queue(number, &shape);
        drop(begins);
        let ends = Arrives(self.end);
        let mut queue = queue?;
        let requests = Requests::new(job, number, self.blocks, self.verify.is_some());
        let ledger = self.verify.map(|verify| Ledger::new(verify.run_id(), requests.share(), &shape));
        let mut load = Load {
            job,
            verify: self.verify,
            ledger,
            requests,
            slots: vec![None; shape.depth],
            free: (0..shape.depth).rev().collect(),
            counted: Queue {
                elapsed: Duration::ZERO,
                ops: Vec::new(),
                verified_blocks: 0,
                interrupted: false,
            },
            asked_to_end: self.asked_to_end,
        };
        load.run(&mut *queue)?;
        drop(ends);
        load.settle(&mut *queue)?;
        Ok(load.counted)
    }
}

/// A queue under load.
struct Load<'a> {
    job: &'a Job,
    verify: Option<&'a Verify>,
    ledger: Option<Ledger>,
    requests: Requests,
    slots: Vec<Option<UnderWay>>,
    free: Vec<usize>,
    counted: Queue,
    asked_to_end: &'a AtomicBool,
}

impl Load<'_> {
    fn run(&mut self, queue: &mut dyn TargetQueue) -> Result<(), BenchError> {
        let limit = self.job.limit;
        let begin = Instant::now();
        // What no clock reaches is no limit.
        let end = limit.time.and_then(|time| begin.checked_add(time));
        let interval = self.job.rate.map(|rate| Duration::from_secs_f64(1.0 / rate.max(1e-3)));
        let (mut asked, mut due) = (0_u64, begin);
        let mut done = Vec::with_capacity(self.slots.len());
        loop {
            let now = Instant::now();
            let is_met =
                end.is_some_and(|end| now >= end) || limit.requests.is_some_and(|most| asked >= most);
            self.counted.interrupted |= !is_met && self.asked_to_end.load(Ordering::Relaxed);
            let is_over = is_met || self.counted.interrupted;
            while !is_over
                && limit.requests.is_none_or(|most| asked < most)
                && (interval.is_none() || due <= now)
                && let Some(slot) = self.free.pop()
            {
                self.ask(queue, slot, if interval.is_some() { due } else { now })?;
                asked += 1;
                due += interval.unwrap_or_default();
            }
            if is_over && self.free.len() == self.slots.len() {
                break;
            }
            let waits_for_due = interval.is_some() && !self.free.is_empty() && !is_over;
            let until = waits_for_due.then(|| end.map_or(due, |end| due.min(end)));
            queue.wait(until, &mut done)?;
            let now = Instant::now();
            for (slot, result) in done.drain(..) {
                self.answered(queue, slot, result, now)?;
            }
        }
        self.counted.elapsed = begin.elapsed();
        Ok(())
    }

    fn ask(&mut self, queue: &mut dyn TargetQueue, slot: usize, since: Instant) -> Result<(), BenchError> {
        let (op, mut offset) = self.requests.next();
        if let Some(ledger) = &mut self.ledger {
            offset = ledger.begin(queue, slot, op, offset);
        }
        self.slots[slot] = Some(UnderWay { op, offset, since });
        queue.submit(slot, op, offset, self.len_bytes(op))
    }

    fn answered(
        &mut self,
        queue: &mut dyn TargetQueue,
        slot: usize,
        result: Result<(), Errno>,
        now: Instant,
    ) -> Result<(), BenchError> {
        let done = self.slots[slot].take().expect("each request is answered once");
        self.free.push(slot);
        let (op, len_bytes) = (name(done.op), self.len_bytes(done.op));
        result.map_err(|errno| BenchError::Request { op, offset: done.offset, len_bytes, errno })?;
        self.counted.note(op, len_bytes, now.duration_since(done.since));
        if let (Some(ledger), Some(verify)) = (&mut self.ledger, self.verify) {
            let durable = ledger.end(queue, slot, done.op, done.offset)?;
            verify.note_durable(&durable)?;
        }
        Ok(())
    }

    fn len_bytes(&self, op: Op) -> u64 {
        if op == Op::Flush { 0 } else { self.job.block_bytes }
    }

    /// Flushes, and reads again what was written.
    fn settle(&mut self, queue: &mut dyn TargetQueue) -> Result<(), BenchError> {
        let (Some(ledger), Some(verify)) = (&mut self.ledger, self.verify) else { return Ok(()) };
        ledger.begin(queue, 0, Op::Flush, 0);
        queue.submit(0, Op::Flush, 0, 0)?;
        let mut done: Vec<Done> = Vec::new();
        while done.is_empty() {
            queue.wait(None, &mut done)?;
        }
        let failed = |errno| BenchError::Request { op: "flush", offset: 0, len_bytes: 0, errno };
        done[0].1.map_err(failed)?;
        verify.note_durable(&ledger.end(queue, 0, Op::Flush, 0)?)?;
        self.counted.verified_blocks = ledger.read_again(queue, self.slots.len())?;
        Ok(())
    }
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
