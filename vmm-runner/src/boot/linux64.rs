//! Linux's 64-bit boot protocol (Linux: Documentation/arch/x86/boot.rst, section "64-bit boot protocol").

use linux_loader::{
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
    loader::bootparam::{boot_e820_entry, boot_params},
};
use vm_memory::GuestAddress;

use super::{
    Handover,
    bzimage::{ENTRY_64, Setup},
    memory_map,
};
use crate::{
    Error, Result,
    machine::{Entry, layout},
};

/// A boot loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xFF;
const E820_RAM: u32 = 1;
const E820_ACPI: u32 = 3;

/// Writes the zero page for a kernel that is loaded, and says where it begins.
pub(super) fn write_zero_page(handover: &Handover<'_>, setup: Setup) -> Result<Entry> {
    let mut page = boot_params { hdr: setup.header(), ..Default::default() };
    page.hdr.type_of_loader = UNDEFINED_LOADER;
    let low =
        |address: u64| u32::try_from(address).map_err(|_| Error::Invalid("loaded above 4 GiB".to_owned()));
    page.hdr.cmd_line_ptr = low(layout::COMMAND_LINE.0)?;
    if let Some((address, size)) = handover.initrd {
        page.hdr.ramdisk_image = low(address.0)?;
        page.hdr.ramdisk_size = low(size)?;
    }
    page.acpi_rsdp_addr = handover.acpi.address;
    let map = memory_map(handover);
    for (entry, (addr, size, is_ram)) in page.e820_table.iter_mut().zip(&map) {
        let kind = if *is_ram { E820_RAM } else { E820_ACPI };
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: kind };
    }
    page.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&page, layout::ZERO_PAGE), handover.memory)
        .map_err(|error| {
            Error::Invalid(format!("the zero page does not fit into the guest's memory: {error}"))
        })?;
    Ok(Entry::Linux64 { entry: GuestAddress(setup.load_address().0 + ENTRY_64) })
}
