//! Long reads that go from the page cache to the socket when their turn to be sent has come, and by no lane: through a
//! pipe, whose pages are those of the cache. What is read is copied once, by the client.
//!
//! A reply that was sent so is the page until the client takes it, and a write to the same bytes meanwhile shows. To
//! the client both were under way at once, so it may see either. A place that comes to hold something else must not
//! show: where an image reuses places, reads are copied, under a lease, to a buffer that is never out of the
//! processor's cache for long. The long way is for all others, and when anything of a read is not in memory: nothing
//! waits for a disk here, the lane waits better.
#![allow(unsafe_code)]

use std::{
    io::{self, IoSlice, PipeReader, PipeWriter},
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
    time::Instant,
};

use img_core::{
    format::{Attempt, HostFile, HostOffset, Place},
    image::{Image, ImageExtent},
};
use rustix::io::Errno;

use super::{
    flight::{Flights, Memory},
    output::Source,
    socket::Socket,
};
use crate::engine::Lane;

/// Shorter reads are copied in less time than these calls take.
const MIN_BYTES: u64 = 64 << 10;

/// What a pipe of a process without rights may hold.
const PIPE_BYTES: u64 = 1 << 20;

/// The longest read that is copied: with what it is copied from and to it has room in a core's cache.
const COPIED_BYTES: u64 = 256 << 10;

/// `cachestat(2)`, on all processors that this runs on.
const SYS_CACHESTAT: libc::c_long = 451;

/// The way from the cache to one socket.
pub(super) struct Straight {
    pipe: Option<(PipeReader, PipeWriter)>,
    buffer: Vec<u8>,
    waiting: Waiting,
    /// Reused.
    extents: Vec<ImageExtent>,
}

/// Where the bytes of a read are that are not sent yet.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Waiting {
    /// So many in the pipe.
    Piped(usize),
    /// A part of the buffer.
    Copied(Range<usize>),
}

impl Waiting {
    const NONE: Self = Self::Piped(0);

    fn is_none(&self) -> bool {
        match self {
            Self::Piped(bytes) => *bytes == 0,
            Self::Copied(part) => part.is_empty(),
        }
    }
}

impl Straight {
    /// A way, where the system has one.
    pub(super) fn new() -> Self {
        Self { pipe: new_pipe().ok(), buffer: Vec::new(), waiting: Waiting::NONE, extents: Vec::new() }
    }

    /// Whether reads of that length are worth a try.
    pub(super) fn takes(&self, image: &Image, len_bytes: u64) -> bool {
        let top = &image.layers()[0];
        let most_bytes = match (top.reuses_places(), &self.pipe) {
            (true, _) => COPIED_BYTES,
            (false, Some(_)) => PIPE_BYTES,
            (false, None) => 0,
        };
        (MIN_BYTES..=most_bytes).contains(&len_bytes)
            && top.file(HostFile::IMAGE).is_some_and(|file| file.limits().alignment_bytes <= 1)
    }

    /// Takes guest bytes, all or none. Nothing waits to be sent.
    pub(super) fn fill(&mut self, image: &Arc<Image>, guest_bytes: &Range<u64>) -> bool {
        assert!(self.waiting.is_none(), "one read at a time");
        if image.layers()[0].reuses_places() {
            let is_copied = self.fill_buffer(image, guest_bytes);
            self.waiting = if is_copied { Waiting::Copied(0..self.buffer.len()) } else { Waiting::NONE };
            return is_copied;
        }
        let mut piped = 0;
        let filled = self.fill_pipe(image, guest_bytes, &mut piped);
        self.waiting = Waiting::Piped(piped);
        if !filled && piped > 0 {
            // What is there of it goes with the pipe.
            self.pipe = new_pipe().ok();
            self.waiting = Waiting::NONE;
        }
        filled
    }

