//! One queue of a device: a driver whose requests each have their own place in memory and their own descriptors.

use std::{
    io,
    os::{
        fd::{AsRawFd as _, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address as _, Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use zerocopy::{IntoBytes, little_endian::U32};

use super::{
    VhostTarget,
    memory::{QueuePlan, SlotPlaces},
};
use crate::{
    bench::{
        noise::Noise,
        run::BenchError,
        target::{Done, Shape, TargetQueue},
    },
    request::Op,
    virtio::{
        Features, GuestRam, Status,
        command::{RawHeader, RawRange, kind},
        config::SECTOR_BYTES,
        driver::{DriverQueue, F_INDIRECT, F_NEXT, F_WRITE},
        ring::RingLayout,
    },
};

/// What stands at the status byte before the device has answered.
const NO_STATUS: u8 = 0xaa;

/// See the module.
pub(super) struct RingQueue<'a> {
    path: &'a Path,
    socket: &'a UnixStream,
    plan: &'a QueuePlan,
    ram: &'a Arc<GuestRam>,
    ring: DriverQueue,
    kick: EventFd,
    call: EventFd,
    poll: Duration,
    slots: Vec<Slot>,
    /// Requests were made available that the device was not shown.
    unshown: bool,
}

struct Slot {
    places: SlotPlaces,
    under_way: bool,
}

impl<'a> RingQueue<'a> {
    /// Queue `number`, with empty rings. The device does not know of it yet.
    pub(super) fn new(target: &'a VhostTarget, number: u32, shape: &Shape) -> Result<Self, BenchError> {
        let plan = &target.plan;
        let ram = &target.memory.ram;
        let event_idx = target.features.has(Features::EVENT_IDX);
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let mut slots = Vec::with_capacity(shape.depth);
        let mut bytes = vec![0; shape.block_bytes];
        let mut noise = Noise::new(shape.seed);
        for slot in 0..shape.depth as u64 {
            let places = plan.places(number, slot);
            noise.fill(&mut bytes);
            ram.write_slice(&bytes, places.data).expect("the memory was made for it");
            slots.push(Slot { places, under_way: false });
        }
        Ok(Self {
            path: &target.path,
            socket: &target.socket,
            plan,
            ram,
            ring: DriverQueue::new(Arc::clone(ram), plan.rings(number), event_idx),
            kick: event()?,
            call: event()?,
            poll: target.options.poll,
            slots,
            unshown: false,
        })
    }

    pub(super) fn layout(&self) -> RingLayout {
        self.ring.layout()
    }

    /// Written by the device.
    pub(super) fn call(&self) -> &EventFd {
        &self.call
    }

    /// Written to wake the device.
    pub(super) fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Writes the descriptors of a request, and makes it available. `data` is its memory and whether the device
    /// writes it.
    fn chain(&mut self, slot: usize, data: Option<(GuestAddress, u64, bool)>) {
        let SlotPlaces { header, status, table, .. } = self.slots[slot].places;
        let slot = u16::try_from(slot).expect("fewer than the descriptors");
        let first = if self.plan.indirect { 0 } else { slot * self.plan.per_request };
        let mut next = first;
        let mut put = |at: GuestAddress, len_bytes: u64, flags: u16| {
            next += 1;
            let len_bytes = u32::try_from(len_bytes).expect("a segment");
            let descriptor =
                Descriptor::new(at.0, len_bytes, flags, if flags & F_NEXT == 0 { 0 } else { next });
            if self.plan.indirect {
                let at = table.unchecked_add(16 * u64::from(next - 1));
                self.ram.write_obj(descriptor, at).expect("the memory was made for it");
            } else {
                self.ring.write_descriptor(next - 1, descriptor);
            }
        };
        put(header, size_of::<RawHeader>() as u64, F_NEXT);
        if let Some((start, len_bytes, device_writes)) = data {
            let direction = if device_writes { F_WRITE } else { 0 };
            let mut at = 0;
            while at < len_bytes {
                let len = self.plan.segment_bytes.min(len_bytes - at);
                put(start.unchecked_add(at), len, direction | F_NEXT);
                at += len;
            }
        }
        put(status, 1, F_WRITE);
        if self.plan.indirect {
            let table_bytes = 16 * u32::from(next);
            self.ring.write_descriptor(slot, Descriptor::new(table.0, table_bytes, F_INDIRECT, 0));
            self.ring.make_available(slot);
        } else {
            self.ring.make_available(first);
        }
        self.unshown = true;
    }

    /// Takes what the device gave back.
    fn take(&mut self, done: &mut Vec<Done>) -> Result<(), BenchError> {
        while let Some((id, _written_bytes)) = self.ring.next_used() {
            let step = if self.plan.indirect { 1 } else { u32::from(self.plan.per_request) };
            let slot = usize::try_from(id / step).expect("32 bits fit");
            let is_known = id.is_multiple_of(step) && self.slots.get(slot).is_some_and(|slot| slot.under_way);
            if !is_known {
                return Err(
                    self.protocol(format_args!("the device gave back chain {id}, which it did not have"))
                );
            }
            self.slots[slot].under_way = false;
            let status: u8 =
                self.ram.read_obj(self.slots[slot].places.status).expect("the memory was made for it");
            let result = match status {
                status if status == Status::Ok as u8 => Ok(()),
                status if status == Status::IoError as u8 => Err(Errno::IO),
                status if status == Status::Unsupported as u8 => Err(Errno::OPNOTSUPP),
                other => {
                    return Err(self.protocol(format_args!("the device answered with status {other:#x}")));
                }
            };
            done.push((slot, result));
        }
        Ok(())
    }

    /// Sleeps until the device signals, that moment has come, or the device is gone.
    fn sleep(&mut self, until: Option<Instant>) -> Result<(), BenchError> {
        let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout =
            timeout.map(|left| Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 }));
        // SAFETY: `call` is open as long as `self` is borrowed.
        #[allow(unsafe_code, reason = "the crate's event descriptor has no safe borrow")]
        let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        let mut fds = [PollFd::new(&call, PollFlags::IN), PollFd::new(self.socket, PollFlags::RDHUP)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(io::Error::from(errno).into()),
        }
        let is_signalled = !fds[0].revents().is_empty();
        let is_gone = !fds[1].revents().is_empty();
        match self.call.read() {
            // Whoever signalled may have been heard before.
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !is_signalled && is_gone => Err(
                BenchError::Gone(format!("{}: the device has closed the connection", self.path.display())),
            ),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn protocol(&self, why: std::fmt::Arguments<'_>) -> BenchError {
        BenchError::Protocol(format!("{}: {why}", self.path.display()))
    }
}

impl TargetQueue for RingQueue<'_> {
    fn submit(&mut self, slot: usize, op: Op, offset: u64, len_bytes: u64) -> Result<(), BenchError> {
        let places = self.slots[slot].places;
        let (asked, data) = match op {
            Op::Read => (kind::IN, Some((places.data, len_bytes, true))),
            Op::Write { fua: false } => (kind::OUT, Some((places.data, len_bytes, false))),
            Op::Flush => (kind::FLUSH, None),
            Op::Discard { fua: false } => {
                let num_sectors = u32::try_from(len_bytes / SECTOR_BYTES)
                    .map_err(|_| BenchError::Job(format!("a discard of {len_bytes} bytes")))?;
                let range = RawRange {
                    sector: (offset / SECTOR_BYTES).into(),
                    num_sectors: num_sectors.into(),
                    flags: U32::ZERO,
                };
                self.ram.write_slice(range.as_bytes(), places.range).expect("the memory was made for it");
                (kind::DISCARD, Some((places.range, size_of::<RawRange>() as u64, false)))
            }
            Op::Write { fua: true } | Op::Discard { fua: true } | Op::WriteZeroes { .. } | Op::Cache => {
                return Err(BenchError::Job(format!("virtio-blk has no request for {op:?}")));
            }
        };
        let sector = if asked == kind::IN || asked == kind::OUT { offset / SECTOR_BYTES } else { 0 };
        let header = RawHeader { kind: asked.into(), reserved: U32::ZERO, sector: sector.into() };
        self.ram.write_slice(header.as_bytes(), places.header).expect("the memory was made for it");
        self.ram.write_obj(NO_STATUS, places.status).expect("the memory was made for it");
        self.slots[slot].under_way = true;
        self.chain(slot, data);
        Ok(())
    }

    fn wait(&mut self, until: Option<Instant>, done: &mut Vec<Done>) -> Result<(), BenchError> {
        if std::mem::take(&mut self.unshown) && self.ring.publish() {
            self.kick.write(1)?;
        }
        let poll_until = (!self.poll.is_zero()).then(|| Instant::now() + self.poll);
        loop {
            self.take(done)?;
            let now = Instant::now();
            if !done.is_empty() || until.is_some_and(|until| now >= until) {
                return Ok(());
            }
            if poll_until.is_some_and(|until| now < until) {
                std::hint::spin_loop();
            } else if !self.ring.enable_signal() {
                self.sleep(until)?;
            }
        }
    }

    fn fill(&mut self, slot: usize, bytes: &[u8]) {
        self.ram.write_slice(bytes, self.slots[slot].places.data).expect("the memory was made for it");
    }

    fn copy(&self, slot: usize, bytes: &mut [u8]) {
        self.ram.read_slice(bytes, self.slots[slot].places.data).expect("the memory was made for it");
    }
}
