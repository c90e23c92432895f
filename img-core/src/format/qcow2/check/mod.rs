//! Audit and repair of a qcow2 image, with the findings of the reference.
//!
//! Works on the file alone; the driver above has drained its caches and reloads after a repair. Rooms:
//! `walk` meets all structures in order, `table` holds the rules of L2 entries, `census` counts all
//! references quietly and in parallel, `narrate` tells what is wrong in the reference's order, `compare`
//! and `rebuild` set the counts right, `copied` the flags that depend on them, `snapshots` the table.
//!
//! Order of a repair, each step durable before the next: (1) entries that cannot be right become zero
//! clusters, (2) counts, in place or as a whole new structure, (3) copied flags, (4) the snapshot table,
//! (5) the corrupt and dirty bits of the header. A crash in between leaves what was wrong before, or less.

mod bitmaps;
mod blocks;
mod census;
mod compare;
mod consent;
mod copied;
mod counters;
mod fault;
mod guard;
mod narrate;
mod place;
mod rebuild;
mod rehearsal;
mod snapshots;
mod table;
#[cfg(test)]
mod tests;
mod walk;

use std::{sync::Arc, thread};

use self::{
    blocks::{Blocks, Singles},
    census::{Census, Gatherer},
    copied::Tables,
    fault::{Fault, Teller},
    guard::Guard,
    narrate::Narrator,
    rehearsal::Rehearsal,
    snapshots::Snapshots,
    table::Rules,
};
use super::{
    super::{CheckReport, CheckWatch, Finding, Repair, unwatched},
    entry::REFCOUNT_TABLE_RESERVED,
    feature::incompatible,
    geometry::Geometry,
    header::Header,
};
use crate::{
    Error, Result,
    storage::{Flush, Preallocation, Storage},
};

/// Host clusters of a file that is audited; the reference's limit.
const MAX_CLUSTERS: u64 = i32::MAX as u64;
/// Threads that count. More would each need counts of their own.
const MAX_WORKERS: usize = 4;
/// Clusters above which one thread counts alone, to need one set of counts.
const MAX_SHARED_CLUSTERS: u64 = 1 << 28;
/// Where offset and size of the refcount table, and count and offset of the snapshot table, stand.
const TABLE_POINTERS_AT: u64 = 48;
/// Where the incompatible feature bits stand in the header.
const INCOMPATIBLE_AT: u64 = 72;

/// Audits the image in `storage` and repairs what `repair` allows, telling each finding as it is met. After
/// a repair `header` says what the file says.
///
/// # Errors
/// Where the reference ends with `Check failed: …`: the error then carries the system's code for that text.
/// What was found until then has been told. An interrupted repair leaves the image no worse than it was.
pub(super) fn check(
    storage: &Arc<dyn Storage>,
    header: &mut Header,
    repair: Repair,
    findings: &mut dyn FnMut(Finding),
    watch: &CheckWatch<'_>,
) -> Result<CheckReport> {
    let mode = match repair {
        Repair::Nothing => Mode::NOTHING,
        Repair::Leaks => Mode::LEAKS,
        Repair::All => Mode::ALL,
    };
    check_as(mode, storage, header, findings, watch)
}

/// [`check`] with all repairs, of an image whose last writer died: what it wrote, and no table says, may be known to
/// somebody else still. Nothing that the file holds is overwritten by new structures.
pub(super) fn repair_after_death(storage: &Arc<dyn Storage>, header: &mut Header) -> Result<CheckReport> {
    let mode = Mode { keeps_off: true, ..Mode::ALL };
    check_as(mode, storage, header, &mut |_: Finding| {}, &unwatched)
}

