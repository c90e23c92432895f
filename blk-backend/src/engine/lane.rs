//! A queue thread's way to one disk: what a front end calls, and how the lane waits.

use std::{
    collections::VecDeque,
    io,
    marker::PhantomData,
    ops::Range,
    os::fd::BorrowedFd,
    sync::Arc,
    task::Waker,
    time::{Duration, Instant},
};

use img_core::image::Lookaside;

use super::{
    backend::{Backend, EngineChoice, EngineInUse},
    course::Direct,
    mailbox::{Content, Finished, LaneWaker, Mailbox},
    poll::{Poll, Poller},
    ring::{Answer, BELL},
    slot::{Slots, Stage},
    transfer::Transfers,
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
    pub poll: Poll,
    /// Which engine.
    pub engine: EngineChoice,
}

impl Default for LaneOptions {
    fn default() -> Self {
        Self { depth: 256, poll: Poll::Off, engine: EngineChoice::Auto }
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

/// Why a caller of [`Lane::run_once_with`] is asked for work of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// In passing: it will be asked again.
    Passing,
    /// For the last time before the lane sleeps. Work that comes later has to end that sleep.
    Last,
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
    pub(super) disk: Arc<Disk>,
    /// [`Disk::image`], as of `generation`, and what is remembered of its map. Looked at again whenever the lane becomes
    /// active.
    pub(super) lookaside: Lookaside,
    pub(super) generation: u64,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) slots: Slots,
    /// Taken while the disk is paused, in order.
    pub(super) held: VecDeque<u32>,
    /// Begun and not ended.
    pub(super) under_way: usize,
    /// Not told yet.
    pub(super) events: Vec<Event>,
    /// Reused.
    pub(super) content: Content,
    /// Wait for somebody who is in the way for a short time.
    pub(super) busy: Vec<u32>,
    /// Makes the lane try those again.
    pub(super) progress: Waker,
    pub(super) transfers: Transfers,
    pub(super) backend: Backend,
    pub(super) engine: EngineInUse,
    pub(super) direct: Option<Direct>,
    pub(super) poller: Poller,
    /// One look at the clock serves a batch.
    pub(super) now: Option<Instant>,
    _stays_on_its_thread: PhantomData<*mut ()>,
}

impl Lane {
    /// A lane of `disk` for the calling thread.
    ///
    /// # Errors
    /// When the system has no descriptors or memory left, or no ring where one was asked for.
    pub fn new(disk: &Arc<Disk>, options: &LaneOptions) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let depth = options.depth.max(1);
        let (backend, engine) = Backend::new(options.engine, depth, &mailbox)?;
        let image = disk.image();
        disk.add_lane(&mailbox, engine.clone());
        Ok(Self {
            generation: disk.generation(),
            direct: Direct::of(&image),
            lookaside: Lookaside::of(&image),
            disk: Arc::clone(disk),
            slots: Slots::new(depth),
            held: VecDeque::with_capacity(depth as usize),
            under_way: 0,
            events: Vec::with_capacity(depth as usize + 8),
            content: Content::default(),
            busy: Vec::with_capacity(depth as usize),
            progress: Waker::from(Arc::clone(&mailbox)),
            transfers: Transfers::default(),
            backend,
            engine,
            mailbox,
            poller: Poller::new(options.poll),
            now: None,
            _stays_on_its_thread: PhantomData,
        })
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// What it stands on.
    #[must_use]
    pub fn engine(&self) -> &EngineInUse {
        &self.engine
    }

    /// Takes a request. Never waits. It is answered by an event of [`Self::run_once`], errors included.
    pub fn submit(&mut self, request: &Request<'_>) -> Submitted {
        let Some(index) = self.slots.take() else { return Submitted::Full };
        let range = checked_range(request);
        let slot = self.slots.get(index);
        slot.tag = request.tag;
        slot.op = request.op;
        slot.began = *self.now.get_or_insert_with(Instant::now);
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
    /// Those of the system; a descriptor can be watched once.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.backend.watch(fd, token)
    }

    /// Ends a [`watch`](Self::watch). An event that was on its way may still come.
    ///
    /// # Errors
    /// When it is not watched.
    pub fn unwatch(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.backend.unwatch(fd)
    }

    /// From other threads: makes [`Self::run_once`] return.
    #[must_use]
    pub fn waker(&self) -> LaneWaker {
        LaneWaker(Arc::clone(&self.mailbox))
    }

