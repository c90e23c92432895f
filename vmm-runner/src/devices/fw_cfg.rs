//! The firmware configuration device (QEMU: docs/specs/fw_cfg.rst): named items that firmware asks for, through
//! ports or by DMA. Everything in it is only read.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use vm_memory::{Bytes, GuestAddress};

use crate::{Error, Result, bus::PortDevice, machine::GuestMemory};

/// Selector, data, and four ports behind it the address register of DMA.
pub const FW_CFG_PORTS: u16 = 0x510;
/// All of them.
pub const FW_CFG_PORT_COUNT: u16 = 12;

const SELECTOR: u16 = 0;
const DATA: u16 = 1;
const DMA_HIGH: u16 = 4;
const DMA_LOW: u16 = 8;

const KEY_SIGNATURE: u16 = 0x00;
const KEY_ID: u16 = 0x01;
const KEY_DIRECTORY: u16 = 0x19;
/// Files have keys from here on.
const KEY_FIRST_FILE: u16 = 0x20;
/// What the signature item holds.
const SIGNATURE: [u8; 4] = *b"QEMU";
/// What the address register of DMA reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// The id item: the ports, and DMA.
const ID: u32 = 1 | 1 << 1;

/// The size of a name in the directory, with its closing NUL.
const NAME_BYTES: usize = 56;

/// The fields of a DMA request, in words of big-endian.
const REQUEST_BYTES: usize = 16;
const DMA_ERROR: u32 = 1;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;
/// A request for more than this is refused: no item is as large, and what is behind an item is zeroes.
const MAX_TRANSFER_BYTES: u32 = 1 << 20;

/// What firmware can ask for, by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FwCfgItems {
    items: BTreeMap<u16, Vec<u8>>,
    /// Name and size of each file, in the order of their keys.
    files: Vec<(String, u32)>,
}

impl FwCfgItems {
    /// Adds an item that has a key of its own.
    pub fn add(&mut self, key: u16, bytes: Vec<u8>) {
        self.items.insert(key, bytes);
    }

    /// Adds a file, which is found in the directory.
    ///
    /// # Errors
    /// When its name or its size does not fit.
    pub fn add_file(&mut self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let key = u16::try_from(self.files.len()).ok().and_then(|index| KEY_FIRST_FILE.checked_add(index));
        let size = u32::try_from(bytes.len()).ok().filter(|size| *size <= MAX_TRANSFER_BYTES);
        let (Some(key), Some(size), true) = (key, size, name.len() < NAME_BYTES) else {
            return Err(Error::Invalid(format!("the firmware cannot be given the file '{name}'")));
        };
        self.files.push((name.to_owned(), size));
        self.items.insert(key, bytes);
        Ok(())
    }

    /// What a file holds.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        let (key, _) = (KEY_FIRST_FILE..).zip(&self.files).find(|(_, (known, _))| known == name)?;
        self.items.get(&key).map(Vec::as_slice)
    }

    /// All files ("File Directory"): their number, then size, key, two bytes of nothing and name of each.
    fn directory(&self) -> Vec<u8> {
        let count = u32::try_from(self.files.len()).expect("counted when they were added");
        let mut bytes = count.to_be_bytes().to_vec();
        for (key, (name, size)) in (KEY_FIRST_FILE..).zip(&self.files) {
            bytes.extend(size.to_be_bytes());
            bytes.extend(key.to_be_bytes());
            bytes.extend([0, 0]);
            bytes.extend(name.as_bytes());
            bytes.resize(bytes.len() + NAME_BYTES - name.len(), 0);
        }
        bytes
    }
}

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    memory: Arc<GuestMemory>,
    selected: u16,
    /// Bytes of the selected item that are read already.
    position: usize,
    dma_high: u32,
}

impl FwCfg {
    /// A device that hands out these items, into `memory` where it is asked to.
    #[must_use]
    pub fn new(items: FwCfgItems, memory: Arc<GuestMemory>) -> Arc<Mutex<Self>> {
        let directory = items.directory();
        let mut items = items.items;
        items.insert(KEY_SIGNATURE, SIGNATURE.to_vec());
        items.insert(KEY_ID, ID.to_le_bytes().to_vec());
        items.insert(KEY_DIRECTORY, directory);
        Arc::new(Mutex::new(Self { items, memory, selected: KEY_SIGNATURE, position: 0, dma_high: 0 }))
    }

