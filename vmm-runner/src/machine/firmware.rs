//! Booting through firmware that is not changed for this machine: SeaBIOS, OVMF. It is memory that ends at 4 GiB,
//! where the processor begins, and it asks fw_cfg what the machine is.

use std::{fs::File, io::Read, path::Path, sync::Arc};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Bytes, GuestAddress, MmapRegion};

use super::{
    acpi::{
        AcpiHardware, CHECKSUM_AT, Linked, RSDP_CHECKSUM_AT, RSDP_EXTENDED_CHECKSUM_AT, RSDP_V1_BYTES,
        RSDP_XSDT_AT, linked,
    },
    layout,
    memory::{GuestMemory, ram_ranges},
};
use crate::{
    Error, Result,
    devices::{COM1_PORTS, FwCfgItems},
};

/// Firmware is a multiple of this.
const PAGE_BYTES: usize = 4096;
/// Its slot in KVM: behind those of RAM.
const SLOT: u32 = 8;

/// Items of fw_cfg that are no files (QEMU: include/standard-headers/linux/qemu_fw_cfg.h).
const KEY_CPUS: u16 = 0x05;
const KEY_NUMA: u16 = 0x0D;
const KEY_BOOT_MENU: u16 = 0x0E;
const KEY_MAX_CPUS: u16 = 0x0F;
/// RAM in the list of `etc/e820`.
const E820_RAM: u32 = 1;

/// Firmware, read from its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firmware {
    bytes: Arc<[u8]>,
}

impl Firmware {
    /// Reads an image that ends with the reset vector.
    ///
    /// # Errors
    /// When it cannot be read, or has no size of firmware.
    pub fn read(path: &Path) -> Result<Self> {
        let most = layout::FIRMWARE_END - layout::FIRMWARE_START;
        let file = File::open(path).map_err(Error::file(path))?;
        let mut bytes = Vec::new();
        let length = file.take(most + 1).read_to_end(&mut bytes).map_err(Error::file(path))?;
        if length == 0 || !length.is_multiple_of(PAGE_BYTES) || length as u64 > most {
            return Err(Error::Invalid(format!(
                "{}: not firmware: its size must be a multiple of {PAGE_BYTES} bytes and at most {} MiB",
                path.display(),
                most >> 20
            )));
        }
        Ok(Self { bytes: bytes.into() })
    }

    /// Puts it below 4 GiB, where it can be read only, and its end also below 1 MiB, where it is RAM as behind a
    /// chipset that is set up. What is returned must live as long as the machine.
    pub(super) fn map(&self, vm: &VmFd, memory: &GuestMemory) -> Result<MmapRegion> {
        if !vm.check_extension(Cap::ReadonlyMem) {
            return Err(Error::Invalid("the KVM of this host has no read-only memory".to_owned()));
        }
        let region = MmapRegion::new(self.bytes.len())
            .map_err(|error| Error::Invalid(format!("memory for the firmware: {error}")))?;
        // SAFETY: the region was just made, is as long as the bytes, and nobody else knows it.
        unsafe { region.as_ptr().copy_from_nonoverlapping(self.bytes.as_ptr(), self.bytes.len()) };
        let slot = kvm_userspace_memory_region {
            slot: SLOT,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::FIRMWARE_END - self.bytes.len() as u64,
            memory_size: self.bytes.len() as u64,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the slot is that of the region, which the machine keeps; it lies above the PCI window, where no
        // other slot is.
        unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("memory of the firmware"))?;
        let shadow = usize::try_from(layout::HIGH_MEMORY.0 - layout::FIRMWARE_SHADOW).expect("256 KiB");
        let end = &self.bytes[self.bytes.len().saturating_sub(shadow)..];
        let at = GuestAddress(layout::HIGH_MEMORY.0 - end.len() as u64);
        memory.write_slice(end, at).map_err(crate::boot::in_memory("the firmware's shadow"))?;
        Ok(region)
    }
}

