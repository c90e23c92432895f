//! `img commit`: what an overlay holds goes into the image below it.

use std::fs;

use clap::ValueHint;
use img_core::{
    format::OpenMode,
    image::{Image, ImageName},
    job::commit::{CommitOptions, commit},
    text,
};

use crate::{
    args::{ChangeArgs, FileArg, Opening},
    context::Context,
    error::{Failure, Outcome},
    names,
    object::ObjectArgs,
    progress::Reporter,
    size,
};

/// Write what an overlay holds into its backing file, and empty the overlay
#[derive(Debug, clap::Args)]
#[command(override_usage = "img commit [OPTIONS] FILENAME", after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    change: ChangeArgs,

    /// Do not empty the overlay
    #[arg(short, long)]
    drop: bool,

    /// The image of the chain to write into, if not the next one; the overlay is not emptied then
    #[arg(short = 'b', long, value_name = "BASE_IMG", value_hint = ValueHint::FilePath)]
    base: Option<String>,

    /// Bytes a second at most
    #[arg(short, long, value_name = "RATE")]
    rate: Option<String>,

    #[command(flatten)]
    objects: ObjectArgs,
    #[command(flatten)]
    file: FileArg,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img commit overlay.qcow2
  img commit -b base.qcow2 top.qcow2";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let rate_bytes = match &args.rate {
        Some(text) => Some(size::argument("rate limit", text, size::MAX_BYTES).map_err(Failure::new)?),
        None => None,
    };
    args.objects.check(context)?;
    let file = args.file.one()?;
    let cache = args.change.cache_mode()?;
    let formats = &args.change.formats;
    let opening = Opening { cache, discards: true, ..Opening::new(file, formats, OpenMode::Write) };
    let image = opening.open(context)?;
    let reporter = Reporter::start(args.change.style()?, 1.0, context)?;
    reporter.begin();
    let outcome = run_commit(args, image, &opening, rate_bytes, &reporter, context);
    if outcome.is_ok() {
        reporter.complete();
    }
    reporter.finish();
    outcome.map_err(|failure| reporter.interrupted().unwrap_or(failure))?;
    if !args.change.quiet {
        context.out.line("Image committed.");
    }
    Ok(0)
}

/// The image below, by the names under which it can be opened again.
struct Base {
    depth: usize,
    name: String,
    format: &'static str,
}

fn run_commit(
    args: &Args,
    image: Image,
    opening: &Opening<'_>,
    rate_bytes: Option<u64>,
    reporter: &Reporter,
    context: &Context,
) -> Result<(), Failure> {
    // The chain is opened to find the base, and again in two parts: nothing below the base is read, and only the
    // base and the overlay are written. What is worth a warning was told the first time.
    let base = find_base(&image, opening.name, args.base.as_deref());
    image.close()?;
    let base = base?;
    let mut options = opening.options(context)?;
    options.max_layers = base.depth;
    let open = |name: &ImageName, options, text: &str| {
        Image::open(name, options).map_err(|error| Failure::open(text, &error))
    };
    let overlay = open(&opening.image_name()?, &options, opening.name)?;
    let base_opening = Opening {
        name: &base.name,
        image_opts: false,
        format: Some(base.format),
        is_reference: true,
        ..*opening
    };
    // As the overlay's name describes it, where it does.
    let base_name = match opening.image_name()?.below(base.depth) {
        Some(described) => described,
        None => base_opening.image_name()?,
    };
    let below = open(&base_name, &base_opening.options(context)?, &base.name)?;
    let committed = commit(&overlay, &below, CommitOptions { rate_bytes }, reporter);
    let closed = below.close();
    committed?;
    closed?;
    if !args.drop && args.base.is_none() {
        overlay.make_empty()?;
    }
    overlay.close()?;
    Ok(())
}

/// The image to write into: the one below, or the one of that name further down.
fn find_base(image: &Image, file: &str, wanted: Option<&str>) -> Result<Base, Failure> {
    let depths = image.layers().len();
    let depth = match wanted {
        None if depths < 2 => return Err(Failure::new("Image does not have a backing file")),
        None => 1,
        Some(wanted) => (1..depths).find(|depth| is_called(image, *depth, wanted)).ok_or_else(|| {
            Failure::new(format!("Did not find '{wanted}' in the backing chain of '{file}'"))
        })?,
    };
    Ok(Base {
        depth,
        name: image.layer_name(depth).to_owned(),
        format: image.layers()[depth].driver().name(),
    })
}

/// Whether the layer at `depth`, below the top, is the one that `wanted` names: as the layer above records it, as
/// it was opened, or the same file by its path.
fn is_called(image: &Image, depth: usize, wanted: &str) -> bool {
    let above = image.layer_name(depth - 1);
    let name = image.layer_name(depth);
    let recorded = image.layers()[depth - 1].backing().is_some_and(|backing| backing.name == wanted);
    let real = |name: &str| fs::canonicalize(text::to_path(names::path(name))).ok();
    let is_same_file = names::full_backing_name(above, wanted)
        .is_ok_and(|full| real(&full).is_some_and(|path| Some(path) == real(name)));
    recorded || name == wanted || is_same_file
}
