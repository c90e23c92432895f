//! A guest that is never idle: it has a request under way in each part of its disk.

use std::path::Path;

use super::{
    Answer, Ask, GuestQueue, SharedRam,
    model::{DiskModel, next_ask},
    vhost::{FrontEnd, Inflight, Wishes},
};
use crate::{
    daemon::{Daemon, Ended},
    pattern::Random,
};

/// Requests of a queue that there is memory for.
pub const SLOTS: u16 = 32;
/// Descriptors of a queue.
pub const SIZE: u16 = 128;
/// Sectors of its disk.
pub const SECTORS: u64 = 32 << 11;
/// Its queues.
pub const QUEUES: u16 = 2;

/// Parts of the disk of each queue: one request each at a time, so that none overlaps another.
const PARTS: u64 = 24;
const PART_SECTORS: u64 = SECTORS / (QUEUES as u64 * PARTS);

/// A request that is not answered.
struct Asked {
    token: u64,
    ask: Ask,
}

/// A guest that always has requests under way.
pub struct BusyGuest {
    /// Its queues.
    pub queues: Vec<GuestQueue>,
    /// By queue and part.
    asked: Vec<Vec<Option<Asked>>>,
    /// What its disk must hold.
    pub model: DiskModel,
    /// What it asks for next.
    pub random: Random,
    /// How many answers it got.
    pub answers: u64,
}

impl BusyGuest {
    /// A guest with [`QUEUES`] queues in `ram`, whose disk reads as zeroes.
    ///
    /// # Panics
    /// When the memory is too small.
    #[must_use]
    pub fn new(ram: &SharedRam, seed: u64) -> Self {
        Self {
            queues: (0..QUEUES).map(|index| GuestQueue::new(ram, index, SIZE, SLOTS, true)).collect(),
            asked: (0..QUEUES).map(|_| (0..PARTS).map(|_| None).collect()).collect(),
            model: DiskModel::new(usize::try_from(SECTORS).expect("small")),
            random: Random::new(seed),
            answers: 0,
        }
    }

    /// Requests that are not answered.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.queues.iter().map(GuestQueue::pending).sum()
    }

    /// Asks for something in each part where nothing is under way.
    ///
    /// # Panics
    /// When the device cannot be kicked.
    pub fn ask(&mut self) {
        for (number, (queue, asked)) in (0u64..).zip(self.queues.iter_mut().zip(&mut self.asked)) {
            for (index, slot) in (0u64..).zip(asked) {
                if slot.is_none() {
                    let first = (number * PARTS + index) * PART_SECTORS;
                    let ask = next_ask(&mut self.random, first, PART_SECTORS);
                    *slot = Some(Asked { token: queue.submit(&ask), ask });
                }
            }
            queue.publish();
        }
    }

    /// Takes the answers that are there.
    ///
    /// # Panics
    /// When one is not what its disk says.
    #[track_caller]
    pub fn take(&mut self) {
        for number in 0..self.queues.len() {
            while let Some(answer) = self.queues[number].answer() {
                self.answered(number, &answer);
            }
        }
    }

    /// Waits until all that is under way is answered.
    ///
    /// # Panics
    /// When an answer does not come, or is not what its disk says.
    #[track_caller]
    pub fn settle(&mut self) {
        for number in 0..self.queues.len() {
            while self.queues[number].pending() > 0 {
                let answer = self.queues[number].wait();
                self.answered(number, &answer);
            }
        }
    }

    /// The end after the last of its daemons died, at `daemon`, which was started after that: what is under way is
    /// answered, the disk is what was written, and the daemon ends when it is asked to. Returns how.
    ///
    /// # Panics
    /// When it is not so.
    #[track_caller]
    pub fn end_at(
        &mut self,
        daemon: Daemon,
        socket: &Path,
        ram: &SharedRam,
        inflight: Option<Inflight>,
    ) -> Ended {
        let front_end = FrontEnd::start(socket, ram, &self.queues, inflight, Wishes::default());
        self.settle();
        assert_eq!(self.queues[0].ask(&Ask::Flush).status, 0);
        self.check_all();
        drop(front_end);
        let ended = daemon.terminate();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended
    }

    fn answered(&mut self, number: usize, answer: &Answer) {
        let is_it =
            |slot: &&mut Option<Asked>| slot.as_ref().is_some_and(|asked| asked.token == answer.token);
        let slot = self.asked[number].iter_mut().find(is_it).expect("a request is answered once");
        let Asked { ask, .. } = slot.take().expect("it was found");
        self.model.apply(&ask);
        self.model.check_answer(&ask, answer);
        self.answers += 1;
    }

    /// Looks at the whole disk, with nothing under way.
    ///
    /// # Panics
    /// When it is not what was written.
    #[track_caller]
    pub fn check_all(&mut self) {
        for sector in (0..SECTORS).step_by(512) {
            let data = self.queues[1].read(sector, 512);
            self.model.check(sector, &data);
        }
    }
}
