//! The tables of a new image: filled in memory, written in large pieces.

use std::ops::Range;

use super::{
    create::Tables,
    create_layout::{Layout, Run},
    entry::COPIED,
    geometry::{Geometry, refcount_set},
};
use crate::{
    Error, Result,
    storage::{Preallocation, Storage},
};

/// Metadata is written in pieces of about this size.
const BATCH_BYTES: usize = 1 << 20;
/// A piece of this size is worth a write of its own.
const LARGE_BYTES: usize = 64 << 10;

pub(super) fn write_refcounts(out: &mut Batch<'_>, layout: &Layout, geometry: Geometry) -> Result<()> {
    let cluster_len = usize::try_from(geometry.cluster_bytes()).expect("at most 2 MiB");
    let table = layout.table();
    let mut table_bytes = vec![0; usize::try_from(table.clusters).expect("at most 8 MiB") * cluster_len];
    for old in layout.abandoned_tables() {
        let mut bytes = vec![0; usize::try_from(old.table.clusters).expect("at most 8 MiB") * cluster_len];
        fill_table(&mut bytes, old.blocks.iter().map(|(&index, &cluster)| (index, cluster)), geometry);
        out.put(old.table.start << geometry.cluster_bits, &bytes)?;
    }
    fill_table(&mut table_bytes, layout.blocks(), geometry);
    let mut block = vec![0; cluster_len];
    // What `block` says; of a big image nearly all blocks say that everything is in use.
    let mut said = Vec::new();
    for (index, cluster) in layout.blocks() {
        let counted: Vec<Run> = layout.counted(index).collect();
        if counted != said {
            block.fill(0);
            for run in &counted {
                for count in run.start..run.start + run.clusters {
                    let count = usize::try_from(count).expect("inside the block");
                    refcount_set(&mut block, geometry.refcount_order, count, 1);
                }
            }
            said = counted;
        }
        out.put(cluster << geometry.cluster_bits, &block)?;
    }
    out.put(table.start << geometry.cluster_bits, &table_bytes)
}

fn fill_table(table: &mut [u8], blocks: impl Iterator<Item = (u64, u64)>, geometry: Geometry) {
    for (index, cluster) in blocks {
        let at = usize::try_from(index).expect("inside the table") * 8;
        table[at..at + 8].copy_from_slice(&(cluster << geometry.cluster_bits).to_be_bytes());
    }
}

pub(super) fn write_l2(out: &mut Batch<'_>, tables: &Tables, geometry: Geometry) -> Result<()> {
    let cluster_len = usize::try_from(geometry.cluster_bytes()).expect("at most 2 MiB");
    let entry_len = usize::try_from(geometry.l2_entry_bytes()).expect("8 or 16");
    let low_words = low_words(geometry);
    let mut data = tables.data.iter().copied();
    let mut run = Run { start: 0, clusters: 0 };
    let mut table = vec![0; cluster_len];
    for &cluster in &tables.l2 {
        let mut rest = table.as_mut_slice();
        while !rest.is_empty() {
            if run.clusters == 0 {
                match data.next() {
                    Some(next) => run = next,
                    None => break,
                }
            }
            let fitting = usize::try_from(run.clusters).map_or(rest.len(), |clusters| clusters * entry_len);
            let (now, later) = rest.split_at_mut(fitting.min(rest.len()));
            fill_entries(now, entry_len, run.start, &low_words, geometry);
            let taken = (now.len() / entry_len) as u64;
            run = Run { start: run.start + taken, clusters: run.clusters - taken };
            rest = later;
        }
        rest.fill(0);
        out.put(cluster << geometry.cluster_bits, &table)?;
    }
    Ok(())
}

/// Cluster numbers below 256 as words of entries, in the order of the file.
fn low_words(geometry: Geometry) -> [u64; 256] {
    std::array::from_fn(|cluster| {
        u64::from_ne_bytes(((cluster as u64) << geometry.cluster_bits).to_be_bytes())
    })
}

/// Makes entries refer to the clusters from `host` on. Of extended entries, the bitmap stays empty: a place
/// is reserved, and the backing file shows.
fn fill_entries(entries: &mut [u8], entry_len: usize, host: u64, low_words: &[u64; 256], geometry: Geometry) {
    let mut host = host;
    let mut rest = entries;
    while !rest.is_empty() {
        // The low byte of a cluster number has bits of its own in the word, so that a loop over it needs
        // no byte order: 4 TiB have 67 million entries.
        let low = usize::from(host.to_le_bytes()[0]);
        let base = u64::from_ne_bytes(((host - low as u64) << geometry.cluster_bits | COPIED).to_be_bytes());
        let (now, later) = rest.split_at_mut(rest.len().min((low_words.len() - low) * entry_len));
        let words = now.as_chunks_mut::<8>().0.iter_mut();
        let fill = |(word, low): (&mut [u8; 8], &u64)| *word = (base | low).to_ne_bytes();
        if entry_len == 8 {
            words.zip(&low_words[low..]).for_each(fill);
        } else {
            words.step_by(2).zip(&low_words[low..]).for_each(fill);
        }
        host += (now.len() / entry_len) as u64;
        rest = later;
    }
}

/// Collects writes that continue each other.
pub(super) struct Batch<'a> {
    storage: &'a dyn Storage,
    start: u64,
    bytes: Vec<u8>,
    /// Large pieces stand far from each other.
    scattered: bool,
    /// Space can be taken ahead of a write.
    reserves: bool,
}

impl<'a> Batch<'a> {
    pub(super) fn new(storage: &'a dyn Storage, scattered: bool) -> Self {
        Self { storage, start: 0, bytes: Vec::new(), scattered, reserves: true }
    }

    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        if self.scattered && bytes.len() >= LARGE_BYTES {
            self.write()?;
            self.reserve(at..at + bytes.len() as u64)?;
            return self.storage.write_at(bytes, at);
        }
        if self.start + self.bytes.len() as u64 != at || self.bytes.len() >= BATCH_BYTES {
            self.write()?;
            self.start = at;
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes space for a piece ahead of its write: a file system that is told the exact lengths of ten
    /// thousand pieces in a sparse file needs a third less time than one that has to guess when it writes
    /// them back. Only a hint: where it cannot be done, writing takes the space.
    fn reserve(&mut self, range: Range<u64>) -> Result<()> {
        if !self.reserves {
            return Ok(());
        }
        match self.storage.preallocate(range, Preallocation::Falloc) {
            Err(Error::Io { source, .. }) if source.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.reserves = false;
                Ok(())
            }
            result => result,
        }
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        if !self.bytes.is_empty() {
            self.storage.write_at(&self.bytes, self.start)?;
            self.bytes.clear();
        }
        Ok(())
    }
}