/// What firmware is told of the machine. `disks` are the PCI slots of its disks, the one to boot first.
pub(super) fn items(ram_bytes: u64, cpus: u32, disks: &[u8]) -> Result<FwCfgItems> {
    let count = u16::try_from(cpus).map_err(|_| Error::Invalid("too many processors".to_owned()))?;
    let mut items = FwCfgItems::default();
    items.add(KEY_CPUS, count.to_le_bytes().to_vec());
    items.add(KEY_MAX_CPUS, count.to_le_bytes().to_vec());
    items.add(KEY_NUMA, vec![0; 8]);
    items.add(KEY_BOOT_MENU, vec![0; 2]);
    items.add_file("etc/e820", e820(ram_bytes))?;
    // A screen and a keyboard for who has no VGA.
    items.add_file("etc/sercon-port", u64::from(COM1_PORTS).to_le_bytes().to_vec())?;
    // Who cannot boot says so and waits, rather than to begin again.
    items.add_file("etc/boot-fail-wait", u32::MAX.to_le_bytes().to_vec())?;
    let order: Vec<String> = disks.iter().map(|slot| format!("/pci@i0cf8/scsi@{slot:x}/disk@0,0")).collect();
    let mut order = order.join("\n").into_bytes();
    order.push(0);
    items.add_file("bootorder", order)?;
    let acpi = linked(0, cpus, AcpiHardware::Full)?;
    items.add_file("etc/table-loader", loader(&acpi))?;
    let Linked { mut rsdp, mut tables, ranges, .. } = acpi;
    // The firmware adds up what it has changed, and wants nothing where the sums will be.
    (rsdp[RSDP_CHECKSUM_AT], rsdp[RSDP_EXTENDED_CHECKSUM_AT]) = (0, 0);
    ranges.iter().for_each(|table| tables[table.start + CHECKSUM_AT] = 0);
    items.add_file(RSDP_FILE, rsdp)?;
    items.add_file(TABLES_FILE, tables)?;
    Ok(items)
}