fn check_as(
    mode: Mode,
    storage: &Arc<dyn Storage>,
    header: &mut Header,
    findings: &mut dyn FnMut(Finding),
    watch: &CheckWatch<'_>,
) -> Result<CheckReport> {
    let mut teller = Teller::new(findings, mode);
    if !mode.repairs() {
        audit(storage.as_ref(), header, mode, (&mut teller, None), watch)?;
        return Ok(teller.report);
    }
    let base = storage.as_ref();
    let old_header = header.clone();
    let rehearsal = Rehearsal::new(base)?;
    let mut result = audit(&rehearsal, header, mode, (&mut teller, Some(&rehearsal)), watch);
    let is_held = rehearsal.is_held();
    if result.is_ok() && rehearsal.has_changes() {
        read_pointers(&rehearsal, header)?;
        if !consent::is_no_worse(base, &old_header, &rehearsal, header)? {
            teller.line("ERROR the repair would damage more than it mends; nothing was written".to_owned());
            result = Err(Error::io(base.path(), "check", rustix::io::Errno::IO));
        }
    }
    if result.is_ok() {
        rehearsal.perform()?;
    } else if is_held {
        *header = old_header;
    }
    let is_clean = result.is_ok() && teller.report.check_errors == 0 && teller.report.corruptions == 0;
    if header.geometry.version >= 3 {
        let bits = match (is_clean, teller.has_signalled()) {
            (true, _) => header.incompatible & !(incompatible::DIRTY | incompatible::CORRUPT),
            (false, true) => header.incompatible | incompatible::CORRUPT,
            (false, false) => header.incompatible,
        };
        if bits != header.incompatible {
            set_features(base, header, bits, is_held)?;
        }
    }
    base.flush(Flush::Data)?;
    read_pointers(base, header)?;
    result.map(|()| teller.report)
}

/// Sets the incompatible feature bits, after everything else is durable. Where structures may overlap the
/// header can be something else as well, and is left alone if that would suffer.
fn set_features(base: &dyn Storage, header: &mut Header, bits: u64, may_overlap: bool) -> Result<()> {
    base.flush(Flush::Data)?;
    let rehearsal = Rehearsal::new(base)?;
    rehearsal.write_at(&bits.to_be_bytes(), INCOMPATIBLE_AT)?;
    if !may_overlap || consent::is_no_worse(base, header, &rehearsal, header)? {
        rehearsal.perform()?;
        header.incompatible = bits;
    }
    Ok(())
}

/// Takes up the pointers that a repair may have changed.
fn read_pointers(storage: &dyn Storage, header: &mut Header) -> Result<()> {
    let mut bytes = [0; 24];
    storage.read_at(&mut bytes, TABLE_POINTERS_AT)?;
    let be32 = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    header.refcount_table_offset = be64(0);
    header.refcount_table_clusters = be32(8);
    header.snapshot_count = be32(12);
    header.snapshots_offset = be64(16);
    Ok(())
}

/// What may be repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mode {
    leaks: bool,
    errors: bool,
    /// New reference counts go behind the end of the file.
    keeps_off: bool,
}

impl Mode {
    const NOTHING: Self = Self { leaks: false, errors: false, keeps_off: false };
    const LEAKS: Self = Self { leaks: true, ..Self::NOTHING };
    const ALL: Self = Self { leaks: true, errors: true, keeps_off: false };

    fn repairs(self) -> bool {
        self.leaks || self.errors
    }
}

/// The file under audit.
struct Subject<'a> {
    storage: &'a dyn Storage,
    geometry: Geometry,
    file_bytes: u64,
    /// Told of the tables that are counted.
    watch: &'a CheckWatch<'a>,
}

impl<'a> Subject<'a> {
    fn new(storage: &'a dyn Storage, geometry: Geometry) -> Result<Self> {
        Ok(Self { storage, geometry, file_bytes: storage.len_bytes()?, watch: &unwatched })
    }

    /// Clusters of the file, the last one perhaps cut short.
    fn clusters(&self) -> u64 {
        self.geometry.clusters_for(self.file_bytes)
    }

    fn workers(&self) -> usize {
        let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        if self.clusters() > MAX_SHARED_CLUSTERS { 1 } else { cores.min(MAX_WORKERS) }
    }

    /// Reads; past the end there are zeroes.
    fn read(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        if at.checked_add(bytes.len() as u64).is_none_or(|end| end > i64::MAX.unsigned_abs()) {
            return Err(self.failure(rustix::io::Errno::IO));
        }
        self.storage.read_at(bytes, at)
    }