    /// Fills the buffer.
    fn fill_buffer(&mut self, image: &Arc<Image>, guest_bytes: &Range<u64>) -> bool {
        let Ok(Attempt::Done(_ticket)) = image.try_map(guest_bytes.clone(), &mut self.extents) else {
            return false;
        };
        let in_memory = |extent: &ImageExtent| {
            extent.reads_as_zeroes() || Run::of(image, extent).is_some_and(|run| run.is_in_memory())
        };
        if !self.extents.iter().all(in_memory) {
            return false;
        }
        let length = guest_bytes.end - guest_bytes.start;
        self.buffer.resize(usize::try_from(length).expect("at most COPIED_BYTES"), 0);
        let mut rest = &mut self.buffer[..];
        for extent in &self.extents {
            let length = usize::try_from(extent.len_bytes).expect("a part of the read");
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(length);
            rest = behind;
            match Run::of(image, extent) {
                None => part.fill(0),
                Some(run) => {
                    if !run.read(part) {
                        return false;
                    }
                }
            }
        }
        true
    }

    /// Fills the pipe, and counts in `piped` what it has then.
    fn fill_pipe(&mut self, image: &Arc<Image>, guest_bytes: &Range<u64>, piped: &mut usize) -> bool {
        let Some((_, pipe)) = &self.pipe else { return false };
        // Whatever is wrong the lane finds out as well, and tells.
        let Ok(Attempt::Done(_ticket)) = image.try_map(guest_bytes.clone(), &mut self.extents) else {
            return false;
        };
        let mut pages = 0;
        for extent in &self.extents {
            let Some(run) = Run::of(image, extent) else { return false };
            pages += run.pages();
            if pages > PIPE_BYTES / page_bytes() || !run.is_in_memory() {
                return false;
            }
        }
        for extent in &self.extents {
            let mut run = Run::of(image, extent).expect("it was one before");
            while run.len_bytes > 0 {
                match splice(run.file, Some(run.at_bytes), pipe.as_fd(), run.len_bytes) {
                    Ok(0) | Err(_) => return false,
                    Ok(moved) => {
                        *piped += moved;
                        run.at_bytes += moved as u64;
                        run.len_bytes -= moved;
                    }
                }
            }
        }
        true
    }

    /// Sends what the socket takes of the bytes that wait; `None` when it takes nothing.
    pub(super) fn send(&mut self, socket: &Socket) -> io::Result<Option<usize>> {
        let waiting = match &mut self.waiting {
            Waiting::Copied(part) => {
                let sent = socket.send(&[IoSlice::new(&self.buffer[part.clone()])], false)?;
                part.start += sent.unwrap_or(0);
                return Ok(sent);
            }
            Waiting::Piped(bytes) => bytes,
        };
        let (pipe, _) = self.pipe.as_ref().expect("it was filled");
        match splice(pipe.as_fd(), None, socket.as_fd(), *waiting) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => {
                *waiting -= sent;
                Ok(Some(sent))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// The data of a connection's replies: in the memory of its requests, or on the straight way.
pub(super) struct Data<'a> {
    pub(super) flights: &'a Flights,
    pub(super) straight: &'a mut Straight,
    pub(super) lane: &'a Lane,
}

impl Source for Data<'_> {
    fn data(&self, request: u32, len_bytes: usize) -> &[u8] {
        match &self.flights.look(request).memory {
            Memory::Idle(buffer) => &buffer.bytes()[..len_bytes],
            Memory::None | Memory::Lent(_) => {
                unreachable!("a reply with data keeps its request until it is sent")
            }
        }
    }

    fn fill(&mut self, request: u32) -> bool {
        let disk = self.lane.disk();
        // Held back like any other request.
        if disk.pauses.is_any() {
            return false;
        }
        let (flight, began) = (self.flights.look(request), Instant::now());
        let filled = self.straight.fill(&disk.image(), &flight.rest);
        if filled {
            self.lane.count_read(flight.len_bytes, began.elapsed());
        }
        filled
    }

    fn send_on(&mut self, socket: &Socket) -> io::Result<Option<usize>> {
        self.straight.send(socket)
    }
}

/// Bytes of a file, in the page cache perhaps.
struct Run<'a> {
    file: BorrowedFd<'a>,
    at_bytes: u64,
    len_bytes: usize,
}

