//! A small NBD client that says what it is told to say, right or wrong, and takes replies apart strictly.
//!
//! The protocol's document is `doc/proto.md` of the NBD project.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
};

/// How requests and replies are framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Simple replies.
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers.
    Extended,
}

/// Request types.
pub mod command {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    pub const DF: u16 = 4;
    pub const REQ_ONE: u16 = 8;
    pub const FAST_ZERO: u16 = 16;
    pub const PAYLOAD_LEN: u16 = 32;
}

/// Option types.
pub mod option {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types.
pub mod reply {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// One connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    framing: Framing,
    /// What the server said of the export.
    pub size_bytes: u64,
    /// The transmission flags.
    pub flags: u16,
    /// The contexts that were selected, by number.
    pub contexts: HashMap<u32, String>,
    /// Requests that were sent and not answered whole, with what is known so far.
    pending: HashMap<u64, Reply>,
    next_cookie: u64,
}

/// A whole reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The error, 0 for none.
    pub error: u32,
    /// The server's words for it.
    pub message: String,
    /// What was read, from the start of the range.
    pub data: Vec<u8>,
    /// Status runs by context number.
    pub status: HashMap<u32, Vec<(u64, u64)>>,
    /// Chunks that it came in; 0 for a simple reply.
    pub chunks: u32,
    command: u16,
    offset: u64,
    covered: u64,
}

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Client {
    /// Connects and says the client flags (fixed newstyle, no zeroes); options come next.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn greet(socket: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        if &greeting != b"NBDMAGICIHAVEOPT\x00\x03" {
            return Err(broken(format!("greeting {greeting:x?}")));
        }
        stream.write_all(&3_u32.to_be_bytes())?;
        Ok(Self {
            stream,
            framing: Framing::Simple,
            size_bytes: 0,
            flags: 0,
            contexts: HashMap::new(),
            pending: HashMap::new(),
            next_cookie: 1,
        })
    }

    /// Negotiates everything and goes to transmission, with the contexts named.
    ///
    /// # Errors
    /// Those of the socket, and of a server that refuses.
    pub fn connect(socket: &Path, export: &str, framing: Framing, contexts: &[&str]) -> io::Result<Self> {
        let mut client = Self::greet(socket)?;
        match framing {
            Framing::Simple => {}
            Framing::Structured => client.expect_ack(option::STRUCTURED_REPLY, &[])?,
            Framing::Extended => client.expect_ack(option::EXTENDED_HEADERS, &[])?,
        }
        client.framing = framing;
        if !contexts.is_empty() {
            for (kind, data) in client.option(option::SET_META_CONTEXT, &meta_request(export, contexts))? {
                match kind {
                    reply::META_CONTEXT => {
                        let id = u32::from_be_bytes(data[..4].try_into().expect("four bytes"));
                        let name = String::from_utf8(data[4..].to_vec()).map_err(|_| broken("not UTF-8"))?;
                        client.contexts.insert(id, name);
                    }
                    reply::ACK => {}
                    other => return Err(broken(format!("reply {other:#x} to SET_META_CONTEXT"))),
                }
            }
        }
        let mut acknowledged = false;
        for (kind, data) in client.option(option::GO, &info_request(export, &[]))? {
            match kind {
                reply::INFO if data[..2] == [0, 0] => {
                    client.size_bytes = u64::from_be_bytes(data[2..10].try_into().expect("eight bytes"));
                    client.flags = u16::from_be_bytes(data[10..12].try_into().expect("two bytes"));
                }
                reply::INFO => {}
                reply::ACK => acknowledged = true,
                other => return Err(broken(format!("reply {other:#x} to GO"))),
            }
        }
        if acknowledged { Ok(client) } else { Err(broken("GO without an ACK")) }
    }

    /// The socket, for what no honest client says.
    pub fn stream(&mut self) -> &mut UnixStream {
        &mut self.stream
    }

    fn expect_ack(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let replies = self.option(option, data)?;
        if replies == [(reply::ACK, Vec::new())] { Ok(()) } else { Err(broken(format!("{replies:?}"))) }
    }

    /// Sends an option and returns its replies, type and data.
    ///
    /// # Errors
    /// Those of the socket, and of replies that are none.
    pub fn option(&mut self, option: u32, data: &[u8]) -> io::Result<Vec<(u32, Vec<u8>)>> {
        self.stream.write_all(&option_bytes(option, data))?;
        let mut replies = Vec::new();
        loop {
            let magic = u64::from_be_bytes(self.bytes()?);
            let (of, kind) = (u32::from_be_bytes(self.bytes()?), u32::from_be_bytes(self.bytes()?));
            if magic != 0x0003_e889_0455_65a9 || of != option {
                return Err(broken(format!("option reply {magic:#x} to {of}")));
            }
            let data = self.counted_bytes()?;
            replies.push((kind, data));
            if kind == reply::ACK || kind >= 1 << 31 {
                return Ok(replies);
            }
        }
    }

    /// Sends a request and returns its cookie. `payload` is what follows the header.
    ///
    /// # Errors
    /// Those of the socket.
    ///
    /// # Panics
    /// When the length does not fit the framing.
    pub fn send(&mut self, kind: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> io::Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut request = Vec::new();
        if self.framing == Framing::Extended {
            let flags = if payload.is_empty() { flags } else { flags | flag::PAYLOAD_LEN };
            request.extend(0x21e4_1c71_u32.to_be_bytes());
            request.extend([flags, kind].map(u16::to_be_bytes).concat());
            request.extend([cookie, offset, len].map(u64::to_be_bytes).concat());
        } else {
            request.extend(0x2560_9513_u32.to_be_bytes());
            request.extend([flags, kind].map(u16::to_be_bytes).concat());
            request.extend([cookie, offset].map(u64::to_be_bytes).concat());
            request.extend(u32::try_from(len).expect("a length of 32 bits").to_be_bytes());
        }
        request.extend_from_slice(payload);
        let data =
            if kind == command::READ { vec![0xee; usize::try_from(len).unwrap_or(0)] } else { Vec::new() };
        self.pending.insert(cookie, Reply { command: kind, offset, data, ..Reply::default() });
        self.stream.write_all(&request)?;
        Ok(cookie)
    }

    /// The next whole reply, and the request it belongs to.
    ///
    /// # Errors
    /// Those of the socket; `InvalidData` for whatever the protocol does not allow.
    pub fn receive(&mut self) -> io::Result<(u64, Reply)> {
        loop {
            if let Some(whole) = self.chunk()? {
                return Ok(whole);
            }
        }
    }

    /// A request alone, and its reply.
    ///
    /// # Errors
    /// As [`Self::send`] and [`Self::receive`].
    pub fn call(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        len: u64,
        payload: &[u8],
    ) -> io::Result<Reply> {
        let cookie = self.send(kind, flags, offset, len, payload)?;
        let (of, reply) = self.receive()?;
        if of == cookie { Ok(reply) } else { Err(broken("a reply to another request")) }
    }

    /// One message of the server; the reply when it ends one.
    fn chunk(&mut self) -> io::Result<Option<(u64, Reply)>> {
        let magic = u32::from_be_bytes(self.bytes()?);
        let framing = self.framing;
        match magic {
            0x6744_6698 if framing != Framing::Extended => {
                let error = u32::from_be_bytes(self.bytes()?);
                let cookie = u64::from_be_bytes(self.bytes()?);
                let mut reply = self.pending.remove(&cookie).ok_or_else(|| broken("unknown cookie"))?;
                if reply.command == command::READ {
                    if framing != Framing::Simple {
                        return Err(broken("a simple reply to a structured read"));
                    }
                    if error == 0 {
                        self.stream.read_exact(&mut reply.data)?;
                    }
                }
                reply.error = error;
                Ok(Some((cookie, reply)))
            }
            0x668e_33ef if framing == Framing::Structured => {
                let (flags, kind) = (u16::from_be_bytes(self.bytes()?), u16::from_be_bytes(self.bytes()?));
                let cookie = u64::from_be_bytes(self.bytes()?);
                let payload = self.counted_bytes()?;
                self.structured(flags, kind, cookie, &payload)
            }
            0x6e8a_278c if framing == Framing::Extended => {
                let (flags, kind) = (u16::from_be_bytes(self.bytes()?), u16::from_be_bytes(self.bytes()?));
                let (cookie, offset) = (u64::from_be_bytes(self.bytes()?), u64::from_be_bytes(self.bytes()?));
                let len = u64::from_be_bytes(self.bytes()?);
                if self.pending.get(&cookie).is_none_or(|request| request.offset != offset) {
                    return Err(broken("an extended reply with another offset"));
                }
                let payload = self.sized_bytes(len)?;
                self.structured(flags, kind, cookie, &payload)
            }
            other => Err(broken(format!("reply magic {other:#x} in {framing:?} framing"))),
        }
    }

    fn structured(
        &mut self,
        flags: u16,
        kind: u16,
        cookie: u64,
        payload: &[u8],
    ) -> io::Result<Option<(u64, Reply)>> {
        let framing = self.framing;
        let mut reply = self.pending.remove(&cookie).ok_or_else(|| broken("unknown cookie"))?;
        reply.chunks += 1;
        let done = flags & 1 != 0;
        match kind {
            0 if payload.is_empty() && done => {}
            1 if payload.len() > 8 && reply.command == command::READ => {
                let at = u64::from_be_bytes(payload[..8].try_into().expect("eight bytes"));
                reply.place(at, &payload[8..])?;
            }
            2 if payload.len() == 12 && reply.command == command::READ => {
                let at = u64::from_be_bytes(payload[..8].try_into().expect("eight bytes"));
                let len = u32::from_be_bytes(payload[8..].try_into().expect("four bytes"));
                reply.place(at, &vec![0; len as usize])?;
            }
            5 if framing == Framing::Structured && payload.len() >= 12 && payload.len() % 8 == 4 => {
                let id = u32::from_be_bytes(payload[..4].try_into().expect("four bytes"));
                let runs = payload[4..].chunks_exact(8).map(|run| {
                    let (len, flags) = run.split_at(4);
                    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("four bytes"));
                    (u64::from(number(len)), u64::from(number(flags)))
                });
                reply.put_status(id, runs.collect())?;
            }
            6 if framing == Framing::Extended && payload.len() >= 24 && payload.len() % 16 == 8 => {
                let id = u32::from_be_bytes(payload[..4].try_into().expect("four bytes"));
                let count = u32::from_be_bytes(payload[4..8].try_into().expect("four bytes"));
                if count as usize != payload.len() / 16 {
                    return Err(broken("another number of descriptors"));
                }
                let runs = payload[8..].chunks_exact(16).map(|run| {
                    let (len, flags) = run.split_at(8);
                    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
                    (number(len), number(flags))
                });
                reply.put_status(id, runs.collect())?;
            }
            0x8001 if payload.len() >= 6 => {
                reply.error = u32::from_be_bytes(payload[..4].try_into().expect("four bytes"));
                let len = usize::from(u16::from_be_bytes(payload[4..6].try_into().expect("two bytes")));
                let text = payload.get(6..6 + len).ok_or_else(|| broken("an error text that is cut off"))?;
                reply.message = String::from_utf8(text.to_vec()).map_err(|_| broken("not UTF-8"))?;
                if reply.error == 0 {
                    return Err(broken("an error chunk without an error"));
                }
            }
            other => return Err(broken(format!("chunk of type {other:#x} with {} bytes", payload.len()))),
        }
        if !done {
            self.pending.insert(cookie, reply);
            return Ok(None);
        }
        if reply.command == command::READ && reply.error == 0 && reply.covered != reply.data.len() as u64 {
            return Err(broken("a read that is not covered"));
        }
        Ok(Some((cookie, reply)))
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn counted_bytes(&mut self) -> io::Result<Vec<u8>> {
        let len = u32::from_be_bytes(self.bytes()?);
        self.sized_bytes(len.into())
    }

    fn sized_bytes(&mut self, len: u64) -> io::Result<Vec<u8>> {
        if len > 64 << 20 {
            return Err(broken(format!("{len} bytes in one message")));
        }
        let mut data = vec![0; usize::try_from(len).expect("at most 64 MiB")];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }
}

