//! `img dd`: copy a part of a disk.

use std::{fs, os::unix::fs::MetadataExt as _};

use img_core::{
    Error, JobStep,
    format::{HostFile, OpenMode, OptionSet, registry},
    image::Image,
    job::convert::{ConvertOptions, convert_part},
    text,
};

use crate::{
    args::{FormatArgs, Opening, OwnProgressArgs, ShareArgs},
    command::create::{self, Make},
    context::Context,
    created::Created,
    error::{Failure, Outcome, system_reason},
    names, option_list,
    progress::Reporter,
    size,
};

/// Copy a part of an image, counted in blocks, into a new one
#[derive(Debug, clap::Args)]
#[command(override_usage = USAGE, after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    formats: FormatArgs,

    /// The format of the new image
    #[arg(short = 'O', long, value_name = "OUTPUT_FMT", default_value = "raw")]
    output_format: String,

    #[command(flatten)]
    share: ShareArgs,

    #[command(flatten)]
    progress: OwnProgressArgs,

    /// if=INPUT, of=OUTPUT; bs=BYTES a block (512), count=BLOCKS to copy (all), skip=BLOCKS of the input
    #[arg(value_name = "OPERAND")]
    operands: Vec<String>,
}

const USAGE: &str = "img dd [OPTIONS] [bs=BYTES] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT";

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img dd -O qcow2 bs=1M if=disk.raw of=disk.qcow2
  img dd bs=512 count=1 if=disk.qcow2 of=boot-sector";

/// What the operands say; of a name given twice the last counts.
struct Operands {
    input: Option<String>,
    output: Option<String>,
    block_bytes: u64,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn read(words: &[String]) -> Result<Self, Failure> {
        let mut read = Self { input: None, output: None, block_bytes: 512, count: None, skip: 0 };
        let number =
            |what: &str, value: &str| size::count(what, value, 0, size::MAX_BYTES).map_err(Failure::new);
        for word in words {
            let unrecognized = |name: &str| Failure::new(format!("unrecognized operand {name}"));
            let (name, value) = word.split_once('=').ok_or_else(|| unrecognized(word))?;
            match name {
                "if" => read.input = Some(value.to_owned()),
                "of" => read.output = Some(value.to_owned()),
                "bs" => read.block_bytes = size::small("bs", value, 1).map_err(Failure::new)?,
                "count" => read.count = Some(number("count", value)?),
                "skip" => read.skip = number("skip", value)?,
                other => return Err(unrecognized(other)),
            }
        }
        Ok(read)
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let operands = Operands::read(&args.operands)?;
    if args.formats.image_opts && args.formats.format.is_some() {
        return Err(Failure::new("--image-opts and --format are mutually exclusive"));
    }
    let (Some(input), Some(output)) = (&operands.input, &operands.output) else {
        return Err(Failure::new("Must specify both input and output files"));
    };
    let opening =
        Opening { force_share: args.share.force_share, ..Opening::new(input, &args.formats, OpenMode::Read) };
    let source = opening.open(context)?;
    let limit = operands.count.and_then(|count| count.checked_mul(operands.block_bytes));
    let end = limit.unwrap_or(u64::MAX).min(source.virtual_size_bytes());
    let start = operands.skip.checked_mul(operands.block_bytes).filter(|start| *start <= end);
    let part = start.unwrap_or(end)..end;
    refuse_same_file(&source, input, output)?;

    let reporter = Reporter::start(args.progress.style()?, 1.0, context)?;
    let mut created = Created::default();
    let outcome =
        create_target(args, output, part.end - part.start, &mut created, context).and_then(|target| {
            if start.is_none() {
                context.error(&format!("{input}: cannot skip to specified offset"));
            }
            // Everything is written, zeroes too, as whoever reads and writes block by block does.
            let options = ConvertOptions { sparse_bytes: 0, ..ConvertOptions::default() };
            reporter.begin();
            let copied = convert_part(&source, part, &target, &options, &reporter);
            let closed = target.close();
            let copied = copied
                .map_err(|error| refusal(&error).with_place(&error, context))
                .and_then(|()| closed.map_err(Failure::from));
            if copied.is_ok() {
                reporter.complete();
            }
            reporter.finish();
            copied
        });
    match outcome {
        Ok(()) => created.keep(),
        Err(failure) => {
            let failure = reporter.interrupted().unwrap_or(failure);
            created.remove()?;
            return Err(failure);
        }
    }
    Ok(0)
}

/// A disk that is made new is empty: what was to be read from it would be gone.
fn refuse_same_file(source: &Image, input: &str, output: &str) -> Result<(), Failure> {
    let Ok(target) = fs::metadata(text::to_path(names::path(output))) else { return Ok(()) };
    let is_target = |layer: &std::sync::Arc<dyn img_core::format::Layer>| {
        (0..).map_while(|number| layer.file(HostFile(number))).any(|file| {
            file.identity().is_some_and(|it| (it.device, it.inode) == (target.dev(), target.ino()))
        })
    };
    if source.layers().iter().any(is_target) {
        return Err(Failure::new(format!("{output}: would be emptied, and '{input}' is read from it")));
    }
    Ok(())
}

fn create_target(
    args: &Args,
    output: &str,
    size_bytes: u64,
    created: &mut Created,
    context: &Context,
) -> Result<Image, Failure> {
    let format = args.output_format.as_str();
    let driver = create::driver(format).map_err(|failure| {
        let is_unknown = registry::by_name(format).is_none() && !registry::is_elsewhere(format);
        if is_unknown { Failure::new("Unknown file format") } else { failure }
    })?;
    let said = |failure: Failure| Failure {
        text: format!("{output}: error while creating output image: {}", failure.text),
        ..failure
    };
    names::check_protocol(output).map_err(Failure::new)?;
    let known = option_list::descriptions(driver, true, context);
    let mut options = OptionSet::new();
    options.set("size", size_bytes.to_string());
    created.expect(names::path(output));
    let make = Make { driver, file: output, options, known: &known, watcher: None };
    let made = create::make(make, context).map_err(said)?;
    created.add(made);
    let formats = FormatArgs { format: Some(format.to_owned()), image_opts: false };
    Opening::new(output, &formats, OpenMode::Write).open(context)
}

fn refusal(error: &Error) -> Failure {
    match error {
        Error::Job { step: JobStep::Write, .. } => {
            Failure::new(format!("error while writing to output image file: {}", system_reason(error)))
        }
        Error::Job { .. } => {
            Failure::new(format!("error while reading from input image file: {}", system_reason(error)))
        }
        other => Failure::from(other),
    }
}
