//! Copying between host files inside the kernel.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

/// Copies up to `len` bytes and returns how many, counted from the front: fewer when the source ends, or
/// where the host cannot. On file systems that share blocks (XFS, Btrfs) `copy_file_range` does so where the
/// range is made of whole blocks; no separate clone call is needed since Linux 5.3.
pub(super) fn copy(
    source: BorrowedFd<'_>,
    source_at: u64,
    target: BorrowedFd<'_>,
    target_at: u64,
    len: u64,
) -> Result<u64, Errno> {
    let (mut from, mut to, mut done) = (source_at, target_at, 0);
    while done < len {
        let most = usize::try_from(len - done).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), most) {
            Ok(0) => break,
            Ok(copied) => done += copied as u64,
            Err(Errno::INTR) => {}
            Err(errno) if is_refusal(errno) => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// Whether the host says that it cannot copy these files this way, rather than that it failed: other file
/// systems, devices, overlapping ranges of one file, sandboxes.
fn is_refusal(errno: Errno) -> bool {
    [
        Errno::XDEV,
        Errno::INVAL,
        Errno::NOSYS,
        Errno::OPNOTSUPP,
        Errno::PERM,
        Errno::TXTBSY,
        Errno::OVERFLOW,
        Errno::ISDIR,
    ]
    .contains(&errno)
}
