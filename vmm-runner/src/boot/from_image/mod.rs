//! Kernels inside a guest's own disk: found through its partitions, file systems and boot loader configuration.
//!
//! Everything here was written by a guest. Parsers are memory-safe crates or plain text; every length is bounded
//! before memory is taken; nothing is mounted.

mod bls;
mod extlinux;
mod grub;
mod partition;
mod volume;

use std::{fmt, sync::Arc};

use img_core::image::Image;

use self::volume::Volume;
use super::{BootFile, DirectBoot, MAX_INITRD_BYTES, MAX_KERNEL_BYTES};
use crate::{Error, Result};

/// More entries than this are not read from one disk.
const MAX_ENTRIES: usize = 256;
/// Boot loader configurations are far smaller.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Directories with more files are not boot directories.
const MAX_DIRECTORY: usize = 4096;

/// One way to boot a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootEntry {
    /// What its author calls it.
    pub title: String,
    /// The kernel's path on its volume.
    pub kernel: String,
    /// The initial file systems' paths; they are put one behind the other.
    pub initrds: Vec<String>,
    /// The kernel's command line.
    pub options: String,
    /// Which volume of the disk, counted from 0.
    volume: usize,
    /// Whether the boot loader would take it.
    pub is_default: bool,
}

/// What a configuration file says, before its files are looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct RawEntry {
    title: String,
    kernel: String,
    initrds: Vec<String>,
    options: String,
    is_default: bool,
}

/// A disk that was looked through.
pub struct BootDisk {
    volumes: Vec<Volume>,
    entries: Vec<BootEntry>,
    /// Why volumes could not be read.
    remarks: Vec<String>,
    has_boot_sector: bool,
}

impl fmt::Debug for BootDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BootDisk").field("entries", &self.entries).finish_non_exhaustive()
    }
}

impl BootDisk {
    /// Looks through a disk: entries of the Boot Loader Specification first, then GRUB's configuration, then
    /// extlinux'.
    ///
    /// # Errors
    /// When the disk cannot be read. A file system that cannot be read is a remark.
    pub fn look(image: &Arc<Image>) -> Result<Self> {
        let mut volumes = Vec::new();
        let mut remarks = Vec::new();
        for part in partition::list(image)? {
            match Volume::open(image, &part) {
                Ok(Some(volume)) => volumes.push(volume),
                Ok(None) => {}
                Err(why) => remarks.push(format!("{}: {why}", part.name)),
            }
        }
        let mut entries: Vec<BootEntry> = Vec::new();
        let readers: [fn(&Volume) -> Vec<RawEntry>; 3] = [bls::read, grub::read, extlinux::read];
        for reader in readers {
            for volume in &volumes {
                for raw in reader(volume) {
                    if entries.len() < MAX_ENTRIES
                        && let Some(entry) = resolve(&volumes, volume, raw)
                        && !entries.iter().any(|known| is_same(known, &entry))
                    {
                        entries.push(entry);
                    }
                }
            }
        }
        // One default: the first that says so, or the first.
        let chosen = entries.iter().position(|entry| entry.is_default).unwrap_or(0);
        for (index, entry) in entries.iter_mut().enumerate() {
            entry.is_default = index == chosen;
        }
        let has_boot_sector = partition::has_boot_code(image)?;
        Ok(Self { volumes, entries, remarks, has_boot_sector })
    }

    /// All entries.
    #[must_use]
    pub fn entries(&self) -> &[BootEntry] {
        &self.entries
    }

    /// What could not be read, and why.
    #[must_use]
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// Whether firmware of a PC would start the disk's first sector.
    #[must_use]
    pub fn has_boot_sector(&self) -> bool {
        self.has_boot_sector
    }

    /// What the volume of an entry is called.
    #[must_use]
    pub fn volume_name(&self, entry: &BootEntry) -> &str {
        self.volumes.get(entry.volume).map_or("", Volume::name)
    }

    /// Reads what an entry names: the one called `title`, or the default.
    ///
    /// # Errors
    /// When there is none, or a file cannot be read or is too large.
    pub fn load(&self, title: Option<&str>) -> Result<DirectBoot> {
        let found =
            self.entries.iter().find(|entry| title.map_or(entry.is_default, |title| entry.title == title));
        let entry = found.ok_or_else(|| {
            let seen: String = self.remarks.iter().map(|remark| format!("; {remark}")).collect();
            match title {
                Some(title) => {
                    Error::Invalid(format!("the disk has no boot entry '{title}' (see --list-boot)"))
                }
                None => Error::Invalid(format!(
                    "no kernel was found in the disk{seen}; give --kernel or --firmware"
                )),
            }
        })?;
        let volume = &self.volumes[entry.volume];
        let kernel = volume.read(&entry.kernel, MAX_KERNEL_BYTES)?;
        let mut initrd = Vec::new();
        for path in &entry.initrds {
            let room = MAX_INITRD_BYTES - initrd.len() as u64;
            initrd.extend(volume.read(path, room)?);
            // The kernel unpacks several archives that begin on words.
            initrd.resize(initrd.len().next_multiple_of(4), 0);
        }
        let within = |path: &str| format!("{} in the disk", path);
        Ok(DirectBoot {
            kernel: BootFile::Bytes { name: within(&entry.kernel), bytes: kernel.into() },
            initrd: entry
                .initrds
                .first()
                .map(|path| BootFile::Bytes { name: within(path), bytes: initrd.into() }),
            command_line: entry.options.clone(),
        })
    }
}

fn is_same(one: &BootEntry, other: &BootEntry) -> bool {
    (&one.title, &one.kernel, &one.options, one.volume)
        == (&other.title, &other.kernel, &other.options, other.volume)
}

/// Finds the files of an entry: on the volume of its configuration, or on another one, under their path or, where
/// `/boot` is a volume of its own, without it.
fn resolve(volumes: &[Volume], own: &Volume, raw: RawEntry) -> Option<BootEntry> {
    let own = volumes.iter().position(|volume| std::ptr::eq(volume, own))?;
    let order = std::iter::once(own).chain((0..volumes.len()).filter(|&index| index != own));
    for volume in order {
        let here = |path: &str| {
            let short = path.strip_prefix("/boot").filter(|rest| rest.starts_with('/'));
            [Some(path), short]
                .into_iter()
                .flatten()
                .find(|path| volumes[volume].has(path))
                .map(str::to_owned)
        };
        let Some(kernel) = here(&raw.kernel) else { continue };
        let Some(initrds) = raw.initrds.iter().map(|path| here(path)).collect() else { continue };
        return Some(BootEntry {
            title: raw.title,
            kernel,
            initrds,
            options: raw.options,
            volume,
            is_default: raw.is_default,
        });
    }
    None
}

/// A path from the root of its volume, without what goes up.
fn absolute(path: &str, dir: &str) -> Option<String> {
    // GRUB may name a device before the path.
    let path = path.rsplit_once(')').map_or(path, |(_, path)| path);
    let joined = if path.starts_with('/') { path.to_owned() } else { format!("{dir}/{path}") };
    let mut parts: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    if parts.is_empty() { None } else { Some(format!("/{}", parts.join("/"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_made_whole_and_stay_inside() {
        assert_eq!(absolute("/boot/../boot/./vmlinuz", "/x").as_deref(), Some("/boot/vmlinuz"));
        assert_eq!(absolute("(hd0,gpt2)/vmlinuz", "/x").as_deref(), Some("/vmlinuz"));
        assert_eq!(absolute("../vmlinuz", "/boot/extlinux").as_deref(), Some("/boot/vmlinuz"));
        assert_eq!(absolute("../../../..", "/boot"), None);
    }
}
