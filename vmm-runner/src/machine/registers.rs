//! The state in which a boot protocol wants the first processor.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::{layout, memory::GuestMemory};
use crate::{Error, Result};

/// Where a direct boot begins. Firmware begins where the processor's reset puts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode without paging, EBX names the start info.
    Pvh {
        /// The first instruction.
        entry: GuestAddress,
    },
    /// Linux's 64-bit protocol: long mode, identity map, RSI names the zero page.
    Linux64 {
        /// The first instruction.
        entry: GuestAddress,
    },
    /// The reset vector.
    Firmware,
}

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;

const MSR_IA32_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

/// Selectors of code, data and task state in the boot descriptor table.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Puts a processor to where `entry` says. Memory gets the tables that this needs.
pub(super) fn set_up(vcpu: &VcpuFd, memory: &GuestMemory, entry: Entry) -> Result<()> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("read the special registers"))?;
    let mut regs = kvm_regs { rflags: 2, rsp: layout::BOOT_STACK, ..Default::default() };
    let (code, entry) = match entry {
        Entry::Firmware => return Ok(()),
        Entry::Pvh { entry } => {
            regs.rbx = layout::PVH_INFO.0;
            sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
            sregs.cr4 = 0;
            (segment(CODE, 0xB, false), entry)
        }
        Entry::Linux64 { entry } => {
            regs.rsi = layout::ZERO_PAGE.0;
            write_identity_map(memory)?;
            sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
            sregs.cr3 = layout::BOOT_PAGE_TABLES.0;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LONG | EFER_LONG_ACTIVE;
            (segment(CODE, 0xB, true), entry)
        }
    };
    regs.rip = entry.0;
    let data = segment(DATA, 0x3, false);
    let mut task = segment(TASK, 0xB, false);
    (task.s, task.limit, task.g, task.db) = (0, 0x67, 0, 0);
    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task), 0];
    for (index, entry) in (0u64..).zip(table) {
        write(memory, entry, GuestAddress(layout::BOOT_GDT.0 + index * 8))?;
    }
    write(memory, 0, layout::BOOT_IDT)?;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.gdt.base = layout::BOOT_GDT.0;
    sregs.gdt.limit = u16::try_from(size_of_val(&table) - 1).expect("a small table");
    sregs.idt.base = layout::BOOT_IDT.0;
    sregs.idt.limit = 7;
    vcpu.set_sregs(&sregs).map_err(Error::kvm("set the special registers"))?;
    vcpu.set_regs(&regs).map_err(Error::kvm("set the registers"))
}

/// What firmware would set on each processor.
pub(super) fn set_msrs(vcpu: &VcpuFd) -> Result<()> {
    let entry =
        kvm_msr_entry { index: MSR_IA32_MISC_ENABLE, data: MISC_ENABLE_FAST_STRING, ..Default::default() };
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| Error::Invalid("one MSR is too many".to_owned()))?;
    vcpu.set_msrs(&msrs).map_err(Error::kvm("set model-specific registers"))?;
    Ok(())
}

/// A flat segment.
fn segment(selector: u16, kind: u8, is_64_bit: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!is_64_bit),
        s: 1,
        l: u8::from(is_64_bit),
        g: 1,
        ..Default::default()
    }
}

/// The entry of a descriptor table that says the same (Intel SDM volume 3, section 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    let base = segment.base;
    (base >> 24 & 0xFF) << 56
        | (limit >> 16 & 0xF) << 48
        | flags << 40
        | (base & 0xFF_FFFF) << 16
        | limit & 0xFFFF
}

/// The first 4 GiB at their own addresses in pages of 2 MiB: what a direct boot loads lies below.
fn write_identity_map(memory: &GuestMemory) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let page = |index: u64| layout::BOOT_PAGE_TABLES.0 + index * 4096;
    write(memory, page(1) | PRESENT_WRITABLE, GuestAddress(page(0)))?;
    for table in 0..4 {
        write(memory, page(2 + table) | PRESENT_WRITABLE, GuestAddress(page(1) + table * 8))?;
        for entry in 0..512 {
            let address = (table * 512 + entry) << 21;
            let at = GuestAddress(page(2 + table) + entry * 8);
            write(memory, address | LARGE | PRESENT_WRITABLE, at)?;
        }
    }
    Ok(())
}

fn write(memory: &GuestMemory, value: u64, at: GuestAddress) -> Result<()> {
    memory
        .write_obj(value.to_le(), at)
        .map_err(|error| Error::Invalid(format!("guest memory at {:#x}: {error}", at.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_as_the_processor_reads_them() {
        assert_eq!(descriptor(&segment(CODE, 0xB, false)), 0x00CF_9B00_0000_FFFF);
        assert_eq!(descriptor(&segment(CODE, 0xB, true)), 0x00AF_9B00_0000_FFFF);
        assert_eq!(descriptor(&segment(DATA, 0x3, false)), 0x00CF_9300_0000_FFFF);
    }
}
