//! All regions of an image in the order of the audit, down to the L2 tables.

use super::{
    super::{
        entry::{L1Entry, OFFSET_MASK},
        header::MAX_L1_BYTES,
    },
    Image, bitmaps,
    counters::index,
    fault::Fault,
};
use crate::Result;

/// L1 entries of all tables together that are followed. Snapshots may claim 65536 tables of 32 MiB each in
/// a small file; 2^30 entries (8 GiB of tables) are more than any image in use has.
const L1_ENTRIES_MAX: u64 = 1 << 30;
/// L1 tables are read in pieces of this size.
const PIECE_BYTES: u64 = 256 << 10;

/// Takes what the walk meets.
pub(super) trait Walker {
    /// Host bytes are referenced.
    fn region(&mut self, offset: u64, bytes: u64);
    /// Something is wrong.
    fn fault(&mut self, fault: Fault);
    /// A table is where no file can be; the walk ends.
    fn unreadable(&mut self, what: &'static str);
    /// An L1 entry names an L2 table.
    fn table(&mut self, offset: u64, is_active: bool) -> Result<()>;
}

/// Meets everything but the refcount blocks, in the reference's order.
pub(super) fn walk(image: &Image<'_>, walker: &mut impl Walker) -> Result<()> {
    let subject = &image.subject;
    let header = image.header;
    let mut budget = L1_ENTRIES_MAX;
    walker.region(0, subject.geometry.cluster_bytes());
    let active = L1 { offset: header.l1_offset, entries: u64::from(header.l1_entries), is_active: true };
    active.walk(image, &mut budget, walker)?;
    if subject.geometry.external_data && !image.snapshots.list.is_empty() {
        walker.fault(Fault::ExternalSnapshots { count: image.snapshots.list.len() });
    }
    for snapshot in &image.snapshots.list {
        let (id, name) = (snapshot.id_text(), snapshot.name_text());
        if subject.geometry.in_cluster(snapshot.l1_offset) != 0 {
            walker.fault(Fault::SnapshotUnaligned { id, name, offset: snapshot.l1_offset });
        } else if u64::from(snapshot.l1_entries) > MAX_L1_BYTES / 8 {
            walker.fault(Fault::SnapshotTooLarge { id, name, entries: snapshot.l1_entries });
        } else {
            let entries = u64::from(snapshot.l1_entries);
            L1 { offset: snapshot.l1_offset, entries, is_active: false }.walk(image, &mut budget, walker)?;
        }
    }
    walker.region(image.snapshots.offset, image.snapshots.table_bytes);
    walker.region(image.blocks.table_offset, image.blocks.entries.len() as u64 * 8);
    if let Some(encryption) = header.encryption {
        walker.region(encryption.offset, encryption.length_bytes);
    }
    bitmaps::walk(image, walker)
}

/// Offset and entries of the L1 tables that are followed.
pub(super) fn followed_tables(image: &Image<'_>) -> Vec<(u64, u64)> {
    let is_followed = |(offset, entries): &(u64, u64)| {
        image.subject.geometry.in_cluster(*offset) == 0
            && *entries <= MAX_L1_BYTES / 8
            && *offset <= i64::MAX.unsigned_abs() - entries * 8
    };
    let active = (image.header.l1_offset, u64::from(image.header.l1_entries));
    let snapshots = image.snapshots.list.iter();
    let inactive = snapshots.map(|snapshot| (snapshot.l1_offset, u64::from(snapshot.l1_entries)));
    std::iter::once(active).chain(inactive).filter(is_followed).collect()
}

/// An L1 table.
#[derive(Clone, Copy)]
struct L1 {
    offset: u64,
    entries: u64,
    is_active: bool,
}

impl L1 {
    fn walk(self, image: &Image<'_>, budget: &mut u64, walker: &mut impl Walker) -> Result<()> {
        let subject = &image.subject;
        if self.entries == 0 {
            return Ok(());
        }
        *budget = budget.checked_sub(self.entries).ok_or_else(|| subject.failure(rustix::io::Errno::FBIG))?;
        walker.region(self.offset, self.entries * 8);
        if self.offset > i64::MAX.unsigned_abs() - self.entries * 8 {
            walker.unreadable("ERROR: I/O error in check_refcounts_l1");
            return Err(subject.failure(rustix::io::Errno::IO));
        }
        for_each_word(image, self.offset, self.entries, |_, word| {
            if word == 0 {
                return Ok(());
            }
            if L1Entry(word).reserved() != 0 {
                walker.fault(Fault::L1Reserved { word });
            }
            let table = word & OFFSET_MASK;
            walker.region(table, subject.geometry.cluster_bytes());
            if subject.geometry.in_cluster(table) != 0 {
                walker.fault(Fault::TableUnaligned { offset: table });
            }
            walker.table(table, self.is_active)
        })
    }
}

/// Reads a table of big-endian words piece by piece.
pub(super) fn for_each_word(
    image: &Image<'_>,
    offset: u64,
    entries: u64,
    mut each: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let mut piece = vec![0; index(PIECE_BYTES.min(entries * 8))];
    let mut done = 0;
    while done < entries {
        let count = (entries - done).min(PIECE_BYTES / 8);
        let bytes = &mut piece[..index(count * 8)];
        image.subject.read(bytes, offset.saturating_add(done * 8))?;
        for (number, word) in bytes.chunks_exact(8).enumerate() {
            each(done + number as u64, u64::from_be_bytes(word.try_into().expect("eight bytes")))?;
        }
        done += count;
    }
    Ok(())
}
