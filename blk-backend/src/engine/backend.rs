//! What a lane stands on: a ring, or an epoll instance and the workers.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::Duration,
};

use super::{
    epoll::Epoll,
    mailbox::Mailbox,
    ring::{Answer, BELL, Ring},
};

/// Which engine a lane shall use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// `io_uring` where it is allowed, threads elsewhere.
    #[default]
    Auto,
    /// `io_uring`, or no lane.
    Ring,
    /// Threads.
    Threads,
}

impl EngineChoice {
    /// The choice of that name: `auto`, `io_uring`, `threads`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "auto" => Self::Auto,
            "io_uring" => Self::Ring,
            "threads" => Self::Threads,
            _ => return None,
        })
    }
}

/// What a failure to make a ring means, in words.
pub(super) fn why_no_ring(error: &io::Error) -> String {
    let why = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "a filter of system calls, a security module or kernel.io_uring_disabled forbids it"
        }
        Some(libc::ENOSYS) => "the kernel has none, or a filter of system calls hides it",
        _ => return error.to_string(),
    };
    format!("{why}: {error}")
}

/// Which engine a lane uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineInUse {
    /// `io_uring`.
    Ring,
    /// Threads.
    Threads {
        /// Why not `io_uring`; `None` when threads were asked for.
        why: Option<String>,
    },
}

impl EngineInUse {
    /// As in [`EngineChoice::from_name`].
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Ring => "io_uring",
            Self::Threads { .. } => "threads",
        }
    }
}

#[derive(Debug)]
pub(super) enum Backend {
    Ring(Box<Ring>),
    Threads(Epoll),
}

impl Backend {
    /// What `choice` and the host allow, with the bell of `mailbox` on watch.
    pub(super) fn new(
        choice: EngineChoice,
        depth: u32,
        mailbox: &Mailbox,
    ) -> io::Result<(Self, EngineInUse)> {
        let threads = |why| -> io::Result<_> {
            Ok((Self::Threads(Epoll::new(mailbox.bell().as_fd())?), EngineInUse::Threads { why }))
        };
        let ring = |depth| {
            let mut ring = Ring::new(depth)?;
            ring.watch(mailbox.bell().as_fd(), BELL)?;
            io::Result::Ok((Self::Ring(Box::new(ring)), EngineInUse::Ring))
        };
        match choice {
            EngineChoice::Threads => threads(None),
            EngineChoice::Ring => ring(depth),
            EngineChoice::Auto => ring(depth).or_else(|error| threads(Some(why_no_ring(&error)))),
        }
    }

    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.watch(fd, token),
            Self::Threads(epoll) => Ok(epoll.watch(fd, token)?),
        }
    }

    pub(super) fn unwatch(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.unwatch(fd),
            Self::Threads(epoll) => Ok(epoll.unwatch(fd)?),
        }
    }

    /// Whether something is to be submitted, or is answered and not taken.
    pub(super) fn has_business(&mut self) -> bool {
        match self {
            Self::Ring(ring) => ring.has_answers() || ring.has_business(),
            Self::Threads(_) => false,
        }
    }

    /// Submits what is waiting for it, and looks for answers. Never waits.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        match self {
            Self::Ring(ring) => {
                if ring.has_business() {
                    ring.enter(0, None)?;
                }
                Ok(())
            }
            Self::Threads(epoll) => Ok(epoll.wait(Some(Duration::ZERO))?),
        }
    }

    /// Submits what is waiting for it, and waits until there is an answer, or `timeout` is over.
    pub(super) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Ring(ring) => ring.enter(1, timeout),
            Self::Threads(epoll) => Ok(epoll.wait(timeout)?),
        }
    }

    /// The next answer that is there.
    pub(super) fn next(&mut self) -> io::Result<Option<Answer>> {
        match self {
            Self::Ring(ring) => ring.next(),
            Self::Threads(epoll) => Ok(epoll.next().map(|token| Answer::Ready { token })),
        }
    }

    /// Calls of the kernel to submit or to wait.
    pub(super) fn calls(&self) -> u64 {
        match self {
            Self::Ring(ring) => ring.calls(),
            Self::Threads(epoll) => epoll.calls(),
        }
    }

    pub(super) fn ring(&mut self) -> Option<&mut Ring> {
        match self {
            Self::Ring(ring) => Some(ring),
            Self::Threads(_) => None,
        }
    }
}