    /// The error that the reference would end with.
    fn failure(&self, errno: rustix::io::Errno) -> Error {
        Error::io(self.storage.path(), "check", errno)
    }
}

/// The file and the structures that were found in it.
struct Image<'a> {
    subject: Subject<'a>,
    header: &'a Header,
    blocks: Blocks,
    snapshots: Snapshots,
}

impl Image<'_> {
    fn rules(&self, mode: Mode) -> Rules {
        Rules {
            geometry: self.subject.geometry,
            file_bytes: self.subject.file_bytes,
            repair_reserved: mode.errors,
        }
    }
}

/// Audits, and repairs what `mode` says. A rehearsal ends, and its changes are carried out, when the image
/// turns out to be one in which a repair cannot damage anything.
fn audit(
    storage: &dyn Storage,
    header: &mut Header,
    mode: Mode,
    (teller, rehearsal): (&mut Teller<'_>, Option<&Rehearsal<'_>>),
    watch: &CheckWatch<'_>,
) -> Result<()> {
    let subject = Subject { watch, ..Subject::new(storage, header.geometry)? };
    let table_bytes = u64::from(header.refcount_table_clusters) * header.geometry.cluster_bytes();
    let blocks = Blocks::read(&subject, header.refcount_table_offset, table_bytes)?;
    let snapshots = snapshots::read(&subject, header, mode, teller)?;
    let of_snapshots = std::mem::take(&mut teller.report);
    if subject.clusters() > MAX_CLUSTERS {
        return Err(subject.failure(rustix::io::Errno::FBIG));
    }
    let rehearsal = rehearsal.filter(|_| of_snapshots == CheckReport::default());
    let (image, census) = counts(subject, header, blocks, snapshots, mode, (teller, rehearsal))?;
    let of_counts = std::mem::replace(&mut teller.report, of_snapshots);
    if teller.report.corruptions > 0 && mode.errors {
        match snapshots::rewrite(&image, &census.counters, &Guard::new(&image)) {
            Ok(()) => {
                teller.report.corruptions_fixed += teller.report.corruptions;
                teller.report.corruptions = 0;
            }
            Err(error) => {
                teller.report.check_errors += 1;
                teller.line(format!("ERROR failed to update snapshot table: {error}"));
                return Err(error);
            }
        }
    }
    teller.add(&of_counts);
    Ok(())
}

