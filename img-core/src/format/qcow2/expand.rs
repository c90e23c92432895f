//! Zero clusters made into what version 2 has: nothing, where no backing file shows through, and clusters full of
//! zeroes elsewhere. In the tables of snapshots as well.
//!
//! Tables are taken in batches. (1) New clusters are counted and read as zeroes, durably; so do those that a zero
//! entry kept for itself. (2) The entries, in place, durable. (3) Clusters that lost an entry are counted down. A
//! crash leaves leaks: an entry says zeroes, before or after.

use std::collections::BTreeMap;

use super::{
    alloc::Freed,
    entry::{COMPRESSED, Cluster, L2Entry, ZERO},
    geometry::Geometry,
    layer::Qcow2Layer,
    refcount::{Counted, usize_of},
    snapshot_table::read_table,
    snapshot_tree::{L1, write_changed},
};
use crate::{
    Error, Result,
    format::Layer,
    storage::{Flush, Preallocation},
};

/// L1 entries that are looked at in all, those of snapshots included: more than any image needs, and few enough
/// to end in seconds where one table is named by all snapshots.
const MAX_L1_ENTRIES: u64 = 1 << 28;
/// Tables that follow each other are read together up to this size, which stays in the cache of a core.
const READ_BYTES: u64 = 256 << 10;
/// Changed tables are kept up to this size before they are written.
const BATCH_BYTES: usize = 16 << 20;

/// A table in memory.
struct Table {
    at: u64,
    before: Vec<u8>,
    now: Vec<u8>,
}

/// What of a batch is still to be done.
#[derive(Default)]
struct Batch {
    tables: Vec<Table>,
    bytes: usize,
    /// Clusters that lose so many references.
    dropped: Vec<(u64, u64)>,
}

/// Expands all of them. The caches are drained; they are not up to date afterwards.
pub(super) fn expand_zero_clusters(layer: &Qcow2Layer, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    layer.check_structures()?;
    let tables: Vec<(u64, u64)> = l2_tables(layer)?.into_iter().collect();
    let total = tables.len() as u64;
    let cluster = layer.geometry.cluster_bytes();
    let together = usize_of((READ_BYTES / cluster).max(1));
    let (mut batch, mut bytes, mut done) = (Batch::default(), Vec::new(), 0);
    for neighbours in tables.chunk_by(|one, next| one.0 + cluster == next.0) {
        for run in neighbours.chunks(together) {
            bytes.resize(run.len() * usize_of(cluster), 0);
            layer.image_file().read_at(&mut bytes, run[0].0)?;
            for (&(at, references), table) in run.iter().zip(bytes.chunks_exact(usize_of(cluster))) {
                progress(done, total);
                done += 1;
                layer.check_l2_place(at)?;
                if !may_have_zero_entries(table, layer.geometry) {
                    continue;
                }
                let mut table = Table { at, now: table.to_vec(), before: table.to_vec() };
                expand_table(layer, &mut table, references, &mut batch)?;
                if table.now != table.before {
                    batch.bytes += table.now.len();
                    batch.tables.push(table);
                }
                if batch.bytes >= BATCH_BYTES {
                    finish(layer, &mut batch)?;
                }
            }
        }
    }
    finish(layer, &mut batch)
}

/// Whether any entry may say that its cluster reads as zeroes; without branches, as most tables have none.
fn may_have_zero_entries(table: &[u8], geometry: Geometry) -> bool {
    if geometry.extended_l2 {
        return true;
    }
    let words = table.as_chunks().0.iter().map(|word| u64::from_be_bytes(*word));
    words.fold(false, |any, word| any | (word & (COMPRESSED | ZERO) == ZERO))
}

