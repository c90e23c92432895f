//! The client's handshake: fixed newstyle, structured replies where the server has them.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use rustix::net::sockopt::set_tcp_nodelay;
use zerocopy::{BE, FromBytes, IntoBytes, byteorder::U32};

use super::{
    broken,
    uri::{NbdUri, ServerAddress},
};
use crate::nbd::{
    socket::Socket,
    wire::{
        Greeting, MAX_PAYLOAD_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, RawOption, RawOptionReply,
        SERVER_MAGIC, handshake_flag, info, option, reply_type, transmission_flag,
    },
};

/// How long a server may take for its part.
const PATIENCE: Duration = Duration::from_secs(30);

/// The longest reply to an option that is taken: names and texts have at most 4096 bytes.
const MAX_REPLY_BYTES: u32 = 16 << 10;

/// What a server says of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExportInfo {
    pub(crate) size_bytes: u64,
    /// Transmission flags.
    flags: u16,
    /// Requests are multiples of it.
    pub(crate) least_block_bytes: u32,
    /// Of a read or a write.
    pub(crate) most_payload_bytes: u32,
}

impl ExportInfo {
    pub(crate) fn is_read_only(&self) -> bool {
        self.has(transmission_flag::READ_ONLY)
    }

    pub(crate) fn can_flush(&self) -> bool {
        self.has(transmission_flag::SEND_FLUSH)
    }

    pub(crate) fn can_trim(&self) -> bool {
        self.has(transmission_flag::SEND_TRIM)
    }

    /// Whether several connections see one disk.
    pub(crate) fn can_multi_conn(&self) -> bool {
        self.has(transmission_flag::CAN_MULTI_CONN)
    }

    /// An export of nothing.
    #[cfg(test)]
    pub(super) fn for_test() -> Self {
        Self { size_bytes: 0, flags: 0, least_block_bytes: 1, most_payload_bytes: 0 }
    }

    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A connection on which both sides have agreed on an export.
#[derive(Debug)]
pub(crate) struct Negotiated {
    pub(super) socket: Socket,
    /// Replies are structured.
    pub(super) structured: bool,
    pub(crate) info: ExportInfo,
}

impl AsFd for Negotiated {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Negotiated {
    /// Connects to the server of `uri` and selects its export.
    ///
    /// # Errors
    /// Those of the socket; a server that breaks the protocol, or refuses.
    pub(crate) fn connect(uri: &NbdUri) -> io::Result<Self> {
        let fd = match &uri.server {
            ServerAddress::Unix(path) => OwnedFd::from(UnixStream::connect(path)?),
            ServerAddress::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port))?;
                set_tcp_nodelay(&stream, true)?;
                stream.into()
            }
        };
        let socket = Socket::new(fd)?;
        let (structured, info) = agree(&mut socket.until(Instant::now() + PATIENCE), &uri.export)?;
        Ok(Self { socket, structured, info })
    }
}

/// The whole dialogue: whether replies are structured, and the export.
fn agree(stream: &mut (impl Read + Write), export: &str) -> io::Result<(bool, ExportInfo)> {
    let greeting: Greeting = receive(stream)?;
    if (greeting.server_magic.get(), greeting.option_magic.get()) != (SERVER_MAGIC, OPTION_MAGIC) {
        return Err(broken("this is no NBD server of the newstyle"));
    }
    let flags = greeting.flags.get();
    if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(broken("the server does not speak the fixed newstyle"));
    }
    let flags = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    stream.write_all(U32::<BE>::new(flags.into()).as_bytes())?;
    ask(stream, option::STRUCTURED_REPLY, &[])?;
    let (kind, _) = answer(stream, option::STRUCTURED_REPLY)?;
    let structured = kind == reply_type::ACK;
    if !structured && !is_error(kind) {
        return Err(broken(format!("reply {kind:#x} to STRUCTURED_REPLY")));
    }
    Ok((structured, go(stream, export)?))
}

/// Chooses the export, and hears what the server says of it.
fn go(stream: &mut (impl Read + Write), export: &str) -> io::Result<ExportInfo> {
    let name_bytes = u32::try_from(export.len()).map_err(|_| broken("a name that is too long"))?;
    let wanted = [1, info::BLOCK_SIZE].map(u16::to_be_bytes).concat();
    ask(stream, option::GO, &[&name_bytes.to_be_bytes(), export.as_bytes(), &wanted].concat())?;
    let mut found = None;
    let (mut least_block_bytes, mut most_payload_bytes) = (1, MAX_PAYLOAD_BYTES);
    loop {
        let (kind, data) = answer(stream, option::GO)?;
        match kind {
            reply_type::INFO => {
                match (data.first_chunk().map(|kind| u16::from_be_bytes(*kind)), data.len()) {
                    (Some(info::EXPORT), 12) => {
                        found =
                            Some((u64::from_be_bytes(part(&data, 2)), u16::from_be_bytes(part(&data, 10))));
                    }
                    (Some(info::BLOCK_SIZE), 14) => {
                        least_block_bytes = u32::from_be_bytes(part(&data, 2)).max(1);
                        most_payload_bytes = u32::from_be_bytes(part(&data, 10));
                    }
                    (Some(info::EXPORT | info::BLOCK_SIZE) | None, len) => {
                        return Err(broken(format!("information of {len} bytes")));
                    }
                    _ => {}
                }
            }
            reply_type::ACK => break,
            kind if is_error(kind) => {
                let why = String::from_utf8_lossy(&data);
                let why = format!("the server refuses the export '{export}': {why} ({kind:#x})");
                return Err(io::Error::other(why));
            }
            other => return Err(broken(format!("reply {other:#x} to GO"))),
        }
    }
    let (size_bytes, flags) =
        found.ok_or_else(|| broken("the server does not say how large the export is"))?;
    Ok(ExportInfo { size_bytes, flags, least_block_bytes, most_payload_bytes })
}

