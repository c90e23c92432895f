//! The driver's side of a split virtqueue: for the load generator, and for tests that play a guest.
//!
//! A well-behaved driver by default; [`DriverQueue::write_descriptor`] and [`DriverQueue::make_available`] write
//! whatever a hostile one would.

use std::sync::{Arc, atomic::Ordering, atomic::fence};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::{GuestRam, chain::GuestRange, ring::RingLayout};

/// `VIRTQ_DESC_F_NEXT` (2.7.5).
pub const F_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes.
pub const F_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub const F_INDIRECT: u16 = 4;

/// A queue as its driver sees it. All of it must be inside `ram`; panics where it is not.
#[derive(Debug)]
pub struct DriverQueue {
    ram: Arc<GuestRam>,
    layout: RingLayout,
    event_idx: bool,
    free: Vec<u16>,
    /// The descriptors of the chain of each head that the device has.
    held: Vec<Vec<u16>>,
    available: u16,
    /// `available` as the device sees it.
    shown: u16,
    used: u16,
}

impl DriverQueue {
    /// A queue at `layout` with zeroed rings.
    ///
    /// # Panics
    /// When a part is outside `ram`.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>, layout: RingLayout, event_idx: bool) -> Self {
        for (at, len_bytes) in [
            (layout.descriptors, RingLayout::descriptors_bytes(layout.size)),
            (layout.available, RingLayout::available_bytes(layout.size)),
            (layout.used, RingLayout::used_bytes(layout.size)),
        ] {
            let zeroes = vec![0; usize::try_from(len_bytes).expect("below 2^20")];
            ram.write_slice(&zeroes, at).expect("the ring is in guest memory");
        }
        Self {
            free: (0..layout.size).rev().collect(),
            held: vec![Vec::new(); usize::from(layout.size)],
            ram,
            layout,
            event_idx,
            available: 0,
            shown: 0,
            used: 0,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// The memory it is in.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Descriptors that no chain has.
    #[must_use]
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain of `readable` and then `writable` memory available, without showing it. Its head names it in
    /// [`Self::pop`]; `None` when there are too few descriptors.
    pub fn add(&mut self, readable: &[GuestRange], writable: &[GuestRange]) -> Option<u16> {
        let count = readable.len() + writable.len();
        if count == 0 || self.free.len() < count {
            return None;
        }
        let chain = self.free.split_off(self.free.len() - count);
        let all =
            readable.iter().map(|range| (range, 0)).chain(writable.iter().map(|range| (range, F_WRITE)));
        for (place, (range, direction)) in all.enumerate() {
            let (flags, next) = match chain.get(place + 1) {
                Some(&next) => (direction | F_NEXT, next),
                None => (direction, 0),
            };
            self.write_descriptor(chain[place], Descriptor::new(range.start.0, range.len_bytes, flags, next));
        }
        let head = chain[0];
        self.held[usize::from(head)] = chain;
        self.make_available(head);
        Some(head)
    }

    /// Like [`Self::add`], through an indirect table written at `table`.
    pub fn add_indirect(
        &mut self,
        table: GuestAddress,
        readable: &[GuestRange],
        writable: &[GuestRange],
    ) -> Option<u16> {
        let head = self.free.pop()?;
        let count = readable.len() + writable.len();
        let all =
            readable.iter().map(|range| (range, 0)).chain(writable.iter().map(|range| (range, F_WRITE)));
        for (place, (range, direction)) in all.enumerate() {
            let flags = if place + 1 < count { direction | F_NEXT } else { direction };
            let next = u16::try_from(place + 1).expect("an indirect table of fewer than 65536");
            let descriptor = Descriptor::new(range.start.0, range.len_bytes, flags, next);
            self.ram
                .write_obj(descriptor, table.unchecked_add(16 * (u64::from(next) - 1)))
                .expect("the table is in guest memory");
        }
        let table_bytes = u32::try_from(16 * count).expect("an indirect table of fewer than 65536");
        self.write_descriptor(head, Descriptor::new(table.0, table_bytes, F_INDIRECT, 0));
        self.held[usize::from(head)] = vec![head];
        self.make_available(head);
        Some(head)
    }

    /// Writes a descriptor, whatever it says.
    ///
    /// # Panics
    /// When `index` is outside the table.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        assert!(index < self.layout.size, "descriptor {index} of {}", self.layout.size);
        let at = self.layout.descriptors.unchecked_add(16 * u64::from(index));
        self.ram.write_obj(descriptor, at).expect("the table is in guest memory");
    }

