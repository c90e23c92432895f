//! The snapshot table, read leniently so that a broken one can be repaired.
//!
//! Spec: "Snapshots". Three things are repaired: more snapshots than anyone reads, extra data longer than
//! anyone keeps, and version 3 entries without their 64-bit sizes.

use super::{
    super::header::{Header, MAX_SNAPSHOTS},
    Image, Mode, Subject,
    counters::{Counters, index},
    fault::{Fault, Teller},
    guard::Guard,
    place,
    table::region,
};
use crate::{Result, storage::Flush};

/// Where the count and the offset of the table stand in the header.
const COUNT_AT: u64 = 60;
/// Fixed part of an entry.
const ENTRY_BYTES: usize = 40;
/// Extra data that has a meaning: size of the machine state, of the disk, and an instruction count.
const KNOWN_EXTRA_BYTES: usize = 24;
/// Extra data that a version 3 entry must have.
const REQUIRED_EXTRA_BYTES: usize = 16;
/// Extra data that is kept.
const MAX_EXTRA_BYTES: usize = 1024;
/// Bytes of the whole table.
const MAX_TABLE_BYTES: u64 = 1024 * MAX_SNAPSHOTS as u64;
/// How far apart first and last entry may be when extra data is skipped.
const MAX_SPAN_BYTES: u64 = i32::MAX as u64;

/// The table.
#[derive(Clone, Debug, Default)]
pub(super) struct Snapshots {
    pub(super) offset: u64,
    pub(super) table_bytes: u64,
    pub(super) list: Vec<Snapshot>,
}

/// An entry.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    /// Seconds, nanoseconds, guest clock: bytes 16 to 32 of the entry.
    times: [u8; 16],
    /// The machine state's size in the fixed part.
    state_bytes: u32,
    extra: Vec<u8>,
    id: Vec<u8>,
    name: Vec<u8>,
}

impl Snapshot {
    /// The id as C prints it.
    pub(super) fn id_text(&self) -> String {
        text(&self.id)
    }

    /// The name as C prints it.
    pub(super) fn name_text(&self) -> String {
        text(&self.name)
    }

    /// The entry as the reference writes it, with all the extra data it must have.
    fn encode(&self, disk_bytes: u64, table: &mut Vec<u8>) {
        table.resize(table.len().next_multiple_of(8), 0);
        let be64 = |at: usize| {
            let bytes = self.extra.get(at..at + 8)?;
            Some(u64::from_be_bytes(bytes.try_into().expect("eight bytes")))
        };
        let state_bytes = be64(0).unwrap_or_else(|| u64::from(self.state_bytes));
        let mut extra = self.extra.clone();
        extra.resize(extra.len().max(KNOWN_EXTRA_BYTES), 0);
        extra[..8].copy_from_slice(&state_bytes.to_be_bytes());
        extra[8..16].copy_from_slice(&be64(8).unwrap_or(disk_bytes).to_be_bytes());
        extra[16..24].copy_from_slice(&be64(16).unwrap_or(u64::MAX).to_be_bytes());
        table.extend(self.l1_offset.to_be_bytes());
        table.extend(self.l1_entries.to_be_bytes());
        let length = |bytes: &[u8]| u16::try_from(bytes.len()).expect("read with a length of 16 bits");
        table.extend(length(&self.id).to_be_bytes());
        table.extend(length(&self.name).to_be_bytes());
        table.extend(self.times);
        table.extend(u32::try_from(state_bytes).unwrap_or(0).to_be_bytes());
        table.extend(u32::try_from(extra.len()).expect("at most 1024 bytes").to_be_bytes());
        table.extend(extra);
        table.extend(&self.id);
        table.extend(&self.name);
    }
}

fn text(bytes: &[u8]) -> String {
    crate::text::from_bytes(bytes.split(|byte| *byte == 0).next().unwrap_or_default())
}

