//! Raw from a stream: the disk is what comes, up to its end.

use std::sync::Arc;

use crate::{
    Result,
    format::{FrontReader, FrontRun, HostFile, HostOffset, Place},
    storage::StreamStorage,
};

/// How much is read at once.
const PIECE_BYTES: usize = 1 << 20;

/// See the module.
pub(super) struct RawStream {
    pub(super) stream: Arc<StreamStorage>,
    pub(super) at: u64,
}

impl FrontReader for RawStream {
    fn virtual_size_bytes(&self) -> Option<u64> {
        None
    }

    fn next(&mut self, runs: &mut Vec<FrontRun>) -> Result<()> {
        let len = self.stream.available(self.at, PIECE_BYTES)?;
        push_run(self.at, len, runs);
        self.at += len as u64;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.stream.drain().map(drop)
    }
}

/// Guest bytes at their own offset.
pub(in super::super) fn push_run(at: u64, len: usize, runs: &mut Vec<FrontRun>) {
    if len > 0 {
        let place = Place::Data { file: HostFile::IMAGE, at: HostOffset(at), writable: false };
        runs.push(FrontRun { guest_offset: at, len_bytes: len as u64, place });
    }
}
