//! The guest's RAM.

use std::{fs::File, os::fd::AsRawFd, str::FromStr};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use super::layout;
use crate::{Error, Result};

/// Memory as the devices see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The smallest guest: a kernel and its initramfs hardly fit into less.
const MIN_BYTES: u64 = 16 << 20;
/// The largest guest: the physical addresses that every x86-64 has, less the PCI window.
const MAX_BYTES: u64 = 1 << 39;

/// How much RAM, and what backs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Size of RAM; a multiple of the page size.
    pub size_bytes: u64,
    /// Pages of this size from the host's pool of huge pages.
    pub huge_page_bytes: Option<u64>,
    /// One memfd that another process can map (a vhost-user backend).
    pub is_shared: bool,
    /// Lets the host merge equal pages (KSM): private ones of the usual size.
    pub is_mergeable: bool,
    /// Takes all pages at start.
    pub is_prefaulted: bool,
    /// Takes pages from this node of the host only.
    pub node: Option<u32>,
    /// Leaves the memory out of core dumps.
    pub is_hidden_from_dumps: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size_bytes: 1 << 30,
            huge_page_bytes: None,
            is_shared: false,
            is_mergeable: false,
            is_prefaulted: false,
            node: None,
            is_hidden_from_dumps: false,
        }
    }
}

impl FromStr for MemoryConfig {
    type Err = String;

    /// `2G`, or `size=2G,hugepages=2M,shared=on,mergeable=on,prefault=on,numa-node=0,dump=off`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut config = Self::default();
        for (index, part) in text.split(',').enumerate() {
            let (name, value) = match part.split_once('=') {
                Some(pair) => pair,
                None if index == 0 => ("size", part),
                None => return Err(format!("'{part}' is not NAME=VALUE")),
            };
            match name {
                "size" => config.size_bytes = parse_size(value)?,
                "hugepages" => {
                    config.huge_page_bytes = match value {
                        "2M" => Some(2 << 20),
                        "1G" => Some(1 << 30),
                        "off" => None,
                        _ => return Err("hugepages are 2M, 1G or off".to_owned()),
                    }
                }
                "shared" => config.is_shared = parse_switch(name, value)?,
                "mergeable" => config.is_mergeable = parse_switch(name, value)?,
                "prefault" => config.is_prefaulted = parse_switch(name, value)?,
                "dump" => config.is_hidden_from_dumps = !parse_switch(name, value)?,
                "numa-node" => {
                    let node = value.parse().ok().filter(|node| *node < 64);
                    config.node = Some(node.ok_or("numa-node is a number below 64")?);
                }
                _ => return Err(format!("memory has no option '{name}'")),
            }
        }
        let unit = config.huge_page_bytes.unwrap_or(4096);
        if config.size_bytes % unit != 0 {
            return Err(format!("the size must be a multiple of {unit} bytes"));
        }
        if !(MIN_BYTES..=MAX_BYTES).contains(&config.size_bytes) {
            return Err(format!("the size must be from {} MiB to {} GiB", MIN_BYTES >> 20, MAX_BYTES >> 30));
        }
        Ok(config)
    }
}

