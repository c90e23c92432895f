//! The ring of one lane: an `io_uring` that may do nothing but read, write, sync and poll the files in its own table.
//!
//! Batched: what is pushed goes to the kernel with the next [`Ring::enter`], all of it in one call; but what files in
//! memory answer at once is asked of them at once, as the ring would give it to a thread. Bytes that are
//! in the page cache have been moved when that call returns. Where the kernel has it (6.1) the ring belongs to its
//! thread alone and the kernel's own part of completions runs only inside that call, so nothing interrupts the
//! queue thread.
#![allow(unsafe_code)]

use std::{
    collections::VecDeque,
    fmt, io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::Duration,
};

use io_uring::{
    IoUring, cqueue, opcode,
    register::Restriction,
    squeue::{Entry, Flags, PushError},
    types::{Fixed, FsyncFlags, SubmitArgs, Timespec},
};

use crate::request::{Errno, iovec};

/// Files of images that a lane can have in its table. A chain that has more is served by workers beyond that.
const IMAGE_FILES: u32 = 768;

/// Descriptors that a lane can watch.
const WATCHES: u32 = 256;
// The kernel refuses a table that is larger than a process may have files, which is 1024 nearly everywhere.
const _: () = assert!(IMAGE_FILES + WATCHES <= 1024);

/// Set in the user data of polls; the rest is the number of the watch and how often it was used.
const WATCH: u64 = 1 << 63;

/// User data of a request whose answer nobody wants.
const NOBODY: u64 = u64::MAX;

/// The most bytes of one plain read or write; the kernel would cut them near here (`MAX_RW_COUNT`).
const MAX_TRANSFER_BYTES: usize = 1 << 30;

/// The most runs of memory in one vectored read or write (`UIO_MAXIOV`).
const MAX_RUNS: usize = 1024;

/// The most bytes of a transfer that is done by the queue's own thread, for files in memory. Longer ones would keep
/// it from the other requests.
const MOST_MOVED_NOW: usize = 128 << 10;

/// What a lane's own bell is called.
pub(super) const BELL: u64 = u64::MAX;

/// See the module.
pub(super) struct Ring {
    ring: IoUring,
    watches: Vec<Watch>,
    /// Image files in the table; the next free place.
    files: u32,
    /// By number: those of them whose bytes are in memory, always.
    in_memory: Vec<Option<OwnedFd>>,
    /// Answers to transfers of those.
    moved: VecDeque<(u32, Result<u32, Errno>)>,
    /// Pushed and not submitted.
    calls: u64,
}

/// A place in the table for a watched descriptor.
#[derive(Debug, Default)]
struct Watch {
    fd: Option<RawFd>,
    token: u64,
    /// Tells an answer of an earlier use of this place from one of this.
    uses: u32,
}

/// A file of an image in a ring's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingFile(u32);