/// Every L2 table, with the number of L1 entries that name it.
fn l2_tables(layer: &Qcow2Layer) -> Result<BTreeMap<u64, u64>> {
    let (file, geometry) = (layer.image_file(), layer.geometry);
    let header = layer.header().clone();
    let mut roots = vec![(header.l1_offset, header.l1_entries)];
    for snapshot in read_table(file, &header)? {
        snapshot.check_l1(geometry)?;
        roots.push((snapshot.l1_offset, snapshot.l1_entries));
    }
    let entries: u64 = roots.iter().map(|(_, entries)| u64::from(*entries)).sum();
    if entries > MAX_L1_ENTRIES {
        return Err(Error::Invalid(format!(
            "{}: the L1 tables of all snapshots have {entries} entries, more than {MAX_L1_ENTRIES}",
            layer.path().display()
        )));
    }
    let mut tables = BTreeMap::new();
    for (at, entries) in roots {
        for (_, table) in L1::read(file, at, entries)?.tables(file, geometry)? {
            *tables.entry(table).or_default() += 1;
        }
    }
    Ok(tables)
}

/// Changes the zero entries of one table in memory, and does (1) for them.
fn expand_table(layer: &Qcow2Layer, table: &mut Table, references: u64, batch: &mut Batch) -> Result<()> {
    let geometry = layer.geometry;
    let cluster = geometry.cluster_bytes();
    let entries = usize_of(geometry.l2_entries());
    let mut index = 0;
    while index < entries {
        let entry = L2Entry::read(&table.before, index, geometry);
        let Cluster::Zero { reserved } = entry.cluster(geometry) else {
            index += 1;
            continue;
        };
        if let Some(own) = reserved {
            if geometry.in_cluster(own) != 0 {
                return Err(Error::corrupt(
                    layer.path(),
                    "L2 entry",
                    table.at + index as u64 * geometry.l2_entry_bytes(),
                    "a host offset aligned to clusters",
                    format_args!("{:#x}", entry.word),
                ));
            }
            if references == 1 && entry.is_copied() && layer.refcount(own)? == 1 {
                layer.check_overlap(&(own..own + cluster), None)?;
                layer.image_file().write_zeroes(own..own + cluster, true)?;
                L2Entry::standard(own, true, geometry).write(&mut table.now, index, geometry);
                index += 1;
                continue;
            }
            // A snapshot may have bytes there.
            batch.dropped.push((own, references));
        }
        if layer.backing().is_none() {
            L2Entry::default().write(&mut table.now, index, geometry);
            index += 1;
            continue;
        }
        // Neighbours that need a cluster as well get theirs in one piece, once those that keep none end.
        let run = (index + 1..entries)
            .take_while(|&next| {
                let next = L2Entry::read(&table.before, next, geometry).cluster(geometry);
                next == Cluster::Zero { reserved: None }
            })
            .count()
            + 1;
        let first = zeroed_clusters(layer, run as u64, references)?;
        for (at, index) in (first..).step_by(usize_of(cluster)).zip(index..index + run) {
            L2Entry::standard(at, references == 1, geometry).write(&mut table.now, index, geometry);
        }
        index += run;
    }
    Ok(())
}

/// New clusters that read as zeroes, for a table with so many references.
fn zeroed_clusters(layer: &Qcow2Layer, count: u64, references: u64) -> Result<u64> {
    let mut state = layer.quiet_state();
    let first = layer.allocate(&mut state, count)?;
    let host = first..first + count * layer.geometry.cluster_bytes();
    for _ in 1..references {
        let counted = layer.count_up(&mut state, layer.clusters_of(&host))?;
        assert_eq!(counted, Counted::Done, "what has been counted has its blocks");
    }
    layer.set_aside(host, Preallocation::Off)?;
    Ok(first)
}

/// The rest of (1), (2) and (3) for a batch.
fn finish(layer: &Qcow2Layer, batch: &mut Batch) -> Result<()> {
    let Batch { tables, dropped, .. } = std::mem::take(batch);
    // (1) A drain makes counts durable, and what was written to the file before them.
    layer.settle()?;
    // (2)
    for table in &tables {
        write_changed(layer.image_file(), table.at, &table.before, &table.now)?;
    }
    layer.image_file().flush(Flush::Data)?;
    // (3)
    let mut state = layer.quiet_state();
    for (at, references) in dropped {
        for _ in 0..references {
            let host = at..at + layer.geometry.cluster_bytes();
            state.free(Freed::clusters(host, layer.runtime.discard_other));
        }
    }
    drop(state);
    layer.settle()
}
