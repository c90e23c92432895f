//! `blk-backend bench`: loads on disks, disks looked at after a crash, and results compared.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use blk_backend::bench::{
    Job, Journal, Limit, Pattern, Verify, compare, run_until, to_json, verify, write_table,
};
use img_core::format::parse_size;
use serde_json::Value;

use super::{Failure, bench_target::TargetArgs, signals};

/// Measure how a disk bears a load
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Put a load on a disk, and show how it was borne
    ///
    /// The disk is an image in this process, a device behind a vhost-user socket, or an export behind an NBD URI. Jobs
    /// that write overwrite what is on it.
    Run(Box<RunArgs>),
    /// Look at a disk after a crash: whether all is there that a verified run had flushed
    Verify(Box<VerifyArgs>),
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
    target: TargetArgs,
    /// read, write, randread, randwrite, randrw or discard
    #[arg(long, value_name = "PATTERN", default_value = "randread", value_parser = pattern)]
    pattern: Pattern,
    /// Of a hundred requests of randrw, so many are reads
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    read_percent: u32,
    /// Bytes of a request, a multiple of 512 up to 64 MiB; 4k and 1M are understood
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
    /// End after so long, fractions included; 10 seconds where no number of requests is given either
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    time: Option<Duration>,
    /// End after so many requests of each queue
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Places and bytes follow from this number
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Write blocks that say where they belong and which write they came with, look at what is read, and in the end
    /// flush and read all of them again
    #[arg(long)]
    verify: bool,
    /// Keep what was flushed in a file, for bench verify after a crash
    #[arg(long, value_name = "FILE", requires = "verify")]
    journal: Option<PathBuf>,
    /// Write the result, with full histograms, to a file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct VerifyArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// What the run wrote with --journal
    #[arg(long, value_name = "FILE")]
    journal: PathBuf,
}

/// The length of a run that nothing else limits.
const DEFAULT_TIME: Duration = Duration::from_secs(10);

/// Reads under way at once while a disk is looked at.
const VERIFY_DEPTH: u32 = 16;

pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    match &args.command {
        Command::Run(args) => return measure(args, out),
        Command::Verify(args) => return look(args, out),
        Command::Compare { a, b } => compare(&read(a)?, &read(b)?, out)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &RunArgs, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    let asked_to_end = signals::flag_on_termination()?;
    let time = args.time.or(if args.count.is_none() { Some(DEFAULT_TIME) } else { None });
    // Before the load: its result is not to be lost for want of a place.
    let json = args.json.as_deref().map(|path| create(path).map(|file| (path, file))).transpose()?;
    let job = Job {
        pattern: args.pattern,
        read_percent: args.read_percent,
        block_bytes: args.block_size,
        depth: args.depth,
        queues: args.queues,
        rate: args.rate.map(f64::from),
        flush_every: args.flush_every,
        limit: Limit { time, requests: args.count },
        seed: args.seed,
    };
    let result = args.target.with(&job, |target| {
        let verify = if args.verify { Some(Verify::new(args.journal.as_deref())?) } else { None };
        run_until(target, &job, verify.as_ref(), &asked_to_end)
    })?;
    write_table(&job, &result, out)?;
    if let Some((path, mut file)) = json {
        let text = format!("{:#}\n", to_json(args.target.name(), &job, &result));
        let written = file.set_len(0).and_then(|()| file.write_all(text.as_bytes()));
        written.map_err(|error| named(path, &error))?;
    }
    if result.interrupted {
        super::warn("the run was ended before its time; this is what it did until then");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// A file for a result; what it holds from before stays until there is a new one.
fn create(path: &Path) -> Result<File, Failure> {
    let opened = File::options().write(true).create(true).truncate(false).open(path);
    opened.map_err(|error| named(path, &error))
}

fn look(args: &VerifyArgs, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    let journal = Journal::read(&args.journal)?;
    let job = Job {
        pattern: Pattern::Read,
        read_percent: 100,
        block_bytes: journal.block_bytes(),
        depth: VERIFY_DEPTH,
        queues: 1,
        rate: None,
        flush_every: None,
        limit: Limit { time: None, requests: None },
        seed: 0,
    };
    let found = args.target.with(&job, |target| verify(target, &journal, &job))?;
    for mismatch in &found.mismatches {
        writeln!(out, "{mismatch}")?;
    }
    writeln!(
        out,
        "{} blocks were flushed: {} are wrong, {} have been written again since",
        found.blocks, found.wrong, found.newer
    )?;
    Ok(if found.wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
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
    let bytes = parse_size(text).map_err(|_| format!("'{text}' is not a number of bytes"))?;
    if bytes == 0 || !bytes.is_multiple_of(512) || bytes > 64 << 20 {
        return Err(format!("{bytes} is not a multiple of 512 up to 64 MiB"));
    }
    Ok(bytes)
}

fn seconds(text: &str) -> Result<Duration, String> {
    let time = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    time.filter(|time| !time.is_zero()).ok_or_else(|| format!("'{text}' is not a number of seconds above 0"))
}
