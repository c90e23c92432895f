//! Requests of one size against an image, so many at a time, and how long they take.
//!
//! Each request that is under way has a thread of its own, so that the depth is a depth: while one waits for the
//! host the others go on.

use std::{
    ops::Range,
    sync::{
        Barrier, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::Progress;
use crate::{Error, Result, image::Image};

/// The most requests under way: more threads than this gain nothing on any host, and take its memory.
pub const MAX_DEPTH: u64 = 1024;

/// The most memory for buffers, one a thread: fewer threads take larger ones.
const MAX_BUFFERS_BYTES: u64 = 1 << 30;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Bench {
    /// How many requests.
    pub count: u64,
    /// How many of them are under way at a time, up to [`MAX_DEPTH`] and a gigabyte of them.
    pub depth: u64,
    /// Guest offset of the first.
    pub offset_bytes: u64,
    /// Of each.
    pub request_bytes: u64,
    /// From the start of one to the start of the next; behind the end of the disk they go on at its start.
    pub step_bytes: u64,
    /// Write this byte; read without.
    pub pattern: Option<u8>,
    /// When to flush.
    pub flush: Option<FlushEvery>,
}

/// Flushes between writes.
#[derive(Clone, Copy, Debug)]
pub struct FlushEvery {
    /// After so many requests.
    pub requests: u64,
    /// Nothing else is under way meanwhile.
    pub drains: bool,
}

impl Bench {
    /// Where request `index` goes.
    fn range(&self, index: u64, disk_bytes: u64) -> Result<Range<u64>> {
        let start = match index {
            0 => self.offset_bytes,
            _ if disk_bytes <= self.step_bytes => 0,
            _ => {
                let far = u128::from(self.offset_bytes) + u128::from(index) * u128::from(self.step_bytes);
                u64::try_from(far % u128::from(disk_bytes)).expect("below the disk's size")
            }
        };
        let end = start.checked_add(self.request_bytes).filter(|end| *end <= disk_bytes);
        let end = end.ok_or_else(|| {
            Error::Invalid(format!(
                "{} bytes at {start} are not inside the disk of {disk_bytes} bytes",
                self.request_bytes
            ))
        })?;
        Ok(start..end)
    }
}

/// Does it, and tells how long the requests took, flushes included.
///
/// # Errors
/// Of the first request that failed; no other is begun after it. [`Error::Cancelled`] between two requests.
pub fn bench(image: &Image, bench: &Bench, progress: &dyn Progress) -> Result<Duration> {
    let affordable = (MAX_BUFFERS_BYTES / bench.request_bytes.max(1)).clamp(1, MAX_DEPTH);
    let threads = bench.depth.min(bench.count).clamp(1, affordable);
    let threads = usize::try_from(threads).expect("at most 1024");
    let run = Run {
        image,
        bench,
        progress,
        disk_bytes: image.virtual_size_bytes(),
        next: AtomicU64::new(0),
        done: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        error: Mutex::new(None),
        turn: Barrier::new(threads),
    };
    let buffer_bytes = usize::try_from(bench.request_bytes)
        .map_err(|_| Error::Invalid("a request of more bytes than memory has addresses".to_owned()))?;
    let buffers: Vec<Vec<u8>> =
        (0..threads).map(|_| vec![bench.pattern.unwrap_or(0); buffer_bytes]).collect();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for buffer in buffers {
            scope.spawn(|| run.work(buffer));
        }
    });
    let took = start.elapsed();
    match run.error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(took),
    }
}

/// What the threads share.
struct Run<'a> {
    image: &'a Image,
    bench: &'a Bench,
    progress: &'a dyn Progress,
    disk_bytes: u64,
    /// Requests begun.
    next: AtomicU64,
    /// Requests ended.
    done: AtomicU64,
    failed: AtomicBool,
    error: Mutex<Option<Error>>,
    /// Where all threads meet around a flush that drains.
    turn: Barrier,
}

