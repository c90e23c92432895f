//! A guest's queue as a data plane serves it: what memory answers is done at once, the rest by a thread that may
//! block. Here one thread does both.

use std::{
    io::{IoSlice, IoSliceMut},
    ops::Range,
    sync::Arc,
    task::{Wake, Waker},
    thread::{self, Thread},
};

use img_core::{
    Result,
    format::{Attempt, Place, WriteStep},
    image::{Commit, Image, ImageExtent, WriteTicket},
    storage::Flush,
};

/// One queue of a disk. The lists keep their memory from request to request.
#[derive(Debug)]
pub struct Queue {
    image: Arc<Image>,
    extents: Vec<ImageExtent>,
    steps: Vec<WriteStep>,
    /// What came of the requests so far.
    pub count: Count,
}

/// How requests were served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// From memory.
    pub done: u64,
    /// After others were out of the way.
    pub busy: u64,
    /// By the calls that may block.
    pub blocked: u64,
    /// Pieces of tables that the queue has read itself.
    pub tables: u64,
}

/// Unparks a thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Queue {
    /// A queue of `image`.
    #[must_use]
    pub fn new(image: &Arc<Image>) -> Self {
        Self { image: Arc::clone(image), extents: Vec::new(), steps: Vec::new(), count: Count::default() }
    }

    /// Reads guest bytes.
    ///
    /// # Errors
    /// What the library says.
    ///
    /// # Panics
    /// When the map's answer does not cover the request.
    pub fn read(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        let range = at..at + buf.len() as u64;
        loop {
            let attempt = self.image.try_map(range.clone(), &mut self.extents)?;
            let _ticket = match attempt {
                Attempt::Done(ticket) => ticket,
                Attempt::Busy => {
                    self.count.busy += 1;
                    let (image, extents) = (&self.image, &mut self.extents);
                    park_while(image, || {
                        Ok(matches!(image.try_map(range.clone(), extents)?, Attempt::Busy))
                    })?;
                    continue;
                }
                Attempt::Blocks => {
                    if self.read_table(range.clone())? {
                        continue;
                    }
                    self.count.blocked += 1;
                    return self.image.read_vectored_at(&mut [IoSliceMut::new(buf)], at);
                }
            };
            self.count.done += 1;
            let mut rest = buf;
            for extent in &self.extents {
                let (now, later) = rest.split_at_mut(to_usize(extent.len_bytes));
                match extent.place {
                    Place::Zero { .. } | Place::Unallocated => now.fill(0),
                    Place::Data { file, at, .. } => {
                        let storage =
                            self.image.storage(extent.depth, file).expect("the map names open files");
                        storage.read_at(now, at.0)?;
                    }
                    Place::Encoded { .. } => panic!("an encoded extent is for who may block"),
                }
                rest = later;
            }
            assert!(rest.is_empty(), "{} bytes of {range:?} are not covered", rest.len());
            return Ok(());
        }
    }

    /// Reads a piece of a table that memory lacks for a range. False where it is not that, or it is not kept.
    fn read_table(&mut self, range: Range<u64>) -> Result<bool> {
        let Some(ticket) = self.image.missing_table(range) else { return Ok(false) };
        let mut bytes = vec![0xee; to_usize(ticket.len_bytes())].into_boxed_slice();
        let storage = self.image.storage(ticket.depth(), ticket.file()).expect("tables are in open files");
        storage.read_at(&mut bytes, ticket.at().0)?;
        self.count.tables += 1;
        Ok(ticket.offer(bytes))
    }

    /// Writes guest bytes.
    ///
    /// # Errors
    /// What the library says.
    ///
    /// # Panics
    /// When the steps do not cover the request.
    pub fn write(&mut self, buf: &[u8], at: u64) -> Result<()> {
        let range = at..at + buf.len() as u64;
        loop {
            let ticket = match self.image.try_prepare_write(range.clone(), &mut self.steps)? {
                Attempt::Done(ticket) => ticket,
                Attempt::Busy => {
                    self.count.busy += 1;
                    let (image, steps) = (&self.image, &mut self.steps);
                    park_while(image, || {
                        Ok(matches!(image.try_prepare_write(range.clone(), steps)?, Attempt::Busy))
                    })?;
                    continue;
                }
                Attempt::Blocks => {
                    self.count.blocked += 1;
                    return self.image.write_vectored_at(&[IoSlice::new(buf)], at);
                }
            };
            let mut done = at;
            let mut around = Vec::new();
            for step in &self.steps {
                let Some(filled) = filled(&self.image, &ticket, step, &mut self.extents)? else { break };
                around.push(filled);
            }
            if around.len() < self.steps.len() {
                drop(ticket);
                self.count.blocked += 1;
                return self.image.write_vectored_at(&[IoSlice::new(buf)], at);
            }
            for (WriteStep { guest_bytes, file, at: host, .. }, [before, after]) in
                self.steps.iter().zip(around)
            {
                assert_eq!(guest_bytes.start, done, "steps follow each other");
                let part = to_usize(guest_bytes.start - at)..to_usize(guest_bytes.end - at);
                let storage = self.image.storage(0, *file).expect("steps name open files");
                let bytes = [&before, &buf[part], &after].map(IoSlice::new);
                storage.write_vectored_at(&bytes, host.0 - before.len() as u64)?;
                done = guest_bytes.end;
            }
            assert_eq!(done, range.end, "the steps cover the request");
            return match ticket.try_commit() {
                Commit::Done => {
                    self.count.done += 1;
                    Ok(())
                }
                Commit::Blocks(ticket) => {
                    self.count.blocked += 1;
                    ticket.commit()
                }
            };
        }
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    /// What the library says.
    ///
    /// # Panics
    /// When the library names a file that is not open.
    pub fn flush(&mut self) -> Result<()> {
        // Whoever is in the way is waited for by the call that may block.
        let Attempt::Done(ticket) = self.image.try_flush() else {
            self.count.blocked += 1;
            return self.image.flush();
        };
        self.count.done += 1;
        for file in ticket.files() {
            self.image.storage(0, *file).expect("an open file").flush(Flush::Data)?;
        }
        ticket.synced();
        Ok(())
    }
}

