//! What the same requests cost fio, which does nothing else with them: there is no guest, no map and no second process.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use img_bench::{by_turns, print, say};

use crate::{
    Bench, against,
    images::Kind,
    median,
    rows::{ROW, Row, measure},
    servers::Side,
};

/// What of fio's requests a second of CPU time is to be reached.
const TARGET: f64 = 0.6;

const NAME: &str = "fio";

/// Where the file is, and how it is read.
const FILES: &[(&str, bool, bool)] =
    &[("in memory", false, false), ("on the disk, cached", true, false), ("on the disk, direct", true, true)];

pub(crate) fn print_table(bench: &Bench, memory: &Path, disk: &Path) -> io::Result<()> {
    if !NAME.contains(&bench.only) {
        return Ok(());
    }
    let version = Command::new("fio").arg("--version").stdin(Stdio::null()).output();
    let version = match version {
        Ok(output) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            say("fio is NOT INSTALLED: what its requests cost is not measured");
            print("| randread, raw, next to fio | skipped: fio is not installed |");
            print("");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    print(&format!("| randread, raw | I/O per CPU-s, ours | {version}, io_uring | ratio (target) |"));
    print("| --- | ---: | ---: | ---: |");
    for (name, on_disk, direct) in FILES.iter().copied() {
        say(&format!("fio, {name}"));
        let directory = if on_disk { disk } else { memory };
        let row = Row { direct, ..ROW };
        let layers = Kind::Raw.make(directory)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for run in 0..bench.runs {
            for side in by_turns(run, Side::Theirs, Side::Ours) {
                match side {
                    Side::Ours => {
                        ours.push(measure(bench, directory, &row, side, &layers, 1)?.per_cpu_second);
                    }
                    Side::Theirs => theirs.push(fio(bench, directory, &row)?),
                }
            }
        }
        let ratio = median(ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect());
        let (ours, theirs) = (median(ours), median(theirs));
        print(&format!("| {name} | {ours:.0} | {theirs:.0} | {} |", against(ratio, Some(TARGET))));
    }
    print("");
    Ok(())
}

/// Requests a second of CPU time, that of the kernel's threads for its ring included, which fio does not count itself.
fn fio(bench: &Bench, directory: &Path, row: &Row) -> io::Result<f64> {
    let mut command = Command::new("fio");
    command.args(["--name=bench", "--filename=disk", "--readonly", "--rw=randread", "--ioengine=io_uring"]);
    command.args(["--invalidate=0", "--time_based", "--output-format=json"]);
    command.arg(format!("--bs={}", row.block_bytes)).arg(format!("--iodepth={}", row.depth));
    command
        .arg(format!("--direct={}", u8::from(row.direct)))
        .arg(format!("--runtime={}", bench.time.as_secs()));
    let before = cpu_of_children()?;
    let output = command.current_dir(directory).stdin(Stdio::null()).stderr(Stdio::inherit()).output()?;
    let cpu = cpu_of_children()? - before;
    let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let job = &said["jobs"][0];
    let number = |value: &serde_json::Value, name: &str| {
        value[name].as_f64().ok_or_else(|| io::Error::other(format!("fio does not tell {name}")))
    };
    if !output.status.success() || number(job, "error")? != 0.0 {
        return Err(io::Error::other(format!("fio: {}", output.status)));
    }
    Ok(number(&job["read"], "total_ios")? / cpu.as_secs_f64())
}

/// CPU time of all children that have ended, and of theirs.
#[expect(unsafe_code, reason = "no kept crate offers getrusage")]
fn cpu_of_children() -> io::Result<Duration> {
    // SAFETY: an all-zero rusage is a valid value of a struct of integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to one such struct.
    if unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let time = |time: libc::timeval| {
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        Duration::from_secs(seconds) + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
    };
    Ok(time(usage.ru_utime) + time(usage.ru_stime))
}
