//! The configuration space of one function (PCI Local Bus Specification 3.0, chapter 6).

use std::ops::Range;

use super::super::{Error, Result};

/// Length of the space in bytes.
const BYTES: usize = 256;
/// The header ends here, and capabilities may begin.
const HEADER_END: usize = 0x40;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2C;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;

/// Command: answers accesses to its memory.
const COMMAND_MEMORY: u8 = 1 << 1;
/// Command: I/O space, memory space, bus master.
const COMMAND_MASK: [u8; 2] = [0x07, 0x04];
/// Status: there are capabilities.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, as 0xCCSSPP.
    pub class: u32,
    /// Subsystem vendor and subsystem.
    pub subsystem: (u16, u16),
    /// The slot has more than function 0.
    pub is_multifunction: bool,
}

/// A 32-bit memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Which of the six.
    pub index: usize,
    /// Size; a power of two of 16 or more.
    pub size_bytes: u32,
    /// Where it is at first.
    pub address: u32,
}

/// Registers, and which of their bits a guest may change.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    bars: Vec<Bar>,
    last_capability: Option<usize>,
    capabilities_end: usize,
}

impl ConfigSpace {
    /// The header of a function.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; BYTES],
            writable: [0; BYTES],
            bars: Vec::new(),
            last_capability: None,
            capabilities_end: HEADER_END,
        };
        space.set_u16(0, identity.vendor);
        space.set_u16(2, identity.device);
        let class = identity.class << 8 | u32::from(identity.revision);
        space.bytes[8..12].copy_from_slice(&class.to_le_bytes());
        space.bytes[0x0E] = u8::from(identity.is_multifunction) << 7;
        space.set_u16(SUBSYSTEM, identity.subsystem.0);
        space.set_u16(SUBSYSTEM + 2, identity.subsystem.1);
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_MASK);
        space.writable[0x0C] = 0xFF; // cache line size, which means nothing here
        space.writable[INTERRUPT_LINE] = 0xFF;
        space
    }

    /// Adds a BAR, and lets the function answer there.
    pub fn add_bar(&mut self, bar: Bar) {
        assert!(
            bar.size_bytes.is_power_of_two() && bar.size_bytes >= 16 && bar.index < 6,
            "a BAR of this machine"
        );
        let at = BAR0 + bar.index * 4;
        self.bytes[at..at + 4].copy_from_slice(&bar.address.to_le_bytes());
        self.writable[at..at + 4].copy_from_slice(&(!(bar.size_bytes - 1)).to_le_bytes());
        self.bytes[COMMAND] |= COMMAND_MEMORY;
        self.bars.push(bar);
    }

    /// Appends a capability, whose first byte is its id; `body` follows the link to the next one. `writable` says
    /// which bits of the body a guest may change. Returns where the capability stands.
    ///
    /// # Errors
    /// When there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<usize> {
        let at = self.capabilities_end;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        if end > BYTES {
            return Err(Error::Invalid("a PCI function has too many capabilities".to_owned()));
        }
        let link = self.last_capability.map_or(CAPABILITIES, |last| last + 1);
        self.bytes[link] = u8::try_from(at).expect("inside 256 bytes");
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[at] = id;
        self.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        let mask = writable.len().min(body.len());
        self.writable[at + 2..at + 2 + mask].copy_from_slice(&writable[..mask]);
        (self.last_capability, self.capabilities_end) = (Some(at), end);
        Ok(at)
    }

    /// Lets a guest change bits of a register of its own kind, with a value at first.
    pub fn add_register(&mut self, offset: usize, value: u8, writable: u8) {
        self.bytes[offset] = value;
        self.writable[offset] = writable;
    }

    /// Four bytes; `register` is a multiple of four.
    #[must_use]
    pub fn read(&self, register: u8) -> u32 {
        let at = usize::from(register & 0xFC);
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("four bytes"))
    }

    /// Writes the bits that a guest may change.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        for (at, &value) in (usize::from(offset)..BYTES).zip(data) {
            self.bytes[at] = self.bytes[at] & !self.writable[at] | value & self.writable[at];
        }
    }

    /// One byte.
    #[must_use]
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes[offset]
    }

    /// Changes a byte that only the device changes.
    pub fn set_byte(&mut self, offset: usize, value: u8) {
        self.bytes[offset] = value;
    }

    /// The memory that it decodes now, by BAR.
    #[must_use]
    pub fn decoded(&self) -> Vec<(usize, Range<u64>)> {
        if self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let ranges = self.bars.iter().map(|bar| {
            let at = BAR0 + bar.index * 4;
            let word = u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("four bytes"));
            let start = u64::from(word & !0xF);
            (bar.index, start..start + u64::from(bar.size_bytes))
        });
        // One that is being sized, or was never placed, is nowhere.
        ranges.filter(|(_, range)| range.start != 0 && range.end <= 1 << 32).collect()
    }

    fn set_u16(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1AF4,
            device: 0x1042,
            revision: 1,
            class: 0x01_0000,
            subsystem: (0x1AF4, 0x1100),
            is_multifunction: false,
        });
        space.add_bar(Bar { index: 0, size_bytes: 0x1_0000, address: 0xC000_0000 });
        space
    }

    #[test]
    fn a_bar_tells_its_size_and_moves() {
        let mut space = space();
        assert_eq!(space.decoded(), [(0, 0xC000_0000..0xC001_0000)]);
        space.write(0x10, &u32::MAX.to_le_bytes());
        assert_eq!(space.read(0x10), 0xFFFF_0000);
        space.write(0x10, &0xFEBF_0000u32.to_le_bytes());
        assert_eq!(space.decoded(), [(0, 0xFEBF_0000..0xFEC0_0000)]);
        space.write(0x04, &[0, 0]);
        assert_eq!(space.decoded(), []);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[]).expect("room");
        let second = space.add_capability(0x11, &[4; 10], &[0xFF]).expect("room");
        assert_eq!(usize::from(space.byte(CAPABILITIES)), first);
        assert_eq!(usize::from(space.byte(first + 1)), second);
        assert_eq!(space.byte(second + 1), 0);
        assert!(space.add_capability(9, &[0; 250], &[]).is_err());
        space.write(u8::try_from(second).expect("a byte"), &[0xAA; 4]);
        assert_eq!([space.byte(second), space.byte(second + 2), space.byte(second + 3)], [0x11, 0xAA, 4]);
    }

    proptest! {
        #[test]
        fn what_identifies_a_function_never_changes(
            writes in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 1..=4)), 0..64)
        ) {
            let mut space = space();
            let before: Vec<u32> = [0x00, 0x08, 0x2C].map(|register| space.read(register)).to_vec();
            for (offset, data) in writes {
                space.write(offset, &data);
                for (_, range) in space.decoded() {
                    prop_assert_eq!(range.start % 0x1_0000, 0);
                }
            }
            prop_assert_eq!(before, [0x00, 0x08, 0x2C].map(|register| space.read(register)).to_vec());
        }
    }
}