/// Reads the table that the header points to, shortening it in the header where `mode` repairs.
///
/// # Errors
/// When there is no table to go on with; the reason has been told.
pub(super) fn read(
    subject: &Subject<'_>,
    header: &mut Header,
    mode: Mode,
    teller: &mut Teller<'_>,
) -> Result<Snapshots> {
    let mut dropped = 0;
    if header.snapshot_count > MAX_SNAPSHOTS && mode.errors {
        let over = header.snapshot_count - MAX_SNAPSHOTS;
        teller.line(format!("Discarding {over} overhanging snapshots"));
        dropped += u64::from(over);
        header.snapshot_count = MAX_SNAPSHOTS;
    }
    if let Some((what, errno)) = table_problem(subject, header) {
        teller.report.check_errors += 1;
        teller.error(format!("ERROR snapshot table {what}"));
        if header.snapshot_count > MAX_SNAPSHOTS {
            let over = header.snapshot_count - MAX_SNAPSHOTS;
            teller.line(format!(
                "You can force-remove all {over} overhanging snapshots with qemu-img check -r all"
            ));
        }
        return Err(subject.failure(errno));
    }
    let mut reader = Reader {
        subject,
        mode,
        teller,
        start: header.snapshots_offset,
        at: header.snapshots_offset,
        told: 0,
    };
    let mut snapshots = Snapshots::default();
    if header.snapshot_count > 0 {
        snapshots.offset = header.snapshots_offset;
        let mut table_bytes = 0_u64;
        for number in 0..header.snapshot_count {
            let before = reader.at;
            let snapshot = reader.entry(number)?;
            table_bytes = table_bytes.next_multiple_of(8) + snapshot.bytes();
            if table_bytes > MAX_TABLE_BYTES || reader.at - reader.start > MAX_SPAN_BYTES {
                let left = header.snapshot_count - number;
                reader.too_big(left)?;
                dropped += u64::from(left);
                header.snapshot_count = number;
                reader.at = before;
                break;
            }
            snapshots.list.push(snapshot);
        }
        snapshots.table_bytes = reader.at - reader.start;
    }
    let shortened = reader.told;
    teller.report.corruptions += dropped + shortened;
    if dropped > 0 {
        // Before anything is counted: the counts belong to the shorter table. What it leaks is found then.
        let count = header.snapshot_count.to_be_bytes();
        subject.storage.write_at(&count, COUNT_AT)?;
        subject.storage.flush(Flush::Data)?;
        teller.report.corruptions_fixed += dropped;
        teller.report.corruptions -= dropped;
    }
    if subject.geometry.version >= 3 {
        for (number, snapshot) in snapshots.list.iter().enumerate() {
            if snapshot.extra.len() < REQUIRED_EXTRA_BYTES {
                teller.report.corruptions += 1;
                teller.line(Fault::SnapshotIncomplete { index: number }.text(mode.errors));
            }
        }
    }
    Ok(snapshots)
}

/// What forbids reading the table at all.
fn table_problem(subject: &Subject<'_>, header: &Header) -> Option<(&'static str, rustix::io::Errno)> {
    let bytes = u64::from(header.snapshot_count) * ENTRY_BYTES as u64;
    if header.snapshot_count > MAX_SNAPSHOTS {
        Some(("too large", rustix::io::Errno::FBIG))
    } else if header.snapshots_offset > i64::MAX.unsigned_abs() - bytes
        || subject.geometry.in_cluster(header.snapshots_offset) != 0
    {
        Some(("offset invalid", rustix::io::Errno::INVAL))
    } else {
        None
    }
}

/// Reads entry after entry.
struct Reader<'a, 'b, 't> {
    subject: &'a Subject<'a>,
    mode: Mode,
    teller: &'t mut Teller<'b>,
    start: u64,
    at: u64,
    /// Entries whose extra data was cut.
    told: u64,
}

