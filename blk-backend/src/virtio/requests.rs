//! The requests of a queue: from the head of a chain to the lane, and from the end of its parts to the used ring.
//!
//! `Flights` are numbered by the head of their chain: a driver that makes a chain available again before
//! it got it back is broken, so there is never a second one.

use vm_memory::{Bytes, GuestAddress};

use super::{
    chain::{GuestRange, RingError, resolve, total_bytes},
    command::{Command, DiskRange, Parsed, Status, parse},
    failure::Action,
    setup::QueueError,
    worker::Worker,
};
use crate::request::{Errno, Op, Request, Segments, Submitted};

/// The most runs of host memory of one request (`IOV_MAX`).
const MAX_RUNS: usize = 1024;

/// A request that is under way.
#[derive(Debug, Default)]
pub(super) struct Flight {
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

impl Worker {
    /// Begins the request at `head`. Its answer comes with [`Self::finish`], now or later.
    pub(super) fn begin(&mut self, head: u16) -> Result<(), QueueError> {
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
    pub(super) fn submit_range(&mut self, head: u16, op: Op, range: DiskRange) -> bool {
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

    pub(super) fn part_ended(&mut self, head: u16, result: Result<(), Errno>) -> Result<(), QueueError> {
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
}
