//! Guest memory as a front end shares it.

use std::{fs::File, io, sync::Arc};

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use super::MAX_MEMORY_SLOTS;
use crate::virtio::GuestRam;

/// One shared region.
#[derive(Clone, Debug)]
struct Region {
    /// Where the front end has it mapped: rings are named by such addresses.
    user_start: u64,
    guest_start: u64,
    len_bytes: u64,
    mapping: Arc<GuestRegionMmap<()>>,
}

/// All regions of one front end, in the order of guest addresses.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedMemory {
    regions: Vec<Region>,
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

impl SharedMemory {
    /// Maps one more region of `file`.
    pub(super) fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> io::Result<()> {
        let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, mmap_offset } = *region;
        if self.regions.len() as u64 >= MAX_MEMORY_SLOTS {
            return Err(invalid(format!("more than {MAX_MEMORY_SLOTS} memory regions")));
        }
        // Past the end of the file every access would be a bus error.
        let file_bytes = file.metadata()?.len();
        if mmap_offset.checked_add(memory_size).is_none_or(|end| end > file_bytes) {
            return Err(invalid(format!(
                "memory region at {guest_phys_addr:#x}: {memory_size} bytes from {mmap_offset} on were expected, \
                 its file has {file_bytes}"
            )));
        }
        if user_addr.checked_add(memory_size).is_none() {
            return Err(invalid(format!("memory region at {guest_phys_addr:#x}: its user addresses wrap")));
        }
        let size = usize::try_from(memory_size)
            .map_err(|_| invalid(format!("memory region at {guest_phys_addr:#x}: {memory_size} bytes")))?;
        let mapping =
            MmapRegion::from_file(FileOffset::new(file, mmap_offset), size).map_err(io::Error::other)?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(guest_phys_addr))
            .ok_or_else(|| invalid(format!("memory region at {guest_phys_addr:#x}: its addresses wrap")))?;
        let at = self.regions.partition_point(|other| other.guest_start < guest_phys_addr);
        self.regions.insert(
            at,
            Region {
                user_start: user_addr,
                guest_start: guest_phys_addr,
                len_bytes: memory_size,
                mapping: Arc::new(mapping),
            },
        );
        Ok(())
    }

    /// Lets one region go.
    pub(super) fn remove(&mut self, region: &VhostUserMemoryRegion) -> io::Result<()> {
        let VhostUserMemoryRegion { guest_phys_addr, memory_size, user_addr, .. } = *region;
        let at = self.regions.iter().position(|other| {
            (other.guest_start, other.len_bytes, other.user_start)
                == (guest_phys_addr, memory_size, user_addr)
        });
        let at = at.ok_or_else(|| {
            invalid(format!("memory region at {guest_phys_addr:#x} of {memory_size} bytes was never added"))
        })?;
        self.regions.remove(at);
        Ok(())
    }

    /// What the device works with. Regions that overlap are refused.
    pub(super) fn ram(&self) -> io::Result<Arc<GuestRam>> {
        let mappings = self.regions.iter().map(|region| Arc::clone(&region.mapping)).collect();
        let ram = GuestRam::from_arc_regions(mappings)
            .map_err(|error| invalid(format!("guest memory: {error}")))?;
        Ok(Arc::new(ram))
    }

    /// The guest address of what the front end knows as `user_address`.
    pub(super) fn guest_address(&self, user_address: u64) -> io::Result<GuestAddress> {
        self.regions
            .iter()
            .find_map(|region| {
                let within = user_address.checked_sub(region.user_start)?;
                (within < region.len_bytes).then(|| GuestAddress(region.guest_start + within))
            })
            .ok_or_else(|| invalid(format!("address {user_address:#x} is in no memory region")))
    }
}
