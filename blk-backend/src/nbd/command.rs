//! Requests of the transmission phase: bytes → checked [`Command`].
//!
//! What a header may say depends on what was negotiated. A violation after which the stream cannot be followed any
//! more is an error and ends the connection; everything else becomes a command or a refusal that is answered.

use zerocopy::FromBytes;

use super::wire::{
    EXTENDED_REQUEST_MAGIC, MAX_PAYLOAD_BYTES, NbdError, REQUEST_MAGIC, RawExtendedRequest, RawRequest,
    command, command_flag as flag,
};

/// How requests and replies are framed: each includes what the one before can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Framing {
    /// Simple replies alone.
    Simple,
    /// Structured replies (`NBD_OPT_STRUCTURED_REPLY`).
    Structured,
    /// 64-bit lengths both ways (`NBD_OPT_EXTENDED_HEADERS`).
    Extended,
}

impl Framing {
    /// Length of a request's header.
    pub(super) fn request_header_bytes(self) -> usize {
        match self {
            Self::Simple | Self::Structured => size_of::<RawRequest>(),
            Self::Extended => size_of::<RawExtendedRequest>(),
        }
    }
}

/// A header as it stood in the stream, its magic number checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u16,
    pub(super) kind: u16,
    /// The client's name for the request, given back in each reply.
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
}

/// What a client asks for. Ranges of `Read`, `Write`, `Trim`, `WriteZeroes`, `Cache` and `BlockStatus` lie inside the
/// disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read {
        dont_fragment: bool,
    },
    Write {
        fua: bool,
    },
    Disconnect,
    Flush,
    Trim {
        fua: bool,
    },
    Cache,
    WriteZeroes {
        fua: bool,
        may_unmap: bool,
        fast_only: bool,
    },
    /// With `filtered`, the effect length and the contexts come as the payload.
    BlockStatus {
        one: bool,
        filtered: bool,
    },
}

/// What follows a header in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checked {
    /// What is to be done, or why it is refused once the payload was passed over.
    pub(super) operation: Result<Operation, Refusal>,
    /// Bytes of the stream that belong to the request.
    pub(super) payload_bytes: u32,
}

/// An answer in place of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) error: NbdError,
    /// For the person behind the client.
    pub(super) why: &'static str,
}

const fn refusal(error: NbdError, why: &'static str) -> Refusal {
    Refusal { error, why }
}

/// Why a stream cannot be followed further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("request magic {found:#010x} where {expected:#010x} must stand")]
    Magic { expected: u32, found: u32 },
    #[error("a request with {0} bytes of payload")]
    Payload(u64),
}

/// What a request is checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) framing: Framing,
    pub(super) disk_bytes: u64,
    pub(super) read_only: bool,
    /// Metadata contexts that the client selected.
    pub(super) contexts: usize,
}

impl Header {
    /// Reads a header off the front of `bytes`, which hold at least [`Framing::request_header_bytes`].
    pub(super) fn parse(bytes: &[u8], framing: Framing) -> Result<Self, Violation> {
        let (expected, found, header) = if framing == Framing::Extended {
            let (raw, _) = RawExtendedRequest::ref_from_prefix(bytes).expect("the caller has a whole header");
            let header = Self {
                flags: raw.flags.get(),
                kind: raw.kind.get(),
                cookie: raw.cookie.get(),
                offset: raw.offset.get(),
                len_bytes: raw.len_bytes.get(),
            };
            (EXTENDED_REQUEST_MAGIC, raw.magic.get(), header)
        } else {
            let (raw, _) = RawRequest::ref_from_prefix(bytes).expect("the caller has a whole header");
            let header = Self {
                flags: raw.flags.get(),
                kind: raw.kind.get(),
                cookie: raw.cookie.get(),
                offset: raw.offset.get(),
                len_bytes: u64::from(raw.len_bytes.get()),
            };
            (REQUEST_MAGIC, raw.magic.get(), header)
        };
        if expected == found { Ok(header) } else { Err(Violation::Magic { expected, found }) }
    }

    /// Whether the length field counts bytes that follow in the stream, not bytes of the disk.
    fn has_payload(&self, framing: Framing) -> bool {
        self.kind == command::WRITE
            || (framing == Framing::Extended && self.flags & flag::PAYLOAD_LENGTH != 0)
    }

