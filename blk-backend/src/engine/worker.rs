//! Threads for what may wait: the blocking side of the image.
//!
//! Threads are started when there is work and none is idle, up to a limit, and end with the disk. Flushes that
//! wait together are one flush: each began after the writes that it speaks for had ended, and so did the one that
//! serves them all.

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use img_core::{
    Result,
    image::{Image, WriteTicket},
};

use super::{
    flight::Flight,
    mailbox::{Finished, Mailbox},
    memory::Runs,
};
use crate::request::{Errno, Op, errno};

/// Bytes go through a buffer of at most this size on their way from or to a guest.
const BOUNCE_BYTES: u64 = 1 << 20;

/// A request, or what is left of it, for a worker.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) image: Arc<Image>,
    pub(super) owner: Arc<Mailbox>,
    pub(super) slot: u32,
    pub(super) task: Task,
    pub(super) guest_bytes: Range<u64>,
    pub(super) runs: Runs,
    /// Where the request has its clusters to itself, if it has. The worker leaves, not the lane: others wait for the
    /// work, not for a queue thread to look around.
    pub(super) entered: Option<Arc<Flight>>,
}

/// What a worker does for a request.
#[derive(Debug)]
pub(super) enum Task {
    /// All of it.
    All(Op),
    /// What is left of a write whose bytes stand in their place.
    Commit {
        ticket: WriteTicket,
        /// Durable before it is done.
        fua: bool,
    },
}

/// The threads of one disk.
#[derive(Debug)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    max_threads: usize,
    spawn: Spawn,
}

/// Starts a thread.
type Spawn = fn(Arc<Shared>) -> io::Result<JoinHandle<()>>;

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Wait for the next flush to begin.
    flushes: Vec<Job>,
    idle: usize,
    started: usize,
    ends: bool,
}

enum Work {
    One(Job),
    Flushes(Vec<Job>),
}

impl Workers {
    /// No threads yet.
    pub(crate) fn new(max_threads: usize) -> Self {
        Self::with(max_threads, |shared| {
            thread::Builder::new().name("disk-worker".to_owned()).spawn(move || shared.work())
        })
    }

    fn with(max_threads: usize, spawn: Spawn) -> Self {
        Self { shared: Arc::default(), threads: Mutex::default(), max_threads: max_threads.max(1), spawn }
    }

    /// Takes a job; its end is told to its owner.
    pub(super) fn give(&self, job: Job) {
        let mut queue = self.shared.lock();
        // Whoever has a ticket is inside the image; others may be waiting on all threads until it has left, for
        // somebody who wants the image alone. So it goes first, on a thread beyond the limit if need be.
        let is_inside = job.is_inside();
        if is_inside {
            queue.jobs.push_front(job)
        } else if matches!(job.task, Task::All(Op::Flush)) {
            queue.flushes.push(job)
        } else {
            queue.jobs.push_back(job)
        }
        // The idle ones include those who were notified and have not taken their job yet.
        let waiting = queue.jobs.len() + usize::from(!queue.flushes.is_empty());
        if waiting > queue.idle && (is_inside || queue.started < self.max_threads) {
            queue.started += 1;
            drop(queue);
            self.start();
        } else {
            drop(queue);
            self.shared.changed.notify_one();
        }
    }

