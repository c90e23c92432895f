//! A guest that drives a virtio block device: its memory, its queues and its requests.
//!
//! [`GuestQueue`] speaks to one queue through rings in shared memory and two descriptors, whoever is on the other
//! side: a queue thread of this process, or a daemon.

pub mod busy;
pub mod model;
pub mod vhost;

use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use blk_backend::virtio::{GuestRam, chain::GuestRange, driver::DriverQueue, ring::RingLayout};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{MemfdFlags, ftruncate, memfd_create},
};
use vm_memory::{Bytes, FileOffset, GuestAddress};

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// Data bytes that one request may have.
pub const MAX_DATA: usize = 256 << 10;

/// Guest memory of a request: a page for header and status, a page for an indirect table, and data.
const SLOT: u64 = 8192 + MAX_DATA as u64;

/// Guest memory of the rings of one queue.
const RINGS: u64 = 64 << 10;

/// How long an answer may take. Generous: the machine may be busy with other things.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// Guest memory that can be shared.
#[derive(Debug)]
pub struct SharedRam {
    /// As mapped here, at guest addresses from 0 on.
    pub ram: Arc<GuestRam>,
    /// What it is in.
    pub file: File,
    /// How much.
    pub len_bytes: u64,
}

impl SharedRam {
    /// Memory for `queues` of `slots` requests each.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn for_queues(queues: u16, slots: u16) -> Self {
        let len_bytes = u64::from(queues) * (RINGS + u64::from(slots) * SLOT);
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory"));
        ftruncate(&file, len_bytes).expect("memory");
        let backing = Some(FileOffset::new(file.try_clone().expect("a file"), 0));
        let size = usize::try_from(len_bytes).expect("it fits");
        let ram = GuestRam::from_ranges_with_files([(GuestAddress(0), size, backing)]).expect("memory");
        Self { ram: Arc::new(ram), file, len_bytes }
    }
}

/// What a guest asks for. Offsets and lengths are in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// `VIRTIO_BLK_T_IN`.
    Read {
        /// First sector.
        sector: u64,
        /// How many.
        sectors: usize,
    },
    /// `VIRTIO_BLK_T_OUT`.
    Write {
        /// First sector.
        sector: u64,
        /// Whole sectors.
        data: Vec<u8>,
    },
    /// `VIRTIO_BLK_T_FLUSH`.
    Flush,
    /// `VIRTIO_BLK_T_GET_ID`.
    Id,
    /// `VIRTIO_BLK_T_DISCARD` of sectors and counts.
    Discard(Vec<(u64, u32)>),
    /// `VIRTIO_BLK_T_WRITE_ZEROES` of sectors, counts and the unmap flag.
    Zero(Vec<(u64, u32, bool)>),
    /// A type that does not exist.
    Unknown,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// As [`GuestQueue::submit`] named the request.
    pub token: u64,
    /// The status byte.
    pub status: u8,
    /// What the device wrote into the data memory.
    pub data: Vec<u8>,
    /// How many bytes it says it wrote.
    pub written_bytes: u32,
}

struct Pending {
    token: u64,
    slot: u64,
    data_bytes: usize,
}

/// One queue, from the driver's side.
pub struct GuestQueue {
    queue: DriverQueue,
    base: u64,
    free_slots: Vec<u64>,
    pending: HashMap<u16, Pending>,
    next_token: u64,
    /// Written to wake the device.
    pub kick: OwnedFd,
    /// Written by the device.
    pub call: OwnedFd,
    /// How often the device was kicked.
    pub kicks: u64,
    /// Whether the next request goes through an indirect table: every other one, or `None` for none.
    indirect: Option<bool>,
}

impl GuestQueue {
    /// Queue `index` of `size` in `ram`, with room for `slots` requests.
    ///
    /// # Panics
    /// When the memory is too small.
    #[must_use]
    pub fn new(ram: &SharedRam, index: u16, size: u16, slots: u16, event_idx: bool) -> Self {
        let base = u64::from(index) * (RINGS + u64::from(slots) * SLOT);
        let layout = RingLayout::packed_at(GuestAddress(base), size);
        assert!(layout.end().0 <= base + RINGS, "the rings fit");
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        Self {
            queue: DriverQueue::new(Arc::clone(&ram.ram), layout, event_idx),
            base: base + RINGS,
            free_slots: (0..u64::from(slots)).rev().collect(),
            pending: HashMap::new(),
            next_token: 0,
            kick: event(),
            call: event(),
            kicks: 0,
            indirect: Some(false),
        }
    }

