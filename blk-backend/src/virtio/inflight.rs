//! Which chains the device has, in memory that outlives it ("Inflight I/O tracking" of the vhost-user protocol, the
//! split ring).
//!
//! A device that dies leaves its requests unanswered; the one that takes its place finds them here and does them
//! again. The order that makes every moment a good one to die:
//!
//! 1. A head is marked before anything is done for its request.
//! 2. The heads of a batch are linked behind `last_batch_head` before the used ring's `idx` shows them.
//! 3. `idx` is stored: the driver has them back.
//! 4. Their marks are taken away, and last `used_idx` follows `idx`.
//!
//! Dead between 3 and 4, `used_idx` is behind `idx`, and the link of step 2 says whose marks are stale. Dead before
//! 3, the batch is done once more: its requests were not answered, so the driver has sent nothing that relies on
//! them, and what they write is what they wrote.

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{Ordering, compiler_fence},
    },
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::redo::RedoLog;

/// Bytes of `QueueRegionSplit` before its array.
const HEADER_BYTES: usize = 16;
/// Bytes of a `DescStateSplit`.
const STATE_BYTES: usize = 16;
/// Queue regions start at multiples of it, a cache line, as in libvhost-user.
const ALIGNMENT_BYTES: usize = 64;

// Offsets in `QueueRegionSplit`.
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
// Offsets in `DescStateSplit`.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// The `version` of a region in use; 0 is one that nobody used yet.
const VERSION_1: u16 = 1;

/// The memory for some queues of one device.
#[derive(Debug)]
pub struct InflightRegion {
    memory: Arc<MmapRegion<()>>,
    queues: u16,
    queue_size: u16,
}

impl InflightRegion {
    /// Bytes for `queues` of `queue_size` descriptors each, and the [`RedoLog`] behind them.
    #[must_use]
    pub fn bytes(queues: u16, queue_size: u16) -> usize {
        Self::queues_bytes(queues, queue_size) + RedoLog::BYTES
    }

    fn queues_bytes(queues: u16, queue_size: u16) -> usize {
        usize::from(queues) * stride(queue_size)
    }

    /// The notes behind the queues.
    #[must_use]
    pub fn redo_log(&self) -> RedoLog {
        RedoLog::new(Arc::clone(&self.memory), Self::queues_bytes(self.queues, self.queue_size))
    }

    /// New memory for `queues` of `queue_size`, zeroed, and the file that it is in.
    ///
    /// # Errors
    /// When the system has none.
    pub fn create(queues: u16, queue_size: u16) -> io::Result<(Arc<Self>, File)> {
        let fd = memfd_create("blk-backend-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let len_bytes = Self::bytes(queues, queue_size);
        ftruncate(&fd, u64::try_from(len_bytes).expect("usize fits u64"))?;
        // Whoever gets the file cannot take the memory from under us.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let file = File::from(fd);
        let region = Self::map(file.try_clone()?, 0, len_bytes, queues, queue_size)?;
        Ok((region, file))
    }

    /// Memory of an earlier device: `len_bytes` of `file` from `offset` on.
    ///
    /// # Errors
    /// When it is too small for that, or cannot be mapped.
    pub fn map(
        file: File,
        offset: u64,
        len_bytes: usize,
        queues: u16,
        queue_size: u16,
    ) -> io::Result<Arc<Self>> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let needed = Self::bytes(queues, queue_size);
        if queues == 0 || queue_size == 0 || len_bytes < needed {
            return Err(invalid(format!(
                "inflight memory: {needed} bytes for {queues} queues of {queue_size} were expected, found {len_bytes}"
            )));
        }
        let end = offset.checked_add(u64::try_from(needed).expect("usize fits u64"));
        let file_bytes = file.metadata()?.len();
        if end.is_none_or(|end| end > file_bytes) {
            return Err(invalid(format!("inflight memory: its file has {file_bytes} bytes")));
        }
        let memory =
            MmapRegion::from_file(FileOffset::new(file, offset), needed).map_err(io::Error::other)?;
        Ok(Arc::new(Self { memory: Arc::new(memory), queues, queue_size }))
    }

    /// The part of queue `index`, whose size is `size` now. `None` when it has none of that size.
    #[must_use]
    pub fn queue(self: &Arc<Self>, index: u16, size: u16) -> Option<InflightQueue> {
        (index < self.queues && size <= self.queue_size).then(|| InflightQueue {
            at: usize::from(index) * stride(self.queue_size),
            region: Arc::clone(self),
            size,
            counter: 0,
        })
    }
}

