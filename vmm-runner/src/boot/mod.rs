//! Putting a kernel, its initial file system and its command line into memory, as a boot protocol wants them.

mod bzimage;
pub mod from_image;
mod linux64;
mod pvh;

use std::{
    borrow::Cow,
    fmt,
    fs::File,
    io::{Cursor, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use linux_loader::loader::{
    KernelLoader, KernelLoaderResult,
    elf::{Elf, PvhBootCapability},
};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    Error, Result,
    devices::{FAST_RESET, SYSTEM_CONTROL_PORT},
    machine::{AcpiTables, Entry, Firmware, GuestMemory, layout, ram_ranges},
};

/// Kernels are far smaller.
const MAX_KERNEL_BYTES: u64 = 512 << 20;
/// Initial file systems are far smaller.
const MAX_INITRD_BYTES: u64 = 1 << 30;
/// An initial file system is put below this where the kernel does not say otherwise (`initrd_addr_max`).
const INITRD_LIMIT: u64 = 0x3800_0000;
const PAGE: u64 = 4096;
/// Real-mode code at the reset vector. Linux jumps there to restart a hardware-reduced machine without EFI:
/// `mov al, FAST_RESET; out 0x92, al; hlt; jmp $-1`.
const RESET_CODE: [u8; 7] = [0xB0, FAST_RESET, 0xE6, 0x92, 0xF4, 0xEB, 0xFD];
const _: () = assert!(SYSTEM_CONTROL_PORT == 0x92);

/// Where a kernel or an initial file system is.
#[derive(Clone, PartialEq, Eq)]
pub enum BootFile {
    /// A file of the host. Read anew at each reset.
    Host(PathBuf),
    /// In memory already.
    Bytes {
        /// What to call it.
        name: String,
        /// Its contents.
        bytes: Arc<[u8]>,
    },
}

impl fmt::Debug for BootFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BootFile({})", self.name())
    }
}

impl BootFile {
    fn name(&self) -> String {
        match self {
            Self::Host(path) => path.display().to_string(),
            Self::Bytes { name, .. } => name.clone(),
        }
    }

    fn read(&self, limit: u64) -> Result<Cow<'_, [u8]>> {
        match self {
            Self::Host(path) => read_file(path, limit).map(Cow::Owned),
            Self::Bytes { bytes, .. } => Ok(Cow::Borrowed(bytes)),
        }
    }
}

/// How a machine starts.
#[derive(Clone, Debug)]
pub enum Boot {
    /// With a kernel.
    Direct(DirectBoot),
    /// With firmware, which finds a boot loader on the disks.
    Firmware {
        /// SeaBIOS, or OVMF.
        firmware: Firmware,
        /// Where it writes down what it does.
        log: Option<Arc<File>>,
    },
}

/// What a direct boot starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectBoot {
    /// bzImage or ELF.
    pub kernel: BootFile,
    /// Initial file system.
    pub initrd: Option<BootFile>,
    /// Command line.
    pub command_line: String,
}

/// What a boot protocol has to tell the kernel.
#[derive(Debug)]
pub(crate) struct Handover<'a> {
    pub(crate) memory: &'a GuestMemory,
    pub(crate) ram_bytes: u64,
    pub(crate) acpi: &'a AcpiTables,
    pub(crate) initrd: Option<(GuestAddress, u64)>,
}

impl DirectBoot {
    /// Loads everything and says where the first processor begins.
    ///
    /// # Errors
    /// When a file cannot be read, is no kernel, or does not fit into memory.
    pub fn load(&self, memory: &GuestMemory, ram_bytes: u64, acpi: &AcpiTables) -> Result<Entry> {
        let kernel = Kernel::load(&self.kernel.name(), &self.kernel.read(MAX_KERNEL_BYTES)?, memory)?;
        write_command_line(memory, &self.command_line)?;
        memory.write_slice(&acpi.bytes, GuestAddress(acpi.address)).map_err(in_memory("the ACPI tables"))?;
        memory.write_slice(&RESET_CODE, layout::RESET_VECTOR).map_err(in_memory("the reset vector"))?;
        let initrd = match &self.initrd {
            Some(file) => Some(load_initrd(file, memory, ram_bytes, kernel.end, kernel.initrd_limit)?),
            None => None,
        };
        let handover = Handover { memory, ram_bytes, acpi, initrd };
        match kernel.protocol {
            Protocol::Pvh { entry } => {
                pvh::write_start_info(&handover)?;
                Ok(Entry::Pvh { entry })
            }
            Protocol::Linux64 { setup } => linux64::write_zero_page(&handover, *setup),
        }
    }
}

/// A kernel in memory.
struct Kernel {
    protocol: Protocol,
    /// The byte behind it, with what it needs to unpack itself.
    end: u64,
    /// The byte behind the highest one where it finds an initial file system.
    initrd_limit: u64,
}

