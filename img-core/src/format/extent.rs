//! The extent: the word everything is written in.

use std::fmt;

/// One of the host files of a layer: 0 is the image file itself, others are its external data file or
/// its extents. Resolved by [`Layer::file`](super::Layer::file).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostFile(pub u32);

impl HostFile {
    /// The image file that was opened by name.
    pub const IMAGE: Self = Self(0);
}

/// A byte offset in a host file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Where a run of guest bytes lives. Never empty, never past the end of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How many guest bytes it covers.
    pub len_bytes: u64,
    /// Where they are.
    pub place: Place,
}

/// The four ways a layer can hold guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// As they are, at `at`. `writable` is false where a copy comes first (snapshot, read-only layer).
    Data {
        /// Which file of the layer.
        file: HostFile,
        /// Where the first byte stands.
        at: HostOffset,
        /// Whether the bytes may be overwritten in place.
        writable: bool,
    },
    /// Reads as zeroes; nothing below shows through. Space may be kept behind it.
    Zero {
        /// The preallocated bytes, whose content means nothing.
        reserved: Option<(HostFile, HostOffset)>,
    },
    /// This layer is silent: ask the next one down, zeroes below the last.
    Unallocated,
    /// A stored run that must pass through a decoder to become `decoded_bytes` guest bytes, of which
    /// this extent is the part from `skip_bytes` on.
    Encoded {
        /// Which file of the layer.
        file: HostFile,
        /// Where the stored run begins.
        at: HostOffset,
        /// Upper bound of the stored run's length (qcow2 counts in sectors, so the tail may be foreign
        /// bytes, and may reach past the end of the file).
        stored_bytes: u32,
        /// Length of the whole decoded unit (a cluster, a grain).
        decoded_bytes: u32,
        /// Where in the decoded unit this extent starts.
        skip_bytes: u32,
        /// How to decode.
        how: Codec,
    },
}

/// How stored bytes become guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// A raw deflate stream (RFC 1951), as in qcow2's zlib clusters.
    Deflate,
    /// A zlib stream (RFC 1950).
    Zlib,
    /// A Zstandard frame (RFC 8878).
    Zstd,
}

impl Place {
    /// The place of the byte `by` further on, inside the same extent.
    #[must_use]
    pub fn advanced(self, by: u64) -> Self {
        match self {
            Self::Data { file, at, writable } => Self::Data { file, at: HostOffset(at.0 + by), writable },
            Self::Zero { reserved } => {
                Self::Zero { reserved: reserved.map(|(file, at)| (file, HostOffset(at.0 + by))) }
            }
            Self::Unallocated => Self::Unallocated,
            Self::Encoded { file, at, stored_bytes, decoded_bytes, skip_bytes, how } => Self::Encoded {
                file,
                at,
                stored_bytes,
                decoded_bytes,
                skip_bytes: skip_bytes + u32::try_from(by).expect("inside one decoded unit"),
                how,
            },
        }
    }

    /// Whether `next`, standing directly behind `len_bytes` of `self`, continues it.
    #[must_use]
    pub fn continues(self, len_bytes: u64, next: Self) -> bool {
        match self {
            // Two encoded units never merge, even where their numbers look continuous.
            Self::Encoded { .. } => false,
            _ => self.advanced(len_bytes) == next,
        }
    }
}

impl Extent {
    /// Appends `self` to `extents`, merging it with the last one where it continues it.
    pub fn push_to(self, extents: &mut Vec<Self>) {
        if let Some(last) = extents.last_mut()
            && last.place.continues(last.len_bytes, self.place)
        {
            last.len_bytes += self.len_bytes;
            return;
        }
        extents.push(self);
    }
}
