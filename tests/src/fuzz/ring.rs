//! A guest that owns its rings and its memory, and writes whatever it likes there.

use std::sync::Arc;

use blk_backend::{
    disk::{Disk, DiskOptions},
    in_process::QueueThread,
    virtio::{
        Device, DeviceOptions, Features, GuestRam, chain::GuestRange, driver::DriverQueue, ring::RingLayout,
        setup::QueueSetup,
    },
};
use img_core::{
    format::OpenMode,
    storage::{MemoryStorage, Storage},
};
use vm_memory::{Bytes, GuestAddress};

use super::script::Script;
use crate::memory;

const RAM_BYTES: usize = 0x8000;
const SIZE: u16 = 16;
/// Behind the rings: headers, status bytes and an indirect table, then data.
const REQUESTS: u64 = 0x400;
const DATA: u64 = 0x1000;

fn range(start: u64, len_bytes: u32) -> GuestRange {
    GuestRange { start: GuestAddress(start), len_bytes }
}

/// A few sound requests, then bytes of the input over rings, headers and tables: three of it are a place and what to
/// write there. The queue answers or breaks, and ends; what it says it did is possible.
pub fn ring(input: &[u8]) {
    let bytes = Script::new(&[]).image().bytes;
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("fuzz.qcow2", &bytes));
    let image = memory::open(storage, OpenMode::Write).expect("nothing is broken in it");
    let disk = Disk::over(image, &DiskOptions::default());
    let device = Device::new(&disk, &DeviceOptions::default()).expect("a device");
    let accepted = device.offered();
    device.negotiate(accepted).expect("what was offered");

    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("memory");
    let ram = Arc::new(ram);
    let rings = RingLayout::packed_at(GuestAddress(0), SIZE);
    let mut driver = DriverQueue::new(Arc::clone(&ram), rings, true);
    for (index, kind) in (0u64..).zip([0u32, 1, 4, 8, 11, 13]) {
        let at = REQUESTS + index * 128;
        let sector = index;
        let header = (u128::from(sector) << 64 | u128::from(kind)).to_le_bytes();
        ram.write_slice(&header, GuestAddress(at)).expect("inside");
        let (readable, writable) = match kind {
            0 => (vec![range(at, 16)], vec![range(DATA, 512), range(at + 16, 1)]),
            1 => (vec![range(at, 16), range(DATA + 512, 512)], vec![range(at + 16, 1)]),
            8 => (vec![range(at, 16)], vec![range(DATA, 20), range(at + 16, 1)]),
            11 | 13 => {
                let sectors = (u128::from(8u32) << 64).to_le_bytes();
                ram.write_slice(&sectors, GuestAddress(at + 32)).expect("inside");
                (vec![range(at, 16), range(at + 32, 16)], vec![range(at + 16, 1)])
            }
            _ => (vec![range(at, 16)], vec![range(at + 16, 1)]),
        };
        let head = if kind == 1 {
            driver.add_indirect(GuestAddress(at + 48), &readable, &writable)
        } else {
            driver.add(&readable, &writable)
        };
        head.expect("sixteen descriptors are enough");
    }
    let _nobody_is_asleep = driver.publish();
    for change in input.chunks_exact(3) {
        let at = u64::from(u16::from_le_bytes([change[0], change[1]])) % DATA;
        ram.write_slice(&change[2..], GuestAddress(at)).expect("inside");
    }

    let setup = QueueSetup {
        ram: Arc::clone(&ram),
        rings,
        next_avail: 0,
        features: if input.len().is_multiple_of(2) {
            accepted
        } else {
            accepted.without(Features::EVENT_IDX)
        },
        kick: None,
        call: None,
        error: None,
        inflight: None,
        redo: None,
        log: None,
        paused: false,
    };
    let before = rings.used_idx(&ram).expect("inside");
    let queue = QueueThread::start(&device, "fuzz", setup).expect("its rings are inside");
    // It drains before it stops; a break is the other end.
    queue.pause().expect("the thread lives");
    let state = queue.stop().expect("the thread lives");
    assert_eq!(state.is_broken, device.needs_reset());
    // As the device counts: a guest may have it read into the rings.
    let answered = state.next_used.wrapping_sub(before);
    assert!(answered <= state.next_avail, "{answered} answers to {} requests", state.next_avail);
    if !state.is_broken {
        assert_eq!(answered, state.next_avail, "what was taken is answered");
    }
}
