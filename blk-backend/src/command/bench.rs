//! `blk-backend bench`: a load on an image in this process, and results compared.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use blk_backend::{
    bench::{Job, Limit, Pattern, compare, run as run_job, to_json, write_table},
    engine::{LaneOptions, Poll},
};
use serde_json::Value;

use super::{Failure, disk_options::DiskArgs};

/// Measure how an image bears a load
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Put a load on an image, in this process, and show how it was borne
    ///
    /// Requests go through the same lanes as those of guests. Jobs that write overwrite what is on the disk.
    Run(Box<RunArgs>),
    /// Show two JSON results side by side
    Compare {
        /// The first result
        a: PathBuf,
        /// The second
        b: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    #[command(flatten)]
    disk: DiskArgs,
    /// read, write, randread, randwrite, randrw or discard
    #[arg(long, value_name = "PATTERN", default_value = "randread", value_parser = pattern)]
    pattern: Pattern,
    /// Of a hundred requests of randrw, so many are reads
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    read_percent: u32,
    /// Bytes of a request, a multiple of 512 up to 64 MiB
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = block_bytes)]
    block_size: u64,
    /// Requests under way at once in each queue
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    depth: u32,
    /// Queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    queues: u32,
    /// Begin so many requests a second in each queue, at even intervals
    #[arg(long, value_name = "IOPS", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Flush after so many requests that change the disk
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    flush_every: Option<u64>,
    /// End after so long; 10 seconds where no number of requests is given either
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    time: Option<u64>,
    /// End after so many requests of each queue
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Places and bytes follow from this number
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Look for work this long before sleeping
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
    poll: u64,
    /// Write the result, with full histograms, to a file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    match &args.command {
        Command::Run(args) => measure(args, out)?,
        Command::Compare { a, b } => compare(&read(a)?, &read(b)?, out)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &RunArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let seconds = args.time.or(if args.count.is_none() { Some(10) } else { None });
    let job = Job {
        pattern: args.pattern,
        read_percent: args.read_percent,
        block_bytes: args.block_size,
        depth: args.depth,
        queues: args.queues,
        rate: args.rate.map(f64::from),
        flush_every: args.flush_every,
        limit: Limit { time: seconds.map(Duration::from_secs), requests: args.count },
        seed: args.seed,
    };
    let disk = args.disk.open(&mut |text| super::warn(text))?;
    let lane = LaneOptions { poll: Poll::For(Duration::from_micros(args.poll)), ..LaneOptions::default() };
    let result = run_job(&disk, &job, &lane).map_err(Failure::new);
    let closed = disk.close();
    let result = result?;
    closed?;
    write_table(&job, &result, out)?;
    if let Some(path) = &args.json {
        let text = format!("{:#}\n", to_json(&args.disk.image, &job, &result));
        fs::write(path, text).map_err(|error| named(path, &error))?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Value, Failure> {
    let text = fs::read_to_string(path).map_err(|error| named(path, &error))?;
    serde_json::from_str(&text).map_err(|error| named(path, &error))
}

fn named(path: &Path, why: &dyn std::fmt::Display) -> Failure {
    Failure::new(format_args!("{}: {why}", path.display()))
}

fn pattern(text: &str) -> Result<Pattern, String> {
    Pattern::from_name(text).ok_or_else(|| {
        let names = Pattern::ALL.map(|(_, name)| name).join(", ");
        format!("'{text}' is none of {names}")
    })
}

fn block_bytes(text: &str) -> Result<u64, String> {
    let bytes: u64 = text.parse().map_err(|_| format!("'{text}' is not a number of bytes"))?;
    if bytes == 0 || !bytes.is_multiple_of(512) || bytes > 64 << 20 {
        return Err(format!("{bytes} is not a multiple of 512 up to 64 MiB"));
    }
    Ok(bytes)
}