impl Reader<'_, '_, '_> {
    fn entry(&mut self, number: u32) -> Result<Snapshot> {
        self.at = self.start + (self.at - self.start).next_multiple_of(8);
        let fixed: [u8; ENTRY_BYTES] =
            self.take(ENTRY_BYTES)?.try_into().expect("as many bytes as were asked for");
        let be32 = |at: usize| u32::from_be_bytes(fixed[at..at + 4].try_into().expect("four bytes"));
        let be16 = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
        let stored_extra = be32(36);
        let kept_extra = index(u64::from(stored_extra)).min(MAX_EXTRA_BYTES);
        if kept_extra as u64 != u64::from(stored_extra) {
            self.too_much_extra(number, stored_extra)?;
        }
        let extra = self.take(kept_extra)?;
        self.at += u64::from(stored_extra) - kept_extra as u64;
        let id = self.take(be16(12))?;
        let name = self.take(be16(14))?;
        Ok(Snapshot {
            l1_offset: u64::from_be_bytes(fixed[..8].try_into().expect("eight bytes")),
            l1_entries: be32(8),
            times: fixed[16..32].try_into().expect("sixteen bytes"),
            state_bytes: be32(32),
            extra,
            id,
            name,
        })
    }

    fn take(&mut self, bytes: usize) -> Result<Vec<u8>> {
        let mut taken = vec![0; bytes];
        self.subject.read(&mut taken, self.at).inspect_err(|_| {
            self.teller
                .error("ERROR failed to read the snapshot table: Failed to read snapshot table".to_owned());
        })?;
        self.at += bytes as u64;
        Ok(taken)
    }

    fn too_much_extra(&mut self, number: u32, stored: u32) -> Result<()> {
        if self.mode.errors {
            self.told += 1;
            self.teller.line(format!(
                "Discarding too much extra metadata in snapshot table entry {number} ({stored} > {MAX_EXTRA_BYTES})"
            ));
            return Ok(());
        }
        self.teller.error(format!(
            "ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry {number}"
        ));
        self.teller.line("You can force-remove this extra metadata with qemu-img check -r all".to_owned());
        Err(self.subject.failure(rustix::io::Errno::FBIG))
    }

    fn too_big(&mut self, left: u32) -> Result<()> {
        if self.mode.errors {
            self.teller.line(format!("Discarding {left} overhanging snapshots (snapshot table is too big)"));
            return Ok(());
        }
        self.teller.error("ERROR failed to read the snapshot table: Snapshot table is too big".to_owned());
        self.teller.line(format!(
            "You can force-remove all {left} overhanging snapshots with qemu-img check -r all"
        ));
        Err(self.subject.failure(rustix::io::Errno::FBIG))
    }
}

impl Snapshot {
    fn bytes(&self) -> u64 {
        (ENTRY_BYTES + self.extra.len() + self.id.len() + self.name.len()) as u64
    }
}

/// Writes the table anew, complete. In order: the counts of its new clusters, the table, the header, and
/// only then the counts of the old clusters. A crash leaves leaks.
pub(super) fn rewrite(image: &Image<'_>, counters: &Counters, guard: &Guard) -> Result<()> {
    let subject = &image.subject;
    let mut table = Vec::new();
    for snapshot in &image.snapshots.list {
        snapshot.encode(image.header.virtual_size_bytes, &mut table);
    }
    if table.len() as u64 > MAX_TABLE_BYTES {
        return Err(subject.failure(rustix::io::Errno::FBIG));
    }
    let clusters = subject.geometry.clusters_for(table.len() as u64);
    let offset = place::take(image, counters, guard, clusters)?;
    subject.storage.write_at(&table, offset)?;
    subject.storage.flush(Flush::Data)?;
    let mut pointer = image.header.snapshot_count.to_be_bytes().to_vec();
    pointer.extend(offset.to_be_bytes());
    subject.storage.write_at(&pointer, COUNT_AT)?;
    subject.storage.flush(Flush::Data)?;
    // Only what was counted: a table that reaches behind the file was not.
    let rules = image.rules(Mode::NOTHING);
    if region(rules, image.snapshots.offset, image.snapshots.table_bytes).is_none() {
        return Ok(());
    }
    place::release(image, image.snapshots.offset, image.snapshots.table_bytes)
}
