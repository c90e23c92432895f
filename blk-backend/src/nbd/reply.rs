//! Replies of the transmission phase: heads of simple replies and of structured and extended chunks, as bytes.
//!
//! A head is appended to a buffer that many replies of one send share; a payload that lives elsewhere follows it in
//! the stream.

use zerocopy::IntoBytes;

use super::{
    command::Framing,
    wire::{
        self, EXTENDED_REPLY_MAGIC, NbdError, REPLY_FLAG_DONE, RawExtendedReply, RawSimpleReply,
        RawStructuredReply, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
    },
};

/// Whom a reply answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addressee {
    pub(super) framing: Framing,
    pub(super) cookie: u64,
    /// The request's offset: extended replies repeat it.
    pub(super) offset: u64,
}

/// A run of status in a block status reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) len_bytes: u64,
    pub(super) flags: u32,
}

impl Addressee {
    /// A head of a chunk with `payload_bytes` behind it.
    fn chunk(self, out: &mut Vec<u8>, kind: u16, done: bool, payload_bytes: usize) {
        let flags = if done { REPLY_FLAG_DONE } else { 0 };
        if self.framing == Framing::Extended {
            let head = RawExtendedReply {
                magic: EXTENDED_REPLY_MAGIC.into(),
                flags: flags.into(),
                kind: kind.into(),
                cookie: self.cookie.into(),
                offset: self.offset.into(),
                payload_bytes: (payload_bytes as u64).into(),
            };
            out.extend_from_slice(head.as_bytes());
        } else {
            let payload_bytes = u32::try_from(payload_bytes).expect("at most a payload and its offset");
            let head = RawStructuredReply {
                magic: STRUCTURED_REPLY_MAGIC.into(),
                flags: flags.into(),
                kind: kind.into(),
                cookie: self.cookie.into(),
                payload_bytes: payload_bytes.into(),
            };
            out.extend_from_slice(head.as_bytes());
        }
    }

    fn simple(self, out: &mut Vec<u8>, error: u32) {
        let head = RawSimpleReply {
            magic: SIMPLE_REPLY_MAGIC.into(),
            error: error.into(),
            cookie: self.cookie.into(),
        };
        out.extend_from_slice(head.as_bytes());
    }

    /// The request succeeded and there is nothing (more) to say. Smallest form that the framing allows: structured
    /// connections may be answered simply where there is no payload ("Structured reply chunk message"), but commands
    /// that are answered `in_chunks` may not, nor anything under extended headers.
    pub(super) fn success(self, out: &mut Vec<u8>, in_chunks: bool) {
        match self.framing {
            Framing::Structured if in_chunks => self.chunk(out, chunk::NONE, true, 0),
            Framing::Extended => self.chunk(out, chunk::NONE, true, 0),
            Framing::Simple | Framing::Structured => self.simple(out, 0),
        }
    }

    /// The request failed; `why` is for the person behind the client, where the framing can carry it.
    pub(super) fn failure(self, out: &mut Vec<u8>, error: NbdError, why: &str) {
        if self.framing == Framing::Simple {
            return self.simple(out, error.code());
        }
        let why = wire::cut(why);
        self.chunk(out, chunk::ERROR, true, 6 + why.len());
        out.extend_from_slice(&error.code().to_be_bytes());
        let len = u16::try_from(why.len()).expect("at most 4096");
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(why);
    }

    /// `len_bytes` of the disk from `at` on follow in the stream. Under simple framing it is the whole request.
    pub(super) fn data(self, out: &mut Vec<u8>, at: u64, len_bytes: usize, done: bool) {
        if self.framing == Framing::Simple {
            return self.simple(out, 0);
        }
        self.chunk(out, chunk::OFFSET_DATA, done, 8 + len_bytes);
        out.extend_from_slice(&at.to_be_bytes());
    }

