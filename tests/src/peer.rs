//! Running a daemon of the reference beside a test, and waiting for any server.

use std::{
    fs,
    io::{ErrorKind, Read},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::command::oracle;

/// How long something may take that usually takes no time. Generous: the machine may be busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon of the reference that serves. It is killed when it is dropped.
#[derive(Debug)]
pub struct Peer(Child);

impl Peer {
    /// Starts `qemu-storage-daemon`, or another tool with `--pidfile`, in `directory` and waits until it serves.
    ///
    /// # Panics
    /// When it ends before.
    #[track_caller]
    #[must_use]
    pub fn start(directory: &Path, tool: &str, arguments: &[&str]) -> Self {
        let pid_file = directory.join("peer.pid");
        // Where there is none there was no peer before.
        fs::remove_file(&pid_file).ok();
        let option = if tool == "qemu-nbd" { "--pid-file" } else { "--pidfile" };
        let child = Command::new(oracle(tool))
            .args(arguments)
            .arg(option)
            .arg(&pid_file)
            .current_dir(directory)
            .stdin(Stdio::null())
            .spawn()
            .expect("it is installed");
        let mut this = Self(child);
        wait_until(tool, || {
            if let Some(status) = this.0.try_wait().expect("our child") {
                panic!("{tool} {arguments:?}: {status}");
            }
            fs::read_to_string(&pid_file).is_ok_and(|pid| pid.ends_with('\n'))
        });
        this
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has seen then.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not for a minute.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Hears a server out, until it hangs up; it has said at most so many bytes then.
///
/// # Panics
/// When it goes on for longer, or falls silent.
pub fn hear_out(stream: &mut UnixStream, most_bytes: usize) {
    let mut heard = 0;
    let mut some = vec![0; 64 << 10];
    loop {
        match stream.read(&mut some) {
            Ok(0) => return,
            Ok(len) => heard += len,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return,
            // The fuzzer's own clock.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("the server neither answers nor hangs up: {error}"),
        }
        assert!(heard <= most_bytes, "the server does not stop talking");
    }
}
