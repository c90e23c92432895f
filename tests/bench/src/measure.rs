//! Running a command and reading what it cost.

use std::{
    io,
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// What one run of a command cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// User and system time of the process and the children it waited for.
    pub(crate) cpu: Duration,
    /// From spawn to exit.
    pub(crate) wall: Duration,
    /// Largest resident set, in KiB.
    pub(crate) peak_kib: u64,
}

impl Cost {
    /// The cost of one behind the other.
    pub(crate) fn then(self, next: Self) -> Self {
        Self {
            cpu: self.cpu + next.cpu,
            wall: self.wall + next.wall,
            peak_kib: self.peak_kib.max(next.peak_kib),
        }
    }
}

/// Runs `command` without input or output and waits for it.
///
/// # Errors
/// When it cannot be started, or fails.
pub(crate) fn run(command: &mut Command) -> io::Result<Cost> {
    let text = format!("{command:?}");
    let start = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let (status, usage) = wait(child.id())?;
    let wall = start.elapsed();
    if !status.success() {
        return Err(io::Error::other(format!("{text}: {status}")));
    }
    let time = |t: libc::timeval| {
        Duration::from_secs(t.tv_sec.unsigned_abs()) + Duration::from_micros(t.tv_usec.unsigned_abs())
    };
    let cpu = time(usage.ru_utime) + time(usage.ru_stime);
    Ok(Cost { cpu, wall, peak_kib: usage.ru_maxrss.unsigned_abs() })
}

/// `wait4`: the only call that tells the peak memory of one child rather than of all.
#[expect(unsafe_code, reason = "no kept crate offers wait4 with resource usage")]
fn wait(pid: u32) -> io::Result<(ExitStatus, libc::rusage)> {
    use std::os::unix::process::ExitStatusExt;

    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut status = 0;
    // SAFETY: an all-zero rusage is a valid value of a struct of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to live, exclusively borrowed locals of the right types, and `pid` is
        // our own child that nobody else waits for.
        let reaped = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
        if reaped == pid {
            return Ok((ExitStatus::from_raw(status), usage));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The least of several runs, each figure by itself: what else the machine does only ever adds.
pub(crate) fn least(runs: &[Cost]) -> Cost {
    fn least_of<T: Ord>(values: impl Iterator<Item = T>) -> T {
        values.min().expect("there was at least one run")
    }
    Cost {
        cpu: least_of(runs.iter().map(|run| run.cpu)),
        wall: least_of(runs.iter().map(|run| run.wall)),
        peak_kib: least_of(runs.iter().map(|run| run.peak_kib)),
    }
}
