//! A front end for tests: it owns the memory of its requests, and sees the answers.
#![allow(unsafe_code)]

use std::{collections::HashMap, path::Path, sync::Arc};

use img_core::{
    format::{Backing, OptionSet, registry},
    image::ImageName,
    job::create::{CreateImage, create},
};

use crate::{
    disk::{Disk, DiskOptions},
    engine::{EngineChoice, Event, Lane, LaneOptions, Poll, Wait, ring_support},
    request::{Errno, Op, Request, Segments, Submitted, iovec},
};

/// The engines that this host has.
pub(super) fn engines() -> Vec<EngineChoice> {
    match ring_support() {
        Ok(()) => vec![EngineChoice::Threads, EngineChoice::Ring],
        Err(_) => vec![EngineChoice::Threads],
    }
}

/// Where files are answered in the call, and where the ring reads them.
pub(super) fn directories() -> Vec<tempfile::TempDir> {
    let mut all = vec![tempfile::tempdir().expect("a directory")];
    all.extend(tempfile::tempdir_in("/dev/shm"));
    all
}

/// The image of `format` and `options` called `name` in a directory.
pub(crate) fn image(
    dir: &Path,
    name: &str,
    format: &str,
    options: &[(&str, &str)],
    size_bytes: u64,
    backing: Option<&str>,
) -> ImageName {
    let path = dir.join(name);
    let name = ImageName::from_path(path.to_str().expect("plain names"));
    let mut set = OptionSet::new();
    for (option, value) in options {
        set.set(*option, *value);
    }
    let backing = backing.map(|backing| Backing {
        name: dir.join(backing).to_str().expect("plain names").to_owned(),
        format: Some("qcow2".to_owned()),
    });
    create(&CreateImage {
        name: &name,
        driver: registry::by_name(format).expect("a known format"),
        virtual_size_bytes: size_bytes,
        backing,
        options: set,
    })
    .expect("a fresh file");
    name
}

/// The disk on a fresh image, and the directory that holds it.
pub(super) fn fresh_disk(format: &str, size_bytes: u64) -> (tempfile::TempDir, Arc<Disk>) {
    let dir = tempfile::tempdir().expect("a directory");
    let name = image(dir.path(), "disk", format, &[], size_bytes, None);
    let options = DiskOptions { format: Some(format.to_owned()), ..DiskOptions::default() };
    let disk = Disk::open(&name, &options).expect("it was just made");
    (dir, disk)
}

/// How a request ended, and its memory.
pub(super) type Answer = (Result<(), Errno>, Box<[u8]>);

/// A lane and the memory of its requests.
pub(super) struct Client {
    pub(super) lane: Lane,
    /// By tag, until the answer was seen.
    memory: HashMap<u64, Box<[u8]>>,
    answers: HashMap<u64, Answer>,
    next_tag: u64,
    pub(super) others: Vec<Event>,
}

impl Client {
    pub(super) fn new(disk: &Arc<Disk>, engine: EngineChoice) -> Self {
        Self::with(disk, &LaneOptions { depth: 16, poll: Poll::Off, engine })
    }

    pub(super) fn with(disk: &Arc<Disk>, options: &LaneOptions) -> Self {
        Self {
            lane: Lane::new(disk, options).expect("a lane"),
            memory: HashMap::new(),
            answers: HashMap::new(),
            next_tag: 1,
            others: Vec::new(),
        }
    }

    /// Submits a request whose memory is `bytes`, in uneven parts. `None` when the lane is full.
    pub(super) fn submit(&mut self, op: Op, offset: u64, len_bytes: u64, bytes: &[u8]) -> Option<u64> {
        let mut memory: Box<[u8]> = bytes.into();
        let cut = memory.len() / 3;
        let vectors: Vec<iovec> = {
            let (first, second) = memory.split_at_mut(cut);
            let run = |part: &mut [u8]| iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() };
            [run(first), run(second)].into_iter().filter(|run| run.iov_len > 0).collect()
        };
        let tag = self.next_tag;
        self.next_tag += 1;
        // SAFETY: the box stays in `memory`, untouched, until the answer; the lane is dropped before it.
        let segments = unsafe { Segments::new(&vectors) };
        match self.lane.submit(&Request { tag, op, offset, len_bytes, segments }) {
            Submitted::Taken => {
                self.memory.insert(tag, memory);
                Some(tag)
            }
            Submitted::Full => None,
        }
    }

    pub(super) fn submit_read(&mut self, offset: u64, length: usize) -> u64 {
        self.submit(Op::Read, offset, length as u64, &vec![0xee; length]).expect("room")
    }

    pub(super) fn submit_write(&mut self, offset: u64, bytes: &[u8]) -> u64 {
        self.submit(Op::Write { fua: false }, offset, bytes.len() as u64, bytes).expect("room")
    }

    /// One round of the lane.
    pub(super) fn run(&mut self, wait: Wait) {
        let mut events = Vec::new();
        self.lane.run_once(wait, &mut events).expect("the lane runs");
        for event in events {
            if let Event::Done { tag, result } = event {
                let memory = self.memory.remove(&tag).expect("answered once, and only what was asked");
                self.answers.insert(tag, (result, memory));
            } else {
                self.others.push(event);
            }
        }
    }

    /// The answer to `tag` if it is there.
    pub(super) fn answer(&mut self, tag: u64) -> Option<Answer> {
        self.answers.remove(&tag)
    }

    /// Waits for the answer to `tag`.
    pub(super) fn wait(&mut self, tag: u64) -> Answer {
        loop {
            if let Some(answer) = self.answer(tag) {
                return answer;
            }
            self.run(Wait::Event);
        }
    }

    pub(super) fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let tag = self.submit_read(offset, length);
        let (result, bytes) = self.wait(tag);
        result.map(|()| bytes.into_vec())
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let tag = self.submit_write(offset, bytes);
        self.wait(tag).0
    }

    /// A request without memory.
    pub(super) fn change(&mut self, op: Op, offset: u64, len_bytes: u64) -> Result<(), Errno> {
        let tag = self.submit(op, offset, len_bytes, &[]).expect("room");
        self.wait(tag).0
    }

    pub(super) fn is_idle(&self) -> bool {
        self.memory.is_empty()
    }

    /// [`Lane::reset`]: the requests are never answered, and their memory is ours again.
    pub(super) fn reset(&mut self) {
        self.lane.reset();
        self.memory.clear();
    }
}
