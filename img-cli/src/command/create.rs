//! `img create`: a new image.

use std::{path::PathBuf, sync::Arc};

use clap::ValueHint;
use img_core::{
    Error,
    format::{Backing, Driver, OpenMode, OptionDescription, OptionSet, registry},
    image::ImageName,
    job::create::{CreateImage, create_watched},
    storage::Watcher,
    text,
};

use crate::{
    args::{Opening, OwnProgressArgs},
    context::Context,
    error::{Failure, Outcome, os_text},
    names,
    object::ObjectArgs,
    option_list,
    progress::told,
    size,
};

/// Make a new image
#[derive(Debug, clap::Args)]
#[command(override_usage = "img create [OPTIONS] FILENAME [SIZE]", after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    progress: OwnProgressArgs,

    #[command(flatten)]
    objects: ObjectArgs,

    /// The format of the new image
    #[arg(short = 'f', long, value_name = "FMT", default_value = "raw")]
    format: String,

    /// Options of the format: NAME=VALUE,...; "help" lists them
    #[arg(short = 'o', long, value_name = "FMT_OPTS")]
    options: Vec<String>,

    /// Record this image as the one below: what the new one does not hold is read from there
    #[arg(short = 'b', long, value_name = "BACKING_FILENAME", value_hint = ValueHint::FilePath)]
    backing: Option<String>,

    /// The format of the image below
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,

    /// Do not open the image below; SIZE is needed then
    #[arg(short = 'u', long)]
    backing_unsafe: bool,

    /// The new image. An existing file is overwritten
    #[arg(value_name = "FILENAME", value_hint = ValueHint::FilePath)]
    operands: Vec<String>,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img create -f qcow2 disk.qcow2 20G
  img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  img create -f qcow2 -o help disk.qcow2";

/// Runs the command. Operands: `FILENAME [SIZE]`.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    args.objects.check(context)?;
    let list = option_list::join(&args.options)?;
    let file = args.operands.first();
    if let Some(list) = &list
        && option_list::asks_for_help(list)
    {
        return help(&args.format, file.map(String::as_str), context);
    }
    let Some(file) = file else {
        return Err(Failure::usage("Expecting image file name"));
    };
    let size_bytes = match args.operands.get(1) {
        Some(text) => Some(size::argument("image size", text, size::MAX_BYTES).map_err(Failure::new)?),
        None => None,
    };
    if let Some(extra) = args.operands.get(2) {
        return Err(Failure::usage(format!("Unexpected argument: {extra}")));
    }
    create_named(args, file, list.as_deref(), size_bytes, context)
        .map_err(|failure| Failure { text: format!("{file}: {}", failure.text), ..failure })?;
    Ok(0)
}

/// Prints the options of a format, and of the file where there is one.
pub(crate) fn help(format: &str, file: Option<&str>, context: &Context) -> Outcome {
    let driver = driver(format)?;
    if let Some(file) = file {
        names::check_protocol(file).map_err(Failure::new)?;
    }
    option_list::print_help(driver, file.is_some(), context);
    Ok(0)
}

/// The format of a new image.
///
/// # Errors
/// When there is none of that name.
pub(crate) fn driver(format: &str) -> Result<&'static dyn Driver, Failure> {
    match registry::by_name(format) {
        Some(driver) if driver.can_create() => Ok(driver),
        Some(_) => Err(Failure::new(format!("Format driver '{format}' does not support image creation"))),
        None if registry::is_elsewhere(format) => Err(Failure::from(registry::unknown(format))),
        None => Err(Failure::new(format!("Unknown file format '{format}'"))),
    }
}

/// Everything behind the command line; errors are said about the file.
fn create_named(
    args: &Args,
    file: &str,
    list: Option<&str>,
    size_bytes: Option<u64>,
    context: &Context,
) -> Result<(), Failure> {
    let driver = driver(&args.format)?;
    names::check_protocol(file).map_err(Failure::new)?;
    let known = option_list::descriptions(driver, true, context);
    let mut options = match list {
        Some(list) => option_list::parse(list, &known).map_err(Failure::new)?,
        None => OptionSet::new(),
    };
    if let Some(size_bytes) = size_bytes {
        if options.get("size").is_some() {
            return Err(Failure::new("The image size must be specified only once"));
        }
        options.set("size", size_bytes.to_string());
    }
    record_backing(driver, args.backing.as_deref(), args.backing_format.as_deref(), &mut options, context)?;
    check_backing_name(file, &options)?;
    if options.get("backing_file").is_some() {
        if args.backing_unsafe {
            if options.get("backing_fmt").is_none() {
                return Err(Failure::new("Backing file specified without backing format"));
            }
        } else {
            open_backing(file, &mut options, context)?;
        }
    }
    if options.get("size").is_none() {
        return Err(Failure::new("Image creation needs a size parameter"));
    }
    if !args.quiet {
        let options = option_list::announce(&options, &known);
        context.out.line(format_args!("Formatting '{file}', fmt={}{options}", driver.name()));
        context.out.flush();
    }
    let fills = options.get("preallocation") == Some("full");
    let mut make = Make { driver, file, options, known: &known, watcher: None };
    if !fills {
        return self::make(make, context).map(|_made| ());
    }
    let reporter = args.progress.of_filling(args.quiet, context)?;
    let watcher = reporter.of_filling(size_of(&make.options)?);
    make.watcher = Some(&watcher);
    told(Some(&reporter), |_| self::make(make, context)).map(|_made| ())
}

