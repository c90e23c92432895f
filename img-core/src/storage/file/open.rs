//! Opening a host file: what is refused, and what is found out once.

use std::{
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicBool, AtomicI32},
    },
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};

use super::{FileStorage, Kind};
use crate::{
    Error, Result,
    storage::{CacheMode, Identity, block, direct::Direct, lock, space},
    text,
};

/// Each write makes its bytes durable, and what is needed to find them again. `OFlags::DSYNC` is something else with
/// rustix on Linux: `O_SYNC`, which commits times with every write.
const DSYNC: OFlags = OFlags::from_bits_retain(libc::O_DSYNC.cast_unsigned());

/// How a host file is opened. The default reads an existing file through the page cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileOptions {
    write: bool,
    create: bool,
    create_new: bool,
    truncate: bool,
    cache: CacheMode,
}

impl FileOptions {
    /// Reading only, existing, `writeback`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Open for writing too.
    #[must_use]
    pub fn write(mut self, write: bool) -> Self {
        self.write = write;
        self
    }

    /// Make the file when there is none; implies writing.
    #[must_use]
    pub fn create(mut self, create: bool) -> Self {
        self.create = create;
        self.write |= create;
        self
    }

    /// Make the file, and fail when there is one; implies writing.
    #[must_use]
    pub fn create_new(mut self, create_new: bool) -> Self {
        self.create_new = create_new;
        self.write |= create_new;
        self
    }

    /// Cut an existing regular file to nothing; implies writing. Devices are left as they are.
    ///
    /// Cutting happens before locks can be taken: a caller that must not hurt another process's image opens
    /// without this, takes the lock, and then [resizes](crate::storage::Storage::resize) to 0.
    #[must_use]
    pub fn truncate(mut self, truncate: bool) -> Self {
        self.truncate = truncate;
        self.write |= truncate;
        self
    }

    /// How the page cache is used.
    #[must_use]
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Opens `path`.
    ///
    /// # Errors
    /// [`Error::OpenFile`] or [`Error::CreateFile`] when the system refuses; [`Error::Invalid`] in the
    /// reference's words for directories, pipes and sockets.
    pub fn open(self, path: impl Into<PathBuf>) -> Result<FileStorage> {
        let path = path.into();
        let creates = self.create || self.create_new;
        let refused = |errno: Errno| {
            let (file, source) = (path.clone(), errno.into());
            if self.cache.is_direct() && errno == Errno::INVAL {
                let verb = if creates { "create" } else { "open" };
                let file = text::from_path(&file);
                return Error::Invalid(format!(
                    "Could not {verb} '{file}': filesystem does not support O_DIRECT"
                ));
            }
            if creates { Error::CreateFile { file, source } } else { Error::OpenFile { file, source } }
        };
        // NONBLOCK: opening a pipe that nobody writes to must not wait; it is refused below.
        let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        flags |= if self.write { OFlags::RDWR } else { OFlags::RDONLY };
        if self.cache.is_direct() {
            flags |= OFlags::DIRECT;
        }
        if self.cache.writes_through() {
            flags |= DSYNC;
        }
        if creates {
            flags |= OFlags::CREATE;
        }
        if self.create_new {
            flags |= OFlags::EXCL;
        }
        if self.truncate {
            flags |= OFlags::TRUNC;
        }
        let mode = Mode::from_raw_mode(0o644);
        let fd = rustix::io::retry_on_intr(|| rustix::fs::open(&path, flags, mode)).map_err(refused)?;
        let stat = rustix::fs::fstat(&fd).map_err(refused)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::Regular,
            FileType::BlockDevice => Kind::Block,
            FileType::CharacterDevice => Kind::Character,
            _ => {
                return Err(Error::Invalid(format!(
                    "'file' driver requires '{}' to be a regular file",
                    text::from_path(&path)
                )));
            }
        };
        // From here on a system call may wait (and io_uring would answer EAGAIN otherwise).
        rustix::fs::fcntl_setfl(&fd, flags & (OFlags::DIRECT | DSYNC)).map_err(refused)?;
        let identity = match kind {
            Kind::Regular => Identity { device: stat.st_dev, inode: stat.st_ino },
            Kind::Block | Kind::Character => Identity { device: stat.st_rdev, inode: 0 },
        };
        let block_bytes = match kind {
            Kind::Block => block::granularity_bytes(fd.as_fd()).map_err(refused)?,
            Kind::Regular | Kind::Character => u32::try_from(stat.st_blksize).unwrap_or(4096).max(1),
        };
        let direct = match kind {
            Kind::Regular if self.cache.is_direct() => {
                let len_bytes = u64::try_from(stat.st_size).unwrap_or(0);
                Some(Direct::find(fd.as_fd(), block_bytes, Some(len_bytes)).map_err(refused)?)
            }
            Kind::Block if self.cache.is_direct() => {
                Some(Direct::find(fd.as_fd(), block_bytes, None).map_err(refused)?)
            }
            _ => None,
        };
        let reserves =
            self.write && kind == Kind::Regular && direct.is_none() && space::is_cheaper_reserved(fd.as_fd());
        Ok(FileStorage {
            path,
            fd,
            kind,
            direct,
            identity,
            block_bytes,
            writable: self.write,
            cache: self.cache,
            punches: AtomicBool::new(kind != Kind::Character),
            long_write: Mutex::new(()),
            reserves: AtomicBool::new(reserves),
            failed_flush: AtomicI32::new(0),
            watcher: OnceLock::new(),
            locks: lock::Locks::default(),
        })
    }
}
