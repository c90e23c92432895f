//! Functions that are there to be recognised: the bridges of an i440FX PC.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use super::{ConfigSpace, Identity, PciFunction};

/// A function with a configuration space and nothing behind it.
#[derive(Debug)]
pub struct FixedFunction(Mutex<ConfigSpace>);

impl FixedFunction {
    /// A function with these registers.
    #[must_use]
    pub fn new(space: ConfigSpace) -> Arc<Self> {
        Arc::new(Self(Mutex::new(space)))
    }
}

impl PciFunction for FixedFunction {
    fn read_config(&self, register: u8) -> u32 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(register)
    }

    fn write_config(&self, offset: u8, data: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }

    fn decoded(&self) -> Vec<(usize, Range<u64>)> {
        Vec::new()
    }

    fn read_bar(&self, _: usize, _: u64, _: &mut [u8]) {}

    fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
}

/// Intel.
pub(crate) const VENDOR_INTEL: u16 = 0x8086;
/// The subsystem by which guests know a virtual board.
pub(crate) const BOARD_SUBSYSTEM: (u16, u16) = (0x1AF4, 0x1100);
/// Programmable attribute map: says where the ROM area of a real board is RAM. Here it always is.
const PAM: std::ops::RangeInclusive<usize> = 0x59..=0x5F;

/// The 440FX memory controller. Firmware that knows it finds RAM behind the ROM area.
#[must_use]
pub fn host_bridge() -> Arc<FixedFunction> {
    let mut space = ConfigSpace::new(Identity {
        vendor: VENDOR_INTEL,
        device: 0x1237,
        revision: 2,
        class: 0x06_0000,
        subsystem: BOARD_SUBSYSTEM,
        is_multifunction: false,
    });
    for register in PAM {
        space.add_register(register, if register == 0x59 { 0x30 } else { 0x33 }, 0xFF);
    }
    FixedFunction::new(space)
}

/// The PIIX3 bridge to the ISA devices.
#[must_use]
pub fn isa_bridge() -> Arc<FixedFunction> {
    let mut space = ConfigSpace::new(Identity {
        vendor: VENDOR_INTEL,
        device: 0x7000,
        revision: 0,
        class: 0x06_0100,
        subsystem: BOARD_SUBSYSTEM,
        is_multifunction: true,
    });
    // Routing of the four PCI interrupt lines, which nothing here uses: off.
    for register in 0x60..0x64 {
        space.add_register(register, 0x80, 0xFF);
    }
    FixedFunction::new(space)
}