fn stride(queue_size: u16) -> usize {
    (HEADER_BYTES + STATE_BYTES * usize::from(queue_size)).next_multiple_of(ALIGNMENT_BYTES)
}

/// Why the memory of an earlier device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflightError {
    /// Another layout.
    #[error("inflight memory: version 1 was expected, found {0}")]
    Version(u16),
    /// Another queue size.
    #[error("inflight memory: a queue of {expected} was expected, found {found}")]
    Size {
        /// The queue's.
        expected: u16,
        /// What the memory says.
        found: u16,
    },
    /// A head that the queue does not have.
    #[error("inflight memory: descriptor {0} is outside the queue")]
    Head(u16),
    /// More chains than the queue has.
    #[error("inflight memory: a last batch of {0} is larger than the queue")]
    Batch(u16),
}

/// The chains of one queue.
#[derive(Debug)]
pub struct InflightQueue {
    region: Arc<InflightRegion>,
    at: usize,
    size: u16,
    /// Of the next head that is marked.
    counter: u64,
}

impl InflightQueue {
    /// Finds what an earlier device had, oldest first, when the used ring's `idx` is `used_idx`. Unused memory is
    /// made ready.
    ///
    /// # Errors
    /// When the memory is not of this queue.
    pub fn recover(&mut self, used_idx: u16) -> Result<Vec<u16>, InflightError> {
        match self.load_u16(VERSION) {
            0 => {
                self.store_u16(DESC_NUM, self.size);
                self.store_u16(USED_IDX, used_idx);
                self.store_u16(VERSION, VERSION_1);
                return Ok(Vec::new());
            }
            VERSION_1 => {}
            version => return Err(InflightError::Version(version)),
        }
        let found = self.load_u16(DESC_NUM);
        if found != self.size {
            return Err(InflightError::Size { expected: self.size, found });
        }
        let batch = used_idx.wrapping_sub(self.load_u16(USED_IDX));
        let is_marked = |head: &u16| self.load_u8(state(*head) + INFLIGHT) != 0;
        if batch > self.size && (0..self.size).any(|head| is_marked(&head)) {
            return Err(InflightError::Batch(batch));
        }
        let mut head = self.load_u16(LAST_BATCH_HEAD);
        // A ring that begins anew over memory that was left in order: there is no batch.
        for _ in 0..if batch > self.size { 0 } else { batch } {
            if head >= self.size {
                return Err(InflightError::Head(head));
            }
            self.store_u8(state(head) + INFLIGHT, 0);
            head = self.load_u16(state(head) + NEXT);
        }
        self.store_u16(USED_IDX, used_idx);
        let mut marked: Vec<(u64, u16)> = (0..self.size)
            .filter(is_marked)
            .map(|head| (self.load_u64(state(head) + COUNTER), head))
            .collect();
        marked.sort_unstable();
        self.counter = marked.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(marked.into_iter().map(|(_, head)| head).collect())
    }

