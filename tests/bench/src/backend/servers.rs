//! The daemons, ours and the reference's, started on the same image.

use std::{
    fs, io,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use blk_backend::bench::CpuClock;

use crate::{Bench, images::Layer};

/// How long a daemon may take to begin.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Ours,
    Theirs,
}

/// How the image is served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Serving {
    /// Around the host's cache.
    pub(crate) direct: bool,
    pub(crate) queues: u32,
}

/// A daemon that serves. It is asked to end when it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
}

impl Server {
    /// A virtio device at `socket` in `directory`.
    pub(crate) fn device(
        bench: &Bench,
        directory: &Path,
        side: Side,
        layers: &[Layer],
        serving: Serving,
    ) -> io::Result<Self> {
        let top = layers.last().expect("an image has a layer");
        let queues = serving.queues.to_string();
        let mut command = match side {
            Side::Ours => {
                let cache = if serving.direct { "none" } else { "writeback" };
                let mut command = Command::new(&bench.backend);
                command.args(["vhost-user", "--socket", "socket", "--queues", &queues, "--cache", cache]);
                command.args(["--image", &top.file, "--format", top.format]);
                command
            }
            Side::Theirs => {
                let mut command = Command::new("qemu-storage-daemon");
                command.args(["--object", "iothread,id=io", "--pidfile", "pid"]);
                let direct = if serving.direct { "on" } else { "off" };
                for (number, layer) in layers.iter().enumerate() {
                    let is_top = number + 1 == layers.len();
                    let read_only = if is_top { "off" } else { "on" };
                    let file = &layer.file;
                    command.arg("--blockdev").arg(format!(
                        "file,node-name=f{number},filename={file},aio=io_uring,cache.direct={direct},\
                         read-only={read_only}"
                    ));
                    let below =
                        number.checked_sub(1).map_or(String::new(), |below| format!(",backing=n{below}"));
                    command.arg("--blockdev").arg(format!(
                        "{},node-name=n{number},file=f{number},read-only={read_only}{below}",
                        layer.format
                    ));
                }
                command.arg("--export").arg(format!(
                    "vhost-user-blk,id=e,node-name=n{},iothread=io,addr.type=unix,addr.path=socket,\
                     writable=on,num-queues={queues}",
                    layers.len() - 1
                ));
                command
            }
        };
        Self::start(&mut command, directory)
    }

    /// An NBD export at `socket` in `directory`, for several connections.
    pub(crate) fn export(
        bench: &Bench,
        directory: &Path,
        side: Side,
        layer: &Layer,
        read_only: bool,
    ) -> io::Result<Self> {
        let mut command = match side {
            Side::Ours => {
                let mut command = Command::new(&bench.backend);
                command.args(["nbd", "--listen", "unix:socket"]);
                command.args(["--image", &layer.file, "--format", layer.format]);
                command.args(read_only.then_some("--read-only"));
                command
            }
            Side::Theirs => {
                let mut command = Command::new("qemu-nbd");
                command.args(read_only.then_some("--read-only"));
                command.args(["-t", "-e", "16", "--aio=io_uring", "--cache=writeback", "--pid-file", "pid"]);
                command.arg("-k").arg(directory.join("socket")).args(["-f", layer.format, &layer.file]);
                command
            }
        };
        Self::start(&mut command, directory)
    }

    fn start(command: &mut Command, directory: &Path) -> io::Result<Self> {
        for left_behind in ["socket", "pid", "said"] {
            match fs::remove_file(directory.join(left_behind)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let said = fs::File::create(directory.join("said"))?;
        let child = command
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(said)
            .stderr(Stdio::piped())
            .spawn()?;
        let mut this = Self { child };
        let until = Instant::now() + PATIENCE;
        // Ours says that it listens; the reference's write a file when they do.
        let is_ready = || {
            let has = |name, text: &str| {
                fs::read_to_string(directory.join(name)).is_ok_and(|found| found.contains(text))
            };
            has("said", "listening on") || has("pid", "\n")
        };
        while !is_ready() {
            if let Some(status) = this.child.try_wait()? {
                let mut why = String::new();
                io::Read::read_to_string(&mut this.child.stderr.take().expect("piped"), &mut why)?;
                return Err(io::Error::other(format!("{command:?}: {status}: {why}")));
            }
            if Instant::now() > until {
                return Err(io::Error::other(format!("{command:?} does not begin to serve")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(this)
    }

    /// What it has cost so far.
    pub(crate) fn clock(&self) -> io::Result<CpuClock> {
        let pid = i32::try_from(self.child.id()).map_err(io::Error::other)?;
        CpuClock::of_process(pid).map_err(io::Error::other)
    }

    /// Memory that is its own, in KiB: neither files nor what it shares with a guest.
    pub(crate) fn memory_kib(&self) -> io::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
        kib.ok_or_else(|| io::Error::other("the system does not tell how much memory a process has"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        use rustix::process::{Pid, Signal, kill_process};

        // It may have ended by itself, which the row has seen then.
        kill_process(Pid::from_child(&self.child), Signal::TERM).ok();
        self.child.wait().ok();
    }
}
