//! The transmission phase of one connection: requests in, work for the lane, replies out, on one thread.
//!
//! Each turn of [`Connection::run`] receives once, begins every request that is whole, lets the lane work, and sends
//! every reply that is ready with one call. It sleeps in the lane alone: a client that does not read its replies stops
//! its own requests, while the lane still follows a pause of the disk.
//!
//! What a connection may hold is bounded: requests by their number, their data by the buffer pool, replies without
//! data by the output. What is beyond waits in the socket.
//!
//! `receive` takes apart what comes in; what becomes of it is here.

use std::{
    collections::VecDeque,
    io,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use img_core::{format::Attempt, image::ImageExtent};

use self::receive::Expected;
use super::{
    buffer::Pool,
    command::{Framing, Operation, Violation},
    flight::{Flights, Memory, is_cut, lane_op},
    handshake::Session,
    input::Input,
    output::{Body, Ended, Output, Sent},
    room::RoomWatch,
    socket::Socket,
    status::{self, Query},
    straight::{Data, Straight},
    wire::NbdError,
};
use crate::{
    engine::{Event, Lane, Wait},
    request::{Errno, Request, Segments, Submitted},
};

mod receive;

/// Long trims and zero writes are done in pieces of this length, so that a pause or the end of the server does not wait
/// for a whole disk.
const PIECE_BYTES: u64 = 1 << 30;

/// Reads of this length are worth a look at the map: zeroes need not be sent.
const HOLE_BYTES: u64 = 32 << 10;

/// A connection without requests for so long gives memory back.
const IDLE: Duration = Duration::from_secs(1);

/// Tokens of what the lane watches.
const SOCKET: u64 = 0;
const ROOM: u64 = 1;

/// Why a connection ended that the client did not end.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Violation(#[from] Violation),
}

type Result<T> = std::result::Result<T, ConnectionError>;

/// One connection in transmission.
pub(super) struct Connection<'a> {
    // Before `flights`: dropping the lane ends what it does to their memory.
    lane: Lane,
    flights: Flights,
    session: Session,
    socket: &'a Socket,
    stop: &'a AtomicBool,
    pool: Pool,
    input: Input,
    expected: Expected,
    output: Output,
    straight: Straight,
    /// Reads that could not go straight, and wait for memory.
    unread: VecDeque<u32>,
    /// Requests that the lane had no room for.
    backlog: VecDeque<u32>,
    /// Block status that is asked for: the request, the range, and the contexts where they were named.
    statuses: VecDeque<(u32, Query, Option<Vec<u32>>)>,
    /// Watches for room to send; watched by the lane in turn.
    room: RoomWatch,
    /// The client has to read before anything can be sent.
    blocked: bool,
    /// Reused.
    events: Vec<Event>,
    ended: Ended,
    extents: Vec<ImageExtent>,
}

impl<'a> Connection<'a> {
    /// A connection that negotiated `session`. It ends in good order soon after `stop` is set and the socket or the
    /// lane is woken.
    pub(super) fn new(
        lane: Lane,
        session: Session,
        socket: &'a Socket,
        stop: &'a AtomicBool,
    ) -> io::Result<Self> {
        let mut lane = lane;
        let room = RoomWatch::new(socket)?;
        lane.watch(socket.as_fd(), SOCKET)?;
        lane.watch(room.as_fd(), ROOM)?;
        Ok(Self {
            lane,
            flights: Flights::new(),
            session,
            socket,
            stop,
            pool: Pool::default(),
            input: Input::new(),
            expected: Expected::Header,
            output: Output::default(),
            straight: Straight::new(),
            unread: VecDeque::new(),
            backlog: VecDeque::new(),
            statuses: VecDeque::new(),
            room,
            blocked: false,
            events: Vec::new(),
            ended: Ended::default(),
            extents: Vec::new(),
        })
    }

    /// Serves until the client leaves, the server stops, or a rule is broken.
    pub(super) fn run(mut self) -> Result<()> {
        let result = self.serve();
        // Whatever is under way ends before its memory goes.
        self.lane.reset();
        // SAFETY: it was just reset.
        #[allow(unsafe_code, reason = "the lane gives the memory back")]
        unsafe {
            self.flights.free();
        }
        result
    }

