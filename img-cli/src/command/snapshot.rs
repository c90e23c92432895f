//! `img snapshot`: internal snapshots.

use std::time::{SystemTime, UNIX_EPOCH};

use img_core::{Error, format::OpenMode, image::Image};

use crate::{
    args::{FileArg, FormatArgs, Opening, ShareArgs},
    context::Context,
    error::{Failure, Outcome, os_text, reason},
    object::ObjectArgs,
    snapshot_table,
};

/// List, take, apply and delete the snapshots inside an image
#[derive(Debug, clap::Args)]
#[command(override_usage = "img snapshot [OPTIONS] FILENAME", after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    formats: FormatArgs,
    #[command(flatten)]
    share: ShareArgs,
    #[command(flatten)]
    objects: ObjectArgs,

    /// List the snapshots: what is done when nothing else is asked
    #[arg(short, long, action = clap::ArgAction::Count)]
    list: u8,

    /// Take a snapshot called SNAPSHOT
    #[arg(short, long, value_name = "SNAPSHOT")]
    create: Vec<String>,

    /// Make the disk as it was when SNAPSHOT was taken. What was written since is lost
    #[arg(short, long, value_name = "SNAPSHOT")]
    apply: Vec<String>,

    /// Forget SNAPSHOT and give its space back
    #[arg(short, long, value_name = "SNAPSHOT")]
    delete: Vec<String>,

    #[command(flatten)]
    file: FileArg,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img snapshot -c before-upgrade disk.qcow2
  img snapshot -l disk.qcow2
  img snapshot -a before-upgrade disk.qcow2";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let asked = usize::from(args.list) + args.create.len() + args.apply.len() + args.delete.len();
    if asked > 1 {
        return Err(Failure::usage("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    args.objects.check(context)?;
    let file = args.file.one()?;
    let changes = !(args.create.is_empty() && args.apply.is_empty() && args.delete.is_empty());
    let mode = if changes { OpenMode::Write } else { OpenMode::Read };
    let opening = Opening { force_share: args.share.force_share, ..Opening::new(file, &args.formats, mode) };
    let image = opening.open(context)?;
    let outcome = if let [name] = args.create.as_slice() {
        image.snapshot_create(name, now()).map_err(|error| ("create", name, why_not_created(&error), error))
    } else if let [name] = args.apply.as_slice() {
        image.snapshot_apply(name).map_err(|error| ("apply", name, why_not_applied(&error), error))
    } else if let [name] = args.delete.as_slice() {
        image.snapshot_delete(name).map_err(|error| ("delete", name, why_not_deleted(&error), error))
    } else {
        return list(&image, context);
    };
    outcome.map_err(|(what, name, why, error)| {
        Failure::new(format!("Could not {what} snapshot '{name}': {why}")).with_place(&error, context)
    })?;
    image.close()?;
    Ok(0)
}

fn list(image: &Image, context: &Context) -> Outcome {
    let snapshots = match image.layers()[0].snapshots() {
        Some(snapshots) => snapshots.list()?,
        None => Vec::new(),
    };
    if !snapshots.is_empty() {
        context.out.print(snapshot_table::table(&snapshots));
    }
    Ok(0)
}

/// Seconds and nanoseconds since 1970, to the microsecond; the format has 32 bits for the seconds.
fn now() -> (u32, u32) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (u32::try_from(since.as_secs()).unwrap_or(u32::MAX), since.subsec_micros() * 1000)
}

fn why_not_created(error: &Error) -> String {
    match error {
        Error::Unsupported { .. } => "Operation not supported".to_owned(),
        other => reason(other),
    }
}

fn why_not_applied(error: &Error) -> String {
    match error {
        Error::NoSuchSnapshot { .. } => "Failed to load snapshot: No such file or directory".to_owned(),
        Error::Unsupported { .. } => "Block driver does not support snapshots".to_owned(),
        Error::Io { source, .. } => format!("Failed to load snapshot: {}", os_text(source)),
        other => reason(other),
    }
}

fn why_not_deleted(error: &Error) -> String {
    match error {
        // An image that has no snapshots has none of that name.
        Error::NoSuchSnapshot { .. } | Error::Unsupported { .. } => "snapshot not found".to_owned(),
        other => reason(other),
    }
}
