//! `img amend`: other options for an image that exists.

use img_core::{
    format::{Driver, OpenMode, OptionSet},
    image::Image,
    job::amend::amend,
};

use crate::{
    args::{ChangeArgs, FileArg, Opening},
    command::create,
    context::Context,
    error::{Failure, Outcome},
    object::ObjectArgs,
    option_list,
    progress::Reporter,
};

/// Change the options of an image
///
/// Version, width of the reference counts, size: the disk reads the same before, after, and when the change is
/// interrupted. Nothing is changed when one of the options is refused.
#[derive(Debug, clap::Args)]
#[command(override_usage = "img amend [OPTIONS] -o OPTIONS FILENAME", after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    change: ChangeArgs,

    /// Allow what could lose the last key of an encrypted image; such images are refused here, others have nothing
    /// to force
    #[arg(long)]
    force: bool,

    /// The options to change: NAME=VALUE,...; "help" lists them
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    options: Vec<String>,

    #[command(flatten)]
    objects: ObjectArgs,
    #[command(flatten)]
    file: FileArg,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img amend -o compat=0.10 disk.qcow2
  img amend -p -o compat=1.1,refcount_bits=64 disk.qcow2
  img amend -f qcow2 -o help";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let list = option_list::join(&args.options)?;
    args.objects.check(context)?;
    let Some(list) = list else {
        return Err(Failure::usage("Must specify options (-o)"));
    };
    let reporter = Reporter::start(args.change.style()?, 1.0, context)?;
    let done = change(args, &list, &reporter, context);
    reporter.finish();
    done.map_err(|failure| reporter.interrupted().unwrap_or(failure))?;
    Ok(0)
}

fn change(args: &Args, list: &str, reporter: &Reporter, context: &Context) -> Result<(), Failure> {
    let asks_for_help = option_list::asks_for_help(list);
    if let Some(format) = &args.change.formats.format
        && asks_for_help
    {
        return help(create::driver(format)?, context);
    }
    let file = args.file.one().map_err(|failure| Failure { show_help_hint: false, ..failure })?;
    let cache = args.change.cache_mode()?;
    let opening = Opening { cache, ..Opening::new(file, &args.change.formats, OpenMode::Write) };
    let image = opening.open(context)?;
    let driver = image.layers()[0].driver();
    if asks_for_help {
        return help(driver, context);
    }
    let wanted = parse(driver, list)?;
    reporter.begin();
    // It is open already; what follows is told no warning twice.
    let mut first = Some(image);
    let done = amend(
        || -> Result<Image, Failure> { first.take().map_or_else(|| opening.open_quietly(context), Ok) },
        &wanted,
        reporter,
    );
    match &done {
        // The reference tells that it is at its end before it says why.
        Ok(()) | Err(Failure { code: 1, .. }) => reporter.complete(),
        Err(_) => {}
    }
    done
}

fn parse(driver: &dyn Driver, list: &str) -> Result<OptionSet, Failure> {
    let known = driver.amend_options();
    if known.is_empty() {
        let name = driver.name();
        return Err(Failure::new(format!("Format driver '{name}' does not support option amendment")));
    }
    option_list::parse(list, known).map_err(|why| {
        // The whole list would do for a new image.
        let hint = if option_list::parse(list, driver.create_options()).is_ok() {
            "\nThis option is only supported for image creation"
        } else {
            ""
        };
        Failure::new(format!("{why}{hint}"))
    })
}

/// Prints what can be changed.
fn help(driver: &dyn Driver, context: &Context) -> Result<(), Failure> {
    if driver.amend_options().is_empty() {
        let name = driver.name();
        return Err(Failure::new(format!("Format driver '{name}' does not support option amendment")));
    }
    context.out.line(format_args!("Amend options for '{}':", driver.name()));
    option_list::print_descriptions(driver.amend_options(), context);
    Ok(())
}