    fn start(&self) {
        match (self.spawn)(Arc::clone(&self.shared)) {
            Ok(thread) => self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread),
            Err(error) => self.go_without(&error),
        }
    }

    /// There is a job too many for the threads there are, and none more is to be had.
    fn go_without(&self, error: &io::Error) {
        let mut queue = self.shared.lock();
        queue.started -= 1;
        // It must not wait for the other threads, which may be waiting for it. It has no wait before it but for tables.
        let is_inside = queue.jobs.front().is_some_and(Job::is_inside);
        let inside = if is_inside { queue.jobs.pop_front() } else { None };
        let (jobs, flushes) = if queue.started == 0 {
            // Nobody is there to do the others, ever: say so rather than wait.
            (std::mem::take(&mut queue.jobs), std::mem::take(&mut queue.flushes))
        } else {
            Default::default()
        };
        drop(queue);
        if let Some(job) = inside {
            job.run(&mut Vec::new());
        }
        let code = Errno::from_io_error(error).unwrap_or(Errno::AGAIN);
        jobs.into_iter().chain(flushes).for_each(|job| job.finish(Err(code)));
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_all();
        for thread in self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            thread.join().expect("a worker catches the panics of its jobs");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a worker.
    fn work(&self) {
        let mut bounce = Vec::new();
        while let Some(work) = self.next() {
            match work {
                Work::One(job) => job.run(&mut bounce),
                Work::Flushes(jobs) => {
                    let result = guarded(|| jobs[0].image.flush());
                    jobs.into_iter().for_each(|job| job.finish(result));
                }
            }
        }
    }

    /// Waits for work; `None` when the disk is gone.
    fn next(&self) -> Option<Work> {
        let mut queue = self.lock();
        loop {
            if queue.jobs.front().is_some_and(Job::is_inside) {
                return queue.jobs.pop_front().map(Work::One);
            }
            // The image of waiting flushes is one and the same: it is exchanged only when nothing is under way.
            if !queue.flushes.is_empty() {
                return Some(Work::Flushes(std::mem::take(&mut queue.flushes)));
            }
            if let Some(job) = queue.jobs.pop_front() {
                return Some(Work::One(job));
            }
            if queue.ends {
                return None;
            }
            queue.idle += 1;
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }
}

/// A panic is a mistake of ours, and an I/O error to the guest: it must not wait for ever.
fn guarded(call: impl FnOnce() -> Result<()>) -> Result<(), Errno> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| errno(&error)),
        Err(_) => Err(Errno::IO),
    }
}

impl Job {
    /// Whether it holds a ticket of the image.
    fn is_inside(&self) -> bool {
        matches!(self.task, Task::Commit { .. })
    }

    fn run(self, bounce: &mut Vec<u8>) {
        let Self { image, owner, slot, task, guest_bytes, runs, entered } = self;
        let result = guarded(|| match task {
            Task::All(op) => Whole { image: &image, op, guest_bytes, runs: &runs }.run(bounce),
            Task::Commit { ticket, fua } => {
                ticket.commit()?;
                if fua { image.flush() } else { Ok(()) }
            }
        });
        finish(&owner, entered, Finished { slot, result, runs });
    }

    fn finish(self, result: Result<(), Errno>) {
        finish(&self.owner, self.entered, Finished { slot: self.slot, result, runs: self.runs });
    }
}

fn finish(owner: &Arc<Mailbox>, entered: Option<Arc<Flight>>, finished: Finished) {
    if let Some(flight) = entered {
        flight.leave(owner, finished.slot);
    }
    owner.finish(finished);
}

/// A request from its first byte to its last.
struct Whole<'a> {
    image: &'a Image,
    op: Op,
    guest_bytes: Range<u64>,
    runs: &'a Runs,
}

impl Whole<'_> {
    fn run(&self, bounce: &mut Vec<u8>) -> Result<()> {
        let image = self.image;
        match self.op {
            Op::Read => self.read(bounce)?,
            Op::Write { .. } => self.write(bounce)?,
            Op::Flush => image.flush()?,
            Op::Discard { .. } => image.discard(self.guest_bytes.clone())?,
            Op::WriteZeroes { may_unmap, fast_only: false, .. } => {
                image.write_zeroes(self.guest_bytes.clone(), may_unmap)?;
            }
            Op::WriteZeroes { may_unmap, fast_only: true, .. } => {
                if !image.write_zeroes_fast(self.guest_bytes.clone(), may_unmap)? {
                    return Err(img_core::Error::unsupported(
                        std::path::Path::new(image.layer_name(0)),
                        "making these bytes zero without writing them",
                    ));
                }
            }
            Op::Cache => {
                for piece in pieces(&self.guest_bytes) {
                    image.read_at(part(bounce, &piece), piece.start)?;
                }
            }
        }
        if self.op.is_fua() { image.flush() } else { Ok(()) }
    }

    fn read(&self, bounce: &mut Vec<u8>) -> Result<()> {
        for piece in pieces(&self.guest_bytes) {
            let bytes = part(bounce, &piece);
            self.image.read_at(bytes, piece.start)?;
            self.runs.put(piece.start - self.guest_bytes.start, bytes);
        }
        Ok(())
    }

    fn write(&self, bounce: &mut Vec<u8>) -> Result<()> {
        for piece in pieces(&self.guest_bytes) {
            let bytes = part(bounce, &piece);
            self.runs.get(piece.start - self.guest_bytes.start, bytes);
            self.image.write_at(bytes, piece.start)?;
        }
        Ok(())
    }
}

