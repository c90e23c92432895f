//! The audit: every grain that a table names must lie inside its file.

use super::{
    header::SECTOR_BYTES,
    layer::{GuestExtent, Kind, VmdkLayer},
    repair,
    sparse::{BadEntry, Sparse},
};
use crate::{
    Error, Result,
    format::{CheckReport, CheckWatch, Finding, Layer as _, Repair},
};

/// Walks all tables. As with the reference the first entry that is wrong ends it. What [`repair`] knows how to mend
/// is mended before, and is not looked for otherwise.
///
/// # Errors
/// [`Error::Unsupported`] when asked to repair leaks alone, or by [`repair::mend`]; [`Error::Corrupt`] for the entry
/// that was told of.
pub(super) fn check(
    layer: &VmdkLayer,
    repair: Repair,
    findings: &mut dyn FnMut(Finding),
    watch: &CheckWatch<'_>,
) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    match repair {
        Repair::Nothing => {}
        Repair::Leaks => return Err(Error::unsupported(layer.path(), "giving back leaks of vmdk images")),
        Repair::All => report.corruptions_fixed = repair::mend(layer, findings)?,
    }
    let total = layer.virtual_size_bytes();
    for extent in &layer.extents {
        if let Kind::Sparse(sparse) = &extent.kind {
            let watch = |bytes: u64| watch((extent.start_bytes + bytes).min(total), total);
            check_tables(extent, sparse, findings, &watch)?;
        }
    }
    if repair == Repair::All {
        report.corruptions_fixed += repair::end(layer, findings)?;
    }
    Ok(report)
}

/// `watch` is told of how many guest bytes of the extent the tables are behind us.
fn check_tables(
    extent: &GuestExtent,
    sparse: &Sparse,
    findings: &mut dyn FnMut(Finding),
    watch: &dyn Fn(u64) -> Result<()>,
) -> Result<()> {
    let mut entries = Vec::new();
    let mut first = 0;
    let mut tell = |grain: u64, before: &str, after: &str| {
        let sector = (extent.start_bytes + grain * sparse.grain_bytes) / SECTOR_BYTES;
        let text = format!("ERROR: {before} for sector {sector}{after}");
        findings(Finding { text, with_program_name: false });
    };
    while first < sparse.grains() {
        let in_table = sparse.table_entries - first % sparse.table_entries;
        let count = in_table.min(sparse.grains() - first);
        let has_table = sparse.entries(first, count, &mut entries).inspect_err(|error| {
            if matches!(error, Error::Corrupt { .. }) {
                tell(first, "could not get cluster_offset", "");
            }
        })?;
        if has_table {
            for (grain, entry) in (first..).zip(entries.iter().copied()) {
                match sparse.read_entry(entry) {
                    Ok(_) => continue,
                    Err(BadEntry::Outside) => tell(grain, "cluster offset", " points after EOF"),
                    Err(BadEntry::Unknown) => tell(grain, "could not get cluster_offset", ""),
                }
                sparse.grain(grain, entry)?;
            }
        }
        first += count;
        watch(first * sparse.grain_bytes)?;
    }
    Ok(())
}
