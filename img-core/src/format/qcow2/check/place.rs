//! Room for a repaired structure, in an image whose counts are right.

use std::ops::Range;

use super::{
    super::geometry::{refcount_get, refcount_set},
    Image,
    blocks::{Block, Lookup},
    counters::{Counters, index},
    guard::Guard,
};
use crate::{Result, storage::Flush};

/// Takes `clusters` neighbouring free clusters and makes their counts, one each, durable. Gives their host
/// offset.
///
/// # Errors
/// `ENOSPC` when the refcount table has no room for another block.
pub(super) fn take(image: &Image<'_>, counters: &Counters, guard: &Guard, clusters: u64) -> Result<u64> {
    let subject = &image.subject;
    let per_block = subject.geometry.refcounts_per_block();
    let mut lookup = Lookup::new(subject, &image.blocks);
    let mut first_absent = None;
    for number in 0..image.blocks.entries.len() as u64 {
        match image.blocks.block(subject, number) {
            Block::At(_) => {}
            Block::Absent => {
                first_absent = first_absent.or(Some(number));
                continue;
            }
            Block::Unaligned(_) | Block::Unreadable => continue,
        }
        let mut free = 0;
        for cluster in number * per_block..(number + 1) * per_block {
            let is_free = guard.is_free(counters, cluster) && lookup.get(cluster)? == Some(0);
            free = if is_free { free + 1 } else { 0 };
            if free == clusters {
                let range = cluster + 1 - clusters..cluster + 1;
                set(image, range.clone(), 1)?;
                return Ok(range.start << subject.geometry.cluster_bits);
            }
        }
    }
    let nospace = || subject.failure(rustix::io::Errno::NOSPC);
    let number = first_absent.filter(|_| clusters < per_block).ok_or_else(nospace)?;
    add_block(image, counters, guard, number, clusters)
}

/// A new refcount block at the start of the clusters that it counts, and the clusters behind it.
fn add_block(
    image: &Image<'_>,
    counters: &Counters,
    guard: &Guard,
    number: u64,
    clusters: u64,
) -> Result<u64> {
    let subject = &image.subject;
    let geometry = subject.geometry;
    let first = number * geometry.refcounts_per_block();
    if !(first..=first + clusters).all(|cluster| guard.is_free(counters, cluster)) {
        return Err(subject.failure(rustix::io::Errno::NOSPC));
    }
    let mut block = vec![0; index(geometry.cluster_bytes())];
    for entry in 0..=clusters {
        refcount_set(&mut block, geometry.refcount_order, index(entry), 1);
    }
    let offset = first << geometry.cluster_bits;
    subject.storage.write_at(&block, offset)?;
    subject.storage.flush(Flush::Data)?;
    subject.storage.write_at(&offset.to_be_bytes(), image.blocks.table_offset + number * 8)?;
    subject.storage.flush(Flush::Data)?;
    Ok(offset + geometry.cluster_bytes())
}

/// Takes one reference from each cluster of a region; counts are not below one.
pub(super) fn release(image: &Image<'_>, offset: u64, bytes: u64) -> Result<()> {
    let bits = image.subject.geometry.cluster_bits;
    let end = image.subject.geometry.clusters_for(offset + bytes);
    let mut lookup = Lookup::new(&image.subject, &image.blocks);
    let mut counts = Vec::new();
    for cluster in offset >> bits..end {
        counts.push((cluster, lookup.get(cluster)?.unwrap_or(0)));
    }
    for (cluster, count) in counts {
        if count > 0 {
            set(image, cluster..cluster + 1, count - 1)?;
        }
    }
    image.subject.storage.flush(Flush::Data)
}

/// Writes counts of clusters whose blocks exist, and flushes.
fn set(image: &Image<'_>, clusters: Range<u64>, count: u64) -> Result<()> {
    let subject = &image.subject;
    let geometry = subject.geometry;
    let per_block = geometry.refcounts_per_block();
    let mut block = vec![0; index(geometry.cluster_bytes())];
    let mut at = clusters.start;
    while at < clusters.end {
        let end = clusters.end.min((at / per_block + 1) * per_block);
        if let Block::At(offset) = image.blocks.block(subject, at / per_block) {
            subject.read(&mut block, offset)?;
            for cluster in at..end {
                let entry = index(cluster % per_block);
                if refcount_get(&block, geometry.refcount_order, entry) != count {
                    refcount_set(&mut block, geometry.refcount_order, entry, count);
                }
            }
            subject.storage.write_at(&block, offset)?;
        }
        at = end;
    }
    subject.storage.flush(Flush::Data)
}
