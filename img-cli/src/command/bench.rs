//! `img bench`: how fast an image answers.

use img_core::{
    format::OpenMode,
    image::CacheMode,
    job::bench::{Bench, FlushEvery, bench},
};

use crate::{
    args::{FileArg, FormatArgs, Opening, OwnProgressArgs, ShareArgs},
    context::Context,
    error::{Failure, Outcome, system_reason},
    progress::told,
    size,
};

/// Send read or write requests to an image and tell how long they take
#[derive(Debug, clap::Args)]
#[command(override_usage = "img bench [OPTIONS] FILENAME", after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Taken for compatibility: what is printed is the result
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    formats: FormatArgs,

    /// Cache mode: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,

    /// How many requests
    #[arg(short = 'c', long, value_name = "COUNT", default_value = "75000")]
    count: String,

    /// How many of them at a time
    #[arg(short = 'd', long, value_name = "DEPTH", default_value = "64")]
    depth: String,

    /// Where the first one starts
    #[arg(short = 'o', long, value_name = "OFFSET", default_value = "0")]
    offset: String,

    /// Bytes of each
    #[arg(short = 's', long, value_name = "BUFFER_SIZE", default_value = "4096")]
    buffer_size: String,

    /// From the start of one to the start of the next; 0 for BUFFER_SIZE
    #[arg(short = 'S', long, value_name = "STEP_SIZE", default_value = "0")]
    step_size: String,

    /// How requests reach the host: threads, native or io_uring. Threads make them here, whatever is asked
    #[arg(short = 'i', long, value_name = "AIO")]
    aio: Option<String>,

    /// The same as --aio=native, which needs a cache mode without the page cache
    #[arg(short, long)]
    native: bool,

    /// Write; read without
    #[arg(short, long)]
    write: bool,

    /// The byte to write
    #[arg(long, value_name = "PATTERN", default_value = "0")]
    pattern: String,

    /// Flush after so many writes
    #[arg(long, value_name = "FLUSH_INTERVAL", default_value = "0")]
    flush_interval: String,

    /// Go on with other writes while a flush is under way
    #[arg(long)]
    no_drain: bool,

    #[command(flatten)]
    progress: OwnProgressArgs,
    #[command(flatten)]
    share: ShareArgs,
    #[command(flatten)]
    file: FileArg,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img bench -c 100000 -d 32 -s 4k disk.qcow2
  img bench -w --pattern 0xaa --flush-interval 64 scratch.qcow2";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let number = |what, text: &str, min| size::small(what, text, min).map_err(Failure::new);
    let count = size::count("request count", &args.count, 1, size::MAX_SMALL).map_err(Failure::new)?;
    let depth = size::count("queue depth", &args.depth, 1, size::MAX_SMALL).map_err(Failure::new)?;
    let offset_bytes = size::argument("offset", &args.offset, size::MAX_BYTES).map_err(Failure::new)?;
    let request_bytes = number("buffer size", &args.buffer_size, 1)?;
    let step_bytes = match number("step size", &args.step_size, 0)? {
        0 => request_bytes,
        step_bytes => step_bytes,
    };
    let pattern = size::count("pattern byte", &args.pattern, 0, 0xff).map_err(Failure::new)?;
    let interval =
        size::count("flush interval", &args.flush_interval, 0, size::MAX_SMALL).map_err(Failure::new)?;
    let aio = aio(args)?;
    let cache = CacheMode::from_name(args.cache.as_deref().unwrap_or("writeback"))
        .ok_or_else(|| Failure::new("Invalid cache mode"))?;
    let file = args.file.one()?;
    if !args.write && interval != 0 {
        return Err(Failure::new("--flush-interval is only available in write tests"));
    }
    if interval != 0 && interval < depth {
        return Err(Failure::new("Flush interval can't be smaller than depth"));
    }
    let mode = if args.write { OpenMode::Write } else { OpenMode::Read };
    if aio == Aio::Native && !cache.is_direct() {
        return Err(Failure::new(format!(
            "Could not open '{file}': aio=native was specified, but it requires cache.direct=on, which was not \
             specified."
        )));
    }
    let force_share = args.share.force_share;
    let image = Opening { cache, force_share, ..Opening::new(file, &args.formats, mode) }.open(context)?;
    context.out.line(format_args!(
        "Sending {count} {} requests, {request_bytes} bytes each, {depth} in parallel (starting at offset \
         {offset_bytes}, step size {step_bytes})",
        if args.write { "write" } else { "read" }
    ));
    if interval != 0 {
        context.out.line(format_args!("Sending flush every {interval} requests"));
    }
    let requests = Bench {
        count,
        depth,
        offset_bytes,
        request_bytes,
        step_bytes,
        pattern: args.write.then(|| u8::try_from(pattern).unwrap_or(u8::MAX)),
        flush: (interval != 0).then_some(FlushEvery { requests: interval, drains: !args.no_drain }),
    };
    let reporter = args.progress.reporter(args.quiet, context)?;
    let took = told(reporter.as_ref(), |progress| {
        bench(&image, &requests, progress).map_err(|error| {
            let text = format!("Failed request: {}", system_reason(&error));
            Failure::new(text).with_place(&error, context)
        })
    })?;
    context.out.line(format_args!("Run completed in {:.3} seconds.", took.as_secs_f64()));
    image.close()?;
    Ok(0)
}

/// How requests are to reach the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aio {
    Threads,
    Native,
}

/// # Errors
/// For names that the reference does not know.
fn aio(args: &Args) -> Result<Aio, Failure> {
    match args.aio.as_deref() {
        _ if args.native => Ok(Aio::Native),
        None | Some("threads" | "io_uring") => Ok(Aio::Threads),
        Some("native") => Ok(Aio::Native),
        Some(other) => Err(Failure::new(format!("Invalid aio option: {other}"))),
    }
}