    /// A front end has read so much without a request, where that is shorter.
    pub(crate) fn count_read(&self, len_bytes: u64, took: Duration) {
        self.mailbox.stats.done(Op::Read, len_bytes, took, true);
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
        self.run_once_with(wait, |_| false, events)
    }

    /// [`Self::run_once`] for a caller with work of its own that makes no event (a ring in shared memory): while
    /// the lane polls before it sleeps, and once more before it does, it asks `has_work` and, when there is some,
    /// returns.
    ///
    /// # Errors
    /// As [`Self::run_once`].
    pub fn run_once_with(
        &mut self,
        wait: Wait,
        mut has_work: impl FnMut(Look) -> bool,
        events: &mut Vec<Event>,
    ) -> io::Result<()> {
        self.look_around();
        if wait == Wait::No || !self.events.is_empty() || has_work(Look::Passing) {
            self.exchange(None)?;
        } else if !self.polls_to_success(wait, &mut has_work)? {
            if has_work(Look::Last) {
                self.exchange(None)?;
            } else {
                self.sleep(wait)?;
            }
        }
        self.look_around();
        events.append(&mut self.events);
        Ok(())
    }

    /// Gives up what has not begun, waits for what has, and forgets all of it: no request that was taken is
    /// answered any more, and its memory is not touched. Watched descriptors stay watched.
    pub fn reset(&mut self) {
        while let Some(index) = self.held.pop_front() {
            self.slots.give(index);
        }
        for index in std::mem::take(&mut self.busy) {
            self.retire(index);
        }
        let parked: Vec<u32> = self.slots.in_stage(Stage::Parked).collect();
        for index in parked {
            if self.disk.flight.forget(&self.mailbox, index) {
                self.retire(index);
            }
        }
        while self.under_way > 0 {
            self.look_around();
            // Whatever was parked and has entered meanwhile has begun, and ends like the others. A system that
            // refuses to wait is asked again: nothing else ends the requests.
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
            // Others had time for it: their work is not done in the moment in which it was handed over.
            self.now = None;
            for Finished { slot: index, result, runs } in content.finished.drain(..) {
                self.slots.get(index).runs = runs;
                self.end(index, result);
            }
            for index in content.released.drain(..) {
                self.slots.get(index).entered = true;
                self.begin(index);
            }
            if self.mailbox.take_progress() {
                self.try_again();
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

    /// Begins again what somebody was in the way of.
    fn try_again(&mut self) {
        for _ in 0..self.busy.len() {
            let index = self.busy.remove(0);
            self.begin(index);
        }
    }

    /// Looks for work for a while. Whether there is some.
    fn polls_to_success(&mut self, wait: Wait, has_work: &mut impl FnMut(Look) -> bool) -> io::Result<bool> {
        let span = self.poller.span();
        if span.is_zero() {
            return Ok(false);
        }
        self.exchange(None)?;
        let mut until = Instant::now() + span;
        if let Wait::Until(moment) = wait {
            until = until.min(moment);
        }
        loop {
            if !self.events.is_empty() || has_work(Look::Passing) {
                self.mailbox.stats.poll_hits.add(1);
                self.poller.found();
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
            std::hint::spin_loop();
            self.exchange(None)?;
            self.look_around();
        }
    }

    fn sleep(&mut self, wait: Wait) -> io::Result<()> {
        let timeout = match wait {
            Wait::No => return self.exchange(None),
            Wait::Event => Duration::MAX,
            Wait::Until(moment) => moment.saturating_duration_since(Instant::now()),
        };
        if !self.mailbox.fall_asleep() {
            return self.exchange(None);
        }
        self.mailbox.stats.sleeps.add(1);
        // Only sleep that waits for others to come tells how soon they do.
        let is_idle = self.poller.adapts() && !self.backend.has_business();
        let began = is_idle.then(Instant::now);
        let slept = self.exchange(Some(timeout));
        self.mailbox.awake();
        if let Some(began) = began {
            self.poller.slept(began.elapsed());
        }
        slept
    }

    /// Submits what is waiting for it, waits for an answer where `timeout` says so, and takes what is there.
    fn exchange(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        match timeout {
            None => self.backend.submit()?,
            Some(Duration::MAX) => self.backend.wait(None)?,
            Some(timeout) => self.backend.wait(Some(timeout))?,
        }
        self.mailbox.stats.enters.set(self.backend.calls());
        self.now = None;
        while let Some(answer) = self.backend.next()? {
            match answer {
                Answer::Ready { token: BELL } => {}
                Answer::Ready { token } => self.events.push(Event::Ready { token }),
                Answer::Moved { transfer, result } => self.moved(transfer, result),
            }
        }
        Ok(())
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
