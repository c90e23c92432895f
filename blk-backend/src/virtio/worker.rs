//! The loop of one queue: one thread, one lane, one virtqueue.
//!
//! A pass takes all that is available, hands it to the lane, gives back in one batch what has ended, and signals
//! the driver once. It allocates nothing and takes no lock. A worker belongs to its thread; others reach it through
//! [`Orders`].
//!
//! What becomes of a single request is in `requests`.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::{
    GuestRam,
    chain::{Chain, DescriptorTable, RingError},
    command::DiskRange,
    device::Device,
    dirty_log::QueueLog,
    features::Features,
    inflight::InflightQueue,
    orders::{Order, Orders},
    redo::RedoLog,
    requests::Flight,
    ring::{RingLayout, UsedRing, is_inside},
    setup::{MAX_QUEUE_SIZE, QueueError, QueueSetup, QueueState},
};
use crate::{
    engine::{Event, Lane, Look, Wait},
    request::{Op, Request, Segments, Submitted, iovec},
};

/// The token of the kick descriptor.
const KICK: u64 = 1;

/// The tag of a flush that the queue itself asks for. All others are heads.
const CHECKPOINT: u64 = u64::MAX;

/// How often a queue without a kick descriptor is looked at.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// One queue at work.
#[derive(Debug)]
pub struct Worker {
    /// Before `ram`: dropped first, so that nothing touches the memory any more when it goes.
    pub(super) lane: Lane,
    depth: usize,
    pub(super) device: Arc<Device>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) rings: RingLayout,
    pub(super) table: DescriptorTable,
    available: Queue,
    pub(super) used: UsedRing,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    pub(super) inflight: Option<InflightQueue>,
    redo: Option<Arc<RedoLog>>,
    /// A flush is under way so that [`Self::redo`] has room.
    checkpoint: bool,
    pub(super) log: Option<QueueLog>,
    /// One for each descriptor.
    pub(super) flights: Vec<Flight>,
    pub(super) in_flight: usize,
    /// Heads that are taken off the available ring, or were an earlier worker's, and not begun.
    heads: VecDeque<u16>,
    /// How many of `heads`, from the front, are an earlier worker's, or were begun before.
    replayed: usize,
    /// Parts of requests that the lane had no room for.
    pub(super) parts: VecDeque<(u16, Op, DiskRange)>,
    /// Ended since the driver was last shown.
    pub(super) ended: Vec<u16>,
    /// Heads of requests that failed and are to be done again. While there are some, no other begins.
    pub(super) kept: Vec<u16>,
    paused: bool,
    broken: bool,
    waiting: VecDeque<Order>,
    // Reused by each request.
    pub(super) chain: Chain,
    pub(super) runs: Vec<iovec>,
    pub(super) ranges: Vec<DiskRange>,
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
        let descriptors = usize::from(rings.size);
        // What was used is in the ring itself. Taken off the available ring is what was used, and what is marked.
        let next_used = rings.used_idx(&ram)?;
        let mut heads = VecDeque::with_capacity(descriptors);
        let next_avail = match &mut inflight {
            None => setup.next_avail,
            Some(inflight) => {
                heads.extend(inflight.recover(next_used)?);
                next_used.wrapping_add(u16::try_from(heads.len()).expect("at most a queue of them"))
            }
        };
        let event_idx = setup.features.has(Features::EVENT_IDX);
        // One more for the queue's own flush.
        let depth = u32::from(rings.size) + 1;
        let mut lane = Lane::new(device.disk(), &device.lane_options(depth))?;
        if let Some(kick) = &setup.kick {
            lane.watch(kick.as_fd(), KICK)?;
        }
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
