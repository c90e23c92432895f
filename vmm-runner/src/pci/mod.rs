//! The PCI bus: one root bus, configuration by the ports 0xCF8 and 0xCFC, and memory windows that functions decode.

mod config;
mod fixed;
mod msix;

use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

pub use config::{Bar, ConfigSpace, Identity};
pub(crate) use fixed::{BOARD_SUBSYSTEM, VENDOR_INTEL};
pub use fixed::{FixedFunction, host_bridge, isa_bridge};
pub use msix::MsixTable;
pub(crate) use msix::{ENABLE as MSIX_ENABLE, MASK_ALL as MSIX_MASK_ALL, table_bytes as msix_table_bytes};

use crate::{
    Error, Result,
    bus::PortDevice,
    machine::{End, RunControl},
};

/// Slots of a bus.
const SLOTS: usize = 32;
/// Functions of a slot.
const FUNCTIONS: usize = 8;

/// A PCI function. Shared by the processors.
pub trait PciFunction: Send + Sync {
    /// Four bytes of configuration space; `register` is a multiple of four below 256.
    fn read_config(&self, register: u8) -> u32;

    /// Writes one, two or four bytes from `offset` on, inside one register.
    fn write_config(&self, offset: u8, data: &[u8]);

    /// The memory that it decodes now, by BAR.
    fn decoded(&self) -> Vec<(usize, Range<u64>)>;

    /// A read of `data.len()` bytes of what a BAR decodes; the range lies inside.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// A write, likewise.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);
}

/// A range that a function decodes.
struct Window {
    range: Range<u64>,
    bar: usize,
    function: Arc<dyn PciFunction>,
}

/// The root bus.
pub struct PciBus {
    /// By slot times eight plus function.
    functions: RwLock<Vec<Option<Arc<dyn PciFunction>>>>,
    /// By start. Windows that a guest made overlap are all kept; the lowest one answers.
    windows: RwLock<Vec<Window>>,
}

impl fmt::Debug for PciBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciBus").finish_non_exhaustive()
    }
}

impl Default for PciBus {
    fn default() -> Self {
        Self {
            functions: RwLock::new((0..SLOTS * FUNCTIONS).map(|_| None).collect()),
            windows: RwLock::default(),
        }
    }
}

impl PciBus {
    /// Puts a function into a slot.
    ///
    /// # Errors
    /// When something is there, or there is no such slot.
    pub fn insert(&self, slot: u8, function: u8, device: Arc<dyn PciFunction>) -> Result<()> {
        {
            let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
            let index = usize::from(slot) * FUNCTIONS + usize::from(function);
            let place =
                functions.get_mut(index).filter(|place| place.is_none() && usize::from(function) < FUNCTIONS);
            *place.ok_or_else(|| Error::Invalid(format!("PCI slot {slot}.{function} is not free")))? =
                Some(device);
        }
        self.note_windows();
        Ok(())
    }

    /// The lowest slot that is free.
    ///
    /// # Errors
    /// When all are taken.
    pub fn free_slot(&self) -> Result<u8> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        let free =
            (0u8..).zip(functions.chunks(FUNCTIONS)).find(|(_, slot)| slot.iter().all(Option::is_none));
        free.map(|(slot, _)| slot)
            .ok_or_else(|| Error::Invalid("no PCI slot is left (29 devices at most)".to_owned()))
    }

    /// A read of device memory by a processor. Where nothing is, all bits are one.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let Some((function, bar, offset)) = self.find(address, data.len()) {
            function.read_bar(bar, offset, data);
        }
    }

    /// A write to device memory by a processor.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.find(address, data.len()) {
            function.write_bar(bar, offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(Arc<dyn PciFunction>, usize, u64)> {
        let windows = self.windows.read().unwrap_or_else(PoisonError::into_inner);
        let end = address.checked_add(length as u64)?;
        let window =
            windows.iter().find(|window| window.range.start <= address && end <= window.range.end)?;
        Some((Arc::clone(&window.function), window.bar, address - window.range.start))
    }

    fn note_windows(&self) {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        let mut windows = self.windows.write().unwrap_or_else(PoisonError::into_inner);
        windows.clear();
        for function in functions.iter().flatten() {
            for (bar, range) in function.decoded() {
                windows.push(Window { range, bar, function: Arc::clone(function) });
            }
        }
        windows.sort_by_key(|window| window.range.start);
    }

    fn function(&self, index: usize) -> Option<Arc<dyn PciFunction>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).get(index)?.clone()
    }
}

