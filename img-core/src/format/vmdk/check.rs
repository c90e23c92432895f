//! The audit: every grain that a table names must lie inside its file.

use super::{
    layer::{GuestExtent, Kind, VmdkLayer},
    sparse::BadEntry,
};
use crate::{
    Error, Result,
    format::{CheckReport, Finding, Repair},
};

/// Entries looked at together.
const CHUNK_ENTRIES: u64 = 512;

/// Walks all tables. Like the reference it stops at the first entry that is wrong, and repairs nothing.
///
/// # Errors
/// [`Error::Unsupported`] when asked to repair.
pub(super) fn check(
    layer: &VmdkLayer,
    repair: Repair,
    findings: &mut dyn FnMut(Finding),
) -> Result<CheckReport> {
    if repair != Repair::Nothing {
        return Err(Error::unsupported(layer.path(), "repairing vmdk images"));
    }
    let mut report = CheckReport::default();
    for extent in &layer.extents {
        if let Some(finding) = first_fault(extent)? {
            findings(finding);
            report.corruptions += 1;
            break;
        }
    }
    Ok(report)
}

fn first_fault(extent: &GuestExtent) -> Result<Option<Finding>> {
    let Kind::Sparse(sparse) = &extent.kind else { return Ok(None) };
    let mut entries = Vec::new();
    let mut first = 0;
    while first < sparse.grains() {
        let in_table = sparse.table_entries - first % sparse.table_entries;
        let count = in_table.min(CHUNK_ENTRIES).min(sparse.grains() - first);
        let sector = |grain: u64| (extent.start_bytes + grain * sparse.grain_bytes) / 512;
        let fault = |grain: u64, what: &str| {
            let text = format!("ERROR: {what} for sector {}", sector(grain));
            Ok(Some(Finding { text, with_program_name: false }))
        };
        match sparse.entries(first, count, &mut entries) {
            Ok(false) => {}
            Ok(true) => {
                for (grain, entry) in (first..).zip(entries.iter().copied()) {
                    match sparse.read_entry(entry) {
                        Ok(_) => {}
                        Err(BadEntry::Outside) => return fault(grain, "cluster offset after file"),
                        Err(BadEntry::Unknown) => return fault(grain, "could not get cluster_offset"),
                    }
                }
            }
            Err(Error::Corrupt { .. }) => return fault(first, "could not get cluster_offset"),
            Err(error) => return Err(error),
        }
        first += count;
    }
    Ok(None)
}
