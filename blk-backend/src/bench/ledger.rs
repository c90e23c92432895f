//! What one queue of a verified run has written, and what it therefore must read.
//!
//! A queue has blocks of its own, and no two requests under way for the same one: then a read has exactly one right
//! answer, the generation that was written last.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
};

use super::{
    journal::Durable,
    run::BenchError,
    stamp::{self, Mismatch, Stamp},
    target::{Done, Shape, TargetQueue},
};
use crate::request::Op;

/// See the module.
pub(super) struct Ledger {
    run_id: u64,
    block_bytes: u64,
    /// The blocks of the queue; more of them than it has slots.
    share: Range<u64>,
    /// By block: how often it was written.
    generations: BTreeMap<u64, u64>,
    /// Blocks that a request is under way for.
    busy: HashSet<u64>,
    /// Writes that were answered after the last flush had begun.
    answered: Vec<Durable>,
    /// By slot: what the flush that is under way there makes durable.
    flushing: Vec<Vec<Durable>>,
    /// The memory of one request.
    scratch: Vec<u8>,
}

impl Ledger {
    pub(super) fn new(run_id: u64, share: Range<u64>, shape: &Shape) -> Self {
        Self {
            run_id,
            block_bytes: shape.block_bytes as u64,
            share,
            generations: BTreeMap::new(),
            busy: HashSet::new(),
            answered: Vec::new(),
            flushing: vec![Vec::new(); shape.depth],
            scratch: vec![0; shape.block_bytes],
        }
    }

    /// Before the request is submitted: fills its memory, and returns where it has to go, which is `offset` or the
    /// next block that nothing is under way for.
    pub(super) fn begin(&mut self, queue: &mut dyn TargetQueue, slot: usize, op: Op, offset: u64) -> u64 {
        if op == Op::Flush {
            self.flushing[slot] = std::mem::take(&mut self.answered);
            return offset;
        }
        let mut block = offset / self.block_bytes;
        while !self.busy.insert(block) {
            block = if block + 1 < self.share.end { block + 1 } else { self.share.start };
        }
        let offset = block * self.block_bytes;
        if let Op::Write { .. } = op {
            let generation = self.generations.entry(block).or_default();
            *generation += 1;
            let first = Stamp { run_id: self.run_id, offset, generation: *generation };
            stamp::fill(&mut self.scratch, first);
            queue.fill(slot, &self.scratch);
        }
        offset
    }

    /// After the request has succeeded: looks at what was read, and returns what is durable now.
    ///
    /// # Errors
    /// [`Mismatch`].
    pub(super) fn end(
        &mut self,
        queue: &mut dyn TargetQueue,
        slot: usize,
        op: Op,
        offset: u64,
    ) -> Result<Vec<Durable>, Mismatch> {
        let block = offset / self.block_bytes;
        match op {
            Op::Flush => return Ok(std::mem::take(&mut self.flushing[slot])),
            Op::Write { .. } => {
                let generation = self.generations[&block];
                self.answered.push(Durable { block, generation });
            }
            _ => {
                // What a block had before its first write is nobody's business.
                if let Some(&generation) = self.generations.get(&block) {
                    queue.copy(slot, &mut self.scratch);
                    stamp::check(&self.scratch, self.run_id, offset, &(generation..=generation))?;
                }
            }
        }
        self.busy.remove(&block);
        Ok(Vec::new())
    }

    /// While nothing is under way: reads all that was written, and returns how many blocks that were.
    ///
    /// # Errors
    /// [`BenchError::Mismatch`], and those of the queue.
    pub(super) fn read_again(
        &mut self,
        queue: &mut dyn TargetQueue,
        depth: usize,
    ) -> Result<u64, BenchError> {
        let Self { run_id, block_bytes, generations, scratch, .. } = self;
        let blocks = generations.keys().copied();
        read_blocks(queue, depth, scratch, blocks, |block, bytes| {
            let generation = generations[&block];
            stamp::check(bytes, *run_id, block * *block_bytes, &(generation..=generation))?;
            Ok(())
        })
    }
}

/// Reads whole blocks, `depth` at a time, and calls `look` with each number and its bytes, for which `memory` is
/// used. Returns how many there were.
///
/// # Errors
/// [`BenchError::Request`], those of the queue and of `look`.
pub(super) fn read_blocks(
    queue: &mut dyn TargetQueue,
    depth: usize,
    memory: &mut [u8],
    mut blocks: impl Iterator<Item = u64>,
    mut look: impl FnMut(u64, &[u8]) -> Result<(), BenchError>,
) -> Result<u64, BenchError> {
    let len_bytes = memory.len() as u64;
    let mut under_way = vec![0; depth];
    let mut free: Vec<usize> = (0..depth).collect();
    let mut done: Vec<Done> = Vec::new();
    let mut count = 0;
    loop {
        while let Some(&slot) = free.last()
            && let Some(block) = blocks.next()
        {
            free.pop();
            under_way[slot] = block;
            queue.submit(slot, Op::Read, block * len_bytes, len_bytes)?;
        }
        if free.len() == depth {
            return Ok(count);
        }
        queue.wait(None, &mut done)?;
        for (slot, result) in done.drain(..) {
            let block = under_way[slot];
            let offset = block * len_bytes;
            result.map_err(|errno| BenchError::Request { op: "read", offset, len_bytes, errno })?;
            queue.copy(slot, memory);
            look(block, memory)?;
            count += 1;
            free.push(slot);
        }
    }
}
