//! `img compare`: do two images read the same?

use clap::ValueHint;
use img_core::{
    Error, JobStep,
    format::OpenMode,
    image::{CacheMode, Image},
    job::{
        bitmaps::marks,
        compare::{CompareOptions, Comparison, compare, compare_marked},
    },
};

use crate::{
    args::{Opening, ProgressArgs, ShareArgs, source_cache},
    context::Context,
    error::{Failure, Outcome, reason},
    object::ObjectArgs,
    progress::Reporter,
};

/// The exit code when an image cannot be opened, or the command line makes no sense.
const TROUBLE: u8 = 2;
/// The exit code when the tables of an image cannot be read.
const UNMAPPABLE: u8 = 3;
/// The exit code when the data of an image cannot be read.
const UNREADABLE: u8 = 4;

/// Tell whether two images have the same contents
///
/// Exit codes: 0 the same, 1 different, 2 an image could not be opened,
/// 3 the tables of one could not be read, 4 its data could not.
#[derive(Debug, clap::Args)]
#[command(override_usage = "img compare [OPTIONS] FILENAME1 FILENAME2", after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Print nothing: the exit code is the answer
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    progress: ProgressArgs,

    /// The format of the first image; found by looking at it when absent
    #[arg(short = 'f', long, value_name = "FMT")]
    a_format: Option<String>,

    /// The format of the second image
    #[arg(short = 'F', long, value_name = "FMT")]
    b_format: Option<String>,

    /// Take file names as full descriptions: driver=qcow2,file.filename=NAME,...
    #[arg(long)]
    image_opts: bool,

    /// Sizes and allocation must agree too
    #[arg(short, long)]
    strict: bool,

    /// Cache mode: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 'T', long, value_name = "CACHE")]
    cache: Option<String>,

    /// Compare only what this persistent bitmap of the first image marks
    #[arg(long, value_name = "BITMAP", help_heading = "Beyond qemu-img")]
    dirty_bitmap: Option<String>,

    #[command(flatten)]
    share: ShareArgs,
    #[command(flatten)]
    objects: ObjectArgs,

    /// The two images
    #[arg(value_name = "FILENAME", value_hint = ValueHint::FilePath)]
    files: Vec<String>,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img compare disk.raw disk.qcow2
  img compare -q -s a.qcow2 b.qcow2 && echo the same";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    args.objects.check(context).map_err(|failure| match failure.code {
        0 => failure,
        _ => failure.with_code(TROUBLE),
    })?;
    let [a, b] = args.files.as_slice() else {
        return Err(Failure::usage("Expecting two image file names"));
    };
    let cache = source_cache(args.cache.as_deref()).map_err(|failure| failure.with_code(TROUBLE))?;
    let reporter = Reporter::start(args.progress.style(args.quiet)?, 2.0, context)?;
    let outcome = run_compare(args, cache, a, b, &reporter, context);
    reporter.finish();
    outcome.map_err(|failure| reporter.interrupted().unwrap_or(failure))
}

/// Why the comparison stopped.
fn trouble(error: &Error, names: [&str; 2]) -> Failure {
    match error {
        Error::Job { step: JobStep::Map, input, source, .. } => {
            Failure::new(format!("Sector allocation test failed for {}: {}", names[*input], reason(source)))
                .with_code(UNMAPPABLE)
        }
        Error::Job { step: JobStep::Read, input, at_bytes, source } => Failure::new(format!(
            "Error while reading offset {at_bytes} of {}: {}",
            names[*input],
            reason(source)
        ))
        .with_code(UNREADABLE),
        error => Failure::from(error).with_code(UNREADABLE),
    }
}

fn run_compare(
    args: &Args,
    cache: CacheMode,
    a: &str,
    b: &str,
    reporter: &Reporter,
    context: &Context,
) -> Outcome {
    let open = |name, format: &Option<String>| -> Result<Image, Failure> {
        let opening = Opening {
            image_opts: args.image_opts,
            cache,
            force_share: args.share.force_share,
            ..Opening::named(name, format.as_deref(), OpenMode::Read)
        };
        opening.open(context).map_err(|failure| failure.with_code(TROUBLE))
    };
    let images = [open(a, &args.a_format)?, open(b, &args.b_format)?];
    reporter.begin();
    let say = |text: &str| {
        if !args.quiet {
            context.out.line(text);
        }
    };
    let options = CompareOptions { strict: args.strict };
    let mut size_warning = || say("Warning: Image size mismatch!");
    let both = [&images[0], &images[1]];
    let marks = args.dirty_bitmap.as_deref().map(|name| marks(&images[0], name)).transpose();
    let marks = marks.map_err(|error| Failure::from(error).with_code(TROUBLE))?;
    let answer = match &marks {
        None => compare(both, options, &mut size_warning, reporter),
        Some(marks) => compare_marked(both, marks, options, &mut size_warning, reporter),
    };
    let answer = answer.map_err(|error| trouble(&error, [a, b]).with_place(&error, context))?;
    match answer {
        Comparison::Identical => {
            reporter.complete();
            say("Images are identical.");
            return Ok(0);
        }
        Comparison::ContentDiffers(at) => say(&format!("Content mismatch at offset {at}!")),
        Comparison::AllocationDiffers(at) => {
            say(&format!("Strict mode: Offset {at} block status mismatch!"));
        }
        Comparison::SizeDiffers => say("Strict mode: Image size mismatch!"),
    }
    Ok(1)
}
