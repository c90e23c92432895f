//! Messages that the `vhost` crate does not carry, taken off the socket before it sees them: the device status, and
//! the channel back to the front end with the one message that a block device has for it.

use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, little_endian::U32};

/// "Header" of the protocol. In host byte order, which is little-endian wherever this is built for.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    request: U32,
    flags: U32,
    payload_bytes: U32,
}
const HEADER_BYTES: usize = size_of::<Header>();
const _: () = assert!(HEADER_BYTES == 12);

const VERSION_1: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

const SET_BACKEND_REQ_FD: u32 = 21;
const SET_STATUS: u32 = 39;
const GET_STATUS: u32 = 40;

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`.
const BACKEND_CONFIG_CHANGE: u32 = 2;

/// A message for this module.
#[derive(Debug)]
pub(super) enum Message {
    /// The driver wrote the device status.
    SetStatus(u64),
    /// The front end asks for it.
    GetStatus,
    /// The channel for messages to the front end.
    BackendChannel(UnixStream),
}

/// How a message is answered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    request: u32,
    wants_ack: bool,
}

/// What is next on the socket.
#[derive(Debug)]
pub(super) enum Next {
    /// One of ours, taken off.
    Ours(Message, Answer),
    /// Anything else, left there.
    Theirs,
    /// The front end is gone.
    End,
}

/// Looks at the next message, and takes it when it is one of ours.
pub(super) fn next(socket: BorrowedFd<'_>) -> io::Result<Next> {
    let mut peeked = [0; HEADER_BYTES];
    // A header that is not all there is left to the crate, which waits for the rest.
    match recv(socket, &mut peeked, RecvFlags::PEEK)? {
        (0, _) => return Ok(Next::End),
        (HEADER_BYTES, _) => {}
        _ => return Ok(Next::Theirs),
    }
    let header = Header::read_from_bytes(&peeked).expect("12 bytes");
    let request = header.request.get();
    let payload_bytes: u32 = match request {
        SET_STATUS => 8,
        GET_STATUS | SET_BACKEND_REQ_FD => 0,
        _ => return Ok(Next::Theirs),
    };
    let flags = header.flags.get();
    if flags & VERSION_MASK != VERSION_1 || flags & REPLY != 0 || header.payload_bytes.get() != payload_bytes
    {
        let what = format!("request {request} with flags {flags:#x} and {} bytes", header.payload_bytes);
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut fds = take(socket, &mut peeked)?;
    let message = match request {
        SET_STATUS => {
            let mut status = [0; 8];
            take(socket, &mut status)?;
            Message::SetStatus(u64::from_le_bytes(status))
        }
        GET_STATUS => Message::GetStatus,
        _ => {
            let missing =
                || io::Error::new(io::ErrorKind::InvalidData, "no descriptor of a channel came along");
            Message::BackendChannel(UnixStream::from(fds.pop().ok_or_else(missing)?))
        }
    };
    Ok(Next::Ours(message, Answer { request, wants_ack: flags & NEED_REPLY != 0 }))
}

/// Fills `bytes`, and takes at most one descriptor that comes along.
fn take(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let mut fds = Vec::new();
    let mut filled = 0;
    while filled < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut rest = [io::IoSliceMut::new(&mut bytes[filled..])];
        let got = recvmsg(socket, &mut rest, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += got;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
    }
    Ok(fds)
}

impl Answer {
    /// Answers with a number: the status that was asked for.
    pub(super) fn reply(self, socket: BorrowedFd<'_>, value: u64) -> io::Result<()> {
        let header = Header {
            request: self.request.into(),
            flags: (VERSION_1 | REPLY).into(),
            payload_bytes: 8.into(),
        };
        let mut bytes = [0; HEADER_BYTES + 8];
        bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        bytes[HEADER_BYTES..].copy_from_slice(&value.to_le_bytes());
        send_all(socket, &bytes, SendFlags::empty())
    }

    /// Says that it was done, where `REPLY_ACK` was negotiated and the message asks for it.
    pub(super) fn acknowledge(self, socket: BorrowedFd<'_>, reply_ack: bool) -> io::Result<()> {
        if self.wants_ack && reply_ack { self.reply(socket, 0) } else { Ok(()) }
    }
}

/// Tells the front end that the configuration is different. It need not answer.
pub(super) fn send_config_change(channel: &UnixStream) -> io::Result<()> {
    let header =
        Header { request: BACKEND_CONFIG_CHANGE.into(), flags: VERSION_1.into(), payload_bytes: U32::ZERO };
    // A front end that does not read its messages is not waited for.
    send_all(channel.as_fd(), header.as_bytes(), SendFlags::DONTWAIT)
}

fn send_all(socket: BorrowedFd<'_>, mut bytes: &[u8], flags: SendFlags) -> io::Result<()> {
    while !bytes.is_empty() {
        let sent = send(socket, bytes, flags | SendFlags::NOSIGNAL)?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// Makes a descriptor of a front end safe to be read, written and watched: it must be one that is waited for, and it
/// never blocks.
pub(super) fn event_fd(file: File) -> io::Result<OwnedFd> {
    use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
    let kind = FileType::from_raw_mode(fstat(&file)?.st_mode);
    if matches!(kind, FileType::RegularFile | FileType::Directory | FileType::BlockDevice) {
        let what = format!("a {kind:?} where an eventfd belongs");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
    Ok(file.into())
}
