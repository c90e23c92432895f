//! The loop of one queue: one thread, one lane, one virtqueue.
//!
//! A pass takes all that is available, hands it to the lane, gives back in one batch what has ended, and signals
//! the driver once. It allocates nothing and takes no lock. A worker belongs to its thread; others reach it through
//! [`Orders`].
//!
//! `Flights` are numbered by the head of their chain: a driver that makes a chain available again before
//! it got it back is broken, so there is never a second one.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{
    GuestRam,
    chain::{Chain, DescriptorTable, GuestRange, RingError, resolve, total_bytes},
    command::{Command, DiskRange, Parsed, Status, parse},
    device::Device,
    dirty_log::QueueLog,
    failure::Action,
    features::Features,
    inflight::InflightQueue,
    orders::{Order, Orders},
    redo::RedoLog,
    ring::{RingLayout, UsedRing, is_inside},
    setup::{MAX_QUEUE_SIZE, QueueError, QueueSetup, QueueState},
};
use crate::{
    engine::{Event, Lane, Look, Wait},
    request::{Errno, Op, Request, Segments, Submitted, iovec},
};

/// The most runs of host memory of one request (`IOV_MAX`).
const MAX_RUNS: usize = 1024;

/// The token of the kick descriptor.
const KICK: u64 = 1;

/// The tag of a flush that the queue itself asks for. All others are heads.
const CHECKPOINT: u64 = u64::MAX;

/// How often a queue without a kick descriptor is looked at.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// A request that is under way.
#[derive(Debug, Default)]
struct Flight {
    status_at: GuestAddress,
    /// Parts that the lane has, or that wait for it.
    parts: u32,
    /// The first failure wins.
    failed: Option<Errno>,
    is_read: bool,
    /// What is told to the driver on success, the status byte included.
    written_bytes: u32,
    /// What the device writes, the status byte not included; filled while a log is kept.
    logged: Vec<GuestRange>,
}

impl Flight {
    fn is_free(&self) -> bool {
        self.parts == 0
    }
}

/// One queue at work.
#[derive(Debug)]
pub struct Worker {
    /// Before `ram`: dropped first, so that nothing touches the memory any more when it goes.
    lane: Lane,
    depth: usize,
    device: Arc<Device>,
    ram: Arc<GuestRam>,
    rings: RingLayout,
    table: DescriptorTable,
    available: Queue,
    used: UsedRing,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    inflight: Option<InflightQueue>,
    redo: Option<Arc<RedoLog>>,
    /// A flush is under way so that [`Self::redo`] has room.
    checkpoint: bool,
    log: Option<QueueLog>,
    /// One for each descriptor.
    flights: Vec<Flight>,
    in_flight: usize,
    /// Heads that are taken off the available ring, or were an earlier worker's, and not begun.
    heads: VecDeque<u16>,
    /// How many of `heads`, from the front, are an earlier worker's, or were begun before.
    replayed: usize,
    /// Parts of requests that the lane had no room for.
    parts: VecDeque<(u16, Op, DiskRange)>,
    /// Ended since the driver was last shown.
    ended: Vec<u16>,
    /// Heads of requests that failed and are to be done again. While there are some, no other begins.
    kept: Vec<u16>,
    paused: bool,
    broken: bool,
    waiting: VecDeque<Order>,
    // Reused by each request.
    chain: Chain,
    runs: Vec<iovec>,
    ranges: Vec<DiskRange>,
}

