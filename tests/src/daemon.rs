//! Running `blk-backend` as a daemon beside a test.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, ChildStderr, ChildStdout, Command, Stdio},
    thread::JoinHandle,
};

use rustix::process::{Pid, Signal, kill_process};

use crate::command::blk_backend_binary;

/// A daemon that serves. It is killed when it is dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: Option<JoinHandle<String>>,
    /// What it said when it was ready, without `listening on `.
    pub address: String,
}

/// How a daemon ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code, or `None` after a signal.
    pub code: Option<i32>,
    /// Standard error.
    pub stderr: String,
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
        let stderr = child.stderr.take().expect("piped");
        let stderr = Some(std::thread::spawn(move || read_all(stderr)));
        let mut this = Self { child, stdout, stderr, address: String::new() };
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

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it was not waited for");
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
    pub fn wait(mut self) -> Ended {
        let code = self.child.wait().expect("our child").code();
        let stderr = self.stderr.take().expect("taken only here").join().expect("it only reads");
        Ended { code, stderr }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.stderr.is_some() {
            // Where it is gone already there is nothing to kill.
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

fn read_all(mut stderr: ChildStderr) -> String {
    let mut bytes = Vec::new();
    stderr.read_to_end(&mut bytes).expect("a pipe");
    String::from_utf8_lossy(&bytes).into_owned()
}
