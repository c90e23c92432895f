//! A guest that reads and writes the registers of all devices as it likes: ports, PCI configuration, BARs, fw_cfg and
//! its DMA, with memory that it has written before.

use std::sync::Arc;

use blk_backend::{
    disk::{Disk, DiskOptions},
    virtio::DeviceOptions,
};
use img_core::{
    format::OpenMode,
    storage::{MemoryStorage, Storage},
};
use vm_memory::{Bytes, GuestAddress};
use vmm_runner::{
    machine::{End, Hardware, MachineConfig},
    virtio::{Block, Entropy},
};

use super::script::Script;
use crate::{board::board, memory};

/// Where there is something, and where nothing should be.
const PORTS: [u16; 12] = [0x60, 0x70, 0x92, 0x3F8, 0x402, 0x510, 0x514, 0x600, 0xB000, 0xCD0, 0xCF8, 0xFFF8];
/// Bus addresses of all functions, as configuration ports have them.
const FUNCTIONS: [u32; 5] = [0, 1 << 11, 1 << 11 | 3 << 8, DISK, ENTROPY];
const DISK: u32 = 2 << 11;
const ENTROPY: u32 = 3 << 11;
/// The parts of a transport's BAR: common, interrupt status, configuration, doorbells, MSI-X and its pending bits.
const PARTS: [u64; 6] = [0, 0x1000, 0x2000, 0x3000, 0x8000, 0x9000];
const DOORBELLS: u64 = 0x3000;
const CONFIG_ADDRESS: u16 = 0xCF8;
const CONFIG_DATA: u16 = 0xCFC;
/// The guest's hands.
struct Guest(Hardware);

impl Guest {
    fn write(&self, port: u16, length: usize, value: u32) {
        self.0.ports().write(port, &value.to_le_bytes()[..length]);
    }

    fn read(&self, port: u16, length: usize) -> u32 {
        let mut data = [0; 4];
        self.0.ports().read(port, &mut data[..length]);
        u32::from_le_bytes(data)
    }

    fn read_config(&self, function: u32, register: u32) -> u32 {
        self.write(CONFIG_ADDRESS, 4, 1 << 31 | function | register);
        self.read(CONFIG_DATA, 4)
    }

    fn write_config(&self, function: u32, register: u32, within: u16, length: usize, value: u32) {
        self.write(CONFIG_ADDRESS, 4, 1 << 31 | function | register);
        self.write(CONFIG_DATA + within, length, value);
    }

    /// Where the BAR of a device is, if it is anywhere.
    fn bar(&self, function: u32) -> Option<u64> {
        let is_on = self.read_config(function, 4) & 2 != 0;
        let address = u64::from(self.read_config(function, 0x10) & !0xF);
        (is_on && address != 0).then_some(address)
    }

    fn write_bar(&self, function: u32, offset: u64, data: &[u8]) {
        if let Some(bar) = self.bar(function) {
            self.0.pci().write_memory(bar + offset, data);
        }
    }

    /// Brings a device up as a driver would, with one queue of which the rings are at `rings`.
    fn drive(&self, function: u32, rings: u32) {
        let write = |offset: u64, data: &[u8]| self.write_bar(function, offset, data);
        write(20, &[0]);
        write(20, &[3]);
        // Version 1, and the reset of queues where it is offered.
        write(0, &1u32.to_le_bytes());
        write(8, &1u32.to_le_bytes());
        let offered = self.bar(function).map_or(0, |bar| {
            let mut data = [0; 4];
            self.0.pci().read_memory(bar + 4, &mut data);
            u32::from_le_bytes(data)
        });
        write(12, &(offered & 0x101).to_le_bytes());
        write(20, &[0xB]);
        write(22, &0u16.to_le_bytes());
        write(24, &16u16.to_le_bytes());
        for (offset, at) in [(32, rings), (40, rings + 0x1000), (48, rings + 0x2000)] {
            write(offset, &at.to_le_bytes());
        }
        write(28, &1u16.to_le_bytes());
        write(20, &[0xF]);
        write(DOORBELLS, &0u16.to_le_bytes());
    }

    /// Who every function is.
    fn identities(&self) -> Vec<u32> {
        let registers =
            FUNCTIONS.iter().flat_map(|&function| [(function, 0), (function, 8), (function, 0x2C)]);
        registers.map(|(function, register)| self.read_config(function, register)).collect()
    }

