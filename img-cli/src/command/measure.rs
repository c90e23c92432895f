//! `img measure`: how large a new image would be.

use clap::ValueHint;
use img_core::{
    format::{BitmapInfo, Driver, Measured, OpenMode, OptionSet},
    image::Image,
    job::measure::{Subject, measure},
};
use serde_json::{Map, Value};

use crate::{
    args::{FormatArgs, Layout, Opening, OutputArgs, OwnProgressArgs, ShareArgs},
    command::create,
    context::Context,
    error::{Failure, Outcome},
    object::ObjectArgs,
    option_list,
    progress::told,
    qdict, size,
    snapshot_param::{self, Wanted},
};

/// Tell how large a new image would be
#[derive(Debug, clap::Args)]
#[command(override_usage = "img measure [OPTIONS] (--size SIZE | FILENAME)", after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The format of the new image
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw")]
    target_format: String,

    /// Options of that format: NAME=VALUE,...
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Measure an empty disk of that size
    #[arg(short, long, value_name = "SIZE")]
    size: Option<String>,

    #[command(flatten)]
    formats: FormatArgs,

    /// Measure this snapshot of FILENAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT_PARAM")]
    snapshot: Option<String>,

    #[command(flatten)]
    progress: OwnProgressArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    share: ShareArgs,
    #[command(flatten)]
    objects: ObjectArgs,

    /// Measure a copy of this image
    #[arg(value_name = "FILENAME", value_hint = ValueHint::FilePath)]
    files: Vec<String>,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img measure -O qcow2 --size 20G
  img measure -O qcow2 -o cluster_size=4k --output=json disk.raw";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let list = option_list::join(&args.options)?;
    let snapshot = args.snapshot.as_deref().map(|text| snapshot_param::parse(text, context)).transpose()?;
    let layout = args.output.layout()?;
    let size_bytes = match &args.size {
        Some(text) => Some(size::argument("image size", text, size::MAX_BYTES).map_err(Failure::new)?),
        None => None,
    };
    args.objects.check(context)?;
    let file = match args.files.as_slice() {
        [] => None,
        [file] => Some(file.as_str()),
        _ => return Err(Failure::new("At most one filename argument is allowed.")),
    };
    let is_about_a_file = args.formats.image_opts || args.formats.format.is_some() || snapshot.is_some();
    if file.is_none() && is_about_a_file {
        return Err(Failure::new("--image-opts, -f, and -l require a filename argument."));
    }
    match (file, size_bytes) {
        (None, None) => {
            return Err(Failure::new("Either --size N or one filename must be specified."));
        }
        (Some(_), Some(_)) => {
            return Err(Failure::new("--size N cannot be used together with a filename."));
        }
        _ => {}
    }
    let source = file.map(|file| open_source(args, file, snapshot.as_ref(), context)).transpose()?;
    let driver = create::driver(&args.target_format)?;
    let mut options = options(driver, list.as_deref(), context)?;
    options.take("size");
    options.take("backing_fmt");
    let has_backing = options.take("backing_file").is_some();
    let subject = match &source {
        Some((image, bitmaps)) => Subject::Copy(image, bitmaps.as_deref()),
        None => Subject::Size(size_bytes.unwrap_or_default()),
    };
    let reporter = args.progress.reporter(false, context)?;
    let measured = told(reporter.as_ref(), |progress| {
        measure(driver, &options, has_backing, subject, progress).map_err(Failure::from)
    })?;
    print(&measured, layout, context);
    Ok(0)
}

/// The disk that is to be copied, and the bitmaps of its image, where the format can keep some.
fn open_source(
    args: &Args,
    file: &str,
    snapshot: Option<&Wanted>,
    context: &Context,
) -> Result<(Image, Option<Vec<BitmapInfo>>), Failure> {
    let opening =
        Opening { force_share: args.share.force_share, ..Opening::new(file, &args.formats, OpenMode::Read) };
    let image = opening.open(context)?;
    let bitmaps = image.layers()[0].bitmaps().map(|bitmaps| bitmaps.list()).transpose()?;
    let image = match snapshot {
        Some(wanted) => opening.at_snapshot(image, wanted, context)?,
        None => image,
    };
    Ok((image, bitmaps))
}

fn options(driver: &dyn Driver, list: Option<&str>, context: &Context) -> Result<OptionSet, Failure> {
    let Some(list) = list else { return Ok(OptionSet::new()) };
    option_list::parse(list, &option_list::descriptions(driver, true, context)).map_err(|text| {
        context.error(&text);
        Failure::new(format!("Invalid options for file format '{}'", driver.name()))
    })
}

fn print(measured: &Measured, layout: Layout, context: &Context) {
    let lines = [
        ("required", "required", Some(measured.required_bytes)),
        ("fully-allocated", "fully allocated", Some(measured.fully_allocated_bytes)),
        ("bitmaps", "bitmaps", measured.bitmaps_bytes),
    ];
    let known = lines.into_iter().filter_map(|(key, name, bytes)| Some((key, name, bytes?)));
    match layout {
        Layout::Human => {
            for (_, name, bytes) in known {
                context.out.line(format_args!("{name} size: {bytes}"));
            }
        }
        Layout::Json => {
            let object: Map<String, Value> =
                known.map(|(key, _, bytes)| (key.to_owned(), bytes.into())).collect();
            context.out.line(qdict::pretty(&Value::Object(object)));
        }
    }
}