    fn serve(&mut self) -> Result<()> {
        loop {
            if self.stop.load(Ordering::Acquire) {
                self.stop_receiving();
            }
            self.receive()?;
            self.begin_requests()?;
            // Sleep only when nothing can be done before somebody else did something.
            let can_send = !self.blocked && !self.output.is_empty();
            let busy = self.can_receive() || can_send || self.is_over();
            let idle = !busy && self.flights.are_none() && self.pool.is_generous();
            let wait = match (busy, idle) {
                (true, _) => Wait::No,
                (false, true) => Wait::Until(Instant::now() + IDLE),
                (false, false) => Wait::Event,
            };
            self.lane.run_once(wait, &mut self.events)?;
            if idle && self.events.is_empty() {
                self.pool.trim();
            }
            self.take_events();
            self.begin_requests()?;
            self.send()?;
            if self.is_over() && self.output.is_empty() {
                return Ok(());
            }
        }
    }

    /// Nothing more will come, and nothing is under way.
    fn is_over(&self) -> bool {
        self.input.has_ended() && self.flights.are_none()
    }

    /// Begins a request whose payload is there.
    fn begin(&mut self, index: u32) {
        let flight = self.flights.get(index);
        let (operation, len_bytes) = (flight.operation, flight.len_bytes);
        match operation {
            Operation::BlockStatus { one, .. } => {
                let query = Query { offset: flight.to.offset, len_bytes, one };
                self.statuses.push_back((index, query, None));
            }
            Operation::Flush => self.submit(index),
            _ if len_bytes == 0 => self.succeed(index),
            Operation::Read { dont_fragment: false } if len_bytes >= HOLE_BYTES && self.is_hole(index) => {
                let to = self.flights.get(index).to;
                let len = u32::try_from(len_bytes).expect("at most the longest payload");
                self.output.push(|out| to.hole(out, len), Body::Nothing);
                self.release(index);
            }
            Operation::Read { .. } if matches!(self.flights.look(index).memory, Memory::None) => {
                let to = self.flights.look(index).to;
                let len = usize::try_from(len_bytes).expect("at most the longest payload");
                self.output.push(|out| to.data(out, to.offset, len, true), Body::Straight(index, len));
            }
            _ => self.submit(index),
        }
    }

    fn may_go_straight(&self, operation: Operation, len_bytes: u64) -> bool {
        matches!(operation, Operation::Read { .. })
            && self.straight.takes(&self.session.export.disk().image(), len_bytes)
    }

    /// Gives reads that could not go straight memory and to the lane, in order, as far as there is memory.
    fn read_unread(&mut self) {
        while let Some(index) = self.unread.pop_front() {
            let len =
                usize::try_from(self.flights.get(index).len_bytes).expect("at most the longest payload");
            match self.pool.take(len, true) {
                Some(buffer) => {
                    self.flights.get(index).memory = Memory::Idle(buffer);
                    self.submit(index);
                }
                None if self.pool.is_unused() => {
                    self.fail(index, NbdError::NoMem, "no memory for the request");
                }
                // When a request has given its memory back.
                None => return self.unread.push_front(index),
            }
        }
    }

    /// Whether the range of a read is known, from memory alone, to read as zeroes, and the client can be told so.
    fn is_hole(&mut self, index: u32) -> bool {
        if self.session.framing == Framing::Simple {
            return false;
        }
        let range = self.flights.get(index).rest.clone();
        let image = self.session.export.disk().image();
        // Whatever is wrong the lane finds out as well, and tells.
        matches!(image.try_map(range, &mut self.extents), Ok(Attempt::Done(_)))
            && self.extents.iter().all(ImageExtent::reads_as_zeroes)
    }

    /// Gives the next piece of a request to the lane.
    fn submit(&mut self, index: u32) {
        let flight = self.flights.get(index);
        let op = lane_op(flight.operation);
        let piece = if is_cut(flight.operation) {
            flight.rest.start..flight.rest.end.min(flight.rest.start + PIECE_BYTES)
        } else {
            flight.rest.clone()
        };
        flight.memory = match std::mem::replace(&mut flight.memory, Memory::None) {
            Memory::Idle(buffer) => Memory::Lent(buffer.lend()),
            memory => memory,
        };
        let mut request = Request {
            tag: index.into(),
            op,
            offset: piece.start,
            len_bytes: piece.end - piece.start,
            segments: Segments::NONE,
        };
        let submitted = match &flight.memory {
            Memory::Lent(lent) => {
                let run = lent.run(usize::try_from(request.len_bytes).expect("at most the longest payload"));
                request.segments = lent.segments(&run);
                self.lane.submit(&request)
            }
            Memory::None | Memory::Idle(_) => self.lane.submit(&request),
        };
        match submitted {
            Submitted::Taken => flight.rest.start = piece.end,
            Submitted::Full => self.backlog.push_back(index),
        }
    }

    fn take_events(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        for event in events.drain(..) {
            match event {
                Event::Done { tag, result } => {
                    self.done(u32::try_from(tag).expect("tags are indices"), result);
                    if let Some(index) = self.backlog.pop_front() {
                        self.submit(index);
                    }
                }
                Event::Ready { token: SOCKET } => self.input.is_ready(),
                Event::Ready { .. } => self.blocked = false,
                Event::Woken => {}
            }
        }
        self.events = events;
    }