/// The bytes of a field. The length of `data` was checked.
fn part<const N: usize>(data: &[u8], at: usize) -> [u8; N] {
    data[at..at + N].try_into().expect("N bytes")
}

fn is_error(kind: u32) -> bool {
    kind >> 31 == 1
}

fn ask(stream: &mut impl Write, option: u32, data: &[u8]) -> io::Result<()> {
    let data_bytes = u32::try_from(data.len()).map_err(io::Error::other)?;
    let head = RawOption { magic: OPTION_MAGIC.into(), option: option.into(), data_bytes: data_bytes.into() };
    stream.write_all(&[head.as_bytes(), data].concat())
}

/// A reply to `option`: its type and data.
fn answer(stream: &mut impl Read, option: u32) -> io::Result<(u32, Vec<u8>)> {
    let head: RawOptionReply = receive(stream)?;
    if head.magic.get() != OPTION_REPLY_MAGIC || head.option.get() != option {
        return Err(broken(format!("a reply to option {} where one to {option} was expected", head.option)));
    }
    if head.data_bytes.get() > MAX_REPLY_BYTES {
        return Err(broken(format!("a reply of {} bytes to an option", head.data_bytes)));
    }
    let mut data = vec![0; head.data_bytes.get() as usize];
    stream.read_exact(&mut data)?;
    Ok((head.reply_type.get(), data))
}

fn receive<T: FromBytes + IntoBytes>(stream: &mut impl Read) -> io::Result<T> {
    let mut head = T::new_zeroed();
    stream.read_exact(head.as_mut_bytes())?;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    /// A server that says what it says, whatever it hears.
    struct Script(Cursor<Vec<u8>>);

    impl Read for Script {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            self.0.read(bytes)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let head = RawOptionReply {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            reply_type: kind.into(),
            data_bytes: u32::try_from(data.len()).expect("short").into(),
        };
        [head.as_bytes(), data].concat()
    }

    fn hear(parts: &[Vec<u8>]) -> io::Result<(bool, ExportInfo)> {
        let greeting = b"NBDMAGICIHAVEOPT\x00\x03".to_vec();
        agree(&mut Script(Cursor::new([&[greeting], parts].concat().concat())), "disk")
    }

    fn export_info(size_bytes: u64, flags: u16) -> Vec<u8> {
        [&[0, 0][..], &size_bytes.to_be_bytes(), &flags.to_be_bytes()].concat()
    }

    #[test]
    fn servers_of_both_kinds_are_understood() {
        let sizes = [512_u32, 4096, 1 << 20].map(u32::to_be_bytes).concat();
        let (structured, info) = hear(&[
            reply(8, 1, &[]),
            reply(7, 3, &export_info(1 << 30, 0b1_0000_0111)),
            reply(7, 3, &[vec![0, 3], sizes].concat()),
            reply(7, 3, b"\0\x02words"),
            reply(7, 1, &[]),
        ])
        .expect("it agrees");
        assert!(structured && info.is_read_only() && info.can_flush() && info.can_multi_conn());
        assert!(!info.can_trim());
        let sizes = (info.size_bytes, info.least_block_bytes, info.most_payload_bytes);
        assert_eq!(sizes, (1 << 30, 512, 1 << 20));
        let unsupported = reply(8, (1 << 31) + 1, b"no");
        let (structured, info) =
            hear(&[unsupported, reply(7, 3, &export_info(9, 1)), reply(7, 1, &[])]).expect("it agrees");
        assert!(!structured && !info.is_read_only());
        assert_eq!((info.least_block_bytes, info.most_payload_bytes), (1, MAX_PAYLOAD_BYTES));
    }

    #[test]
    fn what_a_server_may_not_say_is_refused() {
        for (parts, why) in [
            (vec![reply(7, 1, &[])], "where one to 8"),
            (vec![reply(8, 3, &[])], "STRUCTURED_REPLY"),
            (vec![reply(8, 1, &[]), reply(7, 1, &[])], "how large"),
            (vec![reply(8, 1, &[]), reply(7, 3, &[0, 0, 1])], "information of 3"),
            (vec![reply(8, 1, &[]), reply(7, 3, &[])], "information of 0"),
            (vec![reply(8, 1, &[]), reply(7, (1 << 31) + 6, b"no such disk")], "no such disk"),
            (vec![reply(8, 1, &vec![0; 1 << 20])], "reply of 1048576 bytes"),
            (vec![reply(8, 1, &[]), reply(7, 9, &[])], "0x9 to GO"),
            (vec![], "fill whole buffer"),
        ] {
            let error = hear(&parts).expect_err(why);
            assert!(error.to_string().contains(why), "{why}: {error}");
        }
        let oldstyle = b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00".to_vec();
        assert!(agree(&mut Script(Cursor::new(oldstyle)), "").is_err());
    }
}
