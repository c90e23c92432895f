//! Threads that accept connections: they rest when the system has no more of something, and end when asked to.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, retry_on_intr},
    net::{SocketFlags, accept_with},
};

use crate::engine::Bell;

/// When the system has no descriptors or threads left, accepting is tried again after this.
const BREATH: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A thread that accepts. Dropped, it has ended, and the socket is gone.
#[derive(Debug)]
pub(crate) struct Acceptor {
    end: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
    /// The socket in the file system.
    path: Option<PathBuf>,
}

impl Acceptor {
    /// Calls `serve`, on a thread of that name, with each connection to `listener`, which stands at `path` where it is
    /// in the file system, and with what is rung at the end: whoever ends this waits for `serve`.
    ///
    /// When a connection cannot be accepted or `serve` fails, those to come wait in the listening socket for the next
    /// try. `tell` hears of the first failure, and again once a connection was served in between.
    ///
    /// # Errors
    /// When the system refuses a thread or a descriptor.
    pub(crate) fn start(
        name: &str,
        listener: OwnedFd,
        path: Option<PathBuf>,
        tell: impl Fn(&io::Error) + Send + 'static,
        serve: impl FnMut(OwnedFd, &Bell) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        // Who made a connection that is there may be gone when it is accepted.
        rustix::io::ioctl_fionbio(&listener, true)?;
        let end = Arc::new(Bell::new()?);
        let heard = Arc::clone(&end);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || accept_all(&listener, &heard, tell, serve))?;
        Ok(Self { end, thread: Some(thread), path })
    }

    /// Nothing is accepted after the connection that is being served.
    pub(crate) fn end(&self) {
        self.end.ring();
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.end();
        if let Some(thread) = self.thread.take() {
            // A panic of it was told on standard error.
            thread.join().ok();
        }
        if let Some(path) = &self.path {
            // Somebody else may have taken the socket away.
            fs::remove_file(path).ok();
        }
    }
}

fn accept_all(
    listener: &OwnedFd,
    end: &Bell,
    tell: impl Fn(&io::Error),
    mut serve: impl FnMut(OwnedFd, &Bell) -> io::Result<()>,
) {
    let mut is_told = false;
    loop {
        let served = match next_connection(listener, end) {
            Ok(None) => return,
            Ok(Some(connection)) => serve(connection, end),
            Err(errno) => Err(errno.into()),
        };
        let Err(error) = served else {
            is_told = false;
            continue;
        };
        if !std::mem::replace(&mut is_told, true) {
            tell(&error);
        }
        // Whatever comes of it: the loop looks again.
        poll(&mut [PollFd::new(end, PollFlags::IN)], Some(&BREATH)).ok();
    }
}

/// `None` when `end` has been rung.
fn next_connection(listener: &OwnedFd, end: &Bell) -> Result<Option<OwnedFd>, Errno> {
    while wait_for(listener, end)? {
        match accept_with(listener, SocketFlags::CLOEXEC) {
            // It went away before it came.
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            accepted => return accepted.map(Some),
        }
    }
    Ok(None)
}

/// Waits until `source` can be read, or has ended. False when `end` has been rung.
pub(crate) fn wait_for(source: &impl AsFd, end: &Bell) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(end, PollFlags::IN), PollFd::new(source, PollFlags::IN)];
    retry_on_intr(|| poll(&mut fds, None))?;
    Ok(fds[0].revents().is_empty())
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::{UnixListener, UnixStream},
        sync::mpsc,
    };

    use super::*;

    #[test]
    fn failures_are_told_once_until_somebody_is_served() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).expect("nothing is there").into();
        let (told, heard) = mpsc::channel();
        let (serves, mut outcomes) = (told.clone(), [false, false, true, false].into_iter());
        let acceptor = Acceptor::start(
            "test",
            listener,
            Some(path.clone()),
            move |error| told.send(format!("told {error}")).expect("heard"),
            move |_, _| {
                serves.send("called".to_owned()).expect("heard");
                if outcomes.next().expect("four") { Ok(()) } else { Err(io::Error::other("why")) }
            },
        )
        .expect("a thread");
        for expected in [&["called", "told why"][..], &["called"], &["called"], &["called", "told why"]] {
            UnixStream::connect(&path).expect("it listens");
            for expected in expected {
                assert_eq!(heard.recv().expect("it goes on"), *expected);
            }
        }
        drop(acceptor);
        assert_eq!(heard.recv().ok(), None, "nothing more was said");
        assert!(!path.exists());
    }
}
