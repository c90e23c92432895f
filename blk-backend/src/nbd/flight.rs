//! The requests of a connection, each at one place from its header to the last byte of its reply.

use std::ops::Range;

use super::{
    buffer::{Buffer, Lent},
    command::Operation,
    reply::Addressee,
};
use crate::request::Op;

/// Requests of one connection under way at once.
const MAX_REQUESTS: u32 = 128;

/// A request from its header to the last byte of its reply.
pub(super) struct Flight {
    pub(super) to: Addressee,
    pub(super) operation: Operation,
    pub(super) len_bytes: u64,
    pub(super) memory: Memory,
    /// What is left for the lane behind the piece under way.
    pub(super) rest: Range<u64>,
}

/// The memory of a request.
pub(super) enum Memory {
    /// Nothing is moved, or it goes [straight](super::straight).
    None,
    /// Ours: a payload comes in, or data goes out.
    Idle(Buffer),
    /// The lane's.
    Lent(Lent),
}

/// The requests of a connection, by the numbers under which the lane answers them.
pub(super) struct Flights {
    slots: Vec<Option<Flight>>,
    free: Vec<u32>,
}

impl Flights {
    pub(super) fn new() -> Self {
        Self { slots: (0..MAX_REQUESTS).map(|_| None).collect(), free: (0..MAX_REQUESTS).rev().collect() }
    }

    pub(super) fn are_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(super) fn are_none(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    pub(super) fn add(&mut self, flight: Flight) -> u32 {
        let index = self.free.pop().expect("room was seen to be there");
        self.slots[index as usize] = Some(flight);
        index
    }

    pub(super) fn get(&mut self, index: u32) -> &mut Flight {
        self.slots[index as usize].as_mut().expect("a request under way")
    }

    pub(super) fn look(&self, index: u32) -> &Flight {
        self.slots[index as usize].as_ref().expect("a request under way")
    }

    pub(super) fn remove(&mut self, index: u32) -> Flight {
        let flight = self.slots[index as usize].take().expect("a request under way");
        self.free.push(index);
        flight
    }

    /// Ends with all of them, and frees their memory.
    ///
    /// # Safety
    /// The lane that they were submitted to was reset.
    #[allow(unsafe_code, reason = "the lane gives the memory back")]
    pub(super) unsafe fn free(self) {
        for flight in self.slots.into_iter().flatten() {
            if let Memory::Lent(lent) = flight.memory {
                // SAFETY: as the caller says.
                drop(unsafe { lent.take_back() });
            }
        }
    }
}

/// What the lane does for an operation.
pub(super) fn lane_op(operation: Operation) -> Op {
    match operation {
        Operation::Read { .. } => Op::Read,
        Operation::Write { fua } => Op::Write { fua },
        Operation::Flush => Op::Flush,
        Operation::Trim { fua } => Op::Discard { fua },
        Operation::WriteZeroes { fua, may_unmap, fast_only } => Op::WriteZeroes { may_unmap, fast_only, fua },
        Operation::Cache => Op::Cache,
        Operation::Disconnect | Operation::BlockStatus { .. } => unreachable!("not for the lane"),
    }
}

/// Whether an operation may be done in pieces. A fast zero write succeeds or fails as one.
pub(super) fn is_cut(operation: Operation) -> bool {
    matches!(operation, Operation::Trim { .. } | Operation::WriteZeroes { fast_only: false, .. })
}

/// Memory that a request needs.
pub(super) fn memory_bytes(operation: Operation, len_bytes: u64) -> usize {
    match operation {
        Operation::Read { .. } | Operation::Write { .. } | Operation::BlockStatus { filtered: true, .. } => {
            usize::try_from(len_bytes).expect("at most the longest payload")
        }
        _ => 0,
    }
}