impl Worker {
    /// A worker for the calling thread.
    ///
    /// # Errors
    /// [`QueueError`] when the setup cannot be.
    pub fn new(device: &Arc<Device>, setup: QueueSetup) -> Result<Self, QueueError> {
        let QueueSetup { ram, rings, mut inflight, .. } = setup;
        if !rings.size.is_power_of_two() || rings.size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size(rings.size));
        }
        if !is_inside(&rings, &ram) {
            return Err(RingError::RingOutside.into());
        }
        // What was used is in the ring itself. Taken off the available ring is what was used, and what is marked.
        let next_used = rings.used_idx(&ram)?;
        let mut next_avail = setup.next_avail;
        let mut heads = VecDeque::with_capacity(usize::from(rings.size));
        if let Some(inflight) = &mut inflight {
            heads.extend(inflight.recover(next_used)?);
            let marked = u16::try_from(heads.len()).expect("at most a queue of them");
            next_avail = next_used.wrapping_add(marked);
        }
        let event_idx = setup.features.has(Features::EVENT_IDX);
        // One more for the queue's own flush.
        let depth = u32::from(rings.size) + 1;
        let mut lane = Lane::new(device.disk(), &device.lane_options(depth))?;
        if let Some(kick) = &setup.kick {
            lane.watch(kick.as_fd(), KICK)?;
        }
        let descriptors = usize::from(rings.size);
        let mut worker = Self {
            lane,
            depth: descriptors,
            device: Arc::clone(device),
            rings,
            table: DescriptorTable {
                at: rings.descriptors,
                size: rings.size,
                indirect: setup.features.has(Features::INDIRECT_DESC),
            },
            available: available_ring(&rings, event_idx, next_avail)?,
            used: UsedRing::new(rings, event_idx, next_used),
            kick: setup.kick,
            call: None,
            error: setup.error,
            inflight,
            redo: setup.redo,
            checkpoint: false,
            log: setup.log,
            flights: std::iter::repeat_with(Flight::default).take(descriptors).collect(),
            in_flight: 0,
            replayed: heads.len(),
            heads,
            parts: VecDeque::with_capacity(descriptors),
            ended: Vec::with_capacity(descriptors),
            kept: Vec::new(),
            paused: setup.paused,
            broken: false,
            waiting: VecDeque::new(),
            chain: Chain::default(),
            runs: Vec::with_capacity(descriptors),
            ranges: Vec::new(),
            ram,
        };
        worker.set_call(setup.call);
        Ok(worker)
    }

    /// How others reach it.
    #[must_use]
    pub fn orders(&self) -> Orders {
        Orders::new(self.lane.waker())
    }

    /// Works until it is told to stop.
    ///
    /// # Errors
    /// When the system refuses to wait: nobody serves the queue any more.
    pub fn run(&mut self, orders: &Orders) -> io::Result<()> {
        let mut events = Vec::with_capacity(self.depth + 8);
        // What is there already comes before any order.
        self.survive(Self::fetch);
        loop {
            if self.obey(orders) {
                return Ok(());
            }
            self.survive(Self::fetch);
            self.wait(&mut events)?;
            for event in events.drain(..) {
                if let Event::Done { tag: CHECKPOINT, .. } = event {
                    // A flush that failed leaves the notes, and the guest's own flush will tell it.
                    self.checkpoint = false;
                } else if let Event::Done { tag, result } = event {
                    let head = u16::try_from(tag).expect("a tag that was given");
                    self.survive(|worker| worker.part_ended(head, result));
                }
            }
            self.survive(Self::give_back);
        }
    }

    /// Replaces the descriptor that is written when something was used. It is written at once: what the driver was
    /// not told through the old one it learns now.
    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
        self.signal();
    }

    pub(crate) fn set_error(&mut self, error: Option<OwnedFd>) {
        self.error = error;
    }

    /// Going on begins with requests that failed and were kept.
    pub(crate) fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
        if !paused {
            // They are in the ring no more, like those of an earlier worker.
            self.replayed += self.kept.len();
            for head in self.kept.drain(..).rev() {
                self.heads.push_front(head);
            }
        }
    }

    /// While no request is under way: what is written from now on is logged.
    pub(crate) fn set_log(&mut self, log: Option<QueueLog>) {
        self.log = log;
    }

    /// While no request is under way: the same rings, in memory that is mapped elsewhere.
    pub(crate) fn set_ram(&mut self, ram: Arc<GuestRam>) {
        if is_inside(&self.rings, &ram) {
            self.ram = ram;
        } else {
            self.break_down(&RingError::RingOutside.into());
        }
    }

    /// Follows orders. True when the worker has stopped.
    fn obey(&mut self, orders: &Orders) -> bool {
        orders.take(&mut self.waiting);
        while let Some(order) = self.waiting.pop_front() {
            match order {
                Order::Now(job) => job(self),
                order if !self.is_drained() => {
                    self.waiting.push_front(order);
                    break;
                }
                Order::Drained(job) => job(self),
                Order::Stop(state) => {
                    let next_avail = self.available.next_avail();
                    let next_used = self.used.next();
                    // Whoever asked may be gone.
                    state.send(QueueState { next_avail, next_used, is_broken: self.broken }).ok();
                    return true;
                }
            }
        }
        false
    }

    /// Gives heads that were not begun back to the available ring, and says whether nothing is under way.
    fn is_drained(&mut self) -> bool {
        // An earlier worker's are marked in the inflight memory, and not in the ring any more: they come first.
        if self.in_flight > 0 || (self.replayed > 0 && !self.paused && !self.broken) {
            return false;
        }
        let back = u16::try_from(self.heads.len() - self.replayed).expect("at most a queue of them");
        self.available.set_next_avail(self.available.next_avail().wrapping_sub(back));
        self.heads.truncate(self.replayed);
        true
    }

    /// Takes all that is available, and begins it as far as the lane has room.
    fn fetch(&mut self) -> Result<(), QueueError> {
        while let Some((head, op, range)) = self.parts.pop_front() {
            if !self.submit_range(head, op, range) {
                return Ok(());
            }
        }
        if self.broken || self.paused || !self.kept.is_empty() || self.waits_for_checkpoint() {
            return Ok(());
        }
        if self.heads.is_empty() && self.waiting.is_empty() {
            self.available.disable_notification(&*self.ram).map_err(|_| RingError::RingOutside)?;
            let heads = self.available.iter(&*self.ram).map_err(|error| match error {
                virtio_queue::Error::InvalidAvailRingIndex => RingError::TooManyAvailable,
                _ => RingError::RingOutside,
            })?;
            self.heads.extend(heads.map(|chain| chain.head_index()));
        }
        while self.waiting.is_empty() || self.replayed > 0 {
            if self.lane.depth() >= self.depth || !self.parts.is_empty() {
                break;
            }
            let Some(head) = self.heads.pop_front() else { break };
            self.replayed = self.replayed.saturating_sub(1);
            self.begin(head)?;
        }
        Ok(())
    }

    /// Asks for a flush when there is much that is not durable. Whether new requests have to wait for it.
    fn waits_for_checkpoint(&mut self) -> bool {
        let Some(redo) = &self.redo else { return false };
        if !self.checkpoint && redo.wants_flush() {
            let segments = Segments::NONE;
            let flush = Request { tag: CHECKPOINT, op: Op::Flush, offset: 0, len_bytes: 0, segments };
            self.checkpoint = self.lane.submit(&flush) == Submitted::Taken;
        }
        self.checkpoint && redo.is_nearly_full()
    }

    /// Waits until there is something to do.
    fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        let takes = !self.paused && !self.broken && self.kept.is_empty() && self.waiting.is_empty();
        if !self.ended.is_empty() || (self.in_flight == 0 && !self.waiting.is_empty()) {
            // There are answers to give, or orders to follow.
            return self.lane.run_once(Wait::No, events);
        }
        let is_full = self.checkpoint && self.redo.as_ref().is_some_and(|redo| redo.is_nearly_full());
        if !takes || is_full || !self.heads.is_empty() {
            // What waits for room in the lane gets it by an event, and orders wake the lane.
            return self.lane.run_once(Wait::Event, events);
        }
        let wait = match self.kick {
            Some(_) => Wait::Event,
            None => Wait::Until(Instant::now() + POLL_INTERVAL),
        };
        let Self { lane, available, ram, .. } = self;
        let has_work = |look| match look {
            Look::Passing => {
                let idx = available.avail_idx(&**ram, Ordering::Relaxed);
                idx.is_ok_and(|idx| idx.0 != available.next_avail())
            }
            // Kicks are wanted only while asleep. What became available before they are is seen by the same call.
            Look::Last => available.enable_notification(&**ram).unwrap_or(true),
        };
        lane.run_once_with(wait, has_work, events)
    }

    /// Begins the request at `head`. Its answer comes with [`Self::finish`], now or later.
    fn begin(&mut self, head: u16) -> Result<(), QueueError> {
        let size = self.rings.size;
        let flight = self.flights.get(usize::from(head)).ok_or(RingError::Head { head, size })?;
        if !flight.is_free() {
            return Err(RingError::HeadInUse(head).into());
        }
        self.chain.walk(&self.ram, self.table, head)?;
        let writable_bytes = total_bytes(&self.chain.writable);
        let shape = self.device.shape();
        let Parsed { status_at, command } = parse(&self.ram, &mut self.chain, shape, &mut self.ranges)?;
        if let Some(inflight) = &mut self.inflight {
            inflight.mark(head);
        }
        let flight = &mut self.flights[usize::from(head)];
        flight.status_at = status_at;
        flight.parts = 1;
        flight.failed = None;
        flight.is_read = matches!(command, Ok(Command::In { .. }));
        flight.written_bytes = 1;
        flight.logged.clear();
        self.in_flight += 1;
        match command {
            Err(status) => self.finish(head, status),
            Ok(Command::GetId) => self.give_id(head, writable_bytes),
            Ok(Command::In { at_bytes, len_bytes }) => {
                flight.written_bytes = u32::try_from(writable_bytes).unwrap_or(u32::MAX);
                if self.log.is_some() {
                    flight.logged.extend_from_slice(&self.chain.writable);
                }
                self.submit_data(head, Op::Read, at_bytes, len_bytes)
            }
            Ok(Command::Out { at_bytes, len_bytes }) => {
                let op = Op::Write { fua: self.device.writes_through() };
                self.submit_data(head, op, at_bytes, len_bytes)
            }
            Ok(Command::Flush) => {
                let nothing = DiskRange { at_bytes: 0, len_bytes: 0, may_unmap: false };
                self.submit_range(head, Op::Flush, nothing);
                Ok(())
            }
            Ok(Command::Discard | Command::WriteZeroes) => {
                self.submit_ranges(head, command == Ok(Command::WriteZeroes));
                Ok(())
            }
        }
    }

    /// Hands the data memory of the chain to the lane, which has room.
    fn submit_data(&mut self, head: u16, op: Op, offset: u64, len_bytes: u64) -> Result<(), QueueError> {
        let memory = if op == Op::Read { &self.chain.writable } else { &self.chain.readable };
        self.runs.clear();
        if !resolve(&self.ram, memory, &mut self.runs) || self.runs.len() > MAX_RUNS {
            return self.finish(head, Status::IoError);
        }
        // SAFETY: `resolve` gives runs of the mapping of `self.ram`, readable and writable. It stays mapped until
        // the request is done: `ram` is exchanged only while nothing is under way, and dropped after `lane`, which
        // waits for what it has. Nobody makes references to guest memory: vm-memory goes by address.
        #[allow(unsafe_code, reason = "the promise of guest memory")]
        let segments = unsafe { Segments::new(&self.runs) };
        let request = Request { tag: head.into(), op, offset, len_bytes, segments };
        let submitted = self.lane.submit(&request);
        assert_eq!(submitted, Submitted::Taken, "there was room");
        Ok(())
    }

    /// Hands over the ranges of a discard or write-zeroes command, one part each.
    fn submit_ranges(&mut self, head: u16, zeroes: bool) {
        let fua = self.device.writes_through();
        self.flights[usize::from(head)].parts =
            u32::try_from(self.ranges.len()).expect("at most MAX_RANGES, and not none");
        let ranges = std::mem::take(&mut self.ranges);
        for range in &ranges {
            let op = if zeroes {
                Op::WriteZeroes { may_unmap: range.may_unmap, fast_only: false, fua }
            } else {
                Op::Discard { fua }
            };
            // Behind one that waits all wait, so that `fetch` goes on with them in order.
            if !self.parts.is_empty() {
                self.parts.push_back((head, op, *range));
            } else {
                self.submit_range(head, op, *range);
            }
        }
        self.ranges = ranges;
    }

    /// Hands a part without memory to the lane. False when it has no room: the part waits, first in line.
    fn submit_range(&mut self, head: u16, op: Op, range: DiskRange) -> bool {
        let request = Request {
            tag: head.into(),
            op,
            offset: range.at_bytes,
            len_bytes: range.len_bytes,
            segments: Segments::NONE,
        };
        match self.lane.submit(&request) {
            Submitted::Taken => true,
            Submitted::Full => {
                self.parts.push_front((head, op, range));
                false
            }
        }
    }

    /// 5.2.6: 20 bytes, or as many as the driver has room for.
    fn give_id(&mut self, head: u16, writable_bytes: u64) -> Result<(), QueueError> {
        let mut id = &self.device.id()[..];
        for range in &self.chain.writable {
            let here = id.len().min(usize::try_from(range.len_bytes).expect("u32 fits usize"));
            let (now, rest) = id.split_at(here);
            if self.ram.write_slice(now, range.start).is_err() {
                return self.finish(head, Status::IoError);
            }
            id = rest;
        }
        // What was written without a gap: behind the id there may be one before the status byte.
        let id_bytes = u32::try_from(self.device.id().len()).expect("20");
        let flight = &mut self.flights[usize::from(head)];
        flight.written_bytes = match u32::try_from(writable_bytes) {
            Ok(all) if all <= id_bytes + 1 => all,
            _ => id_bytes,
        };
        if self.log.is_some() {
            flight.logged.extend_from_slice(&self.chain.writable);
        }
        self.finish(head, Status::Ok)
    }

    fn part_ended(&mut self, head: u16, result: Result<(), Errno>) -> Result<(), QueueError> {
        let flight = &mut self.flights[usize::from(head)];
        if let Err(errno) = result {
            flight.failed.get_or_insert(errno);
        }
        if flight.parts > 1 {
            flight.parts -= 1;
            return Ok(());
        }
        match flight.failed {
            None => self.finish(head, Status::Ok),
            // Not the host's failure: it has no such thing.
            Some(Errno::OPNOTSUPP) => self.finish(head, Status::Unsupported),
            Some(errno) => match self.device.failed(flight.is_read, errno) {
                Action::Report => self.finish(head, Status::IoError),
                Action::Ignore => self.finish(head, Status::Ok),
                Action::Stop => {
                    flight.parts = 0;
                    self.in_flight -= 1;
                    self.kept.push(head);
                    Ok(())
                }
            },
        }
    }

    /// Answers a request, once. The driver sees it with [`Self::give_back`].
    fn finish(&mut self, head: u16, status: Status) -> Result<(), QueueError> {
        let flight = &mut self.flights[usize::from(head)];
        flight.parts = 0;
        self.in_flight -= 1;
        let written_bytes = if status == Status::Ok { flight.written_bytes } else { 1 };
        self.ram.write_obj(status as u8, flight.status_at).map_err(|_| RingError::NoStatus)?;
        if let Some(log) = &self.log {
            log.mark_ranges(&flight.logged)?;
            log.log.mark(flight.status_at, 1)?;
        }
        self.used.push(&self.ram, head, written_bytes)?;
        self.ended.push(head);
        Ok(())
    }

    /// Shows the driver what has ended, as one batch, and tells it once.
    fn give_back(&mut self) -> Result<(), QueueError> {
        if self.ended.is_empty() {
            return Ok(());
        }
        if let Some(inflight) = &self.inflight {
            inflight.link(&self.ended);
        }
        self.used.show(&self.ram)?;
        if let Some(inflight) = &self.inflight {
            inflight.unmark(&self.ended, self.used.next());
        }
        self.ended.clear();
        if let Some(log) = &self.log {
            log.mark_used_ring(self.rings.size)?;
        }
        if self.used.wants_signal(&self.ram)? {
            self.signal();
        }
        Ok(())
    }

    fn signal(&self) {
        write_event(self.call.as_ref());
    }

    /// Does a step; what goes wrong breaks the queue and not the worker.
    fn survive(&mut self, step: impl FnOnce(&mut Self) -> Result<(), QueueError>) {
        if let Err(error) = step(self) {
            self.break_down(&error);
        }
    }

    /// Nothing more is taken off the ring. What is under way ends, and others are told.
    fn break_down(&mut self, error: &QueueError) {
        if !self.broken {
            self.broken = true;
            self.device.break_down(error);
            write_event(self.error.as_ref());
        }
    }
}

/// Adds one to an eventfd. When it is full, or its reader is gone, there is nobody to tell more.
fn write_event(fd: Option<&OwnedFd>) {
    if let Some(fd) = fd {
        rustix::io::write(fd, &1u64.to_ne_bytes()).ok();
    }
}

fn available_ring(rings: &RingLayout, event_idx: bool, next_avail: u16) -> Result<Queue, QueueError> {
    let outside = |_| QueueError::from(RingError::RingOutside);
    let mut queue = Queue::new(rings.size).map_err(|_| QueueError::Size(rings.size))?;
    queue.try_set_desc_table_address(rings.descriptors).map_err(outside)?;
    queue.try_set_avail_ring_address(rings.available).map_err(outside)?;
    queue.try_set_used_ring_address(rings.used).map_err(outside)?;
    queue.set_event_idx(event_idx);
    queue.set_next_avail(next_avail);
    queue.set_ready(true);
    Ok(queue)
}
