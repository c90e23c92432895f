//! A file system inside a disk, read only: ext2, ext3 and ext4, and FAT.

use std::{
    fmt,
    io::{self, Read, Seek, SeekFrom, Write},
    ops::Range,
    sync::Arc,
};

use ext4_view::{Ext4, Ext4Read};
use fatfs::{FileSystem, FsOptions};
use img_core::image::Image;

use super::{
    MAX_DIRECTORY,
    partition::{Part, seek},
};
use crate::{Error, Result};

/// ext: where the superblock's magic number stands, and what it is.
const EXT_MAGIC_AT: u64 = 1024 + 56;
const EXT_MAGIC: [u8; 2] = [0x53, 0xEF];
/// FAT: boot sectors begin with a jump.
const FAT_JUMPS: [u8; 2] = [0xEB, 0xE9];
/// File systems that are known by their magic number and cannot be read here: name, place, number.
const UNREADABLE: [(&str, u64, &[u8]); 4] = [
    ("XFS", 0, b"XFSB"),
    ("Btrfs", 0x1_0040, b"_BHRfS_M"),
    ("LUKS", 0, b"LUKS\xBA\xBE"),
    ("LVM", 536, b"LVM2 001"),
];

/// One that is open.
pub(super) struct Volume {
    name: String,
    files: Files,
}

enum Files {
    Ext(Ext4),
    Fat(Box<FileSystem<Window>>),
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Volume").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Volume {
    /// `None` where there is no file system that anyone knows; an error where there is one that cannot be read.
    pub(super) fn open(image: &Arc<Image>, part: &Part) -> std::result::Result<Option<Self>, String> {
        let window = Window { image: Arc::clone(image), bytes: part.bytes.clone(), at: 0 };
        let holds = |at: u64, magic: &[u8]| {
            let mut bytes = vec![0; magic.len()];
            window.read_exact_at(at, &mut bytes).is_ok() && bytes == magic
        };
        let files = if holds(EXT_MAGIC_AT, &EXT_MAGIC) {
            Files::Ext(Ext4::load(Box::new(window)).map_err(|error| error.to_string())?)
        } else if holds(510, &[0x55, 0xAA]) && FAT_JUMPS.iter().any(|jump| holds(0, &[*jump])) {
            // A disk's boot sector looks like this too.
            let Ok(files) = FileSystem::new(window, FsOptions::new()) else { return Ok(None) };
            Files::Fat(Box::new(files))
        } else if let Some((name, ..)) = UNREADABLE.iter().find(|(_, at, magic)| holds(*at, magic)) {
            return Err(format!("{name} cannot be read here"));
        } else {
            return Ok(None);
        };
        Ok(Some(Self { name: part.name.clone(), files }))
    }

    /// Which part of the disk it is on.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether a path names a file that can be opened.
    pub(super) fn has(&self, path: &str) -> bool {
        match &self.files {
            Files::Ext(files) => files.metadata(path).is_ok_and(|facts| !facts.is_dir()),
            Files::Fat(files) => files.root_dir().open_file(path).is_ok(),
        }
    }

    /// The names in a directory, sorted; none where there is no such directory.
    pub(super) fn list(&self, dir: &str) -> Vec<String> {
        let mut names: Vec<String> = match &self.files {
            Files::Ext(files) => files
                .read_dir(dir)
                .into_iter()
                .flatten()
                .take(MAX_DIRECTORY)
                .filter_map(|entry| Some(entry.ok()?.file_name().as_str().ok()?.to_owned()))
                .collect(),
            Files::Fat(files) => {
                let dir = files.root_dir().open_dir(dir);
                let entries = dir.into_iter().flat_map(|dir| dir.iter().take(MAX_DIRECTORY));
                entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect()
            }
        };
        names.sort_unstable();
        names
    }

    /// A whole file.
    pub(super) fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>> {
        let bad = |why: &str| Error::Invalid(format!("{path} in {}: {why}", self.name));
        let too_large = || bad(&format!("larger than {} MiB", limit >> 20));
        match &self.files {
            Files::Ext(files) => {
                let facts = files.metadata(path).map_err(|error| bad(&error.to_string()))?;
                if facts.len() > limit {
                    return Err(too_large());
                }
                files.read(path).map_err(|error| bad(&error.to_string()))
            }
            Files::Fat(files) => {
                let file = files.root_dir().open_file(path).map_err(|error| bad(&error.to_string()))?;
                let mut bytes = Vec::new();
                let read =
                    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| bad(&error.to_string()))?;
                if read as u64 > limit { Err(too_large()) } else { Ok(bytes) }
            }
        }
    }

    /// A text file of the boot loader; `None` where there is none that can be used.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        let bytes = self.has(path).then(|| self.read(path, super::MAX_CONFIG_BYTES).ok()).flatten()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// A part of a disk as the libraries want it; it cannot be written.
#[derive(Debug)]
struct Window {
    image: Arc<Image>,
    bytes: Range<u64>,
    at: u64,
}

impl Window {
    fn len(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    fn read_exact_at(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = at.checked_add(buf.len() as u64).filter(|end| *end <= self.len());
        end.ok_or(io::ErrorKind::UnexpectedEof)?;
        self.image.read_at(buf, self.bytes.start + at).map_err(io::Error::other)
    }
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.read_exact_at(start_byte, dst)?)
    }
}

impl Read for Window {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len().saturating_sub(self.at)).unwrap_or(usize::MAX);
        let count = buf.len().min(left);
        self.read_exact_at(self.at.min(self.len()), &mut buf[..count])?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Window {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = seek(self.at, self.len(), to)?;
        Ok(self.at)
    }
}

impl Write for Window {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
