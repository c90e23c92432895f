//! An image in this process: each queue is a lane of its own.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    cpu::CpuClock,
    memory::Blocks,
    run::BenchError,
    target::{Done, Facts, Shape, Target, TargetQueue},
};
use crate::{
    disk::Disk,
    engine::{Event, Lane, LaneOptions, Wait},
    request::{Op, Request, Segments, Submitted},
};

/// An opened image, and how its lanes are made.
#[derive(Debug)]
pub struct ImageTarget {
    disk: Arc<Disk>,
    lane: LaneOptions,
    clock: CpuClock,
}

impl ImageTarget {
    /// The lanes get the depth that a job asks for, whatever `lane` says.
    #[must_use]
    pub fn new(disk: &Arc<Disk>, lane: LaneOptions) -> Self {
        Self { disk: Arc::clone(disk), lane, clock: CpuClock::own() }
    }
}

impl Target for ImageTarget {
    fn facts(&self) -> Facts {
        Facts {
            size_bytes: self.disk.size_bytes(),
            read_only: self.disk.is_read_only(),
            most_queues: (u32::MAX, ""),
            most_block_bytes: u64::MAX,
            can_flush: true,
            most_discard_bytes: u64::MAX,
        }
    }

    fn queue<'a>(&'a self, _number: u32, shape: &Shape) -> Result<Box<dyn TargetQueue + 'a>, BenchError> {
        let depth =
            u32::try_from(shape.depth).map_err(|_| BenchError::Job("a depth beyond 32 bits".to_owned()))?;
        let lane = Lane::new(&self.disk, &LaneOptions { depth, ..self.lane })?;
        let memory = Blocks::new(shape.depth, shape.block_bytes, shape.seed);
        Ok(Box::new(LaneQueue { lane, memory, events: Vec::with_capacity(shape.depth) }))
    }

    fn backend_cpu(&self) -> Result<Option<Duration>, BenchError> {
        self.clock.now().map(Some)
    }
}

struct LaneQueue {
    /// Before `memory`: dropped first, and waits for what is under way.
    lane: Lane,
    memory: Blocks,
    events: Vec<Event>,
}

impl TargetQueue for LaneQueue {
    fn submit(&mut self, slot: usize, op: Op, offset: u64, len_bytes: u64) -> Result<(), BenchError> {
        let run = [self.memory.run(slot)];
        let segments = if op.moves_bytes() {
            // SAFETY: the run was just given, and `lane` is dropped before `memory`.
            #[allow(unsafe_code, reason = "the promise of a request's memory")]
            unsafe {
                self.memory.segments(&run)
            }
        } else {
            Segments::NONE
        };
        let request = Request { tag: slot as u64, op, offset, len_bytes, segments };
        match self.lane.submit(&request) {
            Submitted::Taken => Ok(()),
            Submitted::Full => {
                Err(BenchError::Job("the lane takes fewer requests than the depth".to_owned()))
            }
        }
    }

    fn wait(&mut self, until: Option<Instant>, done: &mut Vec<Done>) -> Result<(), BenchError> {
        self.lane.run_once(until.map_or(Wait::Event, Wait::Until), &mut self.events)?;
        for event in self.events.drain(..) {
            if let Event::Done { tag, result } = event {
                done.push((usize::try_from(tag).expect("a slot"), result));
            }
        }
        Ok(())
    }

    fn fill(&mut self, slot: usize, bytes: &[u8]) {
        self.memory.fill(slot, bytes);
    }

    fn copy(&self, slot: usize, bytes: &mut [u8]) {
        self.memory.copy(slot, bytes);
    }
}
