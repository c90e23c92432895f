//! The system calls that no kept crate wraps: byte-range locks of an open file description,
//! and the attributes of a file.
//!
//! The only module of the crate where `unsafe` is allowed. Each function is safe to call with any
//! arguments; all pointers handed to the kernel live on this module's stack.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// Takes a shared lock on one byte for the open file description behind `fd`, without waiting.
///
/// # Errors
/// `AGAIN` or `ACCESS` when somebody holds an exclusive lock there; what else `fcntl` says.
pub(super) fn lock_byte(fd: BorrowedFd<'_>, byte: u8) -> Result<(), Errno> {
    ofd(fd, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map(|_| ())
}

/// Gives the lock on one byte back.
pub(super) fn unlock_byte(fd: BorrowedFd<'_>, byte: u8) -> Result<(), Errno> {
    ofd(fd, libc::F_OFD_SETLK, libc::F_UNLCK, byte).map(|_| ())
}

/// Whether another open file description holds any lock on one byte.
pub(super) fn others_lock_byte(fd: BorrowedFd<'_>, byte: u8) -> Result<bool, Errno> {
    let found = ofd(fd, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
    Ok(i32::from(found) != libc::F_UNLCK)
}

/// One lock call on one byte; returns the lock type that the kernel left in the structure.
fn ofd(fd: BorrowedFd<'_>, command: libc::c_int, lock_type: libc::c_int, byte: u8) -> Result<i16, Errno> {
    // SAFETY: `flock` is a C structure of integers, for which all zeroes is a value. The kernel demands
    // that `l_pid` is 0 for these commands.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(lock_type).expect("lock types are 0, 1 and 2");
    lock.l_whence = i16::try_from(libc::SEEK_SET).expect("SEEK_SET is 0");
    lock.l_start = i64::from(byte);
    lock.l_len = 1;
    loop {
        // SAFETY: the descriptor is open for as long as it is borrowed; the commands take a pointer to a
        // `flock`, which is exclusively ours and outlives the call, and keep no reference to it.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) };
        if result != -1 {
            return Ok(lock.l_type);
        }
        let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
        if errno != Errno::INTR {
            return Err(errno);
        }
    }
}

/// `struct fsxattr` (linux/fs.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Attributes {
    flags: u32,
    extent_size_bytes: u32,
    extents: u32,
    project: u32,
    cow_extent_size_bytes: u32,
    padding: [u8; 8],
}
const _: () = assert!(size_of::<Attributes>() == 28);

/// `FS_XFLAG_EXTSIZE` (linux/fs.h): the extent size hint counts.
const EXTENT_SIZE_FLAG: u32 = 0x800;

/// Asks the file system to give a file its space in pieces of `bytes`; 0 for no wish.
///
/// # Errors
/// `NOTTY`, `OPNOTSUPP` or `INVAL` where the file system has no such hints or not this one.
pub(super) fn set_extent_size_hint(fd: BorrowedFd<'_>, bytes: u32) -> Result<(), Errno> {
    let mut attributes = attributes(fd)?;
    attributes.flags = match bytes {
        0 => attributes.flags & !EXTENT_SIZE_FLAG,
        _ => attributes.flags | EXTENT_SIZE_FLAG,
    };
    attributes.extent_size_bytes = bytes;
    attributes_call(fd, ATTRIBUTES_SET, &mut attributes)
}

/// The extent size hint of a file; 0 without one.
///
/// # Errors
/// As [`set_extent_size_hint`].
pub(super) fn extent_size_hint(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    Ok(attributes(fd)?.extent_size_bytes)
}

/// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR` (linux/fs.h).
const ATTRIBUTES_GET: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<Attributes>(b'X', 31);
const ATTRIBUTES_SET: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<Attributes>(b'X', 32);

fn attributes(fd: BorrowedFd<'_>) -> Result<Attributes, Errno> {
    let mut attributes = Attributes::default();
    attributes_call(fd, ATTRIBUTES_GET, &mut attributes)?;
    Ok(attributes)
}

fn attributes_call(
    fd: BorrowedFd<'_>,
    request: rustix::ioctl::Opcode,
    attributes: &mut Attributes,
) -> Result<(), Errno> {
    // SAFETY: the descriptor is open for as long as it is borrowed; both requests take a pointer to a
    // `struct fsxattr`, which `Attributes` lays out and which is exclusively ours during the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), std::ptr::from_mut(attributes)) };
    if result != -1 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}
