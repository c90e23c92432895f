//! Where things are in the guest's physical memory.
//!
//! The map is that of a small i440FX PC: RAM from zero with the VGA hole, the PCI window below 4 GiB, the interrupt
//! controllers and firmware at its end, and the rest of RAM above 4 GiB.

use vm_memory::GuestAddress;

/// The hole for VGA memory, in which there is nothing.
pub const VGA_HOLE_START: u64 = 0xA_0000;
/// RAM goes on here: option ROMs and firmware shadow, or the ACPI tables of a direct boot.
pub const VGA_HOLE_END: u64 = 0xC_0000;
/// RAM below 4 GiB never reaches further: the PCI window begins.
pub const LOW_RAM_LIMIT: u64 = PCI_WINDOW_START;
/// RAM above 4 GiB begins here.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// 32-bit PCI memory window.
pub const PCI_WINDOW_START: u64 = 0xC000_0000;
/// The byte behind it.
pub const PCI_WINDOW_END: u64 = 0xFEC0_0000;

/// I/O interrupt controller.
pub const IOAPIC_ADDRESS: u32 = 0xFEC0_0000;
/// A write here tells that the guest's init runs, and costs one exit: `--stats` tells when that was. No guest has to,
/// and there is nothing to read.
pub const INIT_REGISTER: u64 = 0xFECF_F000;
/// Local interrupt controllers.
pub const LOCAL_APIC_ADDRESS: u32 = 0xFEE0_0000;
/// KVM's identity map page for real mode. Three pages for a task state segment follow. Below the largest firmware.
pub const KVM_IDENTITY_MAP: u64 = 0xFEFF_C000;
/// KVM's task state segment.
pub const KVM_TSS: usize = 0xFEFF_D000;

/// Firmware is at most from here on.
pub const FIRMWARE_START: u64 = 0xFF00_0000;
/// Firmware ends here; the processor begins 16 bytes before.
pub const FIRMWARE_END: u64 = 1 << 32;
/// The end of firmware is also in RAM, from here up to 1 MiB: SeaBIOS takes itself to be there.
pub const FIRMWARE_SHADOW: u64 = VGA_HOLE_END;

/// Global descriptor table of a direct boot.
pub const BOOT_GDT: GuestAddress = GuestAddress(0x500);
/// Interrupt descriptor table of a direct boot; empty.
pub const BOOT_IDT: GuestAddress = GuestAddress(0x520);
/// The start info of a PVH boot.
pub const PVH_INFO: GuestAddress = GuestAddress(0x6000);
/// The module list of a PVH boot.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6040);
/// The memory map of a PVH boot.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
/// The zero page of a 64-bit boot.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Page tables of a 64-bit boot: one level 4, one level 3 and four level 2 tables.
pub const BOOT_PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// Stack of a direct boot, growing down.
pub const BOOT_STACK: u64 = 0x8FF0;
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Its limit with the closing NUL: what the kernels take (`COMMAND_LINE_SIZE` of x86).
pub const COMMAND_LINE_BYTES: usize = 2048;
/// RSDP and ACPI tables of a direct boot, inside the area that is searched for them.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xE_0000);
/// The byte behind the ACPI tables.
pub const ACPI_TABLES_END: u64 = RESET_VECTOR.0;
/// Where firmware has its real-mode reset vector. A kernel that gives up on all other ways jumps there.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xF_FFF0);
/// Nothing of this is the guest's to use on a direct boot: from the ACPI tables up to here.
pub const FIRMWARE_AREA_END: u64 = 0x10_0000;
/// Kernels are loaded from here on.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
