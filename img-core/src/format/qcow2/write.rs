//! Guest writes: prepare (where the bytes will live), commit (the map points there), abort.

use std::ops::Range;

/// A prepared write that changes the map when it is committed.
#[derive(Clone, Debug)]
pub(super) struct Write {
    /// The guest clusters it covers, in bytes.
    pub(super) clusters: Range<u64>,
    /// Where the first of them will stand.
    pub(super) host: u64,
    pub(super) kind: WriteKind,
}

/// What committing does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteKind {
    /// The clusters move to newly allocated ones. The masks are the subclusters that are written in the
    /// first and in the last cluster.
    Fresh { first: u32, last: u32 },
    /// The clusters stay where they are, and the written subclusters begin to count.
    Reuse { first: u32, last: u32 },
    /// One cluster becomes a compressed one of so many bytes.
    Compressed { stored_bytes: u32 },
}
