//! qcow2 from a stream: each level-two table has to stand in front of what it maps, as writers of new images put
//! them; the map itself is read as that of a file.

use std::sync::Arc;

use super::{Qcow2, entry::REFCOUNT_TABLE_RESERVED, header::Header};
use crate::{
    Error, Result,
    format::{FrontReader, FrontRun, OpenMode, front::LayerFront},
    storage::{Storage, StreamStorage},
};

/// See the module.
pub(super) struct Qcow2Stream {
    stream: Arc<StreamStorage>,
    front: LayerFront,
    /// Where the refcount blocks end, by the table; `None` where the table comes later.
    blocks_end: Option<u64>,
}

impl Qcow2Stream {
    /// # Errors
    /// [`Error::Unsupported`] for an image that is not all of its disk; as opening one.
    pub(super) fn new(stream: Arc<StreamStorage>) -> Result<Self> {
        let header = Header::read(&*stream, OpenMode::Read)?;
        let front = LayerFront::open(&Qcow2, Arc::clone(&stream))?;
        let blocks_end = blocks_end(&*stream, &header)?;
        Ok(Self { stream, front, blocks_end })
    }
}

/// Where the last refcount block ends; `None` where the table does not stand in front.
fn blocks_end(stream: &dyn Storage, header: &Header) -> Result<Option<u64>> {
    /// As far as the start of a stream is kept in any case.
    const FRONT_BYTES: u64 = 12 << 20;
    let cluster = header.geometry.cluster_bytes();
    let table_bytes = u64::from(header.refcount_table_clusters) * cluster; // checked: at most 8 MiB
    if header.refcount_table_offset.saturating_add(table_bytes) > FRONT_BYTES {
        return Ok(None);
    }
    let mut table = vec![0; usize::try_from(table_bytes).expect("at most 8 MiB")];
    stream.read_at(&mut table, header.refcount_table_offset)?;
    let entries =
        table.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry) & !REFCOUNT_TABLE_RESERVED);
    Ok(entries.filter(|at| *at != 0).max().map(|at| at.saturating_add(cluster)))
}

impl FrontReader for Qcow2Stream {
    fn virtual_size_bytes(&self) -> Option<u64> {
        self.front.virtual_size_bytes()
    }

    fn unit_bytes(&self) -> u64 {
        self.front.unit_bytes()
    }

    fn next(&mut self, runs: &mut Vec<FrontRun>) -> Result<()> {
        self.front.next(runs)
    }

    fn finish(&mut self) -> Result<()> {
        let end = self.stream.drain()?;
        if self.blocks_end.is_some_and(|blocks_end| blocks_end > end) {
            let rule = format!("refcount blocks up to byte {:#x}", self.blocks_end.unwrap_or(0));
            let found = "the end of the stream: the image is not complete";
            return Err(Error::corrupt(self.stream.path(), "stream", end, rule, found));
        }
        Ok(())
    }
}
