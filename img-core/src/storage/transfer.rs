//! Positional vectored transfers that finish: short counts, interruptions and long slice lists.
//!
//! One system call an I/O is the rule; only after a short count is a second list of slices built.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::BorrowedFd,
};

use rustix::io::Errno;

/// The most slices that one `preadv` or `pwritev` takes (Linux `UIO_MAXIOV`).
const MAX_SLICES: usize = 1024;

/// The largest length of a storage, and so the end of every transfer. File offsets are signed; the last
/// GiB is left out, as the reference does, so that rounding up to any block cannot overflow.
pub(super) const MAX_LEN_BYTES: u64 = (1 << 63) - (1 << 30);

/// The sum of the lengths of `bufs`.
pub(super) fn total_mut(bufs: &[IoSliceMut<'_>]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

/// The sum of the lengths of `bufs`.
pub(crate) fn total(bufs: &[IoSlice<'_>]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

/// Reads until `bufs` are full or the file ends, and returns how many bytes were read.
/// `unit_bytes` is the alignment of direct I/O, 1 without: a count that breaks it is the end of the
/// file, since nothing can be read behind it.
pub(super) fn read_fully(
    fd: BorrowedFd<'_>,
    bufs: &mut [IoSliceMut<'_>],
    at_bytes: u64,
    unit_bytes: u64,
) -> Result<u64, Errno> {
    let wanted = total_mut(bufs);
    let first = &mut bufs[..]; // the caller's slices are never advanced: a short count makes new ones
    let mut done = read_once(fd, first, at_bytes)?;
    if done == wanted || done == 0 || done % unit_bytes != 0 {
        return Ok(done);
    }
    let mut rest = cut_mut(bufs, done, u64::MAX);
    let mut rest = &mut rest[..];
    while done < wanted {
        let count = read_once(fd, rest, at_bytes + done)?; // both below MAX_LEN_BYTES
        done += count;
        if count == 0 || count % unit_bytes != 0 {
            break;
        }
        IoSliceMut::advance_slices(&mut rest, usize::try_from(count).expect("a count fits its buffers"));
    }
    Ok(done)
}

/// Writes all of `bufs`.
pub(super) fn write_fully(fd: BorrowedFd<'_>, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<(), Errno> {
    let wanted = total(bufs);
    let mut done = write_once(fd, bufs, at_bytes)?;
    if done == wanted {
        return Ok(());
    }
    let mut rest = cut(bufs, done, u64::MAX);
    let mut rest = &mut rest[..];
    while done < wanted {
        let count = write_once(fd, rest, at_bytes + done)?;
        if count == 0 {
            // The reference's errno for a device that takes no more.
            return Err(Errno::NOSPC);
        }
        done += count;
        IoSlice::advance_slices(&mut rest, usize::try_from(count).expect("a count fits its buffers"));
    }
    Ok(())
}

fn read_once(fd: BorrowedFd<'_>, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<u64, Errno> {
    let slices = bufs.len().min(MAX_SLICES);
    let count = rustix::io::retry_on_intr(|| rustix::io::preadv(fd, &mut bufs[..slices], at_bytes))?;
    Ok(count as u64)
}

fn write_once(fd: BorrowedFd<'_>, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<u64, Errno> {
    let slices = bufs.len().min(MAX_SLICES);
    let count = rustix::io::retry_on_intr(|| rustix::io::pwritev(fd, &bufs[..slices], at_bytes))?;
    Ok(count as u64)
}

/// The part `from..to` of the bytes that `bufs` string together.
pub(super) fn cut_mut<'a>(bufs: &'a mut [IoSliceMut<'_>], from: u64, to: u64) -> Vec<IoSliceMut<'a>> {
    let mut start = 0;
    let mut part = Vec::with_capacity(bufs.len());
    for buf in bufs {
        let end = start + buf.len() as u64;
        if let Some((low, high)) = inside(start, end, from, to) {
            part.push(IoSliceMut::new(&mut buf[low..high]));
        }
        start = end;
    }
    part
}

/// The part `from..to` of the bytes that `bufs` string together.
pub(crate) fn cut<'a>(bufs: &'a [IoSlice<'_>], from: u64, to: u64) -> Vec<IoSlice<'a>> {
    let mut start = 0;
    let mut part = Vec::with_capacity(bufs.len());
    for buf in bufs {
        let end = start + buf.len() as u64;
        if let Some((low, high)) = inside(start, end, from, to) {
            part.push(IoSlice::new(&buf[low..high]));
        }
        start = end;
    }
    part
}

/// What of a slice that stands at `start..end` lies in `from..to`, relative to the slice.
fn inside(start: u64, end: u64, from: u64, to: u64) -> Option<(usize, usize)> {
    let (low, high) = (start.max(from), end.min(to));
    let relative = |at: u64| usize::try_from(at - start).expect("inside a slice");
    (low < high).then(|| (relative(low), relative(high)))
}

/// Zeroes the bytes of `bufs` from the `from`-th on.
pub(super) fn zero_from(bufs: &mut [IoSliceMut<'_>], from: u64) {
    let mut skip = from;
    for buf in bufs {
        let kept = usize::try_from(skip).unwrap_or(usize::MAX).min(buf.len());
        buf[kept..].fill(0);
        skip -= kept as u64;
    }
}

/// Copies the bytes of `bufs` one after the other into `into`, which has exactly their length.
pub(super) fn gather(bufs: &[IoSlice<'_>], into: &mut [u8]) {
    let mut done = 0;
    for buf in bufs {
        into[done..done + buf.len()].copy_from_slice(buf);
        done += buf.len();
    }
}

/// Fills `bufs` one after the other from `from`, which has exactly their length.
pub(super) fn scatter(from: &[u8], bufs: &mut [IoSliceMut<'_>]) {
    let mut done = 0;
    for buf in bufs {
        let len = buf.len();
        buf.copy_from_slice(&from[done..done + len]);
        done += len;
    }
}

/// A block of zeroes to write from, at an address that direct I/O takes.
static ZEROES: Zeroes = Zeroes([0; 64 << 10]);

#[repr(align(4096))]
struct Zeroes([u8; 64 << 10]);

/// Writes zeroes to a range through `write`, which takes slices and an offset, at most 1 MiB at a time.
pub(super) fn write_zeroes_by<E>(
    range_bytes: std::ops::Range<u64>,
    mut write: impl FnMut(&[IoSlice<'_>], u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut at = range_bytes.start;
    while at < range_bytes.end {
        let mut slices = Vec::with_capacity(16);
        let mut left = (range_bytes.end - at).min(1 << 20);
        let step = left;
        while left > 0 {
            let len = left.min(ZEROES.0.len() as u64);
            slices.push(IoSlice::new(&ZEROES.0[..usize::try_from(len).expect("at most 64 KiB")]));
            left -= len;
        }
        write(&slices, at)?;
        at += step;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cutting_slices_keeps_the_bytes_between() {
        let parts: [&[u8]; 4] = [b"abc", b"", b"defg", b"h"];
        let bufs: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let joined = |from, to| cut(&bufs, from, to).iter().flat_map(|buf| buf.to_vec()).collect::<Vec<u8>>();
        assert_eq!(joined(0, u64::MAX), b"abcdefgh");
        assert_eq!(joined(2, 5), b"cde");
        assert_eq!(joined(3, 3), b"");
        assert_eq!(joined(7, 100), b"h");
    }

    #[test]
    fn zeroing_starts_in_the_middle_of_a_slice() {
        let (mut a, mut b) = (*b"abc", *b"def");
        zero_from(&mut [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)], 4);
        assert_eq!((&a, &b), (b"abc", b"d\0\0"));
    }
}