/// Configuration mechanism 1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2): an address port and four data
/// ports. Among them is the reset register of a PC's chipset: a byte, where the address port takes words only.
#[derive(Debug)]
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    control: Arc<RunControl>,
    address: u32,
}

/// The reset register, from the first port.
const RESET: u16 = 1;
/// The reset register's bit that resets the processors.
const RESET_CPU: u8 = 1 << 2;

/// The first of its ports.
pub const CONFIG_PORTS: u16 = 0xCF8;
/// How many they are.
pub const CONFIG_PORT_COUNT: u16 = 8;
/// The address port's bit that lets the data ports through.
const CONFIG_ENABLE: u32 = 1 << 31;

impl ConfigPorts {
    /// The ports of `bus`.
    #[must_use]
    pub fn new(bus: Arc<PciBus>, control: Arc<RunControl>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { bus, control, address: 0 }))
    }

    /// The function that the address names, and the register.
    fn target(&self) -> Option<(Arc<dyn PciFunction>, u8)> {
        let bus = self.address >> 16 & 0xFF;
        if self.address & CONFIG_ENABLE == 0 || bus != 0 {
            return None;
        }
        let [register, function, ..] = self.address.to_le_bytes();
        Some((self.bus.function(usize::from(function))?, register & 0xFC))
    }
}

impl PortDevice for ConfigPorts {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        let within = usize::from(offset % 4);
        let value = if offset < 4 {
            // The address port is a register of four bytes.
            if within != 0 || data.len() != 4 {
                return;
            }
            self.address
        } else {
            self.target().map_or(u32::MAX, |(function, register)| function.read_config(register))
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes().into_iter().skip(within)) {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        if offset < 4 {
            if let Ok(address) = data.try_into() {
                self.address = u32::from_le_bytes(address);
            } else if offset == RESET && data[0] & RESET_CPU != 0 {
                self.control.end(End::Reset);
            }
            return;
        }
        let within = u8::try_from(offset - 4).unwrap_or(0);
        let length = data.len().min(4 - usize::from(within));
        let Some((function, register)) = self.target() else { return };
        function.write_config(register + within, &data[..length]);
        // The command register and the BARs say what is decoded.
        if register < 0x28 {
            self.bus.note_windows();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(ports: &mut ConfigPorts, address: u32, within: u16, length: usize) -> u32 {
        ports.write(0, &(CONFIG_ENABLE | address).to_le_bytes());
        let mut data = vec![0xFF; length];
        ports.read(4 + within, &mut data);
        data.resize(4, 0);
        u32::from_le_bytes(data.try_into().expect("four bytes"))
    }

    #[test]
    fn the_bridges_are_found_where_firmware_looks_for_them() {
        let bus = Arc::new(PciBus::default());
        bus.insert(0, 0, host_bridge()).expect("free");
        bus.insert(1, 0, isa_bridge()).expect("free");
        assert!(bus.insert(1, 0, isa_bridge()).is_err());
        assert_eq!(bus.free_slot().expect("one of 30"), 2);
        let ports = ConfigPorts::new(bus, Arc::default());
        let mut ports = ports.lock().expect("no panic");
        assert_eq!(read(&mut ports, 0, 0, 4), 0x1237_8086);
        assert_eq!(read(&mut ports, 0, 2, 2), 0x1237);
        assert_eq!(read(&mut ports, 1 << 11, 0, 4), 0x7000_8086);
        // Header type: several functions.
        assert_eq!(read(&mut ports, 1 << 11 | 0xC, 2, 1), 0x80);
        assert_eq!(read(&mut ports, 2 << 11, 0, 4), u32::MAX);
        assert_eq!(read(&mut ports, 1 << 16, 0, 4), u32::MAX);
        // Nothing without the enable bit.
        ports.write(0, &0u32.to_le_bytes());
        let mut data = [0xFF; 4];
        ports.read(4, &mut data);
        assert_eq!(data, [0xFF; 4]);
    }
}
