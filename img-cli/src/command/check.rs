//! `img check`: audit an image, and repair it.

use img_core::{
    Error,
    format::{CheckReport, Finding, OpenMode, Repair},
    image::Image,
    job::{Progress, check::check},
};
use serde_json::{Map, Value};

use crate::{
    args::{FileArg, FormatArgs, Layout, Opening, OutputArgs, OwnProgressArgs, ShareArgs, source_cache},
    context::Context,
    error::{Failure, Outcome, reason},
    object::ObjectArgs,
    output::{Out, complain},
    progress::told,
    qdict,
};

/// The exit code for formats that cannot be checked.
const NOT_SUPPORTED: u8 = 63;

/// Check an image for errors, and repair them
///
/// Exit codes: 0 no errors (left), 1 the check could not be made, 2 errors, 3 leaked clusters only,
/// 63 images of this format cannot be checked.
#[derive(Debug, clap::Args)]
#[command(override_usage = "img check [OPTIONS] FILENAME", after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Print nothing but what is wrong
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    formats: FormatArgs,

    /// Cache mode: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 'T', long, value_name = "CACHE_MODE")]
    cache: Option<String>,

    /// What to repair: leaks, or all
    #[arg(short = 'r', long, value_name = "WHAT")]
    repair: Option<String>,

    #[command(flatten)]
    progress: OwnProgressArgs,
    #[command(flatten)]
    share: ShareArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    objects: ObjectArgs,
    #[command(flatten)]
    file: FileArg,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img check disk.qcow2
  img check -r leaks disk.qcow2";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let repair = match args.repair.as_deref() {
        None => Repair::Nothing,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            return Err(Failure::usage(format!("--repair (-r) expects 'leaks' or 'all' not '{other}'")));
        }
    };
    let layout = args.output.layout()?;
    args.objects.check(context)?;
    let file = args.file.one()?;
    let repairs = repair != Repair::Nothing;
    let opening = Opening {
        cache: source_cache(args.cache.as_deref())?,
        force_share: args.share.force_share,
        ..Opening::new(file, &args.formats, OpenMode::Check { repair: repairs })
    };
    let image = opening.open(context)?;
    let driver = image.layers()[0].driver();
    let beyond = driver.beyond_reference();
    let is_beyond = beyond.check || repairs && beyond.repair;
    if !driver.can_check() || context.is_reference() && is_beyond {
        return Err(Failure::new("This image format does not support checks").with_code(NOT_SUPPORTED));
    }
    let reporter = args.progress.reporter(args.quiet, context)?;
    let audit = |repair| told(reporter.as_ref(), |progress| audit(&image, repair, progress, context));
    let report = audit(repair)?;
    let report = if report.corruptions_fixed > 0 || report.leaks_fixed > 0 {
        if layout == Layout::Human && !args.quiet {
            print_repaired(&report, &context.out);
        }
        let second = audit(Repair::Nothing)?;
        CheckReport { corruptions_fixed: report.corruptions_fixed, leaks_fixed: report.leaks_fixed, ..second }
    } else {
        report
    };
    if !args.quiet {
        match layout {
            Layout::Human => print_human(&report, &context.out),
            Layout::Json => {
                let format = image.layers()[0].driver().name();
                context.out.line(qdict::pretty(&json(&report, file, format)));
            }
        }
    }
    if repairs {
        image.close().map_err(|error| failed(&error).with_place(&error, context))?;
    }
    match report {
        CheckReport { check_errors: 1.., .. } => Err(Failure::new("Check failed")),
        CheckReport { corruptions: 1.., .. } => Ok(2),
        CheckReport { leaks: 1.., .. } => Ok(3),
        _ => Ok(0),
    }
}

/// One pass. Each finding is told as it is met.
fn audit(
    image: &Image,
    repair: Repair,
    progress: &dyn Progress,
    context: &Context,
) -> Result<CheckReport, Failure> {
    let mut tell = |finding: Finding| {
        if finding.with_program_name {
            context.error(&finding.text);
        } else {
            complain(finding.text);
        }
    };
    check(image, repair, &mut tell, progress).map_err(|error| match &error {
        // A format that can be checked and not repaired.
        Error::Unsupported { .. } if context.is_reference() => {
            Failure::new("This image format does not support checks").with_code(NOT_SUPPORTED)
        }
        Error::Unsupported { .. } => failed(&error).with_code(NOT_SUPPORTED),
        _ => failed(&error).with_place(&error, context),
    })
}

fn failed(error: &Error) -> Failure {
    Failure::new(format!("Check failed: {}", reason(error)))
}

fn print_repaired(report: &CheckReport, out: &Out) {
    out.print(format_args!(
        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
         Double checking the fixed image now...\n",
        report.leaks_fixed, report.corruptions_fixed
    ));
}

#[expect(clippy::cast_precision_loss, reason = "two decimals of a percentage are shown")]
fn print_human(report: &CheckReport, out: &Out) {
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        out.line("No errors were found on the image.");
    }
    if report.corruptions > 0 {
        out.print(format_args!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n",
            report.corruptions
        ));
    }
    if report.leaks > 0 {
        out.print(format_args!(
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n",
            report.leaks
        ));
    }
    if report.check_errors > 0 {
        out.print(format_args!(
            "\n{} internal errors have occurred during the check.\n",
            report.check_errors
        ));
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        out.line(format_args!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            percent(report.allocated_clusters, report.total_clusters),
            percent(report.fragmented_clusters, report.allocated_clusters),
            percent(report.compressed_clusters, report.allocated_clusters),
        ));
    }
    if report.image_end_offset > 0 {
        out.line(format_args!("Image end offset: {}", report.image_end_offset));
    }
}

/// The report as an object; what is zero is left out, except for the errors of the check itself.
fn json(report: &CheckReport, file: &str, format: &str) -> Value {
    let mut object = Map::new();
    object.insert("filename".to_owned(), file.into());
    object.insert("format".to_owned(), format.into());
    object.insert("check-errors".to_owned(), report.check_errors.into());
    for (key, number) in [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", report.corruptions_fixed),
        ("leaks-fixed", report.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if number > 0 {
            object.insert(key.to_owned(), number.into());
        }
    }
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_reads_as_the_reference_writes_it() {
        let out = Out::memory();
        let report = CheckReport {
            leaks: 2,
            total_clusters: 1024,
            allocated_clusters: 16,
            image_end_offset: 1_900_544,
            ..CheckReport::default()
        };
        print_human(&report, &out);
        assert_eq!(
            out.text(),
            "\n2 leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n\
             16/1024 = 1.56% allocated, 0.00% fragmented, 0.00% compressed clusters\n\
             Image end offset: 1900544\n"
        );
        let text = qdict::pretty(&json(&report, "a", "qcow2"));
        assert!(
            text.starts_with("{\n    \"image-end-offset\": 1900544,\n    \"total-clusters\": 1024,"),
            "{text}"
        );
    }
}