impl<'a> Run<'a> {
    /// `None` where the bytes of an extent stand in no file, or past the cache.
    fn of(image: &'a Image, extent: &ImageExtent) -> Option<Self> {
        let Place::Data { file, at: HostOffset(at_bytes), .. } = extent.place else { return None };
        let storage = image.storage(extent.depth, file)?;
        if storage.limits().alignment_bytes > 1 {
            return None;
        }
        Some(Self { file: storage.as_fd()?, at_bytes, len_bytes: usize::try_from(extent.len_bytes).ok()? })
    }

    /// Fills `bytes`, which are as many; false where the file has less, or cannot be read.
    fn read(&self, bytes: &mut [u8]) -> bool {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pread(self.file, &mut bytes[done..], self.at_bytes + done as u64) {
                Ok(0) => return false,
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Whether all of it is in the page cache now.
    fn is_in_memory(&self) -> bool {
        /// `struct cachestat_range`.
        #[repr(C)]
        struct Asked {
            start_bytes: u64,
            len_bytes: u64,
        }
        /// `struct cachestat`, in pages.
        #[repr(C)]
        #[derive(Default)]
        struct Found {
            cached: u64,
            dirty: u64,
            written: u64,
            evicted: u64,
            recently_evicted: u64,
        }
        let asked = Asked { start_bytes: self.at_bytes, len_bytes: self.len_bytes as u64 };
        let mut found = Found::default();
        // SAFETY: the kernel reads one struct and writes the other; both are as it knows them, and live.
        let told = unsafe {
            libc::syscall(SYS_CACHESTAT, self.file.as_raw_fd(), &raw const asked, &raw mut found, 0)
        };
        told == 0 && found.cached == self.pages()
    }

    /// Pages that it touches: so many places it takes in a pipe.
    fn pages(&self) -> u64 {
        (self.at_bytes + self.len_bytes as u64).div_ceil(page_bytes()) - self.at_bytes / page_bytes()
    }
}

fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

/// A pipe that holds as much as one may.
fn new_pipe() -> io::Result<(PipeReader, PipeWriter)> {
    let (reader, writer) = io::pipe()?;
    let bytes = libc::c_int::try_from(PIPE_BYTES).expect("it fits");
    // SAFETY: no memory is named.
    if unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((reader, writer))
}

/// Moves pages; never waits for a pipe, nor for a socket that does not.
fn splice(
    from: BorrowedFd<'_>,
    at_bytes: Option<u64>,
    to: BorrowedFd<'_>,
    len_bytes: usize,
) -> Result<usize, Errno> {
    let mut at = match at_bytes.map(libc::loff_t::try_from).transpose() {
        Ok(at) => at,
        Err(_) => return Err(Errno::INVAL),
    };
    let offset = at.as_mut().map_or(std::ptr::null_mut(), std::ptr::from_mut);
    // SAFETY: the offset is read and written, and lives; the other one is not given.
    let moved = unsafe {
        libc::splice(
            from.as_raw_fd(),
            offset,
            to.as_raw_fd(),
            std::ptr::null_mut(),
            len_bytes,
            libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE,
        )
    };
    usize::try_from(moved).map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;
    use crate::{
        disk::{Disk, DiskOptions},
        engine::tests::image,
    };

    const MIB: u64 = 1 << 20;

    fn open(dir: &std::path::Path, format: &str, read_only: bool) -> Arc<Image> {
        let name = image(dir, "disk", format, &[], 4 * MIB, None);
        let writable = Disk::open(&name, &DiskOptions::default()).expect("it was just made");
        let bytes: Vec<u8> = (0..=250).cycle().take(usize::try_from(2 * MIB).unwrap()).collect();
        writable.image().write_at(&bytes, 0).expect("written");
        writable.close().expect("closed");
        drop(writable);
        let options = DiskOptions { read_only, ..DiskOptions::default() };
        Disk::open(&name, &options).expect("it opens").image()
    }

    /// What a client gets of what waits.
    fn sent(straight: &mut Straight) -> Vec<u8> {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket");
        let socket = Socket::new(ours.into()).expect("a socket");
        let mut got = Vec::new();
        while !straight.waiting.is_none() {
            let sent = straight.send(&socket).expect("sent").expect("there is room");
            let mut some = vec![0; sent];
            theirs.read_exact(&mut some).expect("it was sent");
            got.extend(some);
        }
        got
    }

    /// Whether this kernel can tell what is in memory, in a file that is.
    fn is_told(image: &Arc<Image>) -> bool {
        let mut extents = Vec::new();
        drop(image.try_map(0..4096, &mut extents));
        image.read_at(&mut [0; 4096], 0).expect("readable");
        extents.first().and_then(|extent| Run::of(image, extent)).is_some_and(|run| run.is_in_memory())
    }

    #[test]
    fn bytes_in_memory_go_straight_and_no_others() {
        for format in ["raw", "qcow2"] {
            let dir = tempfile::tempdir().expect("a directory");
            let image = open(dir.path(), format, true);
            // Tables are in memory now.
            let mut expected = vec![0; usize::try_from(2 * MIB).unwrap()];
            image.read_at(&mut expected, 0).expect("readable");
            if !is_told(&image) {
                return;
            }
            let mut straight = Straight::new();
            for range in [0..MIB, 4096..MIB + 4096, 512..70_000, 65_536..131_072] {
                assert!(straight.takes(&image, range.end - range.start) || range.start == 512);
                assert!(straight.fill(&image, &range), "{format}: {range:?}");
                let got = sent(&mut straight);
                let place = |at: u64| usize::try_from(at).unwrap();
                assert!(got == expected[place(range.start)..place(range.end)], "{format}: {range:?}");
            }
            // So much touches one page more than there is room for; zeroes; what is not there.
            let mut refused = vec![512..MIB + 512, 4 * MIB - 4096..4 * MIB + 4096];
            if format == "qcow2" {
                refused.push(2 * MIB - 65_536..2 * MIB + 65_536);
            }
            for range in refused {
                assert!(!straight.fill(&image, &range), "{format}: {range:?}");
                assert!(straight.waiting.is_none());
            }
            assert!(straight.fill(&image, &(0..MIB)), "{format}: the way is free again");
        }
    }

    /// What waits to be sent of a place that may come to hold something else is a copy.
    #[test]
    fn places_that_are_reused_are_copied() {
        let dir = tempfile::tempdir().expect("a directory");
        let image = open(dir.path(), "qcow2", false);
        let mut expected = vec![0; usize::try_from(COPIED_BYTES).unwrap()];
        image.read_at(&mut expected, 0).expect("readable");
        if !is_told(&image) {
            return;
        }
        let mut straight = Straight::new();
        assert!(!straight.takes(&image, MIB) && straight.takes(&image, COPIED_BYTES));
        assert!(straight.fill(&image, &(0..COPIED_BYTES)));
        image.discard(0..COPIED_BYTES).expect("discarded");
        image.flush().expect("flushed");
        image.write_at(&vec![0xee; expected.len()], 3 * MIB).expect("written");
        assert_eq!(sent(&mut straight), expected);
        // In part zeroes; all zeroes; and what is not there.
        assert!(straight.fill(&image, &(COPIED_BYTES - 65_536..COPIED_BYTES + 65_536)));
        let mut expected = vec![0; 131_072];
        image.read_at(&mut expected, COPIED_BYTES - 65_536).expect("readable");
        assert_eq!(sent(&mut straight), expected);
        assert!(straight.fill(&image, &(0..131_072)));
        assert_eq!(sent(&mut straight), vec![0; 131_072]);
        assert!(!straight.fill(&image, &(4 * MIB - 4096..4 * MIB + 4096)));
        assert!(straight.waiting.is_none());
        let dir = tempfile::tempdir().expect("a directory");
        assert!(straight.takes(&open(dir.path(), "raw", false), MIB));
    }
}
