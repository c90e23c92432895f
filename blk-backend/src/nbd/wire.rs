//! The NBD protocol's numbers and fixed structures, as its document (`doc/proto.md` of the NBD project, cited
//! below by section) defines them. All integers are big-endian.

use zerocopy::{
    BE, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::{U16, U32, U64},
};

/// "Newstyle negotiation": the first eight bytes a server says, `NBDMAGIC`.
pub(super) const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "Newstyle negotiation": before every option, `IHAVEOPT`.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// "Fixed newstyle negotiation": before every reply to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// "Request message".
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// "Extended request message".
pub(super) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// "Simple reply message".
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// "Structured reply chunk message".
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// "Extended reply chunk message".
pub(super) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// "Handshake flags" and, with the same values, "Client flags".
pub(super) mod handshake_flag {
    pub(in super::super) const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub(in super::super) const NO_ZEROES: u16 = 1 << 1;
}

/// "Transmission flags".
pub(super) mod transmission_flag {
    pub(in super::super) const HAS_FLAGS: u16 = 1 << 0;
    pub(in super::super) const READ_ONLY: u16 = 1 << 1;
    pub(in super::super) const SEND_FLUSH: u16 = 1 << 2;
    pub(in super::super) const SEND_FUA: u16 = 1 << 3;
    pub(in super::super) const SEND_TRIM: u16 = 1 << 5;
    pub(in super::super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(in super::super) const SEND_DF: u16 = 1 << 7;
    pub(in super::super) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(in super::super) const SEND_CACHE: u16 = 1 << 10;
    pub(in super::super) const SEND_FAST_ZERO: u16 = 1 << 11;
    pub(in super::super) const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// "Option types".
pub(super) mod option {
    pub(in super::super) const EXPORT_NAME: u32 = 1;
    pub(in super::super) const ABORT: u32 = 2;
    pub(in super::super) const LIST: u32 = 3;
    pub(in super::super) const STARTTLS: u32 = 5;
    pub(in super::super) const INFO: u32 = 6;
    pub(in super::super) const GO: u32 = 7;
    pub(in super::super) const STRUCTURED_REPLY: u32 = 8;
    pub(in super::super) const LIST_META_CONTEXT: u32 = 9;
    pub(in super::super) const SET_META_CONTEXT: u32 = 10;
    pub(in super::super) const EXTENDED_HEADERS: u32 = 11;
}

/// "Option reply types".
pub(super) mod reply_type {
    pub(in super::super) const ACK: u32 = 1;
    pub(in super::super) const SERVER: u32 = 2;
    pub(in super::super) const INFO: u32 = 3;
    pub(in super::super) const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    pub(in super::super) const ERR_UNSUP: u32 = ERROR + 1;
    pub(in super::super) const ERR_POLICY: u32 = ERROR + 2;
    pub(in super::super) const ERR_INVALID: u32 = ERROR + 3;
    pub(in super::super) const ERR_UNKNOWN: u32 = ERROR + 6;
    pub(in super::super) const ERR_SHUTDOWN: u32 = ERROR + 7;
    pub(in super::super) const ERR_TOO_BIG: u32 = ERROR + 9;
    pub(in super::super) const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// "`NBD_REP_INFO`": information types.
pub(super) mod info {
    pub(in super::super) const EXPORT: u16 = 0;
    pub(in super::super) const NAME: u16 = 1;
    pub(in super::super) const DESCRIPTION: u16 = 2;
    pub(in super::super) const BLOCK_SIZE: u16 = 3;
}

/// "Request types".
pub(super) mod command {
    pub(in super::super) const READ: u16 = 0;
    pub(in super::super) const WRITE: u16 = 1;
    pub(in super::super) const DISCONNECT: u16 = 2;
    pub(in super::super) const FLUSH: u16 = 3;
    pub(in super::super) const TRIM: u16 = 4;
    pub(in super::super) const CACHE: u16 = 5;
    pub(in super::super) const WRITE_ZEROES: u16 = 6;
    pub(in super::super) const BLOCK_STATUS: u16 = 7;
}

/// "Command flags".
pub(super) mod command_flag {
    pub(in super::super) const FUA: u16 = 1 << 0;
    pub(in super::super) const NO_HOLE: u16 = 1 << 1;
    pub(in super::super) const DONT_FRAGMENT: u16 = 1 << 2;
    pub(in super::super) const REQ_ONE: u16 = 1 << 3;
    pub(in super::super) const FAST_ZERO: u16 = 1 << 4;
    pub(in super::super) const PAYLOAD_LENGTH: u16 = 1 << 5;
}

/// "Structured reply flags": the last chunk of a reply.
pub(super) const REPLY_FLAG_DONE: u16 = 1 << 0;

/// "Structured reply types".
pub(super) mod chunk {
    pub(in super::super) const NONE: u16 = 0;
    pub(in super::super) const OFFSET_DATA: u16 = 1;
    pub(in super::super) const OFFSET_HOLE: u16 = 2;
    pub(in super::super) const BLOCK_STATUS: u16 = 5;
    pub(in super::super) const BLOCK_STATUS_EXTENDED: u16 = 6;
    pub(in super::super) const ERROR: u16 = (1 << 15) + 1;
}

/// "`base:allocation` metadata context": not allocated.
pub(super) const STATE_HOLE: u32 = 1 << 0;
/// "`base:allocation` metadata context": reads as zeroes.
pub(super) const STATE_ZERO: u32 = 1 << 1;
/// QEMU `docs/interop/nbd.rst`, `qemu:dirty-bitmap`: changed.
pub(super) const STATE_DIRTY: u32 = 1 << 0;

/// "Error values": what may stand in a reply, whatever the host calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum NbdError {
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    NotSup = 95,
    Shutdown = 108,
}

impl NbdError {
    /// The value for a host's error code: "the server SHOULD map `EDQUOT` and `EFBIG` to `NBD_ENOSPC`"; read-only is
    /// a matter of permission; what the protocol has no word for is an I/O error.
    pub(super) fn from_errno(errno: i32) -> Self {
        match errno {
            libc::EPERM | libc::EACCES | libc::EROFS => Self::Perm,
            libc::ENOMEM => Self::NoMem,
            libc::EINVAL => Self::Inval,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::NoSpc,
            libc::EOPNOTSUPP => Self::NotSup,
            libc::ESHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }

    pub(super) fn code(self) -> u32 {
        self as u32
    }
}

/// "Newstyle negotiation": what the server says first.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Greeting {
    pub server_magic: U64<BE>,
    pub option_magic: U64<BE>,
    pub flags: U16<BE>,
}

/// "Newstyle negotiation": the head of an option.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawOption {
    pub magic: U64<BE>,
    pub option: U32<BE>,
    pub data_bytes: U32<BE>,
}

/// "Fixed newstyle negotiation": the head of a reply to an option.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawOptionReply {
    pub magic: U64<BE>,
    pub option: U32<BE>,
    pub reply_type: U32<BE>,
    pub data_bytes: U32<BE>,
}

