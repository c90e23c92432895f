//! The PVH protocol (Xen: docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h): a 32-bit entry that is
//! told of memory, modules, command line and ACPI in one structure.

use linux_loader::configurator::{BootConfigurator, BootParams, pvh::PvhBootConfigurator};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_ACPI, XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};

use super::{Handover, memory_map};
use crate::{Error, Result, machine::layout};

/// Writes the start info and what it names.
pub(super) fn write_start_info(handover: &Handover<'_>) -> Result<()> {
    let map: Vec<_> = memory_map(handover)
        .into_iter()
        .map(|(addr, size, is_ram)| hvm_memmap_table_entry {
            addr,
            size,
            type_: if is_ram { XEN_HVM_MEMMAP_TYPE_RAM } else { XEN_HVM_MEMMAP_TYPE_ACPI },
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = handover
        .initrd
        .iter()
        .map(|(address, size)| hvm_modlist_entry {
            paddr: address.0,
            size: *size,
            cmdline_paddr: 0,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::try_from(modules.len()).unwrap_or(0),
        modlist_paddr: layout::PVH_MODULES.0,
        cmdline_paddr: layout::COMMAND_LINE.0,
        rsdp_paddr: handover.acpi.address,
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, layout::PVH_INFO);
    params.set_sections(&map, layout::PVH_MEMORY_MAP);
    if !modules.is_empty() {
        params.set_modules(&modules, layout::PVH_MODULES);
    }
    PvhBootConfigurator::write_bootparams(&params, handover.memory).map_err(|error| {
        Error::Invalid(format!("the start info does not fit into the guest's memory: {error}"))
    })
}