    /// The whole request, `len_bytes` from its offset on, reads as zeroes. Not for simple framing.
    pub(super) fn hole(self, out: &mut Vec<u8>, len_bytes: u32) {
        self.chunk(out, chunk::OFFSET_HOLE, true, 12);
        out.extend_from_slice(&self.offset.to_be_bytes());
        out.extend_from_slice(&len_bytes.to_be_bytes());
    }

    /// The status in one metadata context. `descriptors` is not empty; under structured framing no run is 4 GiB.
    pub(super) fn status(self, out: &mut Vec<u8>, context: u32, descriptors: &[Descriptor], done: bool) {
        if self.framing == Framing::Extended {
            self.chunk(out, chunk::BLOCK_STATUS_EXTENDED, done, 8 + 16 * descriptors.len());
            out.extend_from_slice(&context.to_be_bytes());
            let count = u32::try_from(descriptors.len()).expect("bounded by the status walk");
            out.extend_from_slice(&count.to_be_bytes());
            for Descriptor { len_bytes, flags } in descriptors {
                out.extend_from_slice(&len_bytes.to_be_bytes());
                out.extend_from_slice(&u64::from(*flags).to_be_bytes());
            }
        } else {
            self.chunk(out, chunk::BLOCK_STATUS, done, 4 + 8 * descriptors.len());
            out.extend_from_slice(&context.to_be_bytes());
            for Descriptor { len_bytes, flags } in descriptors {
                let len = u32::try_from(*len_bytes).expect("bounded by a request of 32-bit length");
                out.extend_from_slice(&len.to_be_bytes());
                out.extend_from_slice(&flags.to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(framing: Framing, make: impl FnOnce(Addressee, &mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        make(Addressee { framing, cookie: 0x1122, offset: 0x200 }, &mut out);
        out
    }

    #[test]
    fn each_framing_has_its_own_success() {
        let simple = made(Framing::Simple, |to, out| to.success(out, true));
        assert_eq!(
            simple,
            [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &[0; 4], &[0, 0, 0, 0, 0, 0, 0x11, 0x22]].concat()
        );
        assert_eq!(made(Framing::Structured, |to, out| to.success(out, false)), simple);
        let none = made(Framing::Structured, |to, out| to.success(out, true));
        assert_eq!(none[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0]);
        assert_eq!(none.len(), 20);
        let extended = made(Framing::Extended, |to, out| to.success(out, false));
        assert_eq!(extended[..8], [0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 0]);
        assert_eq!(extended[16..24], 0x200_u64.to_be_bytes());
        assert_eq!(extended.len(), 32);
    }

    /// "`NBD_REPLY_TYPE_ERROR`": a message is at most 4096 bytes long.
    #[test]
    fn a_failure_says_why_where_it_can() {
        let error = made(Framing::Structured, |to, out| to.failure(out, NbdError::NoSpc, "full"));
        assert_eq!(error[16..20], 10_u32.to_be_bytes());
        assert_eq!(error[20..], [0, 0, 0, 28, 0, 4, b'f', b'u', b'l', b'l']);
        let long = made(Framing::Structured, |to, out| to.failure(out, NbdError::Io, &"é".repeat(4000)));
        assert_eq!(long.len(), 20 + 6 + 4096);
        assert_eq!(made(Framing::Simple, |to, out| to.failure(out, NbdError::Io, "x")).len(), 16);
    }

    #[test]
    fn status_lengths_are_as_wide_as_the_framing() {
        let runs = [Descriptor { len_bytes: 512, flags: 3 }];
        let structured = made(Framing::Structured, |to, out| to.status(out, 1, &runs, true));
        assert_eq!(structured[20..], [0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 3]);
        let extended = made(Framing::Extended, |to, out| to.status(out, 1, &runs, true));
        assert_eq!(extended[32..40], [0, 0, 0, 1, 0, 0, 0, 1]);
        assert_eq!(extended.len(), 32 + 8 + 16);
    }
}