/// What a step fills before the guest's bytes and behind them; `None` where that takes a thread that may block.
///
/// # Errors
/// When what stands there cannot be read.
///
/// # Panics
/// When the map does not cover what is to be filled.
pub fn filled(
    image: &Image,
    ticket: &WriteTicket,
    step: &WriteStep,
    extents: &mut Vec<ImageExtent>,
) -> Result<Option<[Vec<u8>; 2]>> {
    let Range { start, end } = step.guest_bytes;
    let mut filled = [Vec::new(), Vec::new()];
    let ranges = [start - step.fill_before_bytes..start, end..end + step.fill_after_bytes];
    for (bytes, range) in filled.iter_mut().zip(ranges) {
        if !ticket.map_fill(range.clone(), extents) {
            return Ok(None);
        }
        for extent in &*extents {
            assert_eq!(extent.guest_offset, range.start + bytes.len() as u64, "extents follow each other");
            let from = bytes.len();
            bytes.resize(from + to_usize(extent.len_bytes), 0);
            if let Place::Data { file, at, .. } = extent.place {
                let storage = image.storage(extent.depth, file).expect("the map names open files");
                storage.read_at(&mut bytes[from..], at.0)?;
            }
        }
        assert_eq!(bytes.len() as u64, range.end - range.start, "the extents cover what is filled");
    }
    Ok(Some(filled))
}

/// Parks this thread until something ended that was in the way.
fn park_while(image: &Image, mut is_busy: impl FnMut() -> Result<bool>) -> Result<()> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        image.wake_on_progress(&waker);
        if !is_busy()? {
            return Ok(());
        }
        thread::park();
    }
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("test disks fit in memory")
}