/// References, counts, and the flags that depend on them.
fn counts<'a>(
    subject: Subject<'a>,
    header: &'a Header,
    blocks: Blocks,
    snapshots: Snapshots,
    mode: Mode,
    (teller, rehearsal): (&mut Teller<'_>, Option<&Rehearsal<'_>>),
) -> Result<(Image<'a>, Census)> {
    let geometry = subject.geometry;
    teller.report.total_clusters = geometry.clusters_for(header.virtual_size_bytes / 512 * 512);
    let mut image = Image { subject, header, blocks, snapshots };
    let guard = mode.errors.then(|| Guard::new(&image));
    let (mut census, past_end) = references(&image, mode, guard.as_ref(), teller)?;
    let mut must_rebuild = check_blocks(&mut image, &mut census, mode, teller)?;
    let before = teller.report.clone();
    let is_sound = before.corruptions + before.corruptions_fixed + before.check_errors == 0;
    if let Some(rehearsal) = rehearsal
        && is_sound
        && consent::are_apart(&image, &census)
    {
        rehearsal.perform()?;
    }
    // What was not counted looks like a leak: its counts are all that keeps it from being overwritten.
    let frees = !census.has_uncounted;
    let mode_of_counts = Mode { leaks: mode.leaks && frees, ..mode };
    let mut compared =
        compare::compare(&image.subject, &image.blocks, &census.counters, Mode::NOTHING, teller)?;
    must_rebuild |= compared.must_rebuild;
    let mut has_changed = false;
    if must_rebuild && mode.errors && frees {
        has_changed = true;
        let old = teller.report.clone();
        teller.line("Rebuilding refcount structure".to_owned());
        let mut guard = Guard::new(&image);
        guard.add(&past_end);
        if mode.keeps_off {
            guard.add(&[(0, image.subject.file_bytes)]);
        }
        let rebuilt = rebuild::rebuild(&mut image.subject, &mut census.counters, &guard, teller)?;
        image.blocks = rebuilt;
        teller.report.corruptions = 0;
        teller.report.leaks = 0;
        (census, _) = references(&image, Mode::NOTHING, None, teller)?;
        let mut is_broken = check_blocks(&mut image, &mut census, Mode::NOTHING, teller)?;
        // The old structures, and tables that had to move, are leaks now.
        let saved = std::mem::take(&mut teller.report);
        compared = compare::compare(&image.subject, &image.blocks, &census.counters, Mode::LEAKS, teller)?;
        is_broken |= compared.must_rebuild;
        if is_broken {
            teller.line("ERROR rebuilt refcount structure is still broken".to_owned());
        }
        let fresh_leaks = std::mem::replace(&mut teller.report, saved).leaks;
        let report = &mut teller.report;
        report.corruptions_fixed += old.corruptions.saturating_sub(report.corruptions);
        report.leaks_fixed += old.leaks.saturating_sub(report.leaks);
        report.leaks += fresh_leaks;
    } else if mode.repairs() {
        if must_rebuild {
            teller.line("ERROR need to rebuild refcount structures".to_owned());
            return Err(image.subject.failure(rustix::io::Errno::IO));
        }
        if teller.report.leaks > 0 || teller.report.corruptions > 0 {
            teller.report = before;
            compared =
                compare::compare(&image.subject, &image.blocks, &census.counters, mode_of_counts, teller)?;
            has_changed = compared.has_written;
        }
    }
    copied_flags(&image, &census, mode, has_changed, teller)?;
    teller.report.image_end_offset = (compared.highest + 1) * geometry.cluster_bytes();
    Ok((image, census))
}

/// Compares, and repairs where it is safe, the flags that depend on the counts.
fn copied_flags(
    image: &Image<'_>,
    census: &Census,
    mode: Mode,
    has_changed: bool,
    teller: &mut Teller<'_>,
) -> Result<()> {
    let report = &teller.report;
    // Counts are right by now if that repair succeeded; with leaks only, nothing else may be wrong.
    let is_clean = report.check_errors == 0 && report.corruptions == 0 && report.leaks == 0;
    let repairs = mode.errors || (mode.leaks && is_clean);
    let guard = repairs.then(|| Guard::new(image));
    if has_changed {
        let (recount, walked) = count(image, Mode::NOTHING)?;
        walked?;
        return copied::check(image, Tables(&recount.uncopied), guard.as_ref(), teller);
    }
    copied::check(image, Tables(&census.uncopied), guard.as_ref(), teller)
}

/// Counts quietly. The second result is how the walk outside the L2 tables ended.
fn count(image: &Image<'_>, mode: Mode) -> Result<(Census, Result<()>)> {
    let mut gatherer = Gatherer::new(image.rules(mode), image.subject.clusters());
    let walked = walk::walk(image, &mut gatherer);
    let singles = if image.blocks.are_readable(&image.subject) {
        Some(Singles::read(&image.subject, &image.blocks)?)
    } else {
        None
    };
    Ok((gatherer.count(&image.subject, singles.as_ref())?, walked))
}

/// Counts, and tells what is wrong with what refers. Also gives the references behind the end of the file.
fn references(
    image: &Image<'_>,
    mode: Mode,
    guard: Option<&Guard>,
    teller: &mut Teller<'_>,
) -> Result<(Census, Vec<(u64, u64)>)> {
    let (mut census, walked) = count(image, mode)?;
    teller.report.allocated_clusters += census.clusters.allocated;
    teller.report.fragmented_clusters += census.clusters.fragmented;
    teller.report.compressed_clusters += census.clusters.compressed;
    let limit = image.subject.geometry.refcount_max();
    let is_overflowing = census.counters.any_above(limit);
    if walked.is_ok() && !census.is_region_faulty && census.faulty.is_empty() && !is_overflowing {
        return Ok((census, Vec::new()));
    }
    let mut narrator = Narrator::new(
        image,
        image.rules(mode),
        teller,
        &census.faulty,
        is_overflowing.then_some(limit),
        guard,
    );
    walk::walk(image, &mut narrator)?;
    let (counters, past_end) = narrator.finish()?;
    // A host that failed the first walk alone: what was counted then is not all there is.
    walked?;
    if let Some(counters) = counters {
        census.counters = counters;
    }
    Ok((census, past_end))
}