    /// Decides what the request is.
    ///
    /// # Errors
    /// [`Violation::Payload`] when more bytes follow than anybody may want to send in one request.
    pub(super) fn check(&self, limits: &Limits) -> Result<Checked, Violation> {
        let payload_bytes = if self.has_payload(limits.framing) {
            // Too much is passed over and refused; what no 32-bit header could say is an attack.
            u32::try_from(self.len_bytes).map_err(|_| Violation::Payload(self.len_bytes))?
        } else {
            0
        };
        Ok(Checked { operation: self.operation(limits), payload_bytes })
    }

    fn operation(&self, limits: &Limits) -> Result<Operation, Refusal> {
        let fua = self.flags & flag::FUA != 0;
        let (allowed, operation) = match self.kind {
            command::READ => {
                let dont_fragment = self.flags & flag::DONT_FRAGMENT != 0;
                let allowed = if limits.framing >= Framing::Structured { flag::DONT_FRAGMENT } else { 0 };
                (allowed, Operation::Read { dont_fragment })
            }
            command::WRITE => (flag::PAYLOAD_LENGTH, Operation::Write { fua }),
            command::DISCONNECT => (0, Operation::Disconnect),
            command::FLUSH => (0, Operation::Flush),
            command::TRIM => (0, Operation::Trim { fua }),
            command::CACHE => (0, Operation::Cache),
            command::WRITE_ZEROES => (
                flag::NO_HOLE | flag::FAST_ZERO,
                Operation::WriteZeroes {
                    fua,
                    may_unmap: self.flags & flag::NO_HOLE == 0,
                    fast_only: self.flags & flag::FAST_ZERO != 0,
                },
            ),
            command::BLOCK_STATUS => {
                let (one, filtered) =
                    (self.flags & flag::REQ_ONE != 0, self.flags & flag::PAYLOAD_LENGTH != 0);
                (flag::REQ_ONE | flag::PAYLOAD_LENGTH, Operation::BlockStatus { one, filtered })
            }
            _ => return Err(refusal(NbdError::Inval, "unknown command")),
        };
        // Clients are known to set FUA everywhere ("Command flags"). The payload flag means something only in
        // extended headers.
        let allowed = match limits.framing {
            Framing::Extended => allowed | flag::FUA,
            Framing::Simple | Framing::Structured => (allowed | flag::FUA) & !flag::PAYLOAD_LENGTH,
        };
        if self.flags & !allowed != 0 {
            return Err(refusal(NbdError::Inval, "a command flag that this command does not have"));
        }
        self.check_range(operation, limits)?;
        Ok(operation)
    }

    fn check_range(&self, operation: Operation, limits: &Limits) -> Result<(), Refusal> {
        let inside = self.is_inside(limits.disk_bytes);
        let beyond = |error| refusal(error, "the range is not inside the disk");
        let writes = matches!(
            operation,
            Operation::Write { .. } | Operation::Trim { .. } | Operation::WriteZeroes { .. }
        );
        if writes && limits.read_only {
            return Err(refusal(NbdError::Perm, "the export is read-only"));
        }
        match operation {
            Operation::Disconnect => Ok(()),
            Operation::Flush if self.offset == 0 && self.len_bytes == 0 => Ok(()),
            Operation::Flush => Err(refusal(NbdError::Inval, "a flush has no range")),
            Operation::Read { .. } | Operation::Write { .. } | Operation::Cache
                if self.len_bytes > u64::from(MAX_PAYLOAD_BYTES) =>
            {
                Err(refusal(NbdError::Inval, "longer than the maximum block size"))
            }
            Operation::Write { .. } | Operation::WriteZeroes { .. } if !inside => {
                Err(beyond(NbdError::NoSpc))
            }
            Operation::Read { .. } | Operation::Trim { .. } | Operation::Cache if !inside => {
                Err(beyond(NbdError::Inval))
            }
            Operation::BlockStatus { .. } if limits.contexts == 0 => {
                Err(refusal(NbdError::Inval, "no metadata context was selected"))
            }
            // The range comes with the payload and is checked with it.
            Operation::BlockStatus { filtered: true, .. } => self.check_status_payload(limits),
            Operation::BlockStatus { .. } if self.len_bytes == 0 => {
                Err(refusal(NbdError::Inval, "block status of no bytes"))
            }
            Operation::BlockStatus { .. } if !inside => Err(beyond(NbdError::Inval)),
            _ => Ok(()),
        }
    }

