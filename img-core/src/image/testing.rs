//! A layer in memory for the tests of this module: clusters of 512 bytes, each silent, zero, plain or
//! deflated. Places are never reused, so no lease is needed.

use std::{
    collections::{HashMap, HashSet},
    io::Write,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use serde_json::Value;

use crate::{
    Result,
    format::{
        Backing, Codec, Driver, Extent, HostFile, HostOffset, Layer, LayerWriter, Place, PreparedWrite,
        WritePlan, WriteStep, WriteToken, raw::Raw,
    },
    storage::{MemoryStorage, Preallocation, Storage},
};

pub(super) const CLUSTER: u64 = 512;

#[derive(Debug)]
pub(super) struct FakeLayer {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
    /// The map may be asked about bytes up to here.
    reach: AtomicU64,
    writable: bool,
    state: Mutex<State>,
    ready: Condvar,
    /// How often the map was asked.
    pub(super) asked: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    clusters: HashMap<u64, Slot>,
    end: u64,
    busy: HashSet<u64>,
    prepared: HashMap<u64, (u64, Slot)>,
    tokens: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Slot {
    Zero,
    Plain(u64),
    Deflated { at: u64, stored_bytes: u32 },
}

impl FakeLayer {
    pub(super) fn new(size: u64, writable: bool) -> Self {
        Self {
            storage: Arc::new(MemoryStorage::new("fake")),
            size: AtomicU64::new(size),
            reach: AtomicU64::new(size),
            writable,
            state: Mutex::default(),
            ready: Condvar::new(),
            asked: AtomicUsize::new(0),
        }
    }

    /// The same contents, not to be changed any more.
    pub(super) fn frozen(self) -> Self {
        Self { writable: false, ..self }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn idle(&self, clusters: Range<u64>) -> MutexGuard<'_, State> {
        self.ready
            .wait_while(self.state(), |state| clusters.clone().any(|index| state.busy.contains(&index)))
            .unwrap()
    }

    fn prepare(&self, state: &mut State, index: u64, slot: Slot, plan: WritePlan) -> PreparedWrite<'_> {
        state.tokens += 1;
        let token = state.tokens;
        state.busy.insert(index);
        state.prepared.insert(token, (index, slot));
        PreparedWrite::new(self, WriteToken(token), plan)
    }

    fn set_range(&self, guest_bytes: &Range<u64>, slot: Slot) {
        let clusters = guest_bytes.start / CLUSTER..guest_bytes.end.div_ceil(CLUSTER);
        let mut state = self.idle(clusters.clone());
        for index in clusters {
            state.clusters.insert(index, slot);
        }
    }
}

pub(super) fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

impl Layer for FakeLayer {
    fn driver(&self) -> &'static dyn Driver {
        &Raw
    }

    fn virtual_size_bytes(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn cluster_size_bytes(&self) -> Option<u32> {
        u32::try_from(CLUSTER).ok()
    }

    fn file(&self, file: HostFile) -> Option<&Arc<dyn Storage>> {
        (file == HostFile::IMAGE).then_some(&self.storage)
    }

    fn backing(&self) -> Option<&Backing> {
        None
    }

    fn has_sparse_data(&self) -> bool {
        false
    }

    fn details(&self) -> Result<Option<Value>> {
        Ok(None)
    }

    fn map_range(&self, guest_bytes: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        assert!(guest_bytes.end <= self.reach.load(Ordering::SeqCst), "{guest_bytes:?}");
        let state = self.state();
        let mut at = guest_bytes.start;
        while at < guest_bytes.end {
            let (index, skip) = (at / CLUSTER, at % CLUSTER);
            let len_bytes = (CLUSTER - skip).min(guest_bytes.end - at);
            let place = match state.clusters.get(&index) {
                None => Place::Unallocated,
                Some(Slot::Zero) => Place::Zero { reserved: None },
                Some(Slot::Plain(at)) => {
                    Place::Data { file: HostFile::IMAGE, at: HostOffset(at + skip), writable: self.writable }
                }
                Some(Slot::Deflated { at, stored_bytes }) => Place::Encoded {
                    file: HostFile::IMAGE,
                    at: HostOffset(*at),
                    stored_bytes: *stored_bytes,
                    decoded_bytes: 512,
                    skip_bytes: u32::try_from(skip).unwrap(),
                    how: Codec::Deflate,
                },
            };
            Extent { len_bytes, place }.push_to(extents);
            at += len_bytes;
        }
        Ok(())
    }

    fn writer(&self) -> Option<&dyn LayerWriter> {
        self.writable.then_some(self)
    }
}

impl LayerWriter for FakeLayer {
    fn prepare_write(&self, guest_bytes: Range<u64>) -> Result<PreparedWrite<'_>> {
        let (index, skip) = (guest_bytes.start / CLUSTER, guest_bytes.start % CLUSTER);
        let covered = guest_bytes.start..guest_bytes.end.min((index + 1) * CLUSTER);
        let mut state = self.idle(index..index + 1);
        let after = (index + 1) * CLUSTER - covered.end;
        if let Some(Slot::Plain(at)) = state.clusters.get(&index).copied() {
            let plan = WritePlan::in_place(covered, HostFile::IMAGE, HostOffset(at + skip));
            return Ok(self.prepare(&mut state, index, Slot::Plain(at), plan));
        }
        let at = state.end.next_multiple_of(CLUSTER);
        state.end = at + CLUSTER;
        let step = WriteStep {
            guest_bytes: covered,
            file: HostFile::IMAGE,
            at: HostOffset(at + skip),
            fill_before_bytes: skip,
            fill_after_bytes: after,
            maps: index * CLUSTER..(index + 1) * CLUSTER,
        };
        let plan = WritePlan { step, fill_is_zeroed: index.is_multiple_of(2) };
        Ok(self.prepare(&mut state, index, Slot::Plain(at), plan))
    }

    fn prepare_compressed(&self, guest_offset: u64, stored_bytes: u32) -> Result<PreparedWrite<'_>> {
        let index = guest_offset / CLUSTER;
        let mut state = self.idle(index..index + 1);
        let at = state.end;
        state.end += u64::from(stored_bytes);
        let guest_bytes = guest_offset..guest_offset + CLUSTER;
        let plan = WritePlan::in_place(guest_bytes, HostFile::IMAGE, HostOffset(at));
        // The tail of a run may be foreign bytes, past the end of the file even.
        Ok(self.prepare(&mut state, index, Slot::Deflated { at, stored_bytes: stored_bytes + 100 }, plan))
    }

    fn commit_write(&self, token: WriteToken) -> Result<()> {
        let mut state = self.state();
        let (index, slot) = state.prepared.remove(&token.0).unwrap();
        state.busy.remove(&index);
        state.clusters.insert(index, slot);
        self.ready.notify_all();
        Ok(())
    }

    fn abort_write(&self, token: WriteToken) {
        let mut state = self.state();
        let (index, _) = state.prepared.remove(&token.0).unwrap();
        state.busy.remove(&index);
        self.ready.notify_all();
    }

    fn zero_granularity_bytes(&self) -> u64 {
        CLUSTER
    }

    fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool> {
        assert!(guest_bytes.start.is_multiple_of(CLUSTER));
        assert!(guest_bytes.end.is_multiple_of(CLUSTER) || guest_bytes.end == self.virtual_size_bytes());
        assert!(guest_bytes.end <= self.reach.load(Ordering::SeqCst), "{guest_bytes:?}");
        // A layer that cannot say zero while keeping space.
        if may_unmap {
            self.set_range(&guest_bytes, Slot::Zero);
        }
        Ok(may_unmap)
    }

    fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        self.set_range(&guest_bytes, Slot::Zero);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn prepare_growth(&self, virtual_size_bytes: u64) -> Result<bool> {
        self.reach.store(virtual_size_bytes.next_multiple_of(CLUSTER), Ordering::SeqCst);
        Ok(true)
    }

    /// Leaves the tail of the last cluster as it is, as formats do.
    fn resize(&self, virtual_size_bytes: u64, _preallocation: Preallocation) -> Result<()> {
        self.state().clusters.retain(|index, _| index * CLUSTER < virtual_size_bytes);
        self.size.store(virtual_size_bytes, Ordering::SeqCst);
        self.reach.store(virtual_size_bytes, Ordering::SeqCst);
        Ok(())
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}
