//! A guest's queue as a data plane serves it: what memory answers is done at once, the rest by a thread that may
//! block. Here one thread does both.

use std::{
    io::{IoSlice, IoSliceMut},
    sync::Arc,
    task::{Wake, Waker},
    thread::{self, Thread},
};

use img_core::{
    Result,
    format::{Attempt, Place, WriteStep},
    image::{Commit, Image, ImageExtent},
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
            for WriteStep { guest_bytes, file, at: host, .. } in &self.steps {
                assert_eq!(guest_bytes.start, done, "steps follow each other");
                let part = to_usize(guest_bytes.start - at)..to_usize(guest_bytes.end - at);
                let storage = self.image.storage(0, *file).expect("steps name open files");
                storage.write_at(&buf[part], host.0)?;
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