    /// "`NBD_CMD_BLOCK_STATUS`": a 64-bit effect length, then up to as many 32-bit ids as contexts were selected.
    fn check_status_payload(&self, limits: &Limits) -> Result<(), Refusal> {
        let most = 8 + 4 * limits.contexts as u64;
        if (8..=most).contains(&self.len_bytes) && self.len_bytes.is_multiple_of(4) {
            return Ok(());
        }
        Err(refusal(NbdError::Inval, "a block status payload of the wrong length"))
    }

    fn is_inside(&self, disk_bytes: u64) -> bool {
        self.offset.checked_add(self.len_bytes).is_some_and(|end| end <= disk_bytes)
    }
}

/// The filter of a block status request: its effect length, checked, and the selected ids.
pub(super) fn parse_status_filter(
    payload: &[u8],
    offset: u64,
    limits: &Limits,
) -> Result<(u64, Vec<u32>), Refusal> {
    let (len_bytes, ids) = payload.split_first_chunk().expect("at least eight bytes were let through");
    let len_bytes = u64::from_be_bytes(*len_bytes);
    let ids: Vec<u32> = ids.as_chunks().0.iter().map(|id| u32::from_be_bytes(*id)).collect();
    let mut sorted = ids.clone();
    sorted.sort_unstable();
    if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(refusal(NbdError::Inval, "a metadata context is named twice"));
    }
    if len_bytes == 0 {
        return Err(refusal(NbdError::Inval, "block status of no bytes"));
    }
    if offset.checked_add(len_bytes).is_none_or(|end| end > limits.disk_bytes) {
        return Err(refusal(NbdError::Inval, "the range is not inside the disk"));
    }
    Ok((len_bytes, ids))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    const LIMITS: Limits =
        Limits { framing: Framing::Structured, disk_bytes: 1 << 20, read_only: false, contexts: 1 };

    fn header(kind: u16, flags: u16, offset: u64, len_bytes: u64) -> Header {
        Header { flags, kind, cookie: 7, offset, len_bytes }
    }

    #[track_caller]
    fn refused(header: Header, limits: &Limits) -> NbdError {
        header.check(limits).expect("followable").operation.expect_err("refused").error
    }

    #[test]
    fn a_header_is_its_bytes() {
        let raw = RawRequest {
            magic: REQUEST_MAGIC.into(),
            flags: 1.into(),
            kind: 6.into(),
            cookie: 0x0102_0304_0506_0708.into(),
            offset: 512.into(),
            len_bytes: 1024.into(),
        };
        let parsed = Header::parse(raw.as_bytes(), Framing::Structured).unwrap();
        assert_eq!(parsed, Header { cookie: 0x0102_0304_0506_0708, ..header(6, 1, 512, 1024) });
        let mut extended = vec![0; 32];
        extended[..28].copy_from_slice(raw.as_bytes());
        let error = Header::parse(&extended, Framing::Extended).unwrap_err();
        assert_eq!(error, Violation::Magic { expected: EXTENDED_REQUEST_MAGIC, found: REQUEST_MAGIC });
    }

    /// "Error values" and the request types name which error is due.
    #[test]
    fn requests_outside_the_disk_get_the_error_of_their_kind() {
        for (kind, error) in [
            (command::READ, NbdError::Inval),
            (command::WRITE, NbdError::NoSpc),
            (command::TRIM, NbdError::Inval),
            (command::WRITE_ZEROES, NbdError::NoSpc),
            (command::CACHE, NbdError::Inval),
            (command::BLOCK_STATUS, NbdError::Inval),
        ] {
            assert_eq!(refused(header(kind, 0, (1 << 20) - 1, 2), &LIMITS), error, "{kind}");
            assert_eq!(refused(header(kind, 0, u64::MAX, 2), &LIMITS), error, "{kind}");
            header(kind, 0, (1 << 20) - 1, 1).check(&LIMITS).unwrap().operation.unwrap();
        }
        assert_eq!(refused(header(command::FLUSH, 0, 1, 0), &LIMITS), NbdError::Inval);
        assert_eq!(refused(header(77, 0, 0, 0), &LIMITS), NbdError::Inval);
    }

    #[test]
    fn read_only_exports_refuse_what_writes() {
        let limits = Limits { read_only: true, ..LIMITS };
        for kind in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(refused(header(kind, 0, 0, 512), &limits), NbdError::Perm, "{kind}");
        }
        assert!(header(command::FLUSH, 0, 0, 0).check(&limits).unwrap().operation.is_ok());
    }

    #[test]
    fn flags_belong_to_their_commands_and_to_what_was_negotiated() {
        let extended = Limits { framing: Framing::Extended, ..LIMITS };
        let simple = Limits { framing: Framing::Simple, ..LIMITS };
        assert_eq!(refused(header(command::READ, flag::DONT_FRAGMENT, 0, 1), &simple), NbdError::Inval);
        assert_eq!(refused(header(command::READ, flag::NO_HOLE, 0, 1), &LIMITS), NbdError::Inval);
        assert_eq!(refused(header(command::WRITE, flag::FAST_ZERO, 0, 1), &LIMITS), NbdError::Inval);
        assert_eq!(refused(header(command::WRITE, flag::PAYLOAD_LENGTH, 0, 1), &LIMITS), NbdError::Inval);
        assert!(
            header(command::WRITE, flag::PAYLOAD_LENGTH, 0, 1).check(&extended).unwrap().operation.is_ok()
        );
        assert!(header(command::READ, flag::FUA, 0, 1).check(&LIMITS).unwrap().operation.is_ok());
        assert_eq!(refused(header(command::BLOCK_STATUS, 0, 0, 0), &LIMITS), NbdError::Inval);
        let none = Limits { contexts: 0, ..LIMITS };
        assert_eq!(refused(header(command::BLOCK_STATUS, 0, 0, 1), &none), NbdError::Inval);
    }

    /// A payload is passed over even where the request is refused, or the stream is lost.
    #[test]
    fn a_refused_request_still_names_its_payload() {
        let extended = Limits { framing: Framing::Extended, ..LIMITS };
        let unasked = header(command::READ, flag::PAYLOAD_LENGTH, 0, 99).check(&extended).unwrap();
        assert_eq!((unasked.payload_bytes, unasked.operation.is_err()), (99, true));
        let too_long = header(command::WRITE, 0, 0, u64::from(MAX_PAYLOAD_BYTES) + 1).check(&LIMITS).unwrap();
        assert_eq!((too_long.payload_bytes, too_long.operation.is_err()), (MAX_PAYLOAD_BYTES + 1, true));
        let attack = header(command::WRITE, flag::PAYLOAD_LENGTH, 0, 1 << 32).check(&extended);
        assert_eq!(attack, Err(Violation::Payload(1 << 32)));
    }

    #[test]
    fn a_status_filter_is_checked_as_a_whole() {
        let extended = Limits { framing: Framing::Extended, contexts: 2, ..LIMITS };
        let with = |len: u64, ids: &[u32]| -> Vec<u8> {
            len.to_be_bytes().into_iter().chain(ids.iter().flat_map(|id| id.to_be_bytes())).collect()
        };
        assert_eq!(parse_status_filter(&with(512, &[1]), 0, &extended), Ok((512, vec![1])));
        assert!(parse_status_filter(&with(0, &[1]), 0, &extended).is_err());
        assert!(parse_status_filter(&with(512, &[1, 1]), 0, &extended).is_err());
        assert!(parse_status_filter(&with(u64::MAX, &[]), 512, &extended).is_err());
        let payload =
            |len| header(command::BLOCK_STATUS, flag::PAYLOAD_LENGTH, 0, len).check(&extended).unwrap();
        for (len, good) in [(7, false), (8, true), (12, true), (14, false), (16, true), (20, false)] {
            assert_eq!(payload(len).operation.is_ok(), good, "{len}");
            assert_eq!(u64::from(payload(len).payload_bytes), len);
        }
    }

    proptest! {
        /// What is let through lies inside the disk and inside the limits, whatever the header says.
        #[test]
        fn nothing_outside_gets_through(
            kind in 0_u16..10, flags: u16, offset: u64, len_bytes: u64, extended: bool, read_only: bool,
        ) {
            let framing = if extended { Framing::Extended } else { Framing::Structured };
            let limits = Limits { framing, read_only, ..LIMITS };
            let header = header(kind, flags, offset, len_bytes);
            let Ok(Checked { operation: Ok(operation), .. }) = header.check(&limits) else { return Ok(()) };
            match operation {
                Operation::Read { .. } | Operation::Write { .. } | Operation::Cache => {
                    prop_assert!(len_bytes <= u64::from(MAX_PAYLOAD_BYTES));
                }
                Operation::Disconnect | Operation::BlockStatus { filtered: true, .. } => return Ok(()),
                _ => {}
            }
            prop_assert!(offset.checked_add(len_bytes).unwrap() <= limits.disk_bytes);
        }
    }
}
