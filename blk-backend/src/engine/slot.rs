//! The requests of a lane, each at one place from submission to answer.

use std::{ops::Range, time::Instant};

use super::{
    memory::{RunLists, Runs},
    transfer::Hold,
};
use crate::request::{Errno, Op};

/// Where a request stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nobody's.
    #[default]
    Free,
    /// Not begun: the disk is paused.
    Held,
    /// Waits in the [`Flight`](super::Flight) for its clusters.
    Parked,
    /// Waits for somebody who is in the way for a short time.
    Busy,
    /// The ring moves its bytes.
    Moving,
    /// A worker has it.
    Working,
}

/// One request.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) stage: Stage,
    pub(super) tag: u64,
    pub(super) op: Op,
    pub(super) guest_bytes: Range<u64>,
    pub(super) runs: Runs,
    /// Parts of `runs`, for the ring.
    pub(super) lists: RunLists,
    /// Transfers that the kernel has not answered.
    pub(super) pending: u32,
    /// What keeps the places valid that the transfers go to.
    pub(super) hold: Option<Hold>,
    pub(super) began: Instant,
    /// Its clusters are its own in the [`Flight`](super::Flight).
    pub(super) entered: bool,
    /// Pieces of tables that were read for it.
    pub(super) tables_read: u8,
    /// See [`Self::fail`].
    pub(super) failure: Option<Errno>,
}

impl Slot {
    /// Notes a failure: the first one, but rather one that trying again does not mend.
    pub(super) fn fail(&mut self, errno: Errno) {
        if self.failure.is_none_or(is_mended_by_worker) {
            self.failure = Some(errno);
        }
    }
}

/// Whether an error says that the ring cannot do something here. The blocking calls can, or they say why not.
pub(super) fn is_mended_by_worker(errno: Errno) -> bool {
    matches!(errno, Errno::AGAIN | Errno::INTR | Errno::INVAL | Errno::OPNOTSUPP)
}

/// All slots of a lane. Nothing is allocated once each was in use.
#[derive(Debug)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Slots {
    pub(super) fn new(depth: u32) -> Self {
        let now = Instant::now();
        let slot = |_| Slot {
            stage: Stage::Free,
            tag: 0,
            op: Op::Flush,
            guest_bytes: 0..0,
            runs: Runs::default(),
            lists: RunLists::default(),
            pending: 0,
            hold: None,
            began: now,
            entered: false,
            tables_read: 0,
            failure: None,
        };
        Self { slots: (0..depth).map(slot).collect(), free: (0..depth).rev().collect() }
    }

    /// A free one.
    pub(super) fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Gives one back.
    pub(super) fn give(&mut self, index: u32) {
        let slot = self.get(index);
        debug_assert_ne!(slot.stage, Stage::Free, "given back once");
        slot.stage = Stage::Free;
        slot.entered = false;
        slot.tables_read = 0;
        slot.failure = None;
        debug_assert_eq!(slot.pending, 0, "the kernel may still write its memory");
        slot.hold = None;
        slot.runs.clear();
        self.free.push(index);
    }

    pub(super) fn get(&mut self, index: u32) -> &mut Slot {
        &mut self.slots[index as usize]
    }

    /// Those that stand so.
    pub(super) fn in_stage(&self, stage: Stage) -> impl Iterator<Item = u32> + '_ {
        (0..).zip(&self.slots).filter(move |(_, slot)| slot.stage == stage).map(|(index, _)| index)
    }
}