/// RAM, as firmware wants it: address, length and kind of each range. It knows the hole of VGA memory by itself.
fn e820(ram_bytes: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let low = (GuestAddress(0), ram_bytes.min(layout::LOW_RAM_LIMIT));
    let high = ram_ranges(ram_bytes).into_iter().filter(|(start, _)| start.0 >= layout::HIGH_RAM_START);
    for (start, length) in std::iter::once(low).chain(high) {
        bytes.extend(start.0.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(E820_RAM.to_le_bytes());
    }
    bytes
}

const RSDP_FILE: &str = "etc/acpi/rsdp";
const TABLES_FILE: &str = "etc/acpi/tables";

/// A command of the table loader (QEMU: hw/acpi/bios-linker-loader.c): a word that says what, then its arguments, in
/// 128 bytes.
const COMMAND_BYTES: usize = 128;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Names of files take so much of a command.
const FILE_BYTES: usize = 56;
/// Memory anywhere, and memory in which operating systems look for the RSDP.
const ZONE_HIGH: u8 = 1;
const ZONE_SEARCHED: u8 = 2;

/// What firmware does with the tables: finds memory, makes addresses of what are places in a file, adds up.
fn loader(acpi: &Linked) -> Vec<u8> {
    let place = |at: usize| u32::try_from(at).expect("a few kilobytes").to_le_bytes();
    let file = |name: &str| {
        let mut bytes = name.as_bytes().to_vec();
        bytes.resize(FILE_BYTES, 0);
        bytes
    };
    let allocate = |name: &str, alignment: usize, zone: u8| {
        [&ALLOCATE.to_le_bytes()[..], &file(name), &place(alignment), &[zone]].concat()
    };
    let pointer = |name: &str, at: usize| {
        [&ADD_POINTER.to_le_bytes()[..], &file(name), &file(TABLES_FILE), &place(at), &[8]].concat()
    };
    let checksum = |name: &str, at: usize, start: usize, length: usize| {
        [&ADD_CHECKSUM.to_le_bytes()[..], &file(name), &place(at), &place(start), &place(length)].concat()
    };
    let mut commands = vec![allocate(RSDP_FILE, 16, ZONE_SEARCHED), allocate(TABLES_FILE, 64, ZONE_HIGH)];
    commands.extend(acpi.pointers.iter().map(|&at| pointer(TABLES_FILE, at)));
    commands.push(pointer(RSDP_FILE, RSDP_XSDT_AT));
    commands.extend(
        acpi.ranges
            .iter()
            .map(|table| checksum(TABLES_FILE, table.start + CHECKSUM_AT, table.start, table.len())),
    );
    commands.push(checksum(RSDP_FILE, RSDP_CHECKSUM_AT, 0, RSDP_V1_BYTES));
    commands.push(checksum(RSDP_FILE, RSDP_EXTENDED_CHECKSUM_AT, 0, acpi.rsdp.len()));
    let mut bytes = Vec::with_capacity(commands.len() * COMMAND_BYTES);
    for command in commands {
        bytes.extend(command);
        bytes.resize(bytes.len().next_multiple_of(COMMAND_BYTES), 0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::{super::acpi, *};

    /// Does what the loader says, as firmware does, with the files at these addresses.
    fn execute(
        commands: &[u8],
        mut files: HashMap<String, (u64, Vec<u8>)>,
    ) -> HashMap<String, (u64, Vec<u8>)> {
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        let name = |bytes: &[u8]| {
            let end = bytes.iter().position(|byte| *byte == 0).expect("a NUL");
            String::from_utf8(bytes[..end].to_vec()).expect("text")
        };
        let mut allocated = Vec::new();
        for command in commands.chunks_exact(COMMAND_BYTES) {
            let (kind, rest) = (word(command), &command[4..]);
            let own = name(rest);
            let (first, rest) = (rest, &rest[FILE_BYTES..]);
            match kind {
                ALLOCATE => {
                    assert!(files.contains_key(&own) && word(rest).is_power_of_two());
                    allocated.push(name(first));
                }
                ADD_POINTER => {
                    let (base, at) = (files[&name(rest)].0, word(&rest[FILE_BYTES..]) as usize);
                    assert_eq!((rest[FILE_BYTES + 4], allocated.contains(&own)), (8, true));
                    let field = &mut files.get_mut(&own).expect("a file").1[at..at + 8];
                    let inside = u64::from_le_bytes((&*field).try_into().expect("eight bytes"));
                    field.copy_from_slice(&(base + inside).to_le_bytes());
                }
                ADD_CHECKSUM => {
                    let [at, start, length] = [0, 4, 8].map(|at| word(&rest[at..]) as usize);
                    let bytes = &mut files.get_mut(&own).expect("a file").1;
                    let sum =
                        bytes[start..start + length].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                    bytes[at] = 0u8.wrapping_sub(sum);
                }
                other => panic!("command {other}"),
            }
        }
        files
    }

    proptest! {
        /// Wherever firmware puts the tables, they become those that are made for that place.
        #[test]
        fn the_loader_makes_the_tables_for_where_they_are(cpus in 1u32..=255, page in 1u64..0xF_FFFF) {
            let address = page << 12;
            let made = items(1 << 30, cpus, &[2]);
            if cpus > acpi::MAX_CPUS {
                prop_assert!(made.is_err());
                return Ok(());
            }
            let made = made.expect("it fits");
            let rsdp_bytes = acpi_tables::rsdp::Rsdp::len().next_multiple_of(16) as u64;
            let files = HashMap::from([
                (RSDP_FILE.to_owned(), (0, made.file(RSDP_FILE).expect("there").to_vec())),
                (TABLES_FILE.to_owned(), (address + rsdp_bytes, made.file(TABLES_FILE).expect("there").to_vec())),
            ]);
            let files = execute(made.file("etc/table-loader").expect("there"), files);
            let direct = acpi::tables(address, u64::MAX, cpus, AcpiHardware::Full).expect("they fit").bytes;
            let rsdp = &files[RSDP_FILE].1;
            prop_assert_eq!(&direct[..rsdp.len()], &rsdp[..]);
            prop_assert!(direct.ends_with(&files[TABLES_FILE].1));
        }
    }

    #[test]
    fn memory_is_told_below_and_above_4_gib() {
        let entry = |start: u64, length: u64| {
            [&start.to_le_bytes()[..], &length.to_le_bytes(), &1u32.to_le_bytes()].concat()
        };
        assert_eq!(e820(1 << 30), entry(0, 1 << 30));
        assert_eq!(e820(5 << 30), [entry(0, 3 << 30), entry(4 << 30, 2 << 30)].concat());
    }

    #[test]
    fn disks_are_tried_in_their_order() {
        let made = items(1 << 30, 1, &[2, 10]).expect("it fits");
        let order = b"/pci@i0cf8/scsi@2/disk@0,0\n/pci@i0cf8/scsi@a/disk@0,0\0";
        assert_eq!(made.file("bootorder"), Some(&order[..]));
    }

    #[test]
    fn only_files_of_the_size_of_firmware_are_taken() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("firmware");
        for (size, good) in
            [(0, false), (4095, false), (4096, true), (16 << 20, true), ((16 << 20) + 4096, false)]
        {
            std::fs::File::create(&path).and_then(|file| file.set_len(size)).expect("room");
            assert_eq!(Firmware::read(&path).is_ok(), good, "{size}");
        }
    }
}