    /// The lane has ended a piece of a request.
    fn done(&mut self, index: u32, result: std::result::Result<(), Errno>) {
        let flight = self.flights.get(index);
        flight.memory = match std::mem::replace(&mut flight.memory, Memory::None) {
            // SAFETY: the one request that was submitted with this memory is the one answered here: only trims and
            // zero writes, which have none, are submitted in several pieces.
            #[allow(unsafe_code, reason = "the lane gives the memory back")]
            Memory::Lent(lent) => Memory::Idle(unsafe { lent.take_back() }),
            memory => memory,
        };
        if let Err(errno) = result {
            let text = io::Error::from(errno).to_string();
            return self.fail(index, NbdError::from_errno(errno.raw_os_error()), &text);
        }
        if !flight.rest.is_empty() {
            return self.submit(index);
        }
        match flight.operation {
            Operation::Read { .. } => {
                let (to, len) = (flight.to, flight.len_bytes);
                let len = usize::try_from(len).expect("at most the longest payload");
                self.output.push(|out| to.data(out, to.offset, len, true), Body::Read(index, len));
            }
            _ => self.succeed(index),
        }
    }

    fn succeed(&mut self, index: u32) {
        let flight = self.flights.get(index);
        let (to, operation) = (flight.to, flight.operation);
        let in_chunks = matches!(operation, Operation::Read { .. } | Operation::BlockStatus { .. });
        self.output.push(|out| to.success(out, in_chunks), Body::Nothing);
        self.release(index);
    }

    fn fail(&mut self, index: u32, error: NbdError, why: &str) {
        let to = self.flights.get(index).to;
        self.output.push(|out| to.failure(out, error, why), Body::Nothing);
        self.release(index);
    }

    fn release(&mut self, index: u32) {
        if let Memory::Idle(buffer) = self.flights.remove(index).memory {
            self.pool.give(buffer);
        }
    }

    /// Answers the block status requests that wait, when nothing else of this connection is under way. Whether it did.
    ///
    /// It is done on this thread, and may wait for whoever has the image alone. That one waits for the requests that
    /// hold the map, and a request of this lane would never let go of it while this thread waits: hence none is under
    /// way.
    fn answer_statuses(&mut self) -> bool {
        if self.statuses.is_empty() || self.lane.depth() > 0 || !self.backlog.is_empty() {
            return false;
        }
        while let Some((index, query, ids)) = self.statuses.pop_front() {
            self.block_status(index, query, ids.as_deref());
        }
        true
    }

    /// Answers a block status request; `ids` are the contexts that are asked about, or all.
    fn block_status(&mut self, index: u32, query: Query, ids: Option<&[u32]>) {
        let contexts = &self.session.contexts;
        if ids.is_some_and(|ids| ids.iter().any(|id| !contexts.iter().any(|known| known.id == *id))) {
            return self.fail(index, NbdError::Inval, "a metadata context that was not selected");
        }
        let asked = contexts.iter().filter(|known| ids.is_none_or(|ids| ids.contains(&known.id)));
        let image = self.session.export.disk().image();
        let found: img_core::Result<Vec<_>> =
            asked.map(|known| Ok((known.id, status::descriptors(&image, &known.context, &query)?))).collect();
        let to = self.flights.get(index).to;
        match found {
            // A filter may name no context at all.
            Ok(found) if found.is_empty() => self.succeed(index),
            Ok(found) => {
                let last = found.len() - 1;
                for (at, (id, runs)) in found.iter().enumerate() {
                    self.output.push(|out| to.status(out, *id, runs, at == last), Body::Nothing);
                }
                self.release(index);
            }
            Err(error) => {
                let errno = crate::request::errno(&error);
                self.fail(index, NbdError::from_errno(errno.raw_os_error()), &error.to_string());
            }
        }
    }

    fn send(&mut self) -> Result<()> {
        if self.blocked || self.output.is_empty() {
            return Ok(());
        }
        let mut source = Data { flights: &self.flights, straight: &mut self.straight, lane: &self.lane };
        let sent = self.output.send(self.socket, &mut source, &mut self.ended);
        let mut ended = std::mem::take(&mut self.ended);
        ended.released.drain(..).for_each(|index| self.release(index));
        self.unread.extend(ended.unread.drain(..));
        self.ended = ended;
        self.read_unread();
        if sent? == Sent::Blocked {
            self.blocked = true;
            self.room.arm(self.socket)?;
        }
        Ok(())
    }
}
