//! A program that runs beside a test.

use std::{
    io::Read,
    process::{Child, ChildStderr},
    thread::JoinHandle,
};

use rustix::process::{Pid, Signal, kill_process};

/// A child whose standard error is read while it runs. It is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Watched {
    child: Child,
    stderr: Option<JoinHandle<String>>,
}

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code, or `None` after a signal.
    pub code: Option<i32>,
    /// Standard error.
    pub stderr: String,
}

impl Watched {
    /// Watches `child`, whose standard error is a pipe.
    pub(crate) fn new(mut child: Child) -> Self {
        let stderr = child.stderr.take().expect("piped");
        Self { child, stderr: Some(std::thread::spawn(move || read_all(stderr))) }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("it was not waited for");
    }

    pub(crate) fn wait(mut self) -> Ended {
        let code = self.child.wait().expect("our child").code();
        let stderr = self.stderr.take().expect("taken only here").join().expect("it only reads");
        Ended { code, stderr }
    }
}

impl Drop for Watched {
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