/// What the kernel answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// To the transfer of that number: bytes moved.
    Moved { transfer: u32, result: Result<u32, Errno> },
    /// A watched descriptor.
    Ready { token: u64 },
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("watches", &self.watches)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring with room for `depth` transfers, for the calling thread.
    ///
    /// # Errors
    /// When the kernel has none, or has one that cannot be restricted, or somebody forbids it.
    pub(super) fn new(depth: u32) -> io::Result<Self> {
        let entries = depth.next_power_of_two().clamp(8, 4096);
        let ring = build(entries)?;
        ring.submitter().register_files_sparse(IMAGE_FILES + WATCHES)?;
        restrict(&ring)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            watches: Vec::new(),
            files: 0,
            in_memory: Vec::new(),
            moved: VecDeque::new(),
            calls: 0,
        })
    }

    /// Puts a file into the table. `None` when the table is full.
    ///
    /// # Errors
    /// Those of the system.
    pub(super) fn add_file(&mut self, fd: BorrowedFd<'_>) -> io::Result<Option<RingFile>> {
        if self.files == IMAGE_FILES {
            return Ok(None);
        }
        self.ring.submitter().register_files_update(self.files, &[fd.as_raw_fd()])?;
        self.in_memory.push(if is_in_memory(fd) { Some(fd.try_clone_to_owned()?) } else { None });
        self.files += 1;
        Ok(Some(RingFile(self.files - 1)))
    }

    /// Takes all files of images out of the table. No transfer is under way.
    pub(super) fn forget_files(&mut self) {
        let nothing = vec![-1; self.files as usize];
        // A place that could not be emptied keeps its file until another takes it, or the ring goes.
        self.ring.submitter().register_files_update(0, &nothing).ok();
        self.in_memory.clear();
        self.files = 0;
    }

    /// Tells about `fd` from now on.
    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let raw = fd.as_raw_fd();
        if self.watches.iter().any(|watch| watch.fd == Some(raw)) {
            return Err(Errno::EXIST.into());
        }
        let free = self.watches.iter().position(|watch| watch.fd.is_none());
        let index = match free {
            Some(index) => index,
            None if self.watches.len() < WATCHES as usize => {
                self.watches.push(Watch::default());
                self.watches.len() - 1
            }
            None => return Err(Errno::MFILE.into()),
        };
        self.ring.submitter().register_files_update(place(index), &[raw])?;
        let watch = &mut self.watches[index];
        *watch = Watch { fd: Some(raw), token, uses: watch.uses.wrapping_add(1) };
        self.arm(index)
    }

    /// Ends a watch.
    pub(super) fn unwatch(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        let raw = Some(fd.as_raw_fd());
        let index = self.watches.iter().position(|watch| watch.fd == raw).ok_or(Errno::NOENT)?;
        let remove = opcode::PollRemove::new(self.watch_name(index)).build();
        self.push(remove.flags(Flags::FIXED_FILE).user_data(NOBODY))?;
        self.watches[index].fd = None;
        // Now, not with the next batch: the owner may close the descriptor, and its number may come again.
        self.enter(0, None)?;
        self.ring.submitter().register_files_update(place(index), &[-1])?;
        Ok(())
    }

    fn arm(&mut self, index: usize) -> io::Result<()> {
        let events = u32::from((libc::POLLIN | libc::POLLRDHUP).unsigned_abs());
        let poll = opcode::PollAdd::new(Fixed(place(index)), events).multi(true).build();
        self.push(poll.user_data(self.watch_name(index)))
    }

    /// The user data of a watch: below 2^63 all of it, and never [`NOBODY`].
    fn watch_name(&self, index: usize) -> u64 {
        WATCH | u64::from(self.watches[index].uses & 0x3fff_ffff) << 32 | index as u64
    }

    /// A transfer between `runs` (not empty) and `file` from `at_bytes` on. It may move less than all.
    ///
    /// The runs are memory of a request (see [`Segments::new`](crate::request::Segments::new)) which is not
    /// answered before this transfer is; the list itself stays where it is until the next [`Self::enter`].
    ///
    /// # Safety
    /// As said: list and memory stay.
    pub(super) unsafe fn transfer(
        &mut self,
        transfer: u32,
        writes: bool,
        file: RingFile,
        at_bytes: u64,
        runs: &[iovec],
    ) -> io::Result<()> {
        if let Some(fd) = &self.in_memory[file.0 as usize]
            && runs.iter().map(|run| run.iov_len).sum::<usize>() <= MOST_MOVED_NOW
        {
            // SAFETY: the caller's promise.
            self.moved.push_back((transfer, unsafe { move_now(fd, writes, at_bytes, runs) }));
            return Ok(());
        }
        let fd = Fixed(file.0);
        let entry = if let [run] = runs {
            let (address, length) = (run.iov_base.cast::<u8>(), run.iov_len.min(MAX_TRANSFER_BYTES));
            let length = u32::try_from(length).expect("at most MAX_TRANSFER_BYTES");
            if writes {
                opcode::Write::new(fd, address, length).offset(at_bytes).build()
            } else {
                opcode::Read::new(fd, address, length).offset(at_bytes).build()
            }
        } else {
            let count = u32::try_from(runs.len().min(MAX_RUNS)).expect("at most MAX_RUNS");
            if writes {
                opcode::Writev::new(fd, runs.as_ptr(), count).offset(at_bytes).build()
            } else {
                opcode::Readv::new(fd, runs.as_ptr(), count).offset(at_bytes).build()
            }
        };
        self.push(entry.user_data(u64::from(transfer)))
    }

    /// Makes durable what was written to `file`, by transfers that were answered before and by anybody else. The answer
    /// is that to the transfer of that number, of no bytes.
    pub(super) fn sync(&mut self, transfer: u32, file: RingFile) -> io::Result<()> {
        if let Some(fd) = &self.in_memory[file.0 as usize] {
            self.moved.push_back((transfer, rustix::fs::fdatasync(fd).map(|()| 0)));
            return Ok(());
        }
        let sync = opcode::Fsync::new(Fixed(file.0)).flags(FsyncFlags::DATASYNC).build();
        self.push(sync.user_data(u64::from(transfer)))
    }

    /// The caller of [`Self::transfer`] answers for the memory that an entry names; polls and syncs name none.
    fn push(&mut self, entry: Entry) -> io::Result<()> {
        // SAFETY: see above.
        if let Err(PushError { .. }) = unsafe { self.ring.submission().push(&entry) } {
            self.enter(0, None)?;
            // SAFETY: as above.
            unsafe { self.ring.submission().push(&entry) }.map_err(|_| Errno::BUSY)?;
        }
        Ok(())
    }

    /// Submits what was pushed, and waits for `wanted` answers, for ever or as long as `timeout`. Where there are
    /// answers already it does not wait.
    pub(super) fn enter(&mut self, wanted: usize, timeout: Option<Duration>) -> io::Result<()> {
        let wanted = if self.moved.is_empty() { wanted } else { 0 };
        if wanted == 0 && !self.has_business() {
            return Ok(());
        }
        self.calls += 1;
        let submitter = self.ring.submitter();
        let entered = match timeout {
            Some(timeout) if wanted > 0 => {
                let time = Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
                submitter.submit_with_args(wanted, &SubmitArgs::new().timespec(&time))
            }
            _ => submitter.submit_and_wait(wanted),
        };
        match entered {
            Ok(_) => Ok(()),
            // Interrupted, late, or more answers are waiting than the kernel likes: look at what is there.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Whether [`Self::enter`] has something to do without waiting.
    pub(super) fn has_business(&mut self) -> bool {
        let submission = self.ring.submission();
        !submission.is_empty() || submission.taskrun() || submission.cq_overflow()
    }

    /// Whether there is an answer that [`Self::next`] would give without entering.
    pub(super) fn has_answers(&mut self) -> bool {
        !self.moved.is_empty() || !self.ring.completion().is_empty()
    }

    /// The calls of the kernel so far.
    pub(super) fn calls(&self) -> u64 {
        self.calls
    }

    /// The next answer to a transfer that was done when it was asked for.
    pub(super) fn next_moved(&mut self) -> Option<(u32, Result<u32, Errno>)> {
        self.moved.pop_front()
    }

    /// The next answer that is there.
    pub(super) fn next(&mut self) -> io::Result<Option<Answer>> {
        if let Some((transfer, result)) = self.next_moved() {
            return Ok(Some(Answer::Moved { transfer, result }));
        }
        loop {
            let Some(entry) = self.ring.completion().next() else { return Ok(None) };
            let name = entry.user_data();
            if name == NOBODY {
                continue;
            }
            if name & WATCH == 0 {
                let transfer = u32::try_from(name).expect("as it was given");
                let result = u32::try_from(entry.result())
                    .map_err(|_| Errno::from_raw_os_error(entry.result().saturating_neg()));
                return Ok(Some(Answer::Moved { transfer, result }));
            }
            let index = usize::try_from(name & 0xffff_ffff).expect("a small number");
            if self.watches[index].fd.is_none() || self.watch_name(index) != name {
                continue;
            }
            // An error is told as readiness: who then reads learns what it is.
            if !cqueue::more(entry.flags()) && entry.result() >= 0 {
                self.arm(index)?;
            }
            return Ok(Some(Answer::Ready { token: self.watches[index].token }));
        }
    }
}

/// Whether the file is one of `tmpfs`. The ring gives each of its requests to a thread, as that file system does not
/// say of any that it would not wait; but there is no disk to wait for.
fn is_in_memory(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatfs(fd).is_ok_and(|found| found.f_type == libc::TMPFS_MAGIC)
}

/// Moves bytes between `runs` and a file, in the call.
///
/// # Safety
/// The memory may be read, and written where the file is read.
unsafe fn move_now(fd: &OwnedFd, writes: bool, at_bytes: u64, runs: &[iovec]) -> Result<u32, Errno> {
    let at_bytes = libc::off_t::try_from(at_bytes).map_err(|_| Errno::INVAL)?;
    let count = libc::c_int::try_from(runs.len().min(MAX_RUNS)).expect("at most MAX_RUNS");
    loop {
        let moved = if writes {
            // SAFETY: the list is borrowed; the memory is the caller's promise.
            unsafe { libc::pwritev(fd.as_raw_fd(), runs.as_ptr(), count, at_bytes) }
        } else {
            // SAFETY: as above.
            unsafe { libc::preadv(fd.as_raw_fd(), runs.as_ptr(), count, at_bytes) }
        };
        if let Ok(moved) = u32::try_from(moved) {
            return Ok(moved);
        }
        match Errno::from_io_error(&io::Error::last_os_error()) {
            Some(Errno::INTR) => {}
            other => return Err(other.unwrap_or(Errno::IO)),
        }
    }
}

/// Where watch `index` stands in the table.
fn place(index: usize) -> u32 {
    IMAGE_FILES + u32::try_from(index).expect("below WATCHES")
}

/// The best ring that this kernel has, not enabled yet.
fn build(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_r_disabled().setup_cqsize(entries * 4).setup_clamp().dontfork();
    let mut best = builder.clone();
    best.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
    let mut good = builder.clone();
    good.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    let is_old = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
    let ring = match best.build(entries) {
        Err(error) if is_old(&error) => match good.build(entries) {
            Err(error) if is_old(&error) => builder.build(entries)?,
            other => other?,
        },
        other => other?,
    };
    let has = ring.params();
    if !has.is_feature_ext_arg() || !has.is_feature_nodrop() || !has.is_feature_submit_stable() {
        return Err(io::Error::other("the kernel is older than 5.11"));
    }
    Ok(ring)
}

/// Lets the ring do what a lane does and nothing else, whatever somebody may write into it: these operations, on
/// the files in its table.
fn restrict(ring: &IoUring) -> io::Result<()> {
    /// `IORING_REGISTER_FILES_UPDATE`.
    const FILES_UPDATE: u8 = 6;
    let allowed = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::PollAdd::CODE,
        opcode::PollRemove::CODE,
    ];
    let mut rules: Vec<Restriction> = allowed.into_iter().map(Restriction::sqe_op).collect();
    rules.push(Restriction::register_op(FILES_UPDATE));
    rules.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
    ring.submitter().register_restrictions(&mut rules)
}