/// A size with a suffix, as `img` takes it; megabytes without one.
fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "M" | "m" => 20,
        "K" | "k" => 10,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(format!("'{text}' is not a size (512M, 2G)")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("'{text}' is not a size (512M, 2G)"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

fn parse_switch(name: &str, value: &str) -> std::result::Result<bool, String> {
    match value {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(format!("{name} is on or off")),
    }
}

/// The ranges of RAM that the guest has: first address and length. The VGA hole is none.
#[must_use]
pub fn ram_ranges(size_bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = size_bytes.min(layout::LOW_RAM_LIMIT);
    let mut ranges = vec![
        (GuestAddress(0), layout::VGA_HOLE_START),
        (GuestAddress(layout::VGA_HOLE_END), low - layout::VGA_HOLE_END),
    ];
    if size_bytes > low {
        ranges.push((GuestAddress(layout::HIGH_RAM_START), size_bytes - low));
    }
    ranges
}

/// Takes the RAM from the host: one region below the PCI window, with memory behind the VGA hole that nobody sees,
/// so that huge pages fit, and one above it.
///
/// # Errors
/// When the host has not so much, or no huge pages, or would pass over what is asked for.
pub fn allocate(config: &MemoryConfig) -> Result<GuestMemory> {
    // The kernel takes the advice for any memory, and looks at private pages of the usual size alone.
    if config.is_mergeable && (config.is_shared || config.huge_page_bytes.is_some()) {
        let text = "guest memory: mergeable=on is for memory that is not shared (vhost-user disks share it) and not of \
                    huge pages: the host merges no others";
        return Err(Error::Invalid(text.to_owned()));
    }
    let backing = backing_file(config)?;
    let low = config.size_bytes.min(layout::LOW_RAM_LIMIT);
    let high = config.size_bytes - low;
    let mut regions = Vec::new();
    for (start, length, file_offset) in [(0, low, 0), (layout::HIGH_RAM_START, high, low)] {
        let length = usize::try_from(length).map_err(|_| Error::Invalid("too much memory".to_owned()))?;
        if length == 0 {
            continue;
        }
        let region = match &backing {
            Some(file) => {
                let file = file.try_clone().map_err(Error::host("guest memory"))?;
                // Huge pages that nobody set aside would be missed only when the guest touches them, which kills.
                let reserve = if config.huge_page_bytes.is_some() { 0 } else { libc::MAP_NORESERVE };
                let access = libc::PROT_READ | libc::PROT_WRITE;
                MmapRegion::build(
                    Some(FileOffset::new(file, file_offset)),
                    length,
                    access,
                    libc::MAP_SHARED | reserve,
                )
            }
            None => MmapRegion::new(length),
        };
        let region = region.map_err(|error| match config.huge_page_bytes {
            Some(page) => Error::Invalid(format!(
                "guest memory: the host has not enough free huge pages of {} MiB (see /sys/kernel/mm/hugepages): {error}",
                page >> 20
            )),
            None => Error::Invalid(format!("guest memory: {error}")),
        })?;
        advise(&region, config)?;
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| Error::Invalid("guest memory passes the end of the address space".to_owned()))?;
        regions.push(region);
    }
    GuestMemory::from_regions(regions).map_err(|error| Error::Invalid(format!("guest memory: {error}")))
}

fn backing_file(config: &MemoryConfig) -> Result<Option<File>> {
    let flags = match config.huge_page_bytes {
        Some(size) if size == 2 << 20 => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(_) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        None if config.is_shared => MemfdFlags::empty(),
        None => return Ok(None),
    };
    let file: File = memfd_create("guest-memory", flags | MemfdFlags::CLOEXEC)
        .map_err(Error::host("a file for guest memory"))?
        .into();
    ftruncate(&file, config.size_bytes).map_err(Error::host("the size of guest memory"))?;
    Ok(Some(file))
}

/// What the host should know of the memory.
fn advise(region: &MmapRegion<()>, config: &MemoryConfig) -> Result<()> {
    let mut wishes = Vec::new();
    if config.is_mergeable {
        wishes.push((libc::MADV_MERGEABLE, "mergeable guest memory"));
    }
    if config.is_hidden_from_dumps {
        wishes.push((libc::MADV_DONTDUMP, "guest memory outside of dumps"));
    }
    if let Some(node) = config.node {
        bind_to_node(region, node)?;
    }
    if config.is_prefaulted {
        wishes.push((libc::MADV_POPULATE_WRITE, "guest memory at start"));
    }
    for (advice, what) in wishes {
        // SAFETY: the range is the mapping that `region` owns; none of the advices changes what it holds.
        let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
        if result != 0 {
            return Err(Error::host(what)(std::io::Error::last_os_error()));
        }
    }
    Ok(())
}

fn bind_to_node(region: &MmapRegion<()>, node: u32) -> Result<()> {
    let mask: u64 = 1 << node; // checked to be below 64 when it was parsed
    // SAFETY: the range is the mapping that `region` owns, and the mask outlives the call. The policy only says
    // where pages come from.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            region.as_ptr(),
            region.size(),
            libc::MPOL_BIND,
            &raw const mask,
            u64::BITS + 1,
            0,
        )
    };
    if result != 0 {
        return Err(Error::host("guest memory on one node")(std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Gives the RAM to the guest, one slot a range.
pub(super) fn map_into(vm: &VmFd, memory: &GuestMemory, size_bytes: u64) -> Result<()> {
    for (slot, (start, length)) in (0..).zip(ram_ranges(size_bytes)) {
        let host = memory
            .get_host_address(start)
            .map_err(|error| Error::Invalid(format!("guest memory at {:#x}: {error}", start.0)))?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start.0,
            memory_size: length,
            userspace_addr: host as u64,
        };
        // SAFETY: each range lies in one region, which stays mapped as long as the memory lives, and that outlives
        // the VM; slots do not overlap.
        unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("guest memory"))?;
    }
    Ok(())
}

/// The descriptor behind a region that can be shared.
#[must_use]
pub fn shared_fd(region: &GuestRegionMmap<()>) -> Option<(i32, u64)> {
    region.file_offset().map(|offset| (offset.file().as_raw_fd(), offset.start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_holes_of_a_pc_open() {
        let three = ram_ranges(5 << 30);
        assert_eq!(three[0], (GuestAddress(0), 640 << 10));
        assert_eq!(three[1], (GuestAddress(768 << 10), (3 << 30) - (768 << 10)));
        assert_eq!(three[2], (GuestAddress(4 << 30), 2 << 30));
        assert_eq!(ram_ranges(1 << 30).len(), 2);
    }

    /// Not when the guest touches it, which would kill the process.
    #[test]
    fn huge_pages_that_the_host_has_not_set_aside_are_missed_at_once() {
        let config =
            MemoryConfig { size_bytes: 512 << 30, huge_page_bytes: Some(2 << 20), ..MemoryConfig::default() };
        let error = allocate(&config).expect_err("nobody sets aside half a terabyte").to_string();
        assert!(error.contains("not enough free huge pages of 2 MiB"), "{error}");
    }

    #[test]
    fn what_the_host_merges_none_of_is_not_promised() {
        let small = MemoryConfig { size_bytes: 32 << 20, is_mergeable: true, ..MemoryConfig::default() };
        for config in [
            MemoryConfig { is_shared: true, ..small },
            MemoryConfig { huge_page_bytes: Some(2 << 20), ..small },
        ] {
            let error = allocate(&config).expect_err("it would do nothing").to_string();
            assert!(error.contains("mergeable=on is for memory that is not shared"), "{error}");
        }
    }

    #[test]
    fn options_of_memory_are_understood_or_refused_by_name() {
        let parse = |text: &str| text.parse::<MemoryConfig>();
        assert_eq!(parse("512M").expect("a size").size_bytes, 512 << 20);
        assert_eq!(parse("64").expect("megabytes").size_bytes, 64 << 20);
        let all = parse("size=2G,hugepages=2M,shared=on,mergeable=on,prefault=on,numa-node=1,dump=off");
        assert_eq!(
            all.expect("all options"),
            MemoryConfig {
                size_bytes: 2 << 30,
                huge_page_bytes: Some(2 << 20),
                is_shared: true,
                is_mergeable: true,
                is_prefaulted: true,
                node: Some(1),
                is_hidden_from_dumps: true,
            }
        );
        for bad in
            ["", "8M", "2X", "size=1G,colour=red", "3M,hugepages=2M", "99999999999G", "1G,shared=maybe"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_is_where_the_map_says_and_can_be_shared() {
        let config = MemoryConfig { size_bytes: 32 << 20, is_shared: true, ..MemoryConfig::default() };
        let memory = allocate(&config).expect("32 MiB");
        assert!(memory.address_in_range(GuestAddress(0x9_FFFF)));
        assert!(memory.address_in_range(GuestAddress((32 << 20) - 1)));
        assert!(!memory.address_in_range(GuestAddress(32 << 20)));
        let offsets: Vec<_> = memory.iter().filter_map(shared_fd).map(|(_, offset)| offset).collect();
        assert_eq!(offsets, [0]);
    }
}
