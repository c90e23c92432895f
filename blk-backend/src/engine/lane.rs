//! A queue thread's way to one disk.

use std::{
    collections::VecDeque,
    io,
    marker::PhantomData,
    ops::Range,
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use img_core::image::Image;

use super::{
    epoll::Epoll,
    mailbox::{Content, Finished, LaneWaker, Mailbox},
    slot::{Slots, Stage},
    worker::Job,
};
use crate::{
    disk::Disk,
    request::{Errno, Op, Request, Submitted},
};

/// How a lane is made.
#[derive(Clone, Copy, Debug)]
pub struct LaneOptions {
    /// Requests that may be under way at once; more are refused as [`Submitted::Full`].
    pub depth: u32,
    /// How long [`Lane::run_once`] looks for work before it sleeps.
    pub poll: Duration,
}

impl Default for LaneOptions {
    fn default() -> Self {
        Self { depth: 256, poll: Duration::ZERO }
    }
}

/// How long [`Lane::run_once`] may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all: only what is there.
    No,
    /// Until there is an event.
    Event,
    /// Until there is an event, or that moment.
    Until(Instant),
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request has ended. The engine does not touch its memory any more.
    Done {
        /// [`Request::tag`].
        tag: u64,
        /// How.
        result: Result<(), Errno>,
    },
    /// A watched descriptor has become readable, or was closed by its peer.
    Ready {
        /// As given to [`Lane::watch`].
        token: u64,
    },
    /// Somebody called [`LaneWaker::wake`].
    Woken,
}

/// One thread's way to a disk. It is made, used and dropped on that thread.
///
/// Requests may be answered in any order. A request whose range overlaps that of another one under way sees or
/// leaves either's bytes, as on real disks.
#[derive(Debug)]
pub struct Lane {
    disk: Arc<Disk>,
    /// [`Disk::image`], as of `generation`. Looked at again whenever the lane becomes active.
    image: Arc<Image>,
    generation: u64,
    mailbox: Arc<Mailbox>,
    slots: Slots,
    /// Taken while the disk is paused, in order.
    held: VecDeque<u32>,
    /// Begun and not ended.
    under_way: usize,
    /// Not told yet.
    events: Vec<Event>,
    /// Reused.
    content: Content,
    epoll: Epoll,
    poll: Duration,
    _stays_on_its_thread: PhantomData<*mut ()>,
}

impl Lane {
    /// A lane of `disk` for the calling thread.
    ///
    /// # Errors
    /// When the system has no descriptors or memory left.
    pub fn new(disk: &Arc<Disk>, options: &LaneOptions) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let epoll = Epoll::new(mailbox.bell())?;
        let depth = options.depth.max(1);
        disk.add_lane(&mailbox);
        Ok(Self {
            generation: disk.generation(),
            image: disk.image(),
            disk: Arc::clone(disk),
            slots: Slots::new(depth),
            held: VecDeque::with_capacity(depth as usize),
            under_way: 0,
            events: Vec::with_capacity(depth as usize + 8),
            content: Content::default(),
            epoll,
            mailbox,
            poll: options.poll,
            _stays_on_its_thread: PhantomData,
        })
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Takes a request. Never waits. It is answered by an event of [`Self::run_once`], errors included.
    pub fn submit(&mut self, request: &Request<'_>) -> Submitted {
        let Some(index) = self.slots.take() else { return Submitted::Full };
        let range = checked_range(request);
        let slot = self.slots.get(index);
        slot.tag = request.tag;
        slot.op = request.op;
        slot.began = Instant::now();
        slot.guest_bytes = 0..0;
        slot.runs.set(request.segments);
        slot.stage = Stage::Held;
        match range {
            Err(errno) => self.answer(index, Err(errno)),
            Ok(range) => {
                slot.guest_bytes = range;
                // Behind those that are held already, so that none is overtaken for ever.
                if self.held.is_empty() && self.admit() {
                    self.begin(index);
                } else {
                    self.held.push_back(index);
                }
            }
        }
        Submitted::Taken
    }