impl Reply {
    fn place(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let start = at.checked_sub(self.offset).ok_or_else(|| broken("a chunk before the request"))?;
        let end = start + bytes.len() as u64;
        if end > self.data.len() as u64 {
            return Err(broken("a chunk behind the request"));
        }
        let range = usize::try_from(start).expect("checked")..usize::try_from(end).expect("checked");
        self.data[range].copy_from_slice(bytes);
        self.covered += bytes.len() as u64;
        Ok(())
    }

    fn put_status(&mut self, id: u32, runs: Vec<(u64, u64)>) -> io::Result<()> {
        if self.command != command::BLOCK_STATUS || runs.iter().any(|(len, _)| *len == 0) {
            return Err(broken("a status that is none"));
        }
        match self.status.insert(id, runs) {
            None => Ok(()),
            Some(_) => Err(broken("two chunks for one context")),
        }
    }
}

/// An option as it stands in the stream.
///
/// # Panics
/// When the data is longer than the field can say.
#[must_use]
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("short data");
    [b"IHAVEOPT", &option.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
}

/// The data of `GO` and `INFO`.
#[must_use]
pub fn info_request(export: &str, wanted: &[u16]) -> Vec<u8> {
    let count = u16::try_from(wanted.len()).unwrap_or(u16::MAX);
    let wanted: Vec<u8> = wanted.iter().flat_map(|kind| kind.to_be_bytes()).collect();
    [counted(export), count.to_be_bytes().to_vec(), wanted].concat()
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[must_use]
pub fn meta_request(export: &str, queries: &[&str]) -> Vec<u8> {
    let count = u32::try_from(queries.len()).unwrap_or(u32::MAX);
    let queries: Vec<u8> = queries.iter().flat_map(|query| counted(query)).collect();
    [counted(export), count.to_be_bytes().to_vec(), queries].concat()
}

fn counted(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes(), text.as_bytes()].concat()
}