/// A range in pieces that fit the buffer; cut at multiples of its size, which are borders of clusters.
fn pieces(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let Range { mut start, end } = *range;
    std::iter::from_fn(move || {
        let next = (start - start % BOUNCE_BYTES).saturating_add(BOUNCE_BYTES).min(end);
        let piece = start..next;
        start = next;
        (!piece.is_empty()).then_some(piece)
    })
}

/// As much of the buffer as `piece` is long.
fn part<'a>(bounce: &'a mut Vec<u8>, piece: &Range<u64>) -> &'a mut [u8] {
    let length = usize::try_from(piece.end - piece.start).expect("at most BOUNCE_BYTES");
    if bounce.len() < length {
        bounce.resize(length, 0);
    }
    &mut bounce[..length]
}

#[cfg(test)]
mod tests {
    use img_core::{
        format::{Attempt, OpenContext, OpenMode, OptionSet, registry},
        storage::{MemoryStorage, Preallocation},
    };

    use super::*;
    use crate::engine::mailbox::Content;

    #[test]
    fn pieces_cover_the_range_and_end_at_borders() {
        let found: Vec<_> = pieces(&(BOUNCE_BYTES - 1..3 * BOUNCE_BYTES + 5)).collect();
        let mib = BOUNCE_BYTES;
        assert_eq!(found, [mib - 1..mib, mib..2 * mib, 2 * mib..3 * mib, 3 * mib..3 * mib + 5]);
        assert_eq!(pieces(&(7..7)).count(), 0);
    }

    /// What holds a ticket is done where it is given; what does not is refused where nobody will ever do it.
    #[test]
    fn without_a_thread_nothing_waits_for_one() {
        let file = Arc::new(MemoryStorage::from_bytes("raw", &[1; 1024]));
        let options = OptionSet::new();
        let context =
            OpenContext { mode: OpenMode::Write, options: &options, open_file: &|_, _| unreachable!() };
        let layer = registry::by_name("raw").expect("raw").open(file, &context).expect("raw");
        let image = Arc::new(Image::from_layers(vec![layer]).expect("one layer"));
        let owner = Arc::new(Mailbox::new().expect("a bell"));
        let job = |slot, task| Job {
            image: Arc::clone(&image),
            owner: Arc::clone(&owner),
            slot,
            task,
            guest_bytes: 0..512,
            runs: Runs::default(),
            entered: None,
        };
        let ticket = || match image.try_prepare_write(0..512, &mut Vec::new()) {
            Ok(Attempt::Done(ticket)) => ticket,
            other => panic!("{other:?}"),
        };
        let workers = Workers::with(4, |_| Err(io::ErrorKind::OutOfMemory.into()));
        // As if one were at work, and waited.
        workers.shared.lock().started = 1;
        workers.give(job(0, Task::All(Op::Flush)));
        workers.give(job(1, Task::Commit { ticket: ticket(), fua: true }));
        let mut content = Content::default();
        let mut ended = || {
            owner.take(&mut content);
            content.finished.drain(..).map(|done| (done.slot, done.result)).collect::<Vec<_>>()
        };
        assert_eq!(ended(), [(1, Ok(()))]);
        workers.shared.lock().started = 0;
        workers.give(job(2, Task::Commit { ticket: ticket(), fua: false }));
        assert_eq!(ended(), [(2, Ok(())), (0, Err(Errno::AGAIN))]);
        // Everybody has left.
        image.resize(2048, Preallocation::Off).expect("resized");
    }
}