    /// Tells, from now on, each time that `fd` becomes readable or its peer closes it; also once now if it is so
    /// already. Edge-triggered: whoever is told reads until nothing is left (an eventfd need not be read at all).
    ///
    /// # Errors
    /// Those of `epoll_ctl`; a descriptor can be watched once.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        Ok(self.epoll.watch(fd, token)?)
    }

    /// Ends a [`watch`](Self::watch). An event that was on its way may still come.
    ///
    /// # Errors
    /// When it is not watched.
    pub fn unwatch(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(self.epoll.unwatch(fd)?)
    }

    /// From other threads: makes [`Self::run_once`] return.
    #[must_use]
    pub fn waker(&self) -> LaneWaker {
        LaneWaker(Arc::clone(&self.mailbox))
    }

    /// Requests that are taken and not answered.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.under_way + self.held.len()
    }

    /// Does what can be done, waits as asked, and appends what happened. May return with nothing.
    ///
    /// # Errors
    /// When the system refuses to wait; requests are still under way then.
    pub fn run_once(&mut self, wait: Wait, events: &mut Vec<Event>) -> io::Result<()> {
        self.run_once_with(wait, || false, events)
    }

    /// [`Self::run_once`] for a caller with work of its own that makes no event (a ring in shared memory): while
    /// the lane polls before it sleeps, and once more before it does, it asks `has_work`, and returns when there
    /// is some.
    ///
    /// # Errors
    /// As [`Self::run_once`].
    pub fn run_once_with(
        &mut self,
        wait: Wait,
        mut has_work: impl FnMut() -> bool,
        events: &mut Vec<Event>,
    ) -> io::Result<()> {
        self.look_around();
        if self.events.is_empty() && wait != Wait::No && !self.polls_to_success(wait, &mut has_work) {
            self.sleep(wait)?;
            self.look_around();
        }
        events.append(&mut self.events);
        Ok(())
    }

    /// Gives up what has not begun, waits for what has, and forgets all of it: no request that was taken is
    /// answered any more, and its memory is not touched. Watched descriptors stay watched.
    pub fn reset(&mut self) {
        while let Some(index) = self.held.pop_front() {
            self.slots.give(index);
        }
        let parked: Vec<u32> = self.slots.in_stage(Stage::Parked).collect();
        for index in parked {
            if self.disk.flight.forget(&self.mailbox, index) {
                self.retire(index);
            }
        }
        while self.under_way > 0 {
            self.look_around();
            // Whatever was parked and has entered meanwhile has begun, and ends like the others.
            if self.under_way > 0 && self.sleep(Wait::Event).is_err() {
                std::thread::yield_now();
            }
        }
        self.events.retain(|event| !matches!(event, Event::Done { .. }));
    }

    /// Takes what others left, and what was held back by a pause that is over.
    fn look_around(&mut self) {
        let mut content = std::mem::take(&mut self.content);
        if self.mailbox.take(&mut content) {
            for Finished { slot: index, result, runs } in content.finished.drain(..) {
                self.slots.get(index).runs = runs;
                self.end(index, result);
            }
            for index in content.released.drain(..) {
                self.slots.get(index).entered = true;
                self.begin(index);
            }
            if self.mailbox.take_call() {
                self.events.push(Event::Woken);
            }
        }
        self.content = content;
        while !self.held.is_empty() && self.admit() {
            let index = self.held.pop_front().expect("it is not empty");
            self.begin(index);
        }
    }

    /// Looks for work for a while. Whether there is some.
    fn polls_to_success(&mut self, wait: Wait, has_work: &mut impl FnMut() -> bool) -> bool {
        if has_work() {
            return true;
        }
        if self.poll.is_zero() {
            return false;
        }
        let mut until = Instant::now() + self.poll;
        if let Wait::Until(moment) = wait {
            until = until.min(moment);
        }
        while Instant::now() < until {
            std::hint::spin_loop();
            self.look_around();
            if !self.events.is_empty() || has_work() {
                self.mailbox.stats.poll_hits.add(1);
                return true;
            }
        }
        false
    }

    fn sleep(&mut self, wait: Wait) -> Result<(), Errno> {
        let timeout = match wait {
            Wait::No => return Ok(()),
            Wait::Event => None,
            Wait::Until(moment) => Some(moment.saturating_duration_since(Instant::now())),
        };
        if !self.mailbox.fall_asleep() {
            return Ok(());
        }
        let stats = &self.mailbox.stats;
        stats.sleeps.add(1);
        stats.enters.add(1);
        let events = &mut self.events;
        let slept = self.epoll.wait(timeout, |token| events.push(Event::Ready { token }));
        self.mailbox.awake();
        slept
    }

    /// Whether a request may begin; if so it counts as under way.
    fn admit(&mut self) -> bool {
        if self.disk.is_paused() {
            return false;
        }
        if self.under_way == 0 {
            // Either the one who pauses sees that this lane is active, or this lane sees the pause.
            self.mailbox.set_active(true);
            if self.disk.is_paused() {
                self.become_quiet();
                return false;
            }
            if self.disk.generation() != self.generation {
                self.generation = self.disk.generation();
                self.image = self.disk.image();
            }
        }
        self.under_way += 1;
        self.mailbox.stats.depth_is(self.under_way);
        true
    }

    fn become_quiet(&self) {
        self.mailbox.set_active(false);
        self.disk.lane_is_quiet();
    }

    /// Begins a request that was admitted, or goes on with one that was parked.
    fn begin(&mut self, index: u32) {
        let size = self.image.virtual_size_bytes();
        let slot = self.slots.get(index);
        let (op, range) = (slot.op, slot.guest_bytes.clone());
        if range.end > size {
            return self.end(index, Err(if op.changes() { Errno::NOSPC } else { Errno::INVAL }));
        }
        if op.changes() && self.disk.is_read_only() {
            return self.end(index, Err(Errno::ROFS));
        }
        if range.is_empty() && op != Op::Flush && !op.is_fua() {
            return self.end(index, Ok(()));
        }
        if op.changes() && !self.slots.get(index).entered && !self.enter(index, &range) {
            return;
        }
        self.hand_over(index);
    }

    /// Makes the clusters of a change its own, where changes can be in each other's way. False when it is parked.
    fn enter(&mut self, index: u32, range: &Range<u64>) -> bool {
        let Some(cluster) = self.image.layers()[0].cluster_size_bytes().map(u64::from) else { return true };
        let start = range.start - range.start % cluster;
        let end = range.end.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        let slot = self.slots.get(index);
        slot.stage = Stage::Parked;
        if self.disk.flight.enter(start..end, &self.mailbox, index) {
            self.slots.get(index).entered = true;
            return true;
        }
        self.mailbox.stats.parked.add(1);
        false
    }

    fn hand_over(&mut self, index: u32) {
        let slot = self.slots.get(index);
        slot.stage = Stage::Working;
        let job = Job {
            image: Arc::clone(&self.image),
            owner: Arc::clone(&self.mailbox),
            slot: index,
            op: slot.op,
            guest_bytes: slot.guest_bytes.clone(),
            runs: std::mem::take(&mut slot.runs),
        };
        self.mailbox.stats.handed_over.add(1);
        self.disk.workers.give(job);
    }

    /// A request that was under way has ended.
    fn end(&mut self, index: u32, result: Result<(), Errno>) {
        self.answer(index, result);
        self.leave();
    }

    /// A request that was under way is given up.
    fn retire(&mut self, index: u32) {
        self.slots.give(index);
        self.leave();
    }

    fn leave(&mut self) {
        self.under_way -= 1;
        self.mailbox.stats.depth_is(self.under_way);
        if self.under_way == 0 {
            self.become_quiet();
        }
    }

    /// Tells how a request ended, and frees its slot.
    fn answer(&mut self, index: u32, result: Result<(), Errno>) {
        let slot = self.slots.get(index);
        let bytes = slot.guest_bytes.end - slot.guest_bytes.start;
        self.mailbox.stats.done(slot.op, bytes, slot.began.elapsed(), result.is_ok());
        self.events.push(Event::Done { tag: slot.tag, result });
        if slot.entered {
            self.disk.flight.leave(&self.mailbox, index);
        }
        self.slots.give(index);
    }
}

impl Drop for Lane {
    /// The memory of requests is not ours: nothing may touch it any more.
    fn drop(&mut self) {
        self.reset();
        self.disk.remove_lane(&self.mailbox);
    }
}

/// The guest bytes of a request whose numbers agree with each other.
fn checked_range(request: &Request<'_>) -> Result<Range<u64>, Errno> {
    let end = request.offset.checked_add(request.len_bytes).ok_or(Errno::INVAL)?;
    let memory_bytes = if request.op.moves_bytes() { request.len_bytes } else { 0 };
    if request.segments.len_bytes() != Some(memory_bytes) {
        return Err(Errno::INVAL);
    }
    Ok(request.offset..end)
}