    /// Where its rings are.
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.queue.layout()
    }

    /// For a device without indirect descriptors.
    pub fn never_indirect(&mut self) {
        self.indirect = None;
    }

    /// Makes any head available, whatever it is, and shows it.
    pub fn make_available(&mut self, head: u16) {
        self.queue.make_available(head);
        let _kicked_by_the_caller = self.queue.publish();
    }

    /// The used ring's index.
    ///
    /// # Panics
    /// When the ring is not in memory.
    #[must_use]
    pub fn used_idx(&self) -> u16 {
        self.layout().used_idx(self.queue.ram()).expect("the ring is in memory")
    }

    /// Requests that are not answered.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Whether another request fits.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free_slots.is_empty() && self.queue.free_descriptors() >= 4
    }

    /// Makes a request available without telling the device.
    ///
    /// # Panics
    /// When there is no room, or the request is too large.
    pub fn submit(&mut self, ask: &Ask) -> u64 {
        let slot = self.free_slots.pop().expect("room for a request");
        let start = self.base + slot * SLOT;
        let (header_at, status_at, table_at, data_at) = (start, start + 64, start + 4096, start + 8192);
        let (kind, sector, out, in_bytes): (u32, u64, Vec<u8>, usize) = match ask {
            Ask::Read { sector, sectors } => (0, *sector, Vec::new(), sectors * SECTOR),
            Ask::Write { sector, data } => (1, *sector, data.clone(), 0),
            Ask::Flush => (4, 0, Vec::new(), 0),
            Ask::Id => (8, 0, Vec::new(), 20),
            Ask::Discard(ranges) => (11, 0, encode(ranges.iter().map(|&(at, n)| (at, n, false))), 0),
            Ask::Zero(ranges) => (13, 0, encode(ranges.iter().copied()), 0),
            Ask::Unknown => (0x55, 0, Vec::new(), 0),
        };
        assert!(out.len().max(in_bytes) <= MAX_DATA, "a request of at most {MAX_DATA} bytes");
        let ram = Arc::clone(self.queue.ram());
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        ram.write_slice(&header, GuestAddress(header_at)).expect("inside");
        ram.write_slice(&out, GuestAddress(data_at)).expect("inside");
        ram.write_slice(&[0xaa], GuestAddress(status_at)).expect("inside");
        ram.write_slice(&vec![0xee; in_bytes], GuestAddress(data_at)).expect("inside");
        let (mut readable, mut writable) = (vec![range(header_at, 16)], Vec::new());
        if !out.is_empty() {
            readable.push(range(data_at, out.len()));
        }
        if in_bytes > 0 {
            // In two pieces, as pages of a guest are.
            let half = in_bytes / 2;
            writable.extend([range(data_at, half), range(data_at + half as u64, in_bytes - half)]);
        }
        writable.push(range(status_at, 1));
        self.indirect = self.indirect.map(|indirect| !indirect);
        let head = if self.indirect == Some(true) {
            self.queue.add_indirect(GuestAddress(table_at), &readable, &writable)
        } else {
            self.queue.add(&readable, &writable)
        };
        let token = self.next_token;
        self.next_token += 1;
        let pending = Pending { token, slot, data_bytes: in_bytes };
        self.pending.insert(head.expect("free descriptors"), pending);
        token
    }

    /// Shows the device what was submitted, and kicks it if it wants that.
    ///
    /// # Panics
    /// When it cannot be kicked.
    pub fn publish(&mut self) {
        if self.queue.publish() {
            self.kick();
        }
    }

    /// Kicks the device, wanted or not.
    ///
    /// # Panics
    /// When it cannot be kicked.
    pub fn kick(&mut self) {
        self.kicks += 1;
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).expect("a kick");
    }

    /// An answer that is there.
    ///
    /// # Panics
    /// When the device gives back what it does not have.
    pub fn answer(&mut self) -> Option<Answer> {
        let (head, written_bytes) = self.queue.pop()?;
        let Pending { token, slot, data_bytes } = self.pending.remove(&head).expect("a request of ours");
        self.free_slots.push(slot);
        let start = self.base + slot * SLOT;
        let mut data = vec![0; data_bytes];
        let ram = self.queue.ram();
        ram.read_slice(&mut data, GuestAddress(start + 8192)).expect("inside");
        let status = ram.read_obj(GuestAddress(start + 64)).expect("inside");
        Some(Answer { token, status, data, written_bytes })
    }

    /// Waits for an answer; `None` when there is none for so long.
    ///
    /// # Panics
    /// When it cannot wait.
    pub fn answer_within(&mut self, patience: Duration) -> Option<Answer> {
        let patience = Timespec::try_from(patience).expect("a short time");
        loop {
            if let Some(answer) = self.answer() {
                return Some(answer);
            }
            if self.queue.enable_signal() {
                continue;
            }
            let mut fds = [PollFd::new(&self.call, PollFlags::IN)];
            if poll(&mut fds, Some(&patience)).expect("poll") == 0 {
                return self.answer();
            }
            rustix::io::read(self.call.as_fd(), &mut [0; 8]).expect("an eventfd");
        }
    }

    /// Waits for an answer.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn wait(&mut self) -> Answer {
        let patience = Duration::try_from(PATIENCE).expect("a short time");
        self.answer_within(patience).expect("the device answers")
    }

    /// One request from beginning to end, alone.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn ask(&mut self, ask: &Ask) -> Answer {
        let token = self.submit(ask);
        self.publish();
        let answer = self.wait();
        assert_eq!(answer.token, token, "the only request is answered");
        answer
    }

    /// A read that succeeds.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn read(&mut self, sector: u64, sectors: usize) -> Vec<u8> {
        let answer = self.ask(&Ask::Read { sector, sectors });
        assert_eq!(answer.status, 0, "read of {sectors} sectors at {sector}");
        answer.data
    }
}

fn range(start: u64, len: usize) -> GuestRange {
    GuestRange { start: GuestAddress(start), len_bytes: u32::try_from(len).expect("short") }
}

fn encode(ranges: impl Iterator<Item = (u64, u32, bool)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (sector, sectors, unmap) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(u32::from(unmap).to_le_bytes());
    }
    bytes
}