    /// Writes `head` as the next entry of the available ring, whatever it is.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.available % self.layout.size);
        let at = self.layout.available.unchecked_add(4 + 2 * slot);
        self.ram.write_obj(head.to_le(), at).expect("the ring is in guest memory");
        self.available = self.available.wrapping_add(1);
    }

    /// Shows what is available to the device. True when it wants to be kicked (2.7.10).
    #[must_use = "the device may be asleep"]
    pub fn publish(&mut self) -> bool {
        let before = std::mem::replace(&mut self.shown, self.available);
        let at = self.layout.available.unchecked_add(2);
        self.ram.store(self.available.to_le(), at, Ordering::Release).expect("the ring is in guest memory");
        // The index is stored before the device's wish is read.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return self.load(self.layout.used) & 1 == 0;
        }
        let at = self.layout.used.unchecked_add(4 + 8 * u64::from(self.layout.size));
        let avail_event = self.load(at);
        self.shown.wrapping_sub(avail_event).wrapping_sub(1) < self.shown.wrapping_sub(before)
    }

    /// The next chain of [`Self::add`] and [`Self::add_indirect`] that the device gave back, and how many bytes it
    /// says that it wrote.
    ///
    /// # Panics
    /// When the device gives back what it does not have.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        let (head, written_bytes) = self.next_used()?;
        let head = u16::try_from(head).expect("the device names a descriptor");
        let chain = std::mem::take(&mut self.held[usize::from(head)]);
        assert!(!chain.is_empty(), "the device gave back head {head}, which it did not have");
        self.free.extend(chain);
        Some((head, written_bytes))
    }

    /// The next element of the used ring (2.7.8): `id` and `len` as the device wrote them, not looked at. For drivers
    /// that lay out their descriptors themselves, with [`Self::write_descriptor`] and [`Self::make_available`].
    pub fn next_used(&mut self) -> Option<(u32, u32)> {
        let at = self.layout.used.unchecked_add(2);
        let idx: u16 = self.ram.load(at, Ordering::Acquire).expect("the ring is in guest memory");
        if u16::from_le(idx) == self.used {
            return None;
        }
        let slot = u64::from(self.used % self.layout.size);
        let mut element = [0; 8];
        let at = self.layout.used.unchecked_add(4 + 8 * slot);
        self.ram.read_slice(&mut element, at).expect("the ring is in guest memory");
        self.used = self.used.wrapping_add(1);
        let [id, len] = [&element[..4], &element[4..]]
            .map(|half| u32::from_le_bytes(half.try_into().expect("half of eight bytes")));
        Some((id, len))
    }

    /// Asks to be signalled when the next chain comes back (`used_event`). True when one did already.
    #[must_use = "there may be something already"]
    pub fn enable_signal(&mut self) -> bool {
        if self.event_idx {
            let at = self.layout.available.unchecked_add(4 + 2 * u64::from(self.layout.size));
            self.ram.store(self.used.to_le(), at, Ordering::Relaxed).expect("the ring is in guest memory");
        }
        fence(Ordering::SeqCst);
        self.load(self.layout.used.unchecked_add(2)) != self.used
    }

    fn load(&self, at: GuestAddress) -> u16 {
        u16::from_le(self.ram.load(at, Ordering::Acquire).expect("the ring is in guest memory"))
    }
}