/// The blocks themselves are referenced, by the refcount table. Says whether a new structure is needed.
fn check_blocks(
    image: &mut Image<'_>,
    census: &mut Census,
    mode: Mode,
    teller: &mut Teller<'_>,
) -> Result<bool> {
    let geometry = image.subject.geometry;
    let mut must_rebuild = false;
    for index in 0..image.blocks.entries.len() {
        let entry = image.blocks.entries[index];
        let offset = entry & !REFCOUNT_TABLE_RESERVED;
        let cluster = offset >> geometry.cluster_bits;
        if entry & REFCOUNT_TABLE_RESERVED != 0 {
            teller.corruption(&Fault::BlockReserved { index });
            must_rebuild = true;
        } else if geometry.in_cluster(offset) != 0 {
            teller.corruption(&Fault::BlockUnaligned { index });
            must_rebuild = true;
        } else if cluster >= census.counters.clusters() {
            teller.report.corruptions += 1;
            teller.line(Fault::BlockOutside { index }.text(mode.errors));
            if mode.errors {
                match grow_to(image, offset) {
                    Ok(()) => {
                        census.counters.grow(image.subject.clusters());
                        teller.report.corruptions -= 1;
                        teller.report.corruptions_fixed += 1;
                    }
                    Err(error) => {
                        must_rebuild = true;
                        if error.raw_os_error() != Some(rustix::io::Errno::INVAL.raw_os_error()) {
                            teller.error(format!("Could not resize file: {}", os_text(&error)));
                        }
                        teller.line(format!("ERROR could not resize image: {}", os_text(&error)));
                        continue;
                    }
                }
                count_block(image, census, cluster, teller)?;
            }
        } else if offset != 0 {
            let references = count_block(image, census, cluster, teller)?;
            if references != 1 {
                teller.corruption(&Fault::BlockShared { index, references });
                must_rebuild = true;
            }
        }
    }
    Ok(must_rebuild)
}

/// Counts a refcount block; gives the count so far.
fn count_block(image: &Image<'_>, census: &mut Census, cluster: u64, teller: &mut Teller<'_>) -> Result<u64> {
    if census.counters.get(cluster) == image.subject.geometry.refcount_max() {
        let offset = cluster << image.subject.geometry.cluster_bits;
        teller.corruption(&Fault::Overflow { offset });
    } else {
        let added = census.counters.add(cluster..cluster + 1, 1);
        added.map_err(|_| image.subject.failure(rustix::io::Errno::NOMEM))?;
    }
    Ok(census.counters.get(cluster))
}

/// Makes the file long enough for a refcount block that is said to be behind its end.
fn grow_to(image: &mut Image<'_>, offset: u64) -> Result<()> {
    let subject = &mut image.subject;
    let end = offset.checked_add(subject.geometry.cluster_bytes());
    let end = end.filter(|end| *end <= i64::MAX.unsigned_abs());
    let end = end.ok_or_else(|| subject.failure(rustix::io::Errno::INVAL))?;
    if end >> subject.geometry.cluster_bits > MAX_CLUSTERS {
        return Err(subject.failure(rustix::io::Errno::FBIG));
    }
    subject.storage.resize(end, Preallocation::Off)?;
    subject.file_bytes = subject.storage.len_bytes()?;
    Ok(())
}

/// The system's words for an error, where it has some.
fn os_text(error: &Error) -> String {
    error.raw_os_error().map_or_else(
        || error.to_string(),
        |code| {
            let text = std::io::Error::from_raw_os_error(code).to_string();
            text.split(" (os error").next().unwrap_or_default().to_owned()
        },
    )
}
