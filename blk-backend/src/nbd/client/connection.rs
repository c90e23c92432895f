//! The transmission phase as a client sees it: requests under way, each in a slot with memory of its own.

use std::{
    io::{self, IoSlice},
    ops::Range,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use zerocopy::{FromBytes, IntoBytes};

use super::{Negotiated, broken};
use crate::nbd::{
    socket::Socket,
    wire::{
        REPLY_FLAG_DONE, REQUEST_MAGIC, RawRequest, RawSimpleReply, RawStructuredReply, SIMPLE_REPLY_MAGIC,
        STRUCTURED_REPLY_MAGIC, chunk, command,
    },
};

/// What is received at most in one go, besides the data of a read.
const BUFFER_BYTES: usize = 256 << 10;

/// The longest error chunk that is taken: a code and a text.
const MAX_ERROR_BYTES: usize = 8 << 10;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Trim,
}

impl Kind {
    fn code(self) -> u16 {
        match self {
            Self::Read => command::READ,
            Self::Write => command::WRITE,
            Self::Flush => command::FLUSH,
            Self::Trim => command::TRIM,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: Socket,
    structured: bool,
    slots: Vec<Slot>,
    /// To be sent; `sent` of it are.
    output: Vec<u8>,
    sent: usize,
    /// Received and not looked at.
    input: Box<[u8]>,
    received: Range<usize>,
    /// The data of a read that is being received.
    data: Option<Data>,
}

#[derive(Debug)]
struct Slot {
    memory: Vec<u8>,
    under_way: Option<UnderWay>,
}

#[derive(Clone, Copy, Debug)]
struct UnderWay {
    kind: Kind,
    offset: u64,
    len: usize,
    /// Bytes of a read that have come.
    covered: usize,
    /// The first that the server told.
    error: Option<Errno>,
}

#[derive(Debug)]
struct Data {
    slot: usize,
    /// Of the slot's memory.
    rest: Range<usize>,
    /// Nothing comes behind it.
    is_last: bool,
}

/// A slot, and how its request ended.
type Ended = (usize, Result<(), Errno>);

impl Connection {
    /// With one slot for each of `memory`.
    pub(crate) fn new(negotiated: Negotiated, memory: Vec<Vec<u8>>) -> Self {
        let Negotiated { socket, structured, .. } = negotiated;
        Self {
            socket,
            structured,
            slots: memory.into_iter().map(|memory| Slot { memory, under_way: None }).collect(),
            output: Vec::new(),
            sent: 0,
            input: vec![0; BUFFER_BYTES].into_boxed_slice(),
            received: 0..0,
            data: None,
        }
    }

    /// The memory of a slot.
    pub(crate) fn memory(&self, slot: usize) -> &[u8] {
        &self.slots[slot].memory
    }

    /// See [`Self::memory`].
    pub(crate) fn memory_mut(&mut self, slot: usize) -> &mut [u8] {
        &mut self.slots[slot].memory
    }

    /// Takes a request with the first `len` bytes of the memory of `slot`, which has none under way. It is sent by
    /// [`Self::exchange`].
    pub(crate) fn submit(&mut self, slot: usize, kind: Kind, offset: u64, len: u32) {
        let head = RawRequest {
            magic: REQUEST_MAGIC.into(),
            flags: 0.into(),
            kind: kind.code().into(),
            cookie: (slot as u64).into(),
            offset: offset.into(),
            len_bytes: len.into(),
        };
        self.output.extend_from_slice(head.as_bytes());
        let len = len as usize;
        let Slot { memory, under_way } = &mut self.slots[slot];
        if kind == Kind::Write {
            self.output.extend_from_slice(&memory[..len]);
        }
        *under_way = Some(UnderWay { kind, offset, len, covered: 0, error: None });
    }

    /// Sends what was submitted, and waits until something has ended, or that moment has come.
    ///
    /// # Errors
    /// See the module above.
    pub(crate) fn exchange(&mut self, until: Option<Instant>, ended: &mut Vec<Ended>) -> io::Result<()> {
        loop {
            self.send()?;
            self.look(ended)?;
            if !ended.is_empty() {
                return Ok(());
            }
            if self.receive()? {
                continue;
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(());
            }
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let sending = if self.output.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN | sending)], timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn send(&mut self) -> io::Result<()> {
        while self.sent < self.output.len() {
            match self.socket.send(&[IoSlice::new(&self.output[self.sent..])], false)? {
                Some(sent) => self.sent += sent,
                None => return Ok(()),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(())
    }

    /// False when there is nothing now.
    fn receive(&mut self) -> io::Result<bool> {
        // Before this all that could be looked at was.
        self.input.copy_within(self.received.clone(), 0);
        self.received = 0..self.received.len();
        let room = &mut self.input[self.received.end..];
        let mut direct = 0..0;
        let received = match &self.data {
            // All that was received is looked at, so what comes now begins with this data.
            Some(Data { slot, rest, .. }) => {
                direct = rest.clone();
                self.socket.receive(&mut self.slots[*slot].memory[rest.clone()], room)?
            }
            None => self.socket.receive(room, &mut [])?,
        };
        match received {
            None => Ok(false),
            Some(0) => {
                Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server has closed the connection"))
            }
            Some(received) => {
                let placed = received.min(direct.len());
                self.received.end += received - placed;
                if let Some(data) = &mut self.data {
                    data.rest.start += placed;
                }
                Ok(true)
            }
        }
    }

    /// Looks at what was received.
    fn look(&mut self, ended: &mut Vec<Ended>) -> io::Result<()> {
        loop {
            if let Some(data) = &mut self.data {
                let here = data.rest.len().min(self.received.len());
                let from = self.received.start..self.received.start + here;
                let to = data.rest.start..data.rest.start + here;
                self.slots[data.slot].memory[to].copy_from_slice(&self.input[from]);
                self.received.start += here;
                data.rest.start += here;
                if !data.rest.is_empty() {
                    return Ok(());
                }
                let (slot, is_last) = (data.slot, data.is_last);
                self.data = None;
                if is_last {
                    self.end(slot, ended)?;
                }
            }
            if !self.head(ended)? {
                return Ok(());
            }
        }
    }

    /// Takes one head, and what small things are behind it. False when it has not come as a whole.
    fn head(&mut self, ended: &mut Vec<Ended>) -> io::Result<bool> {
        let bytes = &self.input[self.received.clone()];
        let Some(magic) = bytes.first_chunk().map(|magic| u32::from_be_bytes(*magic)) else {
            return Ok(false);
        };
        match magic {
            SIMPLE_REPLY_MAGIC => {
                let Ok((head, _)) = RawSimpleReply::read_from_prefix(bytes) else { return Ok(false) };
                self.received.start += size_of::<RawSimpleReply>();
                let (slot, request) = self.request(head.cookie.get())?;
                request.error = error(head.error.get());
                if request.kind == Kind::Read && request.error.is_none() {
                    let rest = 0..request.len;
                    request.covered = request.len;
                    if self.structured {
                        return Err(broken("a simple reply to a read, where replies are structured"));
                    }
                    self.data = Some(Data { slot, rest, is_last: true });
                } else {
                    self.end(slot, ended)?;
                }
                Ok(true)
            }
            STRUCTURED_REPLY_MAGIC if self.structured => self.chunk(ended),
            other => Err(broken(format!("a reply begins with {other:#x}"))),
        }
    }

    /// Takes the head of a chunk; see [`Self::head`].
    fn chunk(&mut self, ended: &mut Vec<Ended>) -> io::Result<bool> {
        let bytes = &self.input[self.received.clone()];
        let Ok((head, behind)) = RawStructuredReply::read_from_prefix(bytes) else { return Ok(false) };
        let (kind, payload_bytes) = (head.kind.get(), head.payload_bytes.get() as usize);
        let is_error = kind >> 15 == 1;
        let needed = match kind {
            chunk::NONE if payload_bytes == 0 => 0,
            chunk::OFFSET_DATA if payload_bytes > 8 => 8,
            chunk::OFFSET_HOLE if payload_bytes == 12 => 12,
            _ if is_error && (6..=MAX_ERROR_BYTES).contains(&payload_bytes) => payload_bytes,
            _ => return Err(broken(format!("a chunk of type {kind:#x} with {payload_bytes} bytes"))),
        };
        let Some(payload) = behind.get(..needed) else { return Ok(false) };
        let number = payload.first_chunk().map_or(0, |number| u64::from_be_bytes(*number));
        let code = payload.first_chunk().map_or(0, |code| u32::from_be_bytes(*code));
        let hole_bytes = payload.get(8..12).and_then(|len| Some(u32::from_be_bytes(*len.first_chunk()?)));
        let is_last = head.flags.get() & REPLY_FLAG_DONE != 0;
        self.received.start += size_of::<RawStructuredReply>() + needed;
        let (slot, request) = self.request(head.cookie.get())?;
        match kind {
            chunk::NONE if !is_last => return Err(broken("a chunk of nothing that is not the last")),
            chunk::NONE => {}
            chunk::OFFSET_DATA => {
                let rest = request.place(number, payload_bytes - 8)?;
                self.data = Some(Data { slot, rest, is_last });
                return Ok(true);
            }
            chunk::OFFSET_HOLE => {
                let place = request.place(number, hole_bytes.unwrap_or(0) as usize)?;
                self.slots[slot].memory[place].fill(0);
            }
            _ => {
                let code = error(code).ok_or_else(|| broken("an error chunk without an error"))?;
                request.error.get_or_insert(code);
            }
        }
        if is_last {
            self.end(slot, ended)?;
        }
        Ok(true)
    }

    fn request(&mut self, cookie: u64) -> io::Result<(usize, &mut UnderWay)> {
        let slot = usize::try_from(cookie).unwrap_or(usize::MAX);
        match self.slots.get_mut(slot).and_then(|slot| slot.under_way.as_mut()) {
            Some(request) => Ok((slot, request)),
            None => Err(broken(format!("a reply to request {cookie}, which is not under way"))),
        }
    }

    fn end(&mut self, slot: usize, ended: &mut Vec<Ended>) -> io::Result<()> {
        let request = self.slots[slot].under_way.take().expect("it was looked up");
        if request.kind == Kind::Read && request.error.is_none() && request.covered != request.len {
            return Err(broken(format!("a read of {} bytes was given {}", request.len, request.covered)));
        }
        ended.push((slot, request.error.map_or(Ok(()), Err)));
        Ok(())
    }
}

impl UnderWay {
    /// Where in the memory of a read the `len` bytes at `offset` of the disk belong.
    fn place(&mut self, offset: u64, len: usize) -> io::Result<Range<usize>> {
        let start = offset.checked_sub(self.offset).and_then(|start| usize::try_from(start).ok());
        let place = start.and_then(|start| Some(start..start.checked_add(len)?));
        match place {
            Some(place) if self.kind == Kind::Read && place.end <= self.len && !place.is_empty() => {
                self.covered += len;
                Ok(place)
            }
            _ => Err(broken(format!("{len} bytes at {offset:#x} that were not asked for"))),
        }
    }
}

/// "Error values": they are Linux's numbers.
fn error(code: u32) -> Option<Errno> {
    match i32::try_from(code) {
        Ok(0) => None,
        Ok(code @ 1..4096) => Some(Errno::from_raw_os_error(code)),
        _ => Some(Errno::IO),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, io::Write as _, os::unix::net::UnixStream};

    use super::*;
    use crate::nbd::client::ExportInfo;

    fn pair(structured: bool) -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let socket = Socket::new(ours.into()).expect("a socket");
        let info = ExportInfo::for_test();
        let negotiated = Negotiated { socket, structured, info };
        (Connection::new(negotiated, vec![vec![0xee; 1024]; 2]), theirs)
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
        let head = RawStructuredReply {
            magic: STRUCTURED_REPLY_MAGIC.into(),
            flags: flags.into(),
            kind: kind.into(),
            cookie: cookie.into(),
            payload_bytes: u32::try_from(payload.len()).expect("short").into(),
        };
        [head.as_bytes(), payload].concat()
    }

    fn data(at: u64, bytes: &[u8]) -> Vec<u8> {
        [&at.to_be_bytes(), bytes].concat()
    }

    fn hole(at: u64, len: u32) -> Vec<u8> {
        [&at.to_be_bytes()[..], &len.to_be_bytes()].concat()
    }

    fn simple(error: u32, cookie: u64) -> Vec<u8> {
        let head =
            RawSimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: cookie.into() };
        head.as_bytes().to_vec()
    }

    #[test]
    fn replies_in_pieces_of_any_size_are_put_together() {
        let replies = [
            chunk(0, 1, 0, &data(4096 + 600, &[7; 424])),
            chunk(1, 1, 1, &data(0, &[9; 512])),
            chunk(0, 2, 0, &hole(4096 + 100, 500)),
            chunk(0, 1, 0, &data(4096, &[5; 100])),
            chunk(1, 0, 0, &[]),
        ]
        .concat();
        for piece in [1, 7, 21, 300, replies.len()] {
            let (mut client, mut server) = pair(true);
            client.submit(0, Kind::Read, 4096, 1024);
            client.submit(1, Kind::Read, 0, 512);
            let mut ended = Vec::new();
            let mut all = Vec::new();
            for part in replies.chunks(piece) {
                server.write_all(part).expect("sent");
                client.exchange(Some(Instant::now()), &mut ended).expect("understood");
                all.append(&mut ended);
            }
            assert_eq!(all, [(1, Ok(())), (0, Ok(()))], "{piece}");
            let expected = [vec![5; 100], vec![0; 500], vec![7; 424]].concat();
            assert_eq!(client.memory(0), expected, "{piece}");
            assert_eq!(client.memory(1)[..512], [9; 512], "{piece}");
            assert_eq!(client.memory(1)[512..], [0xee; 512], "{piece}");
        }
    }

    #[test]
    fn requests_are_framed_and_errors_are_told() {
        let (mut client, mut server) = pair(false);
        client.memory_mut(1)[..3].copy_from_slice(b"abc");
        client.submit(1, Kind::Write, 1 << 40, 3);
        client.submit(0, Kind::Trim, 512, 4096);
        server.write_all(&[simple(28, 1), simple(0, 0)].concat()).expect("sent");
        let mut ended = Vec::new();
        client.exchange(None, &mut ended).expect("understood");
        assert_eq!(ended, [(1, Err(Errno::NOSPC)), (0, Ok(()))]);
        let mut sent = [0; 28 + 3 + 28];
        server.read_exact(&mut sent).expect("it was sent");
        let write =
            [&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1][..], &1_u64.to_be_bytes(), &(1_u64 << 40).to_be_bytes()];
        assert_eq!(sent[..31], [&write.concat()[..], &[0, 0, 0, 3], b"abc"].concat());
        assert_eq!(sent[31 + 4..31 + 8], [0, 0, 0, 4]);
    }

    #[test]
    fn servers_that_break_the_protocol_are_found_out() {
        for (structured, bytes) in [
            (true, simple(0, 0)),
            (true, simple(0, 7)),
            (true, chunk(1, 1, 0, &data(4095, &[0; 10]))),
            (true, chunk(1, 1, 0, &data(4096, &[0; 1025]))),
            (true, chunk(1, 2, 0, &hole(4096, 0))),
            (true, chunk(1, 0, 0, &[])),
            (true, chunk(0, 0, 0, &[])),
            (true, chunk(1, 5, 0, &[0; 12])),
            (true, chunk(1, 0x8001, 0, &[0; 6])),
            (true, chunk(1, 0x8001, 0, &[0; 5])),
            (true, chunk(1, 1, 0, &data(u64::MAX, &[0; 10]))),
            (true, b"rubbish!".to_vec()),
            (false, chunk(1, 0, 0, &[])),
        ] {
            let (mut client, mut server) = pair(structured);
            client.submit(0, Kind::Read, 4096, 1024);
            server.write_all(&bytes).expect("sent");
            let error = client.exchange(None, &mut Vec::new()).expect_err("it is wrong");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bytes:x?}: {error}");
        }
        let (mut client, server) = pair(true);
        drop(server);
        let error = client.exchange(None, &mut Vec::new()).expect_err("it is gone");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