enum Protocol {
    Pvh { entry: GuestAddress },
    Linux64 { setup: Box<bzimage::Setup> },
}

impl Kernel {
    fn load(name: &str, image: &[u8], memory: &GuestMemory) -> Result<Self> {
        if image.starts_with(b"\x7fELF") {
            return Self::load_elf(name, image, memory)?.ok_or_else(|| {
                bad_kernel(name, "an ELF file without a PVH entry (XEN_ELFNOTE_PHYS32_ENTRY)")
            });
        }
        let setup = bzimage::Setup::read(image)
            .ok_or_else(|| bad_kernel(name, "neither a bzImage nor an ELF file"))?;
        // Unpacked on the host a kernel starts in a fraction of the time: it need not unpack itself in the guest.
        if let Some(elf) = setup.unpack(image, MAX_KERNEL_BYTES)?
            && let Some(kernel) = Self::load_elf(name, &elf, memory)?
        {
            return Ok(kernel);
        }
        let end = setup.load(image, memory)?;
        let initrd_limit = setup.initrd_limit();
        Ok(Self { protocol: Protocol::Linux64 { setup: Box::new(setup) }, end, initrd_limit })
    }

    /// `None` for a kernel that has no PVH entry.
    fn load_elf(name: &str, image: &[u8], memory: &GuestMemory) -> Result<Option<Self>> {
        let loaded = Elf::load(memory, None, &mut Cursor::new(image), None);
        let KernelLoaderResult { kernel_end, pvh_boot_cap, .. } =
            loaded.map_err(|error| bad_kernel(name, &error.to_string()))?;
        Ok(match pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => {
                Some(Self { protocol: Protocol::Pvh { entry }, end: kernel_end, initrd_limit: INITRD_LIMIT })
            }
            PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => None,
        })
    }
}

fn bad_kernel(name: &str, why: &str) -> Error {
    Error::Invalid(format!("{name}: not a kernel that this machine can start: {why}"))
}

/// Names what did not fit into guest memory.
pub(crate) fn in_memory(what: &'static str) -> impl FnOnce(vm_memory::GuestMemoryError) -> Error {
    move |error| Error::Invalid(format!("{what} does not fit into the guest's memory: {error}"))
}

fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::file(path))?;
    let mut bytes = Vec::new();
    let read = file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::file(path))?;
    if read as u64 > limit {
        return Err(Error::Invalid(format!("{}: larger than {} MiB", path.display(), limit >> 20)));
    }
    Ok(bytes)
}

/// Puts the initial file system into the guest's memory, as high as it may be.
fn load_initrd(
    file: &BootFile,
    memory: &GuestMemory,
    ram_bytes: u64,
    kernel_end: u64,
    limit: u64,
) -> Result<(GuestAddress, u64)> {
    let bytes = file.read(MAX_INITRD_BYTES)?;
    let length = bytes.len() as u64;
    let top = ram_bytes.min(layout::LOW_RAM_LIMIT).min(limit);
    let start = top.checked_sub(length).map(|start| start & !(PAGE - 1)).filter(|start| *start >= kernel_end);
    let start = start.ok_or_else(|| {
        Error::Invalid(format!(
            "{}: {} MiB do not fit between the kernel and {} MiB; give the guest more memory",
            file.name(),
            length >> 20,
            top >> 20
        ))
    })?;
    memory.write_slice(&bytes, GuestAddress(start)).map_err(in_memory("the initial file system"))?;
    Ok((GuestAddress(start), length))
}

fn write_command_line(memory: &GuestMemory, text: &str) -> Result<()> {
    if text.len() >= layout::COMMAND_LINE_BYTES || text.contains('\0') {
        return Err(Error::Invalid(format!(
            "the kernel's command line has at most {} bytes and no NUL",
            layout::COMMAND_LINE_BYTES - 1
        )));
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, layout::COMMAND_LINE).map_err(in_memory("the command line"))
}

/// What is where, for the kernel's memory map: start, length, and whether it is RAM (or else firmware's).
pub(crate) fn memory_map(handover: &Handover<'_>) -> Vec<(u64, u64, bool)> {
    let firmware = handover.acpi.address..layout::FIRMWARE_AREA_END;
    let mut map = Vec::new();
    for (start, length) in ram_ranges(handover.ram_bytes) {
        let end = start.0 + length;
        if (start.0..end).contains(&firmware.start) {
            map.extend([
                (start.0, firmware.start - start.0, true),
                (firmware.start, firmware.end - firmware.start, false),
            ]);
            map.push((firmware.end, end - firmware.end, true));
        } else {
            map.push((start.0, length, true));
        }
    }
    map
}
