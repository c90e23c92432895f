//! `img rebase`: an overlay stands on another backing file.

use clap::ValueHint;
use img_core::{
    format::{Backing, OpenMode, registry},
    image::{CacheMode, Image},
    job::rebase::{rebase, set_backing},
};

use crate::{
    args::{ChangeArgs, FileArg, Opening, ShareArgs, source_cache},
    context::Context,
    error::{Failure, Outcome, words},
    names,
    object::ObjectArgs,
    progress::Reporter,
};

/// Give an overlay another backing file
///
/// The guest reads what it read before: what differs between the two backing files is written into the overlay
/// first. With -u only the name changes, which is right for a backing file that was moved or converted.
#[derive(Debug, clap::Args)]
#[command(override_usage = "img rebase [OPTIONS] -b BACKING_FILENAME FILENAME", after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    change: ChangeArgs,

    /// The new backing file; "" for none
    #[arg(short = 'b', long, value_name = "BACKING_FILENAME", value_hint = ValueHint::FilePath)]
    backing: Option<String>,

    /// The format of the new backing file
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,

    /// Cache mode of the backing files
    #[arg(short = 'T', long, value_name = "CACHE")]
    backing_cache: Option<String>,

    /// Change the name and nothing else; no backing file is opened
    #[arg(short = 'u', long)]
    backing_unsafe: bool,

    /// Compress what is written into the overlay
    #[arg(short, long)]
    compress: bool,

    #[command(flatten)]
    share: ShareArgs,
    #[command(flatten)]
    objects: ObjectArgs,
    #[command(flatten)]
    file: FileArg,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img rebase -b new-base.qcow2 -F qcow2 overlay.qcow2
  img rebase -b \"\" overlay.qcow2
  img rebase -u -b moved/base.qcow2 -F qcow2 overlay.qcow2";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    args.objects.check(context)?;
    let file = args.file.one()?;
    if !args.backing_unsafe && args.backing.is_none() {
        return Err(Failure::usage("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    let reporter = Reporter::start(args.change.style()?, 1.0, context)?;
    reporter.begin();
    let outcome = run_rebase(args, file, &reporter, context);
    if outcome.is_ok() {
        reporter.complete();
    }
    reporter.finish();
    outcome.map_err(|failure| reporter.interrupted().unwrap_or(failure))?;
    Ok(0)
}

fn run_rebase(args: &Args, file: &str, reporter: &Reporter, context: &Context) -> Result<(), Failure> {
    let cache = args.change.cache_mode()?;
    let backing_cache = source_cache(args.backing_cache.as_deref())?;
    let opening = Opening {
        cache,
        backing: !args.backing_unsafe,
        ..Opening::new(file, &args.change.formats, OpenMode::Write)
    };
    let image = opening.open(context)?;
    let done = change(args, &image, backing_cache, reporter, context);
    let closed = image.close();
    done?;
    closed.map_err(Failure::from)
}

fn change(
    args: &Args,
    image: &Image,
    cache: CacheMode,
    reporter: &Reporter,
    context: &Context,
) -> Result<(), Failure> {
    if let Some(format) = &args.backing_format
        && registry::by_name(format).is_none()
        && !registry::is_elsewhere(format)
    {
        return Err(Failure::new(format!("Invalid format name: '{format}'")));
    }
    if args.compress && image.layers()[0].compression().is_none() {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    let name = args.backing.as_deref().filter(|name| !name.is_empty());
    if !args.backing_unsafe {
        let new = name.map(|name| open_new(args, image, name, cache, context)).transpose()?;
        rebase(image, new.as_ref(), args.compress, reporter)?;
    }
    let shown = args.backing.as_deref().unwrap_or_default();
    let failed = |why: &str| Failure::new(format!("Could not change the backing file to '{shown}': {why}"));
    let backing = match (name, &args.backing_format) {
        (None, _) => None,
        (Some(_), None) => return Err(failed("backing format must be specified")),
        (Some(name), Some(format)) => Some(Backing { name: name.to_owned(), format: Some(format.clone()) }),
    };
    set_backing(image, backing.as_ref()).map_err(|error| failed(&words(&error)))
}

/// Opens the new backing file with its chain.
fn open_new(
    args: &Args,
    image: &Image,
    name: &str,
    cache: CacheMode,
    context: &Context,
) -> Result<Image, Failure> {
    let full = names::full_backing_name(image.layer_name(0), name).map_err(Failure::new)?;
    let opening = Opening {
        cache,
        force_share: args.share.force_share,
        is_reference: true,
        ..Opening::named(&full, args.backing_format.as_deref(), OpenMode::Read)
    };
    opening.open(context).map_err(|failure| {
        let outer = format!("Could not open '{full}': ");
        let why = failure.text.strip_prefix(&outer).unwrap_or(&failure.text);
        Failure { text: format!("Could not open new backing file '{name}': {why}"), ..failure }
    })
}
