//! `backend-bench`: pairs `blk-backend` with the installed qemu-storage-daemon and qemu-nbd under the same loads, and
//! prints ratios.
//!
//! Each row serves the same image with both daemons by turns, several times, and puts the load of `blk-backend bench`
//! on each; what counts is requests a second of the daemon's CPU time. `images` makes what is served, `servers` starts
//! the daemons, `rows` are the loads on virtio devices, `nbd` those of other programs' NBD clients; `fio` is what is
//! there to be had.

mod fio;
mod images;
mod nbd;
mod rows;
mod servers;

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use img_bench::say;

/// Compare what requests cost blk-backend with what they cost qemu-storage-daemon and qemu-nbd
#[derive(Debug, Parser)]
struct Arguments {
    /// Where images are made, in a directory of its own; memory, so that the disk is out of the picture
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Where the image for direct I/O is made
    #[arg(long, default_value = "target")]
    disk_dir: PathBuf,
    /// Measured runs of each daemon in each row; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Seconds of each run, where the load has no end of its own
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Only rows whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// The program to measure
    #[arg(long, default_value = "target/release/blk-backend")]
    backend: PathBuf,
}

/// What all rows need.
struct Bench {
    backend: PathBuf,
    runs: u32,
    time: Duration,
    only: String,
}

fn main() -> ExitCode {
    img_bench::program(run)
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let bench = Bench {
        backend: named(&arguments.backend, arguments.backend.canonicalize())?,
        runs: arguments.runs,
        time: Duration::from_secs(arguments.seconds),
        only: arguments.only.clone(),
    };
    let directory = |parent: &Path| named(parent, tempfile::tempdir_in(parent));
    let memory = directory(&arguments.dir)?;
    let disk = directory(&arguments.disk_dir)?;
    let load = || Ok::<_, io::Error>(std::fs::read_to_string("/proc/loadavg")?.trim_end().to_owned());
    say(&format!("load of the machine before: {}", load()?));
    rows::print_table(&bench, memory.path(), disk.path())?;
    rows::print_map(&bench, memory.path())?;
    rows::print_scaling(&bench, memory.path())?;
    fio::print_table(&bench, memory.path(), disk.path())?;
    nbd::print_table(&bench, memory.path())?;
    say(&format!("load of the machine after: {}", load()?));
    Ok(())
}

/// An error of the file system with the name of what it is about.
fn named<T>(path: &Path, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

/// The middle one, or the higher of two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A ratio beside what it should reach.
fn against(ratio: f64, target: Option<f64>) -> String {
    match target {
        None => format!("{ratio:.2}"),
        Some(target) => format!("{ratio:.2} ({target}){}", if ratio >= target { "" } else { " ✗" }),
    }
}