/// The kernel takes a ring apart some time after it was closed, the process may be gone by then. Files, and the locks
/// on them, are not to be kept for so long.
impl Drop for Ring {
    fn drop(&mut self) {
        self.forget_files();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn answers(ring: &mut Ring) -> Vec<Answer> {
        std::iter::from_fn(|| ring.next().expect("a ring")).collect()
    }

    #[test]
    fn files_in_memory_answer_at_once_unless_it_is_much() {
        let Ok(mut ring) = Ring::new(8) else { return };
        let file = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
        assert!(is_in_memory(file.as_fd()));
        let at = ring.add_file(file.as_fd()).expect("added").expect("room");
        let mut memory: Vec<u8> = (0..=255).cycle().take(MOST_MOVED_NOW + 1).collect();
        let (first, rest) = memory.split_at_mut(1000);
        let mut runs =
            [first, rest].map(|part| iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() });
        // SAFETY: all of it lives to the end of the test.
        unsafe { ring.transfer(1, true, at, 7, &runs) }.expect("pushed");
        assert_eq!(answers(&mut ring), [], "so much is for the kernel's threads");
        ring.enter(1, None).expect("entered");
        let long = u32::try_from(MOST_MOVED_NOW + 1).expect("short");
        assert_eq!(answers(&mut ring), [Answer::Moved { transfer: 1, result: Ok(long) }]);

        runs[1].iov_len -= 1;
        // SAFETY: as above.
        unsafe {
            ring.transfer(2, true, at, 7, &runs).expect("done");
            ring.transfer(3, false, at, 8, &runs[1..]).expect("done");
            ring.transfer(4, false, at, u64::MAX, &runs).expect("done");
        }
        let (most, calls) = (long - 1, ring.calls());
        // There are answers: it neither waits nor calls.
        ring.enter(1, None).expect("entered");
        assert_eq!(ring.calls(), calls);
        let expected = [(2, Ok(most)), (3, Ok(most - 1000)), (4, Err(Errno::INVAL))];
        assert_eq!(answers(&mut ring), expected.map(|(transfer, result)| Answer::Moved { transfer, result }));
        assert_eq!(memory[1000..1010], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);

        ring.forget_files();
        assert!(ring.in_memory.is_empty());
    }

