//! Entries of L1 and L2 tables, and long stretches of them read from the file.

use crate::{Result, storage::Storage};

/// Bytes of an entry.
pub(super) const ENTRY_BYTES: u64 = 8;
/// Tables have up to 1 GiB; this much of one is in memory at a time.
pub(super) const PIECE_BYTES: u64 = 1 << 20;

/// What an entry of an L2 table says ("Data cluster offsets").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Not here: ask the backing file.
    Unallocated,
    /// All zeroes, no cluster behind it.
    Zero,
    /// The bytes stand at this host offset, which has not been checked.
    Data(u64),
}

impl Cluster {
    /// The entry that says "zero".
    const ZERO: u64 = 1;

    pub(super) fn from_entry(entry: u64) -> Self {
        match entry {
            0 => Self::Unallocated,
            Self::ZERO => Self::Zero,
            at => Self::Data(at),
        }
    }

    pub(super) fn entry(self) -> u64 {
        match self {
            Self::Unallocated => 0,
            Self::Zero => Self::ZERO,
            Self::Data(at) => at,
        }
    }

    /// What continues it in the next entry of a run.
    pub(super) fn next(self, cluster_bytes: u64) -> Self {
        match self {
            Self::Data(at) => Self::Data(at.wrapping_add(cluster_bytes)),
            same => same,
        }
    }
}

/// The entry at `within` bytes into a piece of a table.
pub(super) fn entry_at(bytes: &[u8], within: usize) -> u64 {
    u64::from_le_bytes(bytes[within..within + 8].try_into().expect("eight bytes"))
}

/// The entries in a piece of a table.
pub(super) fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word))
}

/// Reads the table of `len_bytes` at `at` piece by piece and calls `piece` with the index of its first entry
/// and its bytes, which may be changed: true writes them back. Where the host has a hole nothing is read: a
/// table of zeroes costs nothing, however long it claims to be.
///
/// # Errors
/// Of the storage, and of `piece`.
pub(super) fn for_each_piece(
    storage: &dyn Storage,
    at: u64,
    len_bytes: u64,
    mut piece: impl FnMut(u64, &mut [u8]) -> Result<bool>,
) -> Result<()> {
    let end = at + len_bytes; // inside the file
    let mut bytes = Vec::new();
    let mut from = at;
    while from < end {
        let Some(allocated) = storage.next_allocated(from)? else { break };
        let start = (allocated.start & !(ENTRY_BYTES - 1)).max(from);
        if start >= end {
            break;
        }
        let until = allocated.end.next_multiple_of(ENTRY_BYTES).min(end).min(start + PIECE_BYTES);
        bytes.resize(usize::try_from(until - start).expect("a piece"), 0);
        storage.read_at(&mut bytes, start)?;
        if piece((start - at) / ENTRY_BYTES, &mut bytes)? {
            storage.write_at(&bytes, start)?;
        }
        from = until;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn pieces_cover_all_but_holes_and_can_be_changed() {
        let storage = MemoryStorage::new("table");
        storage.resize(1 << 40, crate::storage::Preallocation::Off).expect("resized");
        let table = 1 << 20;
        for entry in [0_u64, 511, 512, 200_000, (1 << 30) / 8 - 1] {
            storage.write_at(&(entry + 7).to_le_bytes(), table + entry * 8).expect("written");
        }
        let mut found = Vec::new();
        for_each_piece(&storage, table, 1 << 30, |first, bytes| {
            let present: Vec<u64> = (first..)
                .zip(entries(bytes))
                .filter(|(_, entry)| *entry != 0)
                .map(|(index, entry)| {
                    assert_eq!(entry, index + 7);
                    index
                })
                .collect();
            let changes = present.contains(&512);
            if changes {
                let within = usize::try_from(512 - first).expect("in the piece") * 8;
                bytes[within..within + 8].fill(0);
            }
            found.extend(present);
            Ok(changes)
        })
        .expect("readable");
        assert_eq!(found, [0, 511, 512, 200_000, (1 << 30) / 8 - 1]);
        let mut word = [1; 8];
        storage.read_at(&mut word, table + 512 * 8).expect("readable");
        assert_eq!(word, [0; 8]);
    }
}
