//! `img inspect`: whether to take an image from somebody who is not trusted.

use img_core::{
    format::{ReferenceKind, registry},
    job::inspect::{Judged, Policy, Reason, Verdict, inspect},
};
use serde_json::{Value, json};

use crate::{
    args::{FileArg, Layout, OutputArgs, ShareArgs},
    context::Context,
    error::{Failure, Outcome},
    output::Out,
    qdict,
    size::{self, Human},
};

/// The exit code for an image that is refused.
const REFUSED: u8 = 2;

/// Judge an image that is not trusted, from its own file alone
///
/// Files that it names are listed and never opened; without --allow-refs any of them is a reason to refuse.
///
/// Exit codes: 0 accepted, 1 no verdict (the file cannot be read, a limit was met, a wrong command line), 2 refused.
#[derive(Debug, clap::Args)]
#[command(override_usage = "img inspect --untrusted [OPTIONS] FILENAME", after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Believe nothing that the image says (required: there is no other way to inspect)
    #[arg(long)]
    untrusted: bool,

    /// The format that the image is said to have; found by looking at it when absent
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<String>,

    /// Refuse other formats than these, with commas between
    #[arg(long, value_name = "LIST")]
    allow_format: Vec<String>,

    /// Refuse larger disks, in snapshots too
    #[arg(long, value_name = "SIZE")]
    max_size: Option<String>,

    /// Refuse files each of whose bytes stands for more bytes of the disk than this, compressed or not (default: 100)
    #[arg(long, value_name = "N")]
    max_ratio: Option<String>,

    #[command(flatten)]
    share: ShareArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    file: FileArg,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img inspect --untrusted --allow-format qcow2,vmdk --max-size 100G upload.qcow2
  img inspect --untrusted --limits memory=256M,cpu=60 --allow-refs /srv/base --output json upload.qcow2";

/// Where [`Policy::max_ratio`] is when nobody says.
const DEFAULT_RATIO: u64 = 100;

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let layout = args.output.layout()?;
    let file = args.file.one()?;
    if !args.untrusted {
        return Err(Failure::usage("inspect judges untrusted images: say --untrusted"));
    }
    let verdict = inspect(file, &policy(args)?)?;
    match layout {
        Layout::Human => print_human(file, &verdict, &context.out),
        Layout::Json => context.out.line(qdict::pretty(&json(file, &verdict))),
    }
    Ok(if verdict.accepts() { 0 } else { REFUSED })
}

fn policy(args: &Args) -> Result<Policy, Failure> {
    let known = |name: &str| match registry::by_name(name) {
        Some(_) => Ok(name.to_owned()),
        None => Err(Failure::usage(format!("Unknown format '{name}'"))),
    };
    let allowed = args.allow_format.iter().flat_map(|list| list.split(',')).map(known);
    let allowed: Vec<_> = allowed.collect::<Result<_, _>>()?;
    let max_size = args.max_size.as_deref().map(|text| size::argument("maximal size", text, size::MAX_BYTES));
    let max_ratio = args.max_ratio.as_deref().map(|text| size::count("ratio", text, 1, u64::from(u32::MAX)));
    Ok(Policy {
        format: args.format.as_deref().map(known).transpose()?,
        allowed_formats: (!allowed.is_empty()).then_some(allowed),
        max_size_bytes: max_size.transpose().map_err(Failure::new)?,
        max_ratio: max_ratio.transpose().map_err(Failure::new)?.unwrap_or(DEFAULT_RATIO),
        force_share: args.share.force_share,
    })
}

/// What stands in the report for the kind of a reference.
fn kind(kind: &ReferenceKind) -> &'static str {
    match kind {
        ReferenceKind::Backing { .. } => "backing",
        ReferenceKind::DataFile => "data-file",
        ReferenceKind::Extent { .. } => "extent",
    }
}

/// `text` with nothing in it that a terminal would act upon: names are the image's own words.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

fn print_human(file: &str, verdict: &Verdict, out: &Out) {
    let line = |text: String| out.line(printable(&text));
    line(format!("image: {file}"));
    line(format!("verdict: {}", word(verdict)));
    for reason in &verdict.reasons {
        line(format!("reason: {}: {}", reason.id, reason.text));
    }
    line(format!("file format: {}", verdict.format.unwrap_or("unknown")));
    line(format!("file length: {} ({} bytes)", Human(verdict.file_bytes), verdict.file_bytes));
    if let Some(bytes) = verdict.virtual_size_bytes {
        line(format!("virtual size: {} ({bytes} bytes)", Human(bytes)));
    }
    if let Some(stored) = verdict.stored {
        let (all, compressed) = (stored.guest_bytes, stored.compressed_guest_bytes);
        line(format!("stored: {all} bytes of the disk, {compressed} of them compressed"));
    }
    line(format!("snapshots: {}", verdict.snapshots));
    line(format!("bitmaps: {}", verdict.bitmaps));
    for Judged { reference, allowed } in &verdict.references {
        let allowed = if *allowed { "allowed" } else { "refused" };
        line(format!("reference: {}: {} ({allowed}, not opened)", kind(&reference.kind), reference.name));
    }
}

fn word(verdict: &Verdict) -> &'static str {
    if verdict.accepts() { "accept" } else { "refuse" }
}

/// The same keys for every image; what is not known is null.
fn json(file: &str, verdict: &Verdict) -> Value {
    json!({
        "filename": file,
        "verdict": word(verdict),
        "reasons": verdict.reasons.iter().map(reason).collect::<Vec<_>>(),
        "format": verdict.format,
        "file-size": verdict.file_bytes,
        "virtual-size": verdict.virtual_size_bytes,
        "encryption": verdict.encryption,
        "dirty": verdict.dirty,
        "corrupt": verdict.corrupt,
        "snapshots": verdict.snapshots,
        "bitmaps": verdict.bitmaps,
        "stored-bytes": verdict.stored.map(|stored| stored.guest_bytes),
        "compressed-bytes": verdict.stored.map(|stored| stored.compressed_guest_bytes),
        "references": verdict.references.iter().map(reference).collect::<Vec<_>>(),
        "check": verdict.check.as_ref().map(|check| json!({
            "errors": check.check_errors,
            "corruptions": check.corruptions,
            "leaks": check.leaks,
        })),
    })
}

fn reason(reason: &Reason) -> Value {
    json!({
        "id": reason.id,
        "text": reason.text,
        "structure": reason.place.map(|(structure, _)| structure),
        "offset": reason.place.map(|(_, at_bytes)| at_bytes),
        "found": reason.found,
        "expected": reason.expected,
    })
}

fn reference(judged: &Judged) -> Value {
    let format = match &judged.reference.kind {
        ReferenceKind::Backing { format } => format.as_deref(),
        ReferenceKind::DataFile | ReferenceKind::Extent { .. } => None,
    };
    json!({
        "kind": kind(&judged.reference.kind),
        "name": judged.reference.name,
        "format": format,
        "allowed": judged.allowed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_an_image_do_nothing_to_a_terminal() {
        assert_eq!(printable("a\u{1b}[2J\nb"), "a\\u{1b}[2J\\nb");
    }
}
