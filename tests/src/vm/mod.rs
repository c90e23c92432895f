//! Running `vmm-runner` beside a test, with a guest that does what the test tells it.

mod guest;

use std::{
    ffi::OsStr,
    fs,
    io::{self, BufRead, BufReader, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{ChildStdin, Command, Stdio},
};

use rustix::process::{Pid, Signal};

pub use guest::{BLOCK_BYTES, block, elf, sum};

use crate::{
    child::{Ended, Watched},
    command::vmm_runner_binary,
};

/// A runner with the guest in it. It is killed when it is dropped.
#[derive(Debug)]
pub struct Vm {
    process: Watched,
    /// What is typed.
    keys: ChildStdin,
    screen: BufReader<UnixStream>,
}

/// What the guest can be told to do; a number is a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Do {
    /// Write [`block`] there: `ok` or `error`.
    Write(u32),
    /// Read a block there: its [`sum`], or `error`.
    Read(u32),
    /// Flush: `ok` or `error`.
    Flush,
    /// Tell the disk's size in sectors, as eight hexadecimal digits.
    Capacity,
    /// Write one block after the other, 256 of them from there on, again and again, until a key is pressed; then
    /// tells how many.
    Load(u32),
    /// Wait for the power button: `button`.
    AwaitButton,
    /// Tell the runner that its init runs: `ok`.
    TellInit,
    /// Switch off.
    PowerOff,
    /// Reset.
    Reset,
    /// Say something for ever.
    Shout,
    /// A triple fault.
    Crash,
}

impl Vm {
    /// Starts a runner in `directory` with these arguments beside those for the guest, and waits for the guest.
    ///
    /// # Panics
    /// When it does not get so far.
    #[track_caller]
    pub fn start<A: AsRef<OsStr>>(directory: &Path, arguments: impl IntoIterator<Item = A>) -> Self {
        Self::spawn(directory, arguments).with_guest()
    }

    /// Like [`Self::start`], with these variables in its environment.
    ///
    /// # Panics
    /// When it does not get so far.
    #[track_caller]
    pub fn start_with<A: AsRef<OsStr>>(
        directory: &Path,
        arguments: impl IntoIterator<Item = A>,
        variables: [(&str, &OsStr); 1],
    ) -> Self {
        let mut command = Command::new(vmm_runner_binary());
        command.envs(variables);
        Self::spawn_by(command, directory, arguments).with_guest()
    }

    /// Like [`Self::start`], in a mount name space of its own where `full` is a file system of 4 MiB with a copy of
    /// `disk` and a file `ballast` that leaves half a MiB.
    ///
    /// # Panics
    /// When it does not get so far.
    #[track_caller]
    pub fn start_without_space<A: AsRef<OsStr>>(
        directory: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        let script = "mkdir full && mount -t tmpfs -o size=4M full full && cp disk full/ && \
            head -c 3500000 /dev/zero > full/ballast && exec \"$0\" \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c", script]).arg(vmm_runner_binary());
        Self::spawn_by(command, directory, arguments).with_guest()
    }

    /// Value of a field in the status of each thread, by the thread's name.
    ///
    /// # Panics
    /// When there is no such field, or a thread ends meanwhile.
    #[must_use]
    pub fn of_threads(&self, field: &str) -> Vec<(String, String)> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid().as_raw_nonzero())).expect("it runs");
        let value = |status: &str, field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {field} in {status}")).trim().to_owned()
        };
        let status = |thread: io::Result<fs::DirEntry>| {
            let path = thread.expect("an entry").path().join("status");
            fs::read_to_string(path).expect("the thread is there")
        };
        let status = threads.map(status);
        status.map(|status| (value(&status, "Name"), value(&status, field))).collect()
    }

    /// What the runner sees at a path.
    #[must_use]
    pub fn inside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.pid().as_raw_nonzero()));
        root.join(path.strip_prefix("/").expect("an absolute path"))
    }

    #[track_caller]
    fn with_guest(mut self) -> Self {
        let line = self.line();
        if line != "ready" {
            panic!("the guest says {line:?}: {:?}", self.wait());
        }
        self
    }

    /// Starts a runner, which may not get to its guest.
    ///
    /// # Panics
    /// When it cannot be run at all.
    pub fn spawn<A: AsRef<OsStr>>(directory: &Path, arguments: impl IntoIterator<Item = A>) -> Self {
        Self::spawn_by(Command::new(vmm_runner_binary()), directory, arguments)
    }

    fn spawn_by<A: AsRef<OsStr>>(
        mut command: Command,
        directory: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        fs::write(directory.join("guest.elf"), elf()).expect("room");
        // A pipe takes tens of thousands of single bytes until it is full, and a socket only hundreds: tests wait for
        // that.
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let mut child = command
            .args(["--kernel", "guest.elf", "--memory", "32M"])
            .args(arguments)
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(OwnedFd::from(theirs))
            .stderr(Stdio::piped())
            .env("LC_ALL", "C")
            .spawn()
            .expect("it was built");
        let keys = child.stdin.take().expect("piped");
        Self { process: Watched::new(child), keys, screen: BufReader::new(ours) }
    }

    /// Tells the guest to do something.
    ///
    /// # Panics
    /// When the runner is gone.
    pub fn tell(&mut self, what: Do) {
        let (letter, number) = match what {
            Do::Write(sector) => (b'W', sector),
            Do::Read(sector) => (b'R', sector),
            Do::Flush => (b'F', 0),
            Do::Capacity => (b'C', 0),
            Do::Load(sector) => (b'L', sector),
            Do::AwaitButton => (b'P', 0),
            Do::TellInit => (b'I', 0),
            Do::PowerOff => (b'O', 0),
            Do::Reset => (b'B', 0),
            Do::Shout => (b'S', 0),
            Do::Crash => (b'T', 0),
        };
        let mut typed = vec![letter];
        typed.extend(number.to_le_bytes());
        self.keys.write_all(&typed).expect("the runner reads");
    }

    /// Presses a key, which ends [`Do::Load`].
    ///
    /// # Panics
    /// When the runner is gone.
    pub fn press(&mut self) {
        self.keys.write_all(b".").expect("the runner reads");
    }

    /// What the guest says next, or nothing when it is gone.
    ///
    /// # Panics
    /// When it is no text.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.screen.read_line(&mut line).expect("text");
        line.trim_end().to_owned()
    }

    /// Tells the guest to do something, and gives its answer.
    pub fn ask(&mut self, what: Do) -> String {
        self.tell(what);
        self.line()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// Sends the runner a signal.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for the end of the runner.
    ///
    /// # Panics
    /// When the system does not let us.
    #[must_use]
    pub fn wait(self) -> Ended {
        self.process.wait()
    }
}
