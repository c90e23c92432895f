//! One queue of a device is reset and set up anew, elsewhere in memory, while the device goes on (virtio 1.2, section
//! 2.6.1). Also: what of a queue may change when.

use std::sync::Arc;

use blk_backend::{
    disk::{Disk, DiskOptions},
    virtio::{DeviceOptions, chain::GuestRange, driver::DriverQueue, ring::RingLayout},
};
use img_core::image::ImageName;
use img_tests::{
    board::{Rules, board},
    peer::wait_until,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_runner::{machine::Hardware, virtio::Block};

/// Where the first device's BAR is, and what is in it (sections 4.1.4.3 and 4.1.4.4).
const BAR: u64 = 0xC000_0000;
const FEATURES_SELECT: u64 = 0;
const FEATURES: u64 = 4;
const DRIVER_SELECT: u64 = 8;
const DRIVER_FEATURES: u64 = 12;
const STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_ADDRESSES: [u64; 3] = [32, 40, 48];
const QUEUE_RESET: u64 = 58;
const INTERRUPT_STATUS: u64 = 0x1000;
const DOORBELLS: u64 = 0x3000;

const NEEDS_RESET: u8 = 0x40;
/// Interrupt status: the configuration changed, and the status with it.
const CHANGED: u8 = 2;
/// Version 1 and reset of queues, in the upper word of features.
const WANTED: u32 = 1 | 1 << 8;
const SECTOR_BYTES: u32 = 512;
const SECTOR: usize = SECTOR_BYTES as usize;
const QUEUES: u16 = 2;

struct Driver(Hardware, Arc<Rules>);

impl Driver {
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.pci().write_memory(BAR + offset, data);
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.0.pci().read_memory(BAR + offset, &mut data);
        data
    }

    /// Sets a queue up at `base`, and starts it.
    fn set_up(&self, index: u16, base: u64) -> DriverQueue {
        let rings = RingLayout::packed_at(GuestAddress(base), 16);
        let queue = DriverQueue::new(Arc::clone(self.0.memory()), rings, false);
        self.write(QUEUE_SELECT, &index.to_le_bytes());
        self.write(QUEUE_SIZE, &rings.size.to_le_bytes());
        for (offset, at) in QUEUE_ADDRESSES.into_iter().zip([rings.descriptors, rings.available, rings.used])
        {
            self.write(offset, &at.0.to_le_bytes());
        }
        self.write(QUEUE_ENABLE, &1u16.to_le_bytes());
        queue
    }

    /// Reads the sector `number` by way of a queue.
    fn read_sector(&self, index: u16, queue: &mut DriverQueue, number: u64) -> [u8; SECTOR] {
        let range = |start: u64, len_bytes: u32| GuestRange { start: GuestAddress(start), len_bytes };
        let (header, data, status) = (0x2_0000, 0x2_1000, 0x2_2000);
        let memory = self.0.memory();
        let request = (u128::from(number) << 64).to_le_bytes();
        memory.write_slice(&request, GuestAddress(header)).expect("inside");
        memory.write_slice(&[0xFF], GuestAddress(status)).expect("inside");
        queue.add(&[range(header, 16)], &[range(data, SECTOR_BYTES), range(status, 1)]).expect("room");
        if queue.publish() {
            self.write(DOORBELLS + u64::from(index) * 4, &index.to_le_bytes());
        }
        wait_until("the request is answered", || queue.pop().is_some());
        assert_eq!(memory.read_obj::<u8>(GuestAddress(status)).expect("inside"), 0);
        let mut read = [0; SECTOR];
        memory.read_slice(&mut read, GuestAddress(data)).expect("inside");
        read
    }

    fn reset_queue(&self, index: u16) {
        self.write(QUEUE_SELECT, &index.to_le_bytes());
        self.write(QUEUE_RESET, &1u16.to_le_bytes());
    }

    /// Resets the device and brings it to where queues are set up.
    fn negotiate(&self, features: u32) {
        self.write(STATUS, &[0]);
        self.write(STATUS, &[3]);
        self.write(FEATURES_SELECT, &1u32.to_le_bytes());
        assert_eq!(u32::from_le_bytes(self.read(FEATURES)) & WANTED, WANTED);
        self.write(DRIVER_SELECT, &1u32.to_le_bytes());
        self.write(DRIVER_FEATURES, &features.to_le_bytes());
        self.write(STATUS, &[0xB]);
        assert_eq!(self.read(STATUS), [0xB]);
    }
}

fn sector(number: u64) -> [u8; SECTOR] {
    [u8::try_from(number + 1).expect("few sectors"); SECTOR]
}

#[test]
fn a_queue_is_reset_while_its_device_runs() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let content: Vec<u8> = (0..64).flat_map(sector).collect();
    std::fs::write(file.path(), content).expect("room");
    let name = ImageName::parse(file.path().to_str().expect("text")).expect("a name");
    let options = DiskOptions { format: Some("raw".to_owned()), ..DiskOptions::default() };
    let disk = Disk::open(&name, &options).expect("it opens");
    let (mut hardware, rules) = board();
    let options = DeviceOptions { queues: QUEUES, ..DeviceOptions::default() };
    hardware.add_device(Box::new(Block::new(&disk, &options, |_| {}).expect("a device"))).expect("a slot");
    let driver = Driver(hardware, rules);

    driver.negotiate(WANTED);
    let [mut first, mut second] = [(0, 0x1000), (1, 0x4000)].map(|(index, at)| driver.set_up(index, at));
    driver.write(STATUS, &[0xF]);
    assert_eq!(driver.read_sector(0, &mut first, 3), sector(3));
    // A queue that runs stays where it is.
    driver.write(QUEUE_SELECT, &0u16.to_le_bytes());
    driver.write(QUEUE_ADDRESSES[0], &0u64.to_le_bytes());
    assert_eq!(driver.read_sector(0, &mut first, 4), sector(4));
    for base in [0x8000u64, 0x1000] {
        driver.reset_queue(0);
        assert_eq!([driver.read(QUEUE_ENABLE), driver.read(QUEUE_RESET)], [[0; 2]; 2]);
        assert_eq!(driver.read_sector(1, &mut second, 5), sector(5), "the other queue goes on");
        let mut anew = driver.set_up(0, base);
        assert_eq!(driver.read_sector(0, &mut anew, 6), sector(6));
    }
    assert_eq!(driver.read(STATUS), [0xF]);

    // One that is set up where there is no memory breaks the device, which says so.
    driver.reset_queue(0);
    driver.write(QUEUE_ADDRESSES[0], &0xFFFF_0000u64.to_le_bytes());
    driver.write(QUEUE_ENABLE, &1u16.to_le_bytes());
    wait_until("the device wants to be reset", || driver.read(STATUS) == [0xF | NEEDS_RESET]);
    assert_eq!(driver.read(INTERRUPT_STATUS), [CHANGED], "the driver is told");

    // Who did not ask for it cannot do it.
    driver.negotiate(1);
    let mut first = driver.set_up(0, 0x1000);
    driver.write(STATUS, &[0xF]);
    driver.reset_queue(0);
    assert_eq!(driver.read(QUEUE_ENABLE), [1, 0]);
    assert_eq!(driver.read_sector(0, &mut first, 7), sector(7));
    assert_eq!(driver.1.doorbells(), [BAR + DOORBELLS, BAR + DOORBELLS + 4]);
}