    #[test]
    fn a_ring_moves_bytes_and_does_nothing_else() {
        let Ok(mut ring) = Ring::new(8) else { return };
        let mut file = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut file, b"0123456789").expect("written");
        let at = ring.add_file(file.as_fd()).expect("added").expect("room");
        let mut memory = [0u8; 4];
        let run = iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: 4 };
        // SAFETY: all of it lives to the end of the test.
        unsafe { ring.transfer(7, false, at, 3, &[run]) }.expect("pushed");
        ring.enter(1, None).expect("entered");
        assert_eq!(answers(&mut ring), [Answer::Moved { transfer: 7, result: Ok(4) }]);
        assert_eq!(&memory, b"3456");
        ring.sync(8, at).expect("pushed");
        ring.enter(1, None).expect("entered");
        assert_eq!(answers(&mut ring), [Answer::Moved { transfer: 8, result: Ok(0) }]);

        // A file outside the table, and an operation outside the list.
        let outside =
            opcode::Read::new(io_uring::types::Fd(file.as_raw_fd()), memory.as_mut_ptr(), 4).build();
        let operation = opcode::Fadvise::new(Fixed(at.0), 4, libc::POSIX_FADV_NORMAL).build();
        for entry in [outside, operation] {
            ring.push(entry.user_data(8)).expect("pushed");
            ring.enter(1, None).expect("entered");
            assert_eq!(answers(&mut ring), [Answer::Moved { transfer: 8, result: Err(Errno::ACCESS) }]);
        }
        assert!(ring.ring.submitter().register_files(&[file.as_raw_fd()]).is_err());
    }
}