/// Takes `-b` and `-F` into the options.
///
/// # Errors
/// When the format has no backing files.
pub(crate) fn record_backing(
    driver: &dyn Driver,
    backing: Option<&str>,
    backing_format: Option<&str>,
    options: &mut OptionSet,
    context: &Context,
) -> Result<(), Failure> {
    let has_backing = driver.has_backing() && !(context.is_reference() && driver.beyond_reference().backing);
    for (name, value, what) in
        [("backing_file", backing, "Backing file"), ("backing_fmt", backing_format, "Backing file format")]
    {
        if let Some(value) = value {
            if !has_backing {
                return Err(Failure::new(format!(
                    "{what} not supported for file format '{}'",
                    driver.name()
                )));
            }
            options.set(name, value);
        }
    }
    Ok(())
}

fn check_backing_name(file: &str, options: &OptionSet) -> Result<(), Failure> {
    match options.get("backing_file") {
        Some("") => Err(Failure::new("Expected backing file name, got empty string")),
        Some(backing) if backing == file => {
            Err(Failure::new("Error: Trying to create an image with the same filename as the backing file"))
        }
        _ => Ok(()),
    }
}

/// Opens the image below: it must be there and of the format that is recorded, and gives the new one its
/// size where none is named.
fn open_backing(file: &str, options: &mut OptionSet, context: &Context) -> Result<(), Failure> {
    let backing = options.get("backing_file").unwrap_or_default().to_owned();
    let format = options.get("backing_fmt").map(str::to_owned);
    let name = names::full_backing_name(file, &backing).map_err(Failure::new)?;
    let opening = Opening { is_reference: true, ..Opening::named(&name, format.as_deref(), OpenMode::Read) };
    let image = open_plainly(&opening, context)
        .map_err(|failure| Failure::new(format!("{}\nCould not open backing image.", failure.text)))?;
    if format.is_none() {
        let found = image.layers()[0].driver().name();
        return Err(Failure::new(format!(
            "Backing file specified without backing format\nDetected format of {found}."
        )));
    }
    if options.get("size").is_none() {
        options.set("size", image.virtual_size_bytes().to_string());
    }
    Ok(())
}

/// Opens an image; errors do not name it twice.
fn open_plainly(opening: &Opening<'_>, context: &Context) -> Result<img_core::image::Image, Failure> {
    opening.open(context).map_err(|failure| {
        let outer = format!("Could not open '{}': ", opening.name);
        let text = failure.text.strip_prefix(&outer).map_or(failure.text.clone(), str::to_owned);
        Failure { text, ..failure }
    })
}

fn size_of(options: &OptionSet) -> Result<u64, Failure> {
    let text = options.get("size").unwrap_or_default();
    text.parse().map_err(|_| Failure::new(format!("Value '{text}' is out of range for parameter 'size'")))
}

/// An image to make.
pub(crate) struct Make<'a> {
    pub(crate) driver: &'static dyn Driver,
    pub(crate) file: &'a str,
    /// `size` and backing included.
    pub(crate) options: OptionSet,
    pub(crate) known: &'a [OptionDescription],
    /// Who watches while its space is written.
    pub(crate) watcher: Option<&'a Arc<dyn Watcher>>,
}

/// Makes it. Returns the files that were not there before.
pub(crate) fn make(make: Make<'_>, context: &Context) -> Result<Vec<PathBuf>, Failure> {
    let Make { driver, file, mut options, known, watcher } = make;
    let size_bytes = size_of(&options)?;
    options.take("size");
    if size_bytes > size::MAX_BYTES {
        return Err(Failure::new("Could not resize image: Image size cannot be negative"));
    }
    let format = options.take("backing_fmt");
    if let Some(format) = &format
        && registry::by_name(format).is_none()
        && !registry::is_elsewhere(format)
    {
        return Err(Failure::new(format!("Parameter 'backing-fmt' does not accept value '{format}'")));
    }
    let backing = match options.take("backing_file") {
        Some(name) => Some(Backing { name, format }),
        None if format.is_some() => {
            return Err(Failure::new("Backing format cannot be used without backing file"));
        }
        None => None,
    };
    let name = ImageName::from_path(names::path(file));
    let request = CreateImage { name: &name, driver, virtual_size_bytes: size_bytes, backing, options };
    let made = create_watched(&request, watcher).map_err(|error| refusal(driver, known, &error))?;
    for warning in &made.warnings {
        context.warning(warning);
    }
    Ok(made.files)
}

/// Why the image was not made.
fn refusal(driver: &dyn Driver, known: &[OptionDescription], error: &Error) -> Failure {
    match error {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::FileTooLarge => {
            let hint = if known.iter().any(|option| option.name == "cluster_size") {
                " (try using a larger cluster size)"
            } else {
                ""
            };
            let format = driver.name();
            Failure::new(format!("The image size is too large for file format '{format}'{hint}"))
        }
        Error::Io { file, operation: "open", source, .. } => {
            Failure::new(format!("Could not create '{}': {}", text::from_path(file), os_text(source)))
        }
        // The caller puts the file's name in front.
        Error::Unsupported { feature, .. } => Failure::new(format!("{feature} is not supported")),
        error => Failure::from(error),
    }
}

/// The same for an image made on the way to something else.
pub(crate) fn make_for(what: &str, make: Make<'_>, context: &Context) -> Result<Vec<PathBuf>, Failure> {
    let (driver, file) = (make.driver, make.file);
    self::make(make, context).map_err(|failure| Failure {
        text: format!("{file}: error while {what} {}: {}", driver.name(), failure.text),
        ..failure
    })
}