    /// Step 1: the device has the chain at `head`, a descriptor of the queue.
    pub fn mark(&mut self, head: u16) {
        self.store_u64(state(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.store_u8(state(head) + INFLIGHT, 1);
        compiler_fence(Ordering::SeqCst);
    }

    /// Step 2: `heads` are about to be shown to the driver.
    pub fn link(&self, heads: &[u16]) {
        for &head in heads {
            self.store_u16(state(head) + NEXT, self.load_u16(LAST_BATCH_HEAD));
            self.store_u16(LAST_BATCH_HEAD, head);
        }
        compiler_fence(Ordering::SeqCst);
    }

    /// Step 4: the driver sees `heads`, and `used_idx` in the used ring.
    pub fn unmark(&self, heads: &[u16], used_idx: u16) {
        compiler_fence(Ordering::SeqCst);
        for &head in heads {
            self.store_u8(state(head) + INFLIGHT, 0);
        }
        compiler_fence(Ordering::SeqCst);
        self.store_u16(USED_IDX, used_idx);
    }

    // All offsets are inside the mapping: `at` and `size` were checked when `self` was made, heads by the caller.

    fn load_u8(&self, offset: usize) -> u8 {
        self.region.memory.get_ref(self.at + offset).expect(INSIDE).load()
    }

    fn store_u8(&self, offset: usize, value: u8) {
        self.region.memory.get_ref(self.at + offset).expect(INSIDE).store(value);
    }

    fn load_u16(&self, offset: usize) -> u16 {
        self.region.memory.get_ref(self.at + offset).expect(INSIDE).load()
    }

    fn store_u16(&self, offset: usize, value: u16) {
        self.region.memory.get_ref(self.at + offset).expect(INSIDE).store(value);
    }

    fn load_u64(&self, offset: usize) -> u64 {
        self.region.memory.get_ref(self.at + offset).expect(INSIDE).load()
    }

    fn store_u64(&self, offset: usize, value: u64) {
        self.region.memory.get_ref(self.at + offset).expect(INSIDE).store(value);
    }
}

const INSIDE: &str = "inside the mapping";

/// Where the state of `head` is in a queue region.
fn state(head: u16) -> usize {
    HEADER_BYTES + STATE_BYTES * usize::from(head)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Dies after each step in turn, and says what the next device finds.
    fn found(steps: usize) -> Vec<u16> {
        let (region, _file) = InflightRegion::create(2, 8).expect("memory");
        let mut queue = region.queue(1, 8).expect("it is there");
        assert_eq!(queue.recover(100), Ok(vec![]));
        let mut used_idx = 100;
        for step in 0..steps {
            match step {
                0 => queue.mark(5),
                1 => queue.mark(2),
                2 => queue.mark(7),
                3 => queue.link(&[2, 7]),
                4 => used_idx = 102, // the used ring's own
                5 => queue.unmark(&[2, 7], 102),
                6 => queue.mark(2),
                _ => unreachable!("a story of seven steps"),
            }
        }
        region.queue(1, 8).expect("it is there").recover(used_idx).expect("its own memory")
    }

    #[test]
    fn every_moment_is_a_good_one_to_die() {
        assert!(found(0).is_empty());
        assert_eq!(found(1), [5]);
        assert_eq!(found(3), [5, 2, 7], "in the order of their coming");
        assert_eq!(found(4), [5, 2, 7], "not shown: done again");
        assert_eq!(found(5), [5], "shown: the marks are stale");
        assert_eq!(found(6), [5]);
        assert_eq!(found(7), [5, 2]);
    }

    /// Dead in the middle of taking marks away.
    #[test]
    fn half_of_the_marks_is_as_good_as_all() {
        let (region, _file) = InflightRegion::create(1, 8).expect("memory");
        let mut queue = region.queue(0, 8).expect("it is there");
        queue.recover(0).expect("new");
        [1, 2, 3].into_iter().for_each(|head| queue.mark(head));
        queue.link(&[1, 3]);
        queue.store_u8(state(1) + INFLIGHT, 0);
        let mut next = region.queue(0, 8).expect("it is there");
        assert_eq!(next.recover(2), Ok(vec![2]));
        assert_eq!(next.recover(2), Ok(vec![2]), "finding out changes nothing");
    }

    #[test]
    fn memory_of_another_queue_is_refused() {
        let (region, file) = InflightRegion::create(1, 8).expect("memory");
        region.queue(0, 8).expect("it is there").recover(0).expect("new");
        assert!(region.queue(1, 8).is_none());
        assert!(region.queue(0, 16).is_none());
        let size = InflightError::Size { expected: 4, found: 8 };
        assert_eq!(region.queue(0, 4).expect("smaller").recover(0), Err(size));
        assert!(InflightRegion::map(file.try_clone().expect("a file"), 0, 4096, 1, 8).is_err());
        let enough = InflightRegion::bytes(1, 8);
        assert!(InflightRegion::map(file, u64::MAX, enough, 1, 8).is_err());
    }

    proptest! {
        /// Any bytes: an answer, and only heads of the queue.
        #[test]
        fn hostile_memory_is_read_or_refused(bytes in vec(any::<u8>(), 256), used_idx: u16, sane: bool) {
            let (region, _file) = InflightRegion::create(1, 8).expect("memory");
            for (at, byte) in bytes.iter().take(InflightRegion::queues_bytes(1, 8)).enumerate() {
                region.memory.get_ref(at).expect(INSIDE).store(*byte);
            }
            let mut queue = region.queue(0, 8).expect("it is there");
            if sane {
                queue.store_u16(VERSION, VERSION_1);
                queue.store_u16(DESC_NUM, 8);
                queue.store_u16(USED_IDX, used_idx.wrapping_sub(3));
            }
            if let Ok(heads) = queue.recover(used_idx) {
                prop_assert!(heads.len() <= 8 && heads.iter().all(|&head| head < 8));
            }
        }
    }
}
