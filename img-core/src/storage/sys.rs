//! The system calls that no kept crate wraps: byte-range locks of an open file description.
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