    /// One thing that a script says.
    fn act(&self, script: &mut Script<'_>) {
        let kind = script.byte();
        let length = [1, 2, 4][usize::from(kind >> 4) % 3];
        let place = script.byte();
        let device = if place & 1 == 0 { DISK } else { ENTROPY };
        match kind % 10 {
            0..=2 => {
                let port =
                    PORTS[usize::from(place) % PORTS.len()].saturating_add(u16::from(script.byte() % 16));
                if kind.is_multiple_of(10) {
                    self.read(port, length);
                } else {
                    self.write(port, length, number(script));
                }
            }
            3 | 4 => {
                let function = FUNCTIONS[usize::from(place) % FUNCTIONS.len()];
                let register = u32::from(script.byte());
                let within = u16::from(script.byte() % 4);
                self.write_config(function, register & 0xFC, within, length, number(script));
            }
            5 | 6 => {
                let offset = PARTS[usize::from(place >> 1) % PARTS.len()] + u64::from(script.byte());
                let value = u64::from(number(script)) | u64::from(number(script)) << 32;
                self.write_bar(device, offset, &value.to_le_bytes()[..1 << ((kind >> 4) % 4)]);
            }
            7 => {
                let offset = PARTS[usize::from(place >> 1) % PARTS.len()] + u64::from(script.byte());
                if let Some(bar) = self.bar(device) {
                    let mut data = [0; 8];
                    self.0.pci().read_memory(bar + offset, &mut data[..1 << ((kind >> 4) % 4)]);
                }
            }
            8 => {
                let at = u64::from(script.u16()) << 3;
                let value = u64::from(number(script)) | u64::from(number(script)) << 32;
                // Behind the end of memory there is nothing to write to.
                self.0.memory().write_obj(value.to_be(), GuestAddress(at)).ok();
            }
            _ => self.drive(device, u32::from(script.u16()) << 4),
        }
    }
}

/// A number of the kind that devices trip over.
fn number(script: &mut Script<'_>) -> u32 {
    match script.byte() % 4 {
        0 => u32::from(script.byte()),
        1 => 1 << (script.byte() % 32),
        2 => u32::MAX - u32::from(script.byte()),
        _ => u32::from(script.u16()) << 16 | u32::from(script.u16()),
    }
}

/// A machine without processors, which does what the input says until it ends; what must hold of it does.
pub fn machine(input: &[u8]) {
    let mut script = Script::new(input);
    let bytes = Script::new(&[]).image().bytes;
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("fuzz.qcow2", &bytes));
    let image = memory::open(storage, OpenMode::Write).expect("nothing is broken in it");
    let disk = Disk::over(image, &DiskOptions::default());
    let (mut hardware, rules) = board();
    let block = Block::new(&disk, &DeviceOptions::default(), |_| {}).expect("a device");
    hardware.add_device(Box::new(block)).expect("a slot");
    hardware.add_device(Box::new(Entropy::default())).expect("a slot");
    hardware.add_firmware_devices(&MachineConfig::default(), None).expect("free ports");
    let guest = Guest(hardware);

    let before = guest.identities();
    let preset = script.byte();
    if preset & 1 != 0 {
        guest.write_config(FUNCTIONS[2], 0x40, 0, 4, 0xB001);
        guest.write_config(FUNCTIONS[2], 0x80, 0, 1, 1);
    }
    for (bit, device) in [(2, DISK), (4, ENTROPY)] {
        if preset & bit != 0 {
            guest.drive(device, 0x8000);
        }
    }
    while !script.is_empty() {
        guest.act(&mut script);
    }

    assert_eq!(guest.identities(), before);
    let end = guest.0.control().ended();
    assert!(matches!(end, None | Some(End::PowerOff | End::Reset)), "{end:?}");
    let bars: Vec<u64> = [DISK, ENTROPY].into_iter().filter_map(|device| guest.bar(device)).collect();
    for address in &rules.doorbells() {
        let is_behind_bar = |bar: &u64| (bar + DOORBELLS..bar + DOORBELLS + 0x1000).contains(address);
        assert!(bars.iter().any(is_behind_bar), "a doorbell at {address:#x}, BARs at {bars:#x?}");
    }
}