    fn select(&mut self, key: u16) {
        (self.selected, self.position) = (key, 0);
    }

    /// The next bytes of the selected item; zeroes behind its end, and for a key that is not there.
    fn take(&mut self, data: &mut [u8]) {
        data.fill(0);
        let rest = self.items.get(&self.selected).and_then(|item| item.get(self.position..));
        for (byte, value) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *value;
        }
        self.skip(data.len());
    }

    fn skip(&mut self, bytes: usize) {
        self.position = self.position.saturating_add(bytes);
    }

    /// Does what the request at `address` asks for, and says so in its first word. A request that is outside of
    /// memory gets no answer: there is no place for one.
    fn transfer(&mut self, address: GuestAddress) {
        let mut request = [0; REQUEST_BYTES];
        if self.memory.read_slice(&mut request, address).is_err() {
            return;
        }
        let result = match self.serve(request) {
            Some(()) => 0,
            None => DMA_ERROR,
        };
        // It was read from there, so it is there.
        drop(self.memory.write_slice(&result.to_be_bytes(), address));
    }

    /// `None` is an error.
    fn serve(&mut self, request: [u8; REQUEST_BYTES]) -> Option<()> {
        let [c0, c1, c2, c3, l0, l1, l2, l3, to @ ..] = request;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        let to = GuestAddress(u64::from_be_bytes(to));
        if control & DMA_SELECT != 0 {
            self.select(u16::from_be_bytes([c0, c1]));
        }
        if control & DMA_READ != 0 {
            if length > MAX_TRANSFER_BYTES {
                return None;
            }
            let mut bytes = vec![0; length as usize];
            self.take(&mut bytes);
            self.memory.write_slice(&bytes, to).ok()
        } else if control & DMA_SKIP != 0 {
            self.skip(length as usize);
            Some(())
        } else {
            // Nothing can be written.
            (control & DMA_WRITE == 0).then_some(())
        }
    }
}

impl PortDevice for FwCfg {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        match offset {
            DATA => self.take(&mut data[..1]),
            DMA_HIGH.. => {
                let from = usize::from(offset - DMA_HIGH);
                for (byte, value) in data.iter_mut().zip(DMA_SIGNATURE.get(from..).unwrap_or_default()) {
                    *byte = *value;
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        match (offset, data) {
            (SELECTOR, &[low, high]) => self.select(u16::from_le_bytes([low, high])),
            (DMA_HIGH, &[a, b, c, d]) => self.dma_high = u32::from_be_bytes([a, b, c, d]),
            // The lower half is what starts it.
            (DMA_LOW, &[a, b, c, d]) => {
                let low = u32::from_be_bytes([a, b, c, d]);
                let high = std::mem::take(&mut self.dma_high);
                self.transfer(GuestAddress(u64::from(high) << 32 | u64::from(low)));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::MutexGuard;

    use proptest::prelude::*;

    use super::*;

    const RAM_BYTES: usize = 0x1_0000;
    const REQUEST_AT: u32 = 0x100;

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("little"))
    }

    fn device(memory: &Arc<GuestMemory>) -> Arc<Mutex<FwCfg>> {
        let mut items = FwCfgItems::default();
        items.add(5, vec![2, 0]);
        items.add_file("etc/first", b"one".to_vec()).expect("fits");
        items.add_file("etc/second", (0..=255).collect()).expect("fits");
        FwCfg::new(items, Arc::clone(memory))
    }

    fn lock(device: &Mutex<FwCfg>) -> MutexGuard<'_, FwCfg> {
        device.lock().expect("no panic")
    }

    fn read_port(device: &mut FwCfg, key: u16, count: usize) -> Vec<u8> {
        device.write(SELECTOR, &key.to_le_bytes());
        let one = |_| {
            let mut data = [0xFF];
            device.read(DATA, &mut data);
            data[0]
        };
        (0..count).map(one).collect()
    }

    /// Makes a request and returns what its first word says afterwards.
    fn request(device: &mut FwCfg, memory: &GuestMemory, control: u32, length: u32, to: u64) -> u32 {
        let at = GuestAddress(u64::from(REQUEST_AT));
        let mut bytes = control.to_be_bytes().to_vec();
        bytes.extend(length.to_be_bytes());
        bytes.extend(to.to_be_bytes());
        memory.write_slice(&bytes, at).expect("inside");
        device.write(DMA_HIGH, &0u32.to_be_bytes());
        device.write(DMA_LOW, &REQUEST_AT.to_be_bytes());
        u32::from_be(memory.read_obj(at).expect("inside"))
    }

    #[test]
    fn items_are_read_byte_by_byte_and_end_in_zeroes() {
        let memory = memory();
        let device = device(&memory);
        let mut device = lock(&device);
        assert_eq!(read_port(&mut device, KEY_SIGNATURE, 5), b"QEMU\0");
        assert_eq!(read_port(&mut device, KEY_ID, 4), [3, 0, 0, 0]);
        assert_eq!(read_port(&mut device, 5, 3), [2, 0, 0]);
        assert_eq!(read_port(&mut device, 0x1234, 2), [0, 0]);
        let mut signature = [0; 4];
        device.read(DMA_HIGH, &mut signature);
        assert_eq!(&signature, b"QEMU");
        device.read(DMA_LOW, &mut signature);
        assert_eq!(&signature, b" CFG");
    }

    #[test]
    fn the_directory_names_the_files() {
        let memory = memory();
        let device = device(&memory);
        let mut device = lock(&device);
        let directory = read_port(&mut device, KEY_DIRECTORY, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..22], *b"\0\0\0\x03\0\x20\0\0etc/first\0");
        assert_eq!(directory[68..87], *b"\0\0\x01\0\0\x21\0\0etc/second\0");
        let name = "n".repeat(NAME_BYTES);
        let mut items = FwCfgItems::default();
        assert!(items.add_file(&name, Vec::new()).is_err());
        assert!(items.add_file(&name[1..], Vec::new()).is_ok());
    }

