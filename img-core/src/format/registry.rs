//! The formats this build knows: the only list of their names.

use std::path::Path;

use super::{Driver, null, qcow2, qed, raw, vmdk, vpc};
use crate::Error;

/// All drivers, in the order of `--help`.
pub static DRIVERS: &[&dyn Driver] =
    &[&raw::Raw, &qcow2::Qcow2, &qed::Qed, &vmdk::Vmdk, &vpc::Vpc, &null::NULL_CO, &null::NULL_AIO];

/// The driver called `name`.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static dyn Driver> {
    DRIVERS.iter().copied().find(|driver| driver.name() == name)
}

/// Formats and protocols that the reference has drivers for, and this build has not.
const ELSEWHERE: &[&str] = &[
    "blkdebug",
    "blklogwrites",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "file",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "io_uring",
    "iscsi",
    "iser",
    "luks",
    "nbd",
    "nfs",
    "nvme",
    "nvme-io_uring",
    "parallels",
    "preallocate",
    "qcow",
    "quorum",
    "rbd",
    "replication",
    "snapshot-access",
    "ssh",
    "throttle",
    "vdi",
    "vhdx",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
    "vvfat",
];

/// Whether `name` is a driver that exists, but not here.
#[must_use]
pub fn is_elsewhere(name: &str) -> bool {
    ELSEWHERE.contains(&name)
}

/// Why there is no driver called `name`.
#[must_use]
pub fn unknown(name: &str) -> Error {
    Error::Invalid(if is_elsewhere(name) {
        format!("The format '{name}' is not supported yet")
    } else {
        format!("Unknown driver '{name}'")
    })
}

/// How many bytes of a file's start [`probe`] looks at.
pub const PROBE_BYTES: usize = 2048;

/// The driver most sure of a file that starts with `head`. Raw claims everything, a little.
#[must_use]
pub fn probe(head: &[u8], name: &Path) -> &'static dyn Driver {
    DRIVERS.iter().copied().max_by_key(|driver| driver.probe(head, name)).expect("the list is not empty")
}

/// Whether a driver claims every file, so that its claim means that nothing else is known.
#[must_use]
pub fn is_a_guess(driver: &dyn Driver) -> bool {
    driver.probe(&[], Path::new("")) > 0
}

/// How many bytes of a file's end [`probe_tail`] looks at.
pub const PROBE_TAIL_BYTES: usize = 512;

/// The driver that the last bytes of a file speak for, where they do.
#[must_use]
pub fn probe_tail(tail: &[u8], file_bytes: u64) -> Option<&'static dyn Driver> {
    DRIVERS.iter().copied().find(|driver| driver.probe_tail(tail, file_bytes))
}
