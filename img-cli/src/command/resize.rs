//! `img resize`: another size for the disk.

use clap::ValueHint;
use img_core::{format::OpenMode, storage::Preallocation};

use crate::{
    args::{FormatArgs, Opening, OwnProgressArgs},
    context::Context,
    error::{Failure, Outcome},
    object::ObjectArgs,
    option_list,
    progress::told,
    size,
};

/// Change the size of an image
#[derive(Debug, clap::Args)]
#[command(override_usage = "img resize [OPTIONS] FILENAME [+-]SIZE", after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    formats: FormatArgs,

    /// Allow the new size to be smaller: what stands behind it is lost
    #[arg(long)]
    shrink: bool,

    /// How space for the new part is set aside: off, metadata, falloc, full
    #[arg(long, value_name = "PREALLOC")]
    preallocation: Option<String>,

    #[command(flatten)]
    progress: OwnProgressArgs,

    #[command(flatten)]
    objects: ObjectArgs,

    /// The image, and its new size or the difference: [+-]SIZE
    #[arg(value_name = "FILENAME [+-]SIZE", value_hint = ValueHint::FilePath, allow_negative_numbers = true)]
    operands: Vec<String>,
}

/// What to do to the size.
enum Change {
    To(u64),
    By(u64),
    Less(u64),
}

/// What is done for the new part.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Growth {
    /// It is mapped; space is not set aside.
    Mapped,
    /// It is not mapped unless space is set aside for it.
    Storage(Preallocation),
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img resize disk.qcow2 +10G
  img resize --shrink disk.qcow2 5G";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let growth = growth(args.preallocation.as_deref())?;
    args.objects.check(context)?;
    let (file, text) = match args.operands.as_slice() {
        [file, text] => (file, text),
        [] | [_] => return Err(Failure::usage("Expecting image file name and size")),
        _ => return Err(Failure::usage("Extra argument(s) in command line")),
    };
    let change = change(text)?;
    let image = Opening::new(file, &args.formats, OpenMode::Write).open(context)?;
    let old = image.virtual_size_bytes();
    let new = match change {
        Change::To(bytes) => Some(bytes),
        Change::By(bytes) => old.checked_add(bytes),
        Change::Less(bytes) => old.checked_sub(bytes),
    };
    let new = new
        .filter(|bytes| (1..=size::MAX_BYTES).contains(bytes))
        .ok_or_else(|| Failure::new("New image size must be positive"))?;
    if new <= old && growth != Growth::Storage(Preallocation::Off) {
        return Err(Failure::new("Preallocation can only be used for growing images"));
    }
    if new < old && !args.shrink {
        context.error("Use the --shrink option to perform a shrink operation.");
        context.warning(
            "Shrinking an image will delete all data beyond the shrunken image's end. Before performing \
             such an operation, make sure there is no important data there.",
        );
        return Err(Failure::silent(1));
    }
    if context.is_reference() && image.layers()[0].driver().beyond_reference().resize {
        return Err(Failure::new("Image format driver does not support resize"));
    }
    // Setting space aside may mean to write all of what is new.
    let reporter = match growth {
        Growth::Mapped | Growth::Storage(Preallocation::Off) => None,
        Growth::Storage(_) => Some(args.progress.of_filling(args.quiet, context)?),
    };
    if let Some(reporter) = &reporter {
        image.watch_filling(&reporter.of_filling(new - old));
    }
    told(reporter.as_deref(), |_| {
        let resized = match growth {
            Growth::Mapped => image.grow_mapped(new),
            Growth::Storage(preallocation) => image.resize(new, preallocation),
        };
        resized
            .and_then(|()| image.close())
            .map_err(|error| Failure::from(&error).with_place(&error, context))
    })?;
    if !args.quiet {
        context.out.line("Image resized.");
    }
    Ok(0)
}

fn growth(text: Option<&str>) -> Result<Growth, Failure> {
    match text {
        None | Some("off") => Ok(Growth::Storage(Preallocation::Off)),
        Some("falloc") => Ok(Growth::Storage(Preallocation::Falloc)),
        Some("full") => Ok(Growth::Storage(Preallocation::Full)),
        Some("metadata") => Ok(Growth::Mapped),
        Some(other) => Err(Failure::new(format!("Invalid preallocation mode '{other}'"))),
    }
}

fn change(text: &str) -> Result<Change, Failure> {
    let (make, digits): (fn(u64) -> Change, &str) = match text.as_bytes().first() {
        Some(b'+') => (Change::By, &text[1..]),
        Some(b'-') => (Change::Less, &text[1..]),
        _ => (Change::To, text),
    };
    option_list::size("size", digits).map(make).map_err(Failure::new)
}
