//! What a front end asks of a lane, and what it is told.

use std::fmt;

use img_core::Error;
pub use libc::iovec;
pub use rustix::io::Errno;

/// One request of a guest or of a network client.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The asker's name for it, given back in [`Event::Done`](crate::engine::Event::Done). The lane does not look
    /// at it.
    pub tag: u64,
    /// What to do.
    pub op: Op,
    /// First guest byte.
    pub offset: u64,
    /// How many guest bytes. For [`Op::Read`] and [`Op::Write`] this is the length of `segments`; 0 for
    /// [`Op::Flush`].
    pub len_bytes: u64,
    /// Where the bytes go to or come from.
    pub segments: Segments<'a>,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fill the segments.
    Read,
    /// Write the segments.
    Write {
        /// Durable before it is done.
        fua: bool,
    },
    /// Make every write that was done before durable.
    Flush,
    /// The content does not matter any more: give space back where whole clusters are covered.
    Discard {
        /// Durable before it is done.
        fua: bool,
    },
    /// Read as zeroes from now on.
    WriteZeroes {
        /// Whether space may be given back.
        may_unmap: bool,
        /// Rather fail with [`Errno::OPNOTSUPP`], having changed nothing, than write bytes.
        fast_only: bool,
        /// Durable before it is done.
        fua: bool,
    },
    /// Bring the bytes near: they will be read soon.
    Cache,
}

impl Op {
    /// Whether the disk may be different afterwards.
    #[must_use]
    pub fn changes(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard { .. } | Self::WriteZeroes { .. })
    }

    /// Whether it must be durable before it is done.
    #[must_use]
    pub fn is_fua(self) -> bool {
        matches!(
            self,
            Self::Write { fua: true } | Self::Discard { fua: true } | Self::WriteZeroes { fua: true, .. }
        )
    }

    /// Whether bytes go through the segments.
    #[must_use]
    pub fn moves_bytes(self) -> bool {
        matches!(self, Self::Read | Self::Write { .. })
    }
}

/// The memory of a request: runs of bytes of this process, in the order of the guest's bytes.
///
/// It belongs to somebody else, a guest say, who may read and write it at any moment. Nothing here makes a
/// reference to those bytes: the kernel moves them, or they are copied by address.
#[derive(Clone, Copy)]
pub struct Segments<'a>(&'a [iovec]);

impl<'a> Segments<'a> {
    /// No memory.
    pub const NONE: Segments<'static> = Segments(&[]);

    /// The memory that `vectors` name. The list itself is copied when the request is submitted.
    ///
    /// # Safety
    /// From the submission until the lane returned `Done` for the request, was reset or dropped, every byte
    /// named is mapped, readable, and for [`Op::Read`] writable. No Rust reference to it that forbids somebody
    /// else's writes (for a write: a unique one) is used meanwhile.
    #[allow(unsafe_code, reason = "the promise that the rest of the engine stands on")]
    #[must_use]
    pub const unsafe fn new(vectors: &'a [iovec]) -> Self {
        Self(vectors)
    }

    /// The runs.
    #[must_use]
    pub fn vectors(&self) -> &'a [iovec] {
        self.0
    }

    /// Bytes in all; `None` when that is more than a `u64` holds.
    #[must_use]
    pub fn len_bytes(&self) -> Option<u64> {
        self.0.iter().try_fold(0u64, |sum, run| sum.checked_add(u64::try_from(run.iov_len).ok()?))
    }
}

impl fmt::Debug for Segments<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|run| (run.iov_base, run.iov_len))).finish()
    }
}

/// Whether a lane took a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a request that was not taken is never answered"]
pub enum Submitted {
    /// It will be answered by an event, once.
    Taken,
    /// As many requests as the lane holds are under way: submit again after an event.
    Full,
}

/// What a guest is told of an error: a number.
#[must_use]
pub fn errno(error: &Error) -> Errno {
    if let Some(code) = error.raw_os_error() {
        return Errno::from_raw_os_error(code);
    }
    match error {
        Error::ReadOnly { .. } => Errno::ROFS,
        Error::Invalid(_) => Errno::INVAL,
        Error::Unsupported { .. } => Errno::OPNOTSUPP,
        Error::Open { source, .. } | Error::Backing { source, .. } | Error::Job { source, .. } => {
            errno(source)
        }
        _ => Errno::IO,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn errors_become_the_number_at_their_root() {
        let full = Error::io_at(Path::new("disk"), "write", 7, Errno::NOSPC);
        assert_eq!(errno(&full), Errno::NOSPC);
        assert_eq!(errno(&Error::Backing { file: "x".into(), source: Box::new(full) }), Errno::NOSPC);
        assert_eq!(errno(&Error::ReadOnly { file: "x".into() }), Errno::ROFS);
        assert_eq!(errno(&Error::corrupt(Path::new("x"), "L2 entry", 0, "a", "b")), Errno::IO);
    }

    #[test]
    fn lengths_that_overflow_are_none() {
        let run = |length| iovec { iov_base: std::ptr::null_mut(), iov_len: length };
        let runs = [run(usize::MAX), run(1)];
        // SAFETY: nothing is submitted.
        #[allow(unsafe_code)]
        let segments = unsafe { Segments::new(&runs) };
        assert_eq!(segments.len_bytes(), None);
    }
}
