//! Servers that all scripts of a target talk to.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use blk_backend::disk::{Disk, DiskOptions};
use img_core::{
    format::OpenMode,
    storage::{MemoryStorage, Storage},
};
use rustix::fs::{Mode, OFlags, open};

use crate::{craft::Crafted, memory};

/// A server on a disk in memory, and where it is reached.
pub(super) struct Served<S> {
    _server: S,
    /// The socket, which has no name any more: the process leaves nothing behind, however it ends.
    _socket: OwnedFd,
    pub(super) path: PathBuf,
}

impl<S> Served<S> {
    /// What `start` serves at the path that it is given.
    pub(super) fn new(start: impl FnOnce(&Arc<Disk>, &Path) -> S) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let storage: Arc<dyn Storage> =
            Arc::new(MemoryStorage::from_bytes("fuzz.qcow2", &Crafted::new().bytes));
        let image = memory::open(storage, OpenMode::Write).expect("it is valid");
        let server = start(&Disk::over(image, &DiskOptions::default()), &path);
        let socket = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).expect("it is there");
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd()).into();
        Self { _server: server, _socket: socket, path }
    }
}