    #[test]
    fn dma_reads_and_skips_and_refuses_the_rest() {
        let memory = memory();
        let device = device(&memory);
        let mut device = lock(&device);
        let select = 0x21 << 16 | DMA_SELECT;
        assert_eq!(request(&mut device, &memory, select | DMA_READ, 4, 0x200), 0);
        assert_eq!(request(&mut device, &memory, DMA_SKIP, 10, 0), 0);
        assert_eq!(request(&mut device, &memory, DMA_READ, 4, 0x204), 0);
        let read: [u8; 8] = memory.read_obj(GuestAddress(0x200)).expect("inside");
        assert_eq!(read, [0, 1, 2, 3, 14, 15, 16, 17]);
        assert_eq!(request(&mut device, &memory, DMA_READ, 2, RAM_BYTES as u64 - 1), DMA_ERROR);
        assert_eq!(request(&mut device, &memory, DMA_READ, MAX_TRANSFER_BYTES + 1, 0x200), DMA_ERROR);
        assert_eq!(request(&mut device, &memory, select | DMA_WRITE, 4, 0x200), DMA_ERROR);
        // Nowhere: no answer, and no harm.
        device.write(DMA_LOW, &u32::MAX.to_be_bytes());
    }

    proptest! {
        /// However an item is read, its bytes come in order, and nothing else.
        #[test]
        fn pieces_of_an_item_are_the_item(steps in prop::collection::vec((0u8..3, 0u32..100), 0..20)) {
            let memory = memory();
            let device = device(&memory);
            let mut device = lock(&device);
            device.write(SELECTOR, &0x21u16.to_le_bytes());
            let item: Vec<u8> = (0..=255).chain([0; 2000]).collect();
            let mut at = 0;
            for (kind, count) in steps {
                let end = at + count as usize;
                match kind {
                    0 => prop_assert_eq!(request(&mut device, &memory, DMA_SKIP, count, 0), 0),
                    1 => {
                        prop_assert_eq!(request(&mut device, &memory, DMA_READ, count, 0x200), 0);
                        let mut read = vec![0; count as usize];
                        memory.read_slice(&mut read, GuestAddress(0x200)).expect("inside");
                        prop_assert_eq!(&read[..], &item[at..end]);
                    }
                    _ => {
                        for expected in &item[at..end] {
                            let mut data = [0xFF];
                            device.read(DATA, &mut data);
                            prop_assert_eq!(data[0], *expected);
                        }
                    }
                }
                at = end;
            }
        }
    }
}
