//! Running `blk-backend` as a daemon beside a test.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader},
    path::Path,
    process::{ChildStdout, Command, Stdio},
};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, waitid};

pub use crate::child::Ended;
use crate::{child::Watched, command::blk_backend_binary};

/// A daemon that serves. It is killed when it is dropped.
#[derive(Debug)]
pub struct Daemon {
    process: Watched,
    stdout: BufReader<ChildStdout>,
    /// What it said when it was ready, without `listening on `.
    pub address: String,
}

impl Daemon {
    /// Starts `blk-backend` in `directory` and waits until it says that it listens.
    ///
    /// # Panics
    /// When it ends before.
    #[track_caller]
    pub fn start<A: AsRef<OsStr>>(directory: &Path, arguments: impl IntoIterator<Item = A>) -> Self {
        Self::try_start(directory, arguments).unwrap_or_else(|ended| panic!("the daemon ended: {ended:?}"))
    }

    /// Like [`Self::start`], for a daemon that may refuse to serve.
    ///
    /// # Errors
    /// How it ended.
    ///
    /// # Panics
    /// When it cannot be run at all.
    pub fn try_start<A: AsRef<OsStr>>(
        directory: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Self, Ended> {
        let mut child = Command::new(blk_backend_binary())
            .args(arguments)
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env("LC_ALL", "C")
            .spawn()
            .expect("it was built");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut this = Self { process: Watched::new(child), stdout, address: String::new() };
        let mut line = String::new();
        this.stdout.read_line(&mut line).expect("a pipe");
        match line.trim_end().strip_prefix("listening on ") {
            Some(address) => {
                address.clone_into(&mut this.address);
                Ok(this)
            }
            None => Err(this.wait()),
        }
    }

    /// The next line that it says on standard output, without its end.
    ///
    /// # Panics
    /// When the pipe is broken.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a pipe");
        line.trim_end().to_owned()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Stops it, and returns when all of it stands still. A signal that ends it still does.
    ///
    /// # Panics
    /// When it is gone.
    pub fn halt(&self) {
        self.signal(Signal::STOP);
        // Told once no thread of it runs; what is told later, its end, is left to others.
        let stopped = rustix::io::retry_on_intr(|| waitid(WaitId::Pid(self.pid()), WaitIdOptions::STOPPED));
        assert!(stopped.is_ok_and(|status| status.is_some_and(|status| status.stopped())), "it is gone");
    }

    /// Asks it to end, and waits.
    #[must_use]
    pub fn terminate(self) -> Ended {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Kills it.
    #[must_use]
    pub fn kill(self) -> Ended {
        self.signal(Signal::KILL);
        self.wait()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When the system does not let us.
    #[must_use]
    pub fn wait(self) -> Ended {
        self.process.wait()
    }
}
