//! From received bytes to requests: headers and payloads one after the other, as far as there is room.

use super::{Connection, Result};
use crate::nbd::{
    command::{Checked, Header, Limits, Operation, Refusal, parse_status_filter},
    flight::{Flight, Memory, memory_bytes},
    output::Body,
    reply::Addressee,
    status::Query,
    wire::NbdError,
};

/// What the next received bytes are.
pub(super) enum Expected {
    Header,
    /// Bytes of a request's payload; so many are there.
    Payload {
        flight: u32,
        received: usize,
        len: usize,
    },
    /// Bytes of a request that is refused then.
    Passed {
        left: u64,
        to: Addressee,
        refusal: Refusal,
    },
}

impl Connection<'_> {
    pub(super) fn stop_receiving(&mut self) {
        self.input.end();
        // A payload that will not be whole is not waited for.
        if let Expected::Payload { flight, .. } = std::mem::replace(&mut self.expected, Expected::Header) {
            self.release(flight);
        }
    }

    /// Also while the client does not take its replies: one that sends many requests before it reads gets through, as
    /// far as there is room.
    pub(super) fn can_receive(&self) -> bool {
        self.input.may_receive() && !self.is_full()
    }

    /// Whether requests have to end, or replies to be taken, before other requests may begin. A payload under way has
    /// its memory already.
    fn is_full(&self) -> bool {
        let waits = self.flights.are_full() || self.output.is_long() || !self.statuses.is_empty();
        matches!(self.expected, Expected::Header) && waits
    }

    pub(super) fn receive(&mut self) -> Result<()> {
        if !self.can_receive() {
            return Ok(());
        }
        if let Expected::Payload { flight, received, len } = &mut self.expected
            && self.input.bytes().is_empty()
        {
            let Memory::Idle(buffer) = &mut self.flights.get(*flight).memory else {
                unreachable!("a payload is received into memory of ours");
            };
            *received += self.input.receive(self.socket, &mut buffer.bytes_mut()[*received..*len])?;
        } else {
            self.input.receive(self.socket, &mut [])?;
        }
        Ok(())
    }

    /// What is expected will not come any more: the client left. Always false, so that nothing more is taken apart.
    fn was_cut_off(&mut self) -> bool {
        if self.input.receives_no_more() {
            self.stop_receiving();
        }
        false
    }

    /// Takes the received bytes apart, as far as there is room for the requests.
    pub(super) fn begin_requests(&mut self) -> Result<()> {
        self.read_unread();
        loop {
            while self.step()? {}
            if !self.answer_statuses() {
                return Ok(());
            }
        }
    }

    /// Whether there may be more to take apart.
    fn step(&mut self) -> Result<bool> {
        match &mut self.expected {
            Expected::Header => self.header(),
            Expected::Payload { flight, received, len } => {
                let (flight, len) = (*flight, *len);
                let Memory::Idle(buffer) = &mut self.flights.get(flight).memory else {
                    unreachable!("a payload is received into memory of ours");
                };
                *received += self.input.take(&mut buffer.bytes_mut()[*received..len]);
                let whole = *received == len;
                if whole {
                    self.expected = Expected::Header;
                    self.payload_is_whole(flight);
                }
                Ok(whole || self.was_cut_off())
            }
            Expected::Passed { left, to, refusal } => {
                let len = self.input.bytes().len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= len as u64;
                let (whole, to, refusal) = (*left == 0, *to, *refusal);
                self.input.consume(len);
                if whole {
                    self.expected = Expected::Header;
                    self.output.push(|out| to.failure(out, refusal.error, refusal.why), Body::Nothing);
                }
                Ok(whole || self.was_cut_off())
            }
        }
    }

    fn limits(&self) -> Limits {
        let export = &self.session.export;
        Limits {
            framing: self.session.framing,
            disk_bytes: export.size_bytes(),
            read_only: export.is_read_only(),
            contexts: self.session.contexts.len(),
        }
    }

    /// Takes the next header, when it is whole and there is room for its request.
    fn header(&mut self) -> Result<bool> {
        let framing = self.session.framing;
        if self.input.bytes().len() < framing.request_header_bytes() {
            return Ok(self.was_cut_off());
        }
        if self.is_full() {
            return Ok(false);
        }
        let header = Header::parse(self.input.bytes(), framing)?;
        let Checked { operation, payload_bytes } = header.check(&self.limits())?;
        let to = Addressee { framing, cookie: header.cookie, offset: header.offset };
        let operation = match operation {
            Ok(operation) => operation,
            Err(refusal) => {
                self.input.consume(framing.request_header_bytes());
                self.expected = Expected::Passed { left: payload_bytes.into(), to, refusal };
                return Ok(true);
            }
        };
        let memory = match memory_bytes(operation, header.len_bytes) {
            0 => Memory::None,
            _ if self.may_go_straight(operation, header.len_bytes) => Memory::None,
            len => match self.pool.take(len, self.blocked) {
                Some(buffer) => Memory::Idle(buffer),
                None if self.pool.is_unused() => return self.no_memory(to, payload_bytes),
                // Looked at again when a request gave its memory back.
                None => return Ok(false),
            },
        };
        self.input.consume(framing.request_header_bytes());
        if operation == Operation::Disconnect {
            self.stop_receiving();
            return Ok(false);
        }
        let range = header.offset..header.offset + header.len_bytes;
        let flight =
            self.flights.add(Flight { to, operation, len_bytes: header.len_bytes, memory, rest: range });
        if payload_bytes > 0 {
            let len = usize::try_from(payload_bytes).expect("at most the longest payload");
            self.expected = Expected::Payload { flight, received: 0, len };
        } else {
            self.begin(flight);
        }
        Ok(true)
    }

    fn no_memory(&mut self, to: Addressee, payload_bytes: u32) -> Result<bool> {
        self.input.consume(self.session.framing.request_header_bytes());
        let refusal = Refusal { error: NbdError::NoMem, why: "no memory for the request" };
        self.expected = Expected::Passed { left: payload_bytes.into(), to, refusal };
        Ok(true)
    }

    fn payload_is_whole(&mut self, index: u32) {
        let limits = self.limits();
        let flight = self.flights.get(index);
        match (flight.operation, &flight.memory) {
            (Operation::BlockStatus { filtered: true, one }, Memory::Idle(buffer)) => {
                let payload = usize::try_from(flight.len_bytes).expect("a short payload");
                match parse_status_filter(&buffer.bytes()[..payload], flight.to.offset, &limits) {
                    Ok((len_bytes, ids)) => {
                        let query = Query { offset: flight.to.offset, len_bytes, one };
                        self.statuses.push_back((index, query, Some(ids)));
                    }
                    Err(refusal) => self.fail(index, refusal.error, refusal.why),
                }
            }
            _ => self.begin(index),
        }
    }
}
