//! The rings of a split virtqueue (virtio 1.2, sections 2.7.6 to 2.7.10): where they are, and giving chains back.
//!
//! The available side is `virtio_queue`'s. Its used side shows every element to the driver at once; here a batch is
//! written first and shown by one store of `idx`, with one decision whether to signal, and the driver's flag against
//! interrupts is honoured.

use std::{
    num::Wrapping,
    sync::atomic::{Ordering, fence},
};

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::{GuestRam, chain::RingError};

/// Largest queue of a split ring (2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6).
const NO_INTERRUPT: u16 = 1;

/// Where the three parts of a queue are in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Descriptors; a power of two up to [`MAX_QUEUE_SIZE`].
    pub size: u16,
    /// The descriptor table.
    pub descriptors: GuestAddress,
    /// The available ring.
    pub available: GuestAddress,
    /// The used ring.
    pub used: GuestAddress,
}

impl RingLayout {
    /// Bytes of the descriptor table.
    #[must_use]
    pub fn descriptors_bytes(size: u16) -> u64 {
        16 * u64::from(size)
    }

    /// Bytes of the available ring, `used_event` included.
    #[must_use]
    pub fn available_bytes(size: u16) -> u64 {
        6 + 2 * u64::from(size)
    }

    /// Bytes of the used ring, `avail_event` included.
    #[must_use]
    pub fn used_bytes(size: u16) -> u64 {
        6 + 8 * u64::from(size)
    }

    /// The three parts one after the other from `start` on, which is a multiple of 16.
    #[must_use]
    pub fn packed_at(start: GuestAddress, size: u16) -> Self {
        let available = start.unchecked_add(Self::descriptors_bytes(size));
        let used = (available.raw_value() + Self::available_bytes(size)).next_multiple_of(4);
        Self { size, descriptors: start, available, used: GuestAddress(used) }
    }

    /// The first byte behind all parts of [`Self::packed_at`].
    #[must_use]
    pub fn end(&self) -> GuestAddress {
        self.used.unchecked_add(Self::used_bytes(self.size))
    }

    /// What is in the used ring's `idx`.
    ///
    /// # Errors
    /// [`RingError::RingOutside`].
    pub fn used_idx(&self, ram: &GuestRam) -> Result<u16, RingError> {
        load_u16(ram, self.used, 2)
    }
}

/// The used ring, as the device writes it.
#[derive(Debug)]
pub struct UsedRing {
    layout: RingLayout,
    event_idx: bool,
    /// Behind the last element written.
    next: Wrapping<u16>,
    /// As the driver sees it.
    shown: Wrapping<u16>,
    /// `shown` when the driver was last asked about. `None` before: it is signalled then, whatever it said.
    asked: Option<Wrapping<u16>>,
}

impl UsedRing {
    /// The ring at `layout`, going on behind `next`. All of it is in `ram`.
    #[must_use]
    pub fn new(layout: RingLayout, event_idx: bool, next: u16) -> Self {
        Self { layout, event_idx, next: Wrapping(next), shown: Wrapping(next), asked: None }
    }

    /// Elements written and not yet shown.
    #[must_use]
    pub fn unshown(&self) -> u16 {
        (self.next - self.shown).0
    }

    /// `idx`, when all that was pushed is shown.
    #[must_use]
    pub fn next(&self) -> u16 {
        self.next.0
    }

    /// Writes an element behind the last one. At most `size` of them between two calls of [`Self::show`].
    ///
    /// # Errors
    /// [`RingError::RingOutside`].
    pub fn push(&mut self, ram: &GuestRam, head: u16, written_bytes: u32) -> Result<(), RingError> {
        let slot = u64::from(self.next.0 % self.layout.size);
        let at = self.layout.used.checked_add(4 + 8 * slot).ok_or(RingError::RingOutside)?;
        // `struct virtq_used_elem` (2.7.8): id, len.
        let element = (u64::from(written_bytes) << 32 | u64::from(head)).to_le();
        ram.write_slice(&element.to_ne_bytes(), at).map_err(|_| RingError::RingOutside)?;
        self.next += 1;
        Ok(())
    }

    /// Shows what was pushed to the driver.
    ///
    /// # Errors
    /// [`RingError::RingOutside`].
    pub fn show(&mut self, ram: &GuestRam) -> Result<(), RingError> {
        let at = self.layout.used.checked_add(2).ok_or(RingError::RingOutside)?;
        // Release: the elements, the data and the status bytes are there before `idx` says so (2.7.13.3).
        ram.store(self.next.0.to_le(), at, Ordering::Release).map_err(|_| RingError::RingOutside)?;
        self.shown = self.next;
        Ok(())
    }

    /// Whether the driver wants to be told of what was shown since this was last asked (2.7.7.2).
    ///
    /// # Errors
    /// [`RingError::RingOutside`].
    pub fn wants_signal(&mut self, ram: &GuestRam) -> Result<bool, RingError> {
        let before = self.asked.replace(self.shown);
        if before == Some(self.shown) {
            return Ok(false);
        }
        // `idx` is stored before the driver's wish is read: one of both sides sees the other's store.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return Ok(load_u16(ram, self.layout.available, 0)? & NO_INTERRUPT == 0);
        }
        let used_event = Wrapping(load_u16(ram, self.layout.available, 4 + 2 * u64::from(self.layout.size))?);
        Ok(before.is_none_or(|before| self.shown - used_event - Wrapping(1) < self.shown - before))
    }
}

fn load_u16(ram: &GuestRam, base: GuestAddress, offset_bytes: u64) -> Result<u16, RingError> {
    let at = base.checked_add(offset_bytes).ok_or(RingError::RingOutside)?;
    ram.load(at, Ordering::Relaxed).map(u16::from_le).map_err(|_| RingError::RingOutside)
}

/// Whether the three parts lie in `ram` and are aligned as section 2.7 says.
#[must_use]
pub fn is_inside(layout: &RingLayout, ram: &GuestRam) -> bool {
    let inside = |at: GuestAddress, len_bytes: u64, alignment: u64| {
        at.raw_value().is_multiple_of(alignment)
            && ram.check_range(at, usize::try_from(len_bytes).expect("below 2^20 fits usize"))
    };
    inside(layout.descriptors, RingLayout::descriptors_bytes(layout.size), 16)
        && inside(layout.available, RingLayout::available_bytes(layout.size), 2)
        && inside(layout.used, RingLayout::used_bytes(layout.size), 4)
}