/// "Request message".
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawRequest {
    pub magic: U32<BE>,
    pub flags: U16<BE>,
    pub kind: U16<BE>,
    pub cookie: U64<BE>,
    pub offset: U64<BE>,
    pub len_bytes: U32<BE>,
}

/// "Extended request message".
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawExtendedRequest {
    pub magic: U32<BE>,
    pub flags: U16<BE>,
    pub kind: U16<BE>,
    pub cookie: U64<BE>,
    pub offset: U64<BE>,
    pub len_bytes: U64<BE>,
}

/// "Simple reply message".
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawSimpleReply {
    pub magic: U32<BE>,
    pub error: U32<BE>,
    pub cookie: U64<BE>,
}

/// "Structured reply chunk message".
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawStructuredReply {
    pub magic: U32<BE>,
    pub flags: U16<BE>,
    pub kind: U16<BE>,
    pub cookie: U64<BE>,
    pub payload_bytes: U32<BE>,
}

/// "Extended reply chunk message".
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawExtendedReply {
    pub magic: U32<BE>,
    pub flags: U16<BE>,
    pub kind: U16<BE>,
    pub cookie: U64<BE>,
    pub offset: U64<BE>,
    pub payload_bytes: U64<BE>,
}

const _: () = assert!(size_of::<Greeting>() == 18);
const _: () = assert!(size_of::<RawOption>() == 16);
const _: () = assert!(size_of::<RawOptionReply>() == 20);
const _: () = assert!(size_of::<RawRequest>() == 28);
const _: () = assert!(size_of::<RawExtendedRequest>() == 32);
const _: () = assert!(size_of::<RawSimpleReply>() == 16);
const _: () = assert!(size_of::<RawStructuredReply>() == 20);
const _: () = assert!(size_of::<RawExtendedReply>() == 32);

/// "Conventions": no string is longer.
pub(super) const MAX_STRING_BYTES: usize = 4096;
/// "Block size constraints": the payload that is never taken for an attack, and what we take at most in one
/// READ or WRITE; the reference has the same limit.
pub(super) const MAX_PAYLOAD_BYTES: u32 = 32 << 20;

/// The part of a message that a string of the protocol can hold.
pub(super) fn cut(text: &str) -> &[u8] {
    let end = (0..=text.len().min(MAX_STRING_BYTES)).rev().find(|end| text.is_char_boundary(*end));
    &text.as_bytes()[..end.expect("0 is a boundary")]
}
