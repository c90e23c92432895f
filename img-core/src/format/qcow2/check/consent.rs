//! Whether a repair may be carried out: what is readable stays as it is, and no more is wrong than before.
//!
//! Most repairs need no second look: where every structure that is rewritten in place has its clusters for
//! itself, and new structures go to free clusters, nothing else can change. Any other repair is
//! [rehearsed](super::rehearsal), and its outcome compared with what there was.

use std::ops::Range;

use super::{
    super::{
        entry::{COPIED, L2Entry, OFFSET_MASK},
        header::Header,
    },
    Image, Mode, Subject, audit,
    blocks::Blocks,
    census::Census,
    count,
    counters::index,
    fault::Teller,
    rehearsal::Rehearsal,
    snapshots,
    table::{Kind, compressed_place, kind, without_place},
    walk::{followed_tables, for_each_word},
};
use crate::{Result, storage::Storage};

/// Whether everything that a repair rewrites in place is referenced as that and as nothing else. The refcount
/// blocks are not looked at: the audit of the refcount table says it of them.
pub(super) fn are_apart(image: &Image<'_>, census: &Census) -> bool {
    let geometry = image.subject.geometry;
    let has_own = |offset: u64, bytes: u64| {
        let end = offset.saturating_add(bytes).div_ceil(geometry.cluster_bytes());
        (offset >> geometry.cluster_bits..end).all(|cluster| census.counters.get(cluster) == 1)
    };
    let header = image.header;
    has_own(0, geometry.cluster_bytes())
        && has_own(header.l1_offset, u64::from(header.l1_entries) * 8)
        && has_own(image.blocks.table_offset, image.blocks.entries.len() as u64 * 8)
        && census.tables.iter().filter(|table| table.active > 0).all(|table| {
            geometry.in_cluster(table.offset) == 0
                && census.counters.get(table.offset >> geometry.cluster_bits) == table.references
        })
}

/// Whether the outcome of a rehearsal is no worse than what stands in `base`. `header` is the rehearsed one.
pub(super) fn is_no_worse(
    base: &dyn Storage,
    old_header: &Header,
    rehearsal: &Rehearsal<'_>,
    header: &Header,
) -> Result<bool> {
    if !keeps_guest_data(base, old_header, rehearsal)? {
        return Ok(false);
    }
    let wrong = |storage: &dyn Storage, header: &Header| {
        let mut quiet = |_| {};
        let mut teller = Teller::new(&mut quiet, Mode::NOTHING);
        let result = audit(
            storage,
            &mut header.clone(),
            Mode::NOTHING,
            (&mut teller, None),
            &crate::format::unwatched,
        );
        result.map(|()| (teller.report.corruptions, teller.report.check_errors))
    };
    Ok(match (wrong(base, old_header), wrong(rehearsal, header)) {
        (Ok(before), Ok(after)) => after.0 <= before.0 && after.1 <= before.1,
        // What no audit gets through cannot get worse in its eyes.
        (Err(_), _) => true,
        (Ok(_), Err(_)) => false,
    })
}

/// Ranges that change.
struct Changes(Vec<Range<u64>>);

impl Changes {
    fn touch(&self, offset: u64, bytes: u64) -> bool {
        let after = self.0.partition_point(|range| range.end <= offset);
        self.0.get(after).is_some_and(|range| range.start < offset.saturating_add(bytes))
    }
}

/// Whether the disk and its snapshots read as before wherever they could be read: all tables lead where they
/// led, and what they lead to has not changed.
fn keeps_guest_data(base: &dyn Storage, header: &Header, rehearsal: &Rehearsal<'_>) -> Result<bool> {
    let mut header = header.clone();
    let subject = Subject::new(base, header.geometry)?;
    let geometry = subject.geometry;
    let table_bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_bytes();
    let blocks = Blocks::read(&subject, header.refcount_table_offset, table_bytes)?;
    let mut quiet = |_| {};
    let mut teller = Teller::new(&mut quiet, Mode::NOTHING);
    // Without a table of snapshots there are none that could be read.
    let snapshots = snapshots::read(&subject, &mut header, Mode::NOTHING, &mut teller).unwrap_or_default();
    let image = Image { subject, header: &header, blocks, snapshots };
    let changes = Changes(rehearsal.changed()?);
    for (offset, entries) in followed_tables(&image) {
        if !changes.touch(offset, entries * 8) {
            continue;
        }
        let mut is_same = true;
        for_each_word(&image, offset, entries, |number, word| {
            let at = offset.saturating_add(number * 8);
            if is_same && changes.touch(at, 8) {
                let mut now = [0; 8];
                rehearsal.read_at(&mut now, at)?;
                is_same = u64::from_be_bytes(now) & !COPIED == word & !COPIED;
            }
            Ok(())
        })?;
        if !is_same {
            return Ok(false);
        }
    }
    let (census, _) = count(&image, Mode::NOTHING)?;
    let mut before = vec![0; index(geometry.cluster_bytes())];
    let mut after = before.clone();
    for table in census.tables.iter().filter(|table| geometry.in_cluster(table.offset) == 0) {
        image.subject.read(&mut before, table.offset)?;
        let has_changed = changes.touch(table.offset, geometry.cluster_bytes());
        if has_changed {
            rehearsal.read_at(&mut after, table.offset)?;
        }
        for number in 0..index(geometry.l2_entries()) {
            let old = L2Entry::read(&before, number, geometry);
            if has_changed && !means_the_same(&image, old, L2Entry::read(&after, number, geometry)) {
                return Ok(false);
            }
            if place(&image, old).is_some_and(|(offset, bytes)| changes.touch(offset, bytes)) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Whether an entry was left alone but for its flag, or was repaired as misplaced.
fn means_the_same(image: &Image<'_>, old: L2Entry, new: L2Entry) -> bool {
    let geometry = image.subject.geometry;
    let is_misplaced = matches!(kind(old.word, geometry), Kind::ZeroReserved | Kind::Normal)
        && geometry.in_cluster(old.word & OFFSET_MASK) != 0;
    (old.word & !COPIED == new.word & !COPIED && old.bitmap == new.bitmap)
        || (is_misplaced && new == without_place(old, geometry))
}

/// The bytes of this file that hold an entry's data, where it has any that can be read.
fn place(image: &Image<'_>, entry: L2Entry) -> Option<(u64, u64)> {
    let geometry = image.subject.geometry;
    let offset = entry.word & OFFSET_MASK;
    match kind(entry.word, geometry) {
        _ if geometry.external_data => None,
        Kind::Compressed => Some(compressed_place(entry.word, geometry)),
        Kind::Normal if geometry.in_cluster(offset) == 0 => Some((offset, geometry.cluster_bytes())),
        Kind::Normal | Kind::ZeroReserved | Kind::ZeroPlain | Kind::Unallocated => None,
    }
}
