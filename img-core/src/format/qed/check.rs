//! Audit and repair ("Consistency checking"): every cluster is named once, every name leads into the file.
//!
//! What can be repaired is a name that leads nowhere: it becomes "unallocated". Clusters that nobody names are
//! counted, and two names for one cluster, and both stay: the reference does so, and neither loses data. Where
//! a cluster of a table has two names nothing is repaired: what is a broken name in the one is data in the other.
//! The need-check bit is cleared last, once the repaired tables are durable and no corruption is left.

use super::{
    cluster_set::ClusterSet,
    geometry::Geometry,
    header::{Header, SECTOR_BYTES, feature},
    table::{Cluster, entries, entry_at, for_each_piece},
};
use crate::{
    Result,
    format::{CheckReport, CheckWatch, Repair},
    storage::{Flush, Storage},
};

/// Audits the image on `storage` and makes good what `repair` allows: leaks cannot be given back, so either
/// kind of repair is the same.
pub(super) fn check(
    storage: &dyn Storage,
    header: &mut Header,
    repair: Repair,
    watch: &CheckWatch<'_>,
) -> Result<CheckReport> {
    let mut audit = Audit::run(storage, header, false, watch)?;
    if repair != Repair::Nothing && audit.lost != 0 && !audit.has_shared_table {
        audit = Audit::run(storage, header, true, watch)?;
    }
    let mut report = audit.report;
    let clusters = audit.end_bytes.saturating_sub(audit.first_bytes) >> header.geometry.cluster_bits;
    report.leaks = clusters.saturating_sub(audit.used.len());
    if repair != Repair::Nothing && report.corruptions == 0 && header.features & feature::NEED_CHECK != 0 {
        storage.flush(Flush::Data)?;
        header.features &= !feature::NEED_CHECK;
        header.write(storage)?;
    }
    if repair != Repair::Nothing {
        storage.flush(Flush::Data)?;
    }
    Ok(report)
}

struct Audit<'a> {
    storage: &'a dyn Storage,
    geometry: Geometry,
    first_bytes: u64,
    end_bytes: u64,
    repairs: bool,
    /// Clusters that something names; all of them behind the header and inside the file.
    used: ClusterSet,
    /// Those of them that are tables.
    tables: ClusterSet,
    /// A cluster of a table has another name.
    has_shared_table: bool,
    /// Entries that lead nowhere.
    lost: u64,
    watch: &'a CheckWatch<'a>,
    report: CheckReport,
}

impl<'a> Audit<'a> {
    fn run(
        storage: &'a dyn Storage,
        header: &Header,
        repairs: bool,
        watch: &'a CheckWatch<'a>,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let mut audit = Self {
            storage,
            geometry,
            first_bytes: header.header_bytes(),
            // As the reference counts: what is missing of the file's last sector reads as zeroes.
            end_bytes: geometry.cluster_start(storage.len_bytes()?.next_multiple_of(SECTOR_BYTES)),
            repairs,
            used: ClusterSet::default(),
            tables: ClusterSet::default(),
            has_shared_table: false,
            lost: 0,
            watch,
            report: CheckReport {
                total_clusters: header.virtual_size_bytes.div_ceil(geometry.cluster_bytes()),
                ..CheckReport::default()
            },
        };
        audit.l1(header.l1_offset)?;
        Ok(audit)
    }

    fn l1(&mut self, l1_offset: u64) -> Result<()> {
        self.name_table(l1_offset);
        let storage = self.storage;
        let total = self.geometry.table_bytes() / 8;
        for_each_piece(storage, l1_offset, self.geometry.table_bytes(), |first, bytes| {
            let mut changed = false;
            for within in (0..bytes.len()).step_by(8) {
                let table = entry_at(bytes, within);
                if table == 0 {
                    continue;
                }
                if !self.is_place(table, self.geometry.table_clusters()) {
                    changed |= self.lost(&mut bytes[within..within + 8]);
                } else if self.name_table(table) {
                    self.l2(table)?;
                }
                (self.watch)(first + within as u64 / 8 + 1, total)?;
            }
            Ok(changed)
        })?;
        (self.watch)(total, total)
    }

    fn l2(&mut self, table: u64) -> Result<()> {
        let cluster_bytes = self.geometry.cluster_bytes();
        let storage = self.storage;
        let mut last = None;
        for_each_piece(storage, table, self.geometry.table_bytes(), |_, bytes| {
            let mut changed = false;
            // Zeroes, in most of the table of most images.
            if entries(bytes).all(|entry| entry == 0) {
                return Ok(false);
            }
            for within in (0..bytes.len()).step_by(8) {
                let Cluster::Data(host) = Cluster::from_entry(entry_at(bytes, within)) else { continue };
                self.report.allocated_clusters += 1;
                if last.is_some_and(|last: u64| last.wrapping_add(cluster_bytes) != host) {
                    self.report.fragmented_clusters += 1;
                }
                last = Some(host);
                if self.is_place(host, 1) {
                    self.has_shared_table |= self.tables.contains(host >> self.geometry.cluster_bits);
                    self.name(host, 1);
                } else {
                    changed |= self.lost(&mut bytes[within..within + 8]);
                }
            }
            Ok(changed)
        })
    }

    /// Whether so many clusters can stand there.
    fn is_place(&self, host: u64, clusters: u64) -> bool {
        let end = host.checked_add(clusters << self.geometry.cluster_bits);
        self.geometry.in_cluster(host) == 0
            && host >= self.first_bytes
            && end.is_some_and(|end| end <= self.end_bytes)
    }

    /// Notes that something names the table at `host`; false where something else names a part of it.
    fn name_table(&mut self, host: u64) -> bool {
        let clusters = self.geometry.table_clusters();
        let first = host >> self.geometry.cluster_bits;
        self.tables.insert(first..first + clusters);
        let is_alone = self.name(host, clusters);
        self.has_shared_table |= !is_alone;
        is_alone
    }

    /// Notes that something names these clusters; false where something else does already.
    fn name(&mut self, host: u64, clusters: u64) -> bool {
        let first = host >> self.geometry.cluster_bits;
        let twice = self.used.insert(first..first + clusters);
        self.report.corruptions += twice;
        twice == 0
    }

    /// An entry leads nowhere: it is made empty, where that is allowed.
    fn lost(&mut self, entry: &mut [u8]) -> bool {
        self.lost += 1;
        if self.repairs {
            entry.fill(0);
            self.report.corruptions_fixed += 1;
        } else {
            self.report.corruptions += 1;
        }
        self.repairs
    }
}