impl Run<'_> {
    fn work(&self, mut buffer: Vec<u8>) {
        let count = self.bench.count;
        let Some(FlushEvery { requests, drains: true }) = self.bench.flush else {
            return self.requests(count, &mut buffer);
        };
        // All threads take the same number of rounds, after a failure too: none is left waiting.
        let mut end = 0;
        while end < count {
            end = end.saturating_add(requests).min(count);
            self.requests(end, &mut buffer);
            let leads = self.turn.wait().is_leader();
            if leads {
                // A request beyond this round was counted by each thread that found it full.
                self.next.store(end, Ordering::SeqCst);
                if end.is_multiple_of(requests) && !self.failed.load(Ordering::SeqCst) {
                    self.note(self.image.flush());
                }
            }
            self.turn.wait();
        }
    }

    /// Makes requests until `end` of them have begun.
    fn requests(&self, end: u64, buffer: &mut [u8]) {
        while !self.failed.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::SeqCst);
            if index >= end {
                return;
            }
            self.note(self.request(index, buffer));
            let done = self.done.fetch_add(1, Ordering::SeqCst) + 1;
            self.progress.advance(done, self.bench.count);
            if self.progress.is_cancelled() {
                self.note(Err(Error::Cancelled));
            }
            if let Some(FlushEvery { requests, drains: false }) = self.bench.flush
                && done.is_multiple_of(requests)
            {
                self.note(self.image.flush());
            }
        }
    }

    fn request(&self, index: u64, buffer: &mut [u8]) -> Result<()> {
        let guest = self.bench.range(index, self.disk_bytes)?;
        match self.bench.pattern {
            Some(_) => self.image.write_at(buffer, guest.start),
            None => self.image.read_at(buffer, guest.start),
        }
    }

    fn note(&self, result: Result<()>) {
        if let Err(error) = result {
            self.failed.store(true, Ordering::SeqCst);
            let mut told = self.error.lock().unwrap_or_else(PoisonError::into_inner);
            // What the host refused to one request comes before what others met because of that.
            let is_cause = |told: &Error| told.raw_os_error().is_none() && error.raw_os_error().is_some();
            if told.as_ref().is_none_or(is_cause) {
                *told = Some(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        format::{Driver as _, OpenContext, OpenMode, OptionSet, raw::Raw},
        job::Unwatched,
        storage::{
            MemoryStorage, Storage,
            testing::{FailAt, Operation},
        },
    };

    const BENCH: Bench = Bench {
        count: 100,
        depth: 8,
        offset_bytes: 512,
        request_bytes: 1024,
        step_bytes: 4096,
        pattern: Some(7),
        flush: None,
    };

    fn open(storage: Arc<dyn Storage>) -> Image {
        let context = OpenContext {
            mode: OpenMode::Write,
            options: &OptionSet::new(),
            open_file: &|name, _| panic!("no file '{name}' to open"),
        };
        Image::from_layers(vec![Raw.open(storage, &context).expect("raw")]).expect("a layer")
    }

    #[test]
    fn every_request_goes_to_its_place() {
        for flush in [
            None,
            Some(FlushEvery { requests: 8, drains: true }),
            Some(FlushEvery { requests: 9, drains: false }),
        ] {
            let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("disk", &vec![0; 200 * 4096]));
            bench(&open(Arc::clone(&storage)), &Bench { flush, ..BENCH }, &Unwatched).expect("done");
            let mut bytes = vec![0; 200 * 4096];
            storage.read_at(&mut bytes, 0).expect("readable");
            for (at, byte) in bytes.iter().enumerate() {
                let within = at % 4096;
                let is_written = at / 4096 < 100 && (512..1536).contains(&within);
                assert_eq!(*byte, if is_written { 7 } else { 0 }, "{flush:?} {at:#x}");
            }
        }
    }

    /// As the reference: after the end of the disk at the remainder, and at 0 where a step is longer than the disk.
    #[test]
    fn requests_wrap_at_the_end_of_the_disk() {
        let start = |bench: &Bench, index| bench.range(index, 10_240).map(|range| range.start).ok();
        assert_eq!([0, 1, 2, 3].map(|index| start(&BENCH, index)), [512, 4608, 8704, 2560].map(Some));
        let far = Bench { step_bytes: 10_240, ..BENCH };
        assert_eq!([0, 1, 2].map(|index| start(&far, index)), [512, 0, 0].map(Some));
        assert_eq!(start(&Bench { offset_bytes: 9500, ..BENCH }, 0), None);
    }

    #[test]
    fn a_failure_ends_it_whatever_waits() {
        for flush in [None, Some(FlushEvery { requests: 8, drains: true })] {
            let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("disk", &vec![0; 200 * 4096]));
            let failing = Arc::new(FailAt::once(memory, |operation| operation == Operation::Write, 20));
            bench(&open(failing), &Bench { flush, ..BENCH }, &Unwatched).expect_err("one write fails");
        }
    }
}
