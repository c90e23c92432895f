//! `img bitmap`: the persistent dirty bitmaps of an image.

use clap::{ArgMatches, FromArgMatches, ValueHint};
use img_core::{
    format::OpenMode,
    job::bitmaps::{Change, change},
};

use crate::{
    args::{FormatArgs, Opening},
    context::Context,
    error::{Failure, Outcome, words},
    object::ObjectArgs,
    size,
};

/// Add, remove, clear, enable, disable and merge the dirty bitmaps of an image
///
/// Several actions are done in the order given, each for itself: when one fails, those before it stay done.
#[derive(Debug, clap::Args)]
#[command(override_usage = "img bitmap ACTION... [OPTIONS] FILENAME BITMAP", after_help = EXAMPLES)]
pub(crate) struct Options {
    #[command(flatten)]
    formats: FormatArgs,

    /// Make BITMAP, which notes changes from then on
    #[arg(long, num_args = 0, default_missing_value = "")]
    add: Vec<String>,

    /// How many bytes of the disk a bit of the new bitmap stands for
    #[arg(short = 'g', long, value_name = "BYTES")]
    granularity: Option<String>,

    /// Take BITMAP out of the image
    #[arg(long, num_args = 0, default_missing_value = "")]
    remove: Vec<String>,

    /// Forget what BITMAP has noted
    #[arg(long, num_args = 0, default_missing_value = "")]
    clear: Vec<String>,

    /// Note changes in BITMAP from now on
    #[arg(long, num_args = 0, default_missing_value = "")]
    enable: Vec<String>,

    /// Note no changes in BITMAP any more
    #[arg(long, num_args = 0, default_missing_value = "")]
    disable: Vec<String>,

    /// Add what the bitmap SOURCE has noted to BITMAP
    #[arg(long, value_name = "SOURCE")]
    merge: Vec<String>,

    /// The image that has the bitmaps to merge, if it is another one
    #[arg(short = 'b', long, value_name = "SRC_FILENAME", value_hint = ValueHint::FilePath)]
    source_file: Option<String>,

    /// The format of that image
    #[arg(short = 'F', long, value_name = "SRC_FMT")]
    source_format: Option<String>,

    #[command(flatten)]
    objects: ObjectArgs,

    /// The image, and the name of the bitmap
    #[arg(value_name = "FILENAME BITMAP", value_hint = ValueHint::FilePath)]
    operands: Vec<String>,
}

/// The options, and the actions among them in the order given, which clap keeps apart from the options.
#[derive(Debug)]
pub(crate) struct Args {
    options: Options,
    actions: Vec<Action>,
}

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge(String),
}

impl Action {
    /// As the reference calls it when it fails.
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

impl clap::Args for Args {
    fn augment_args(command: clap::Command) -> clap::Command {
        Options::augment_args(command)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Options::augment_args_for_update(command)
    }
}

impl FromArgMatches for Args {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let options = Options::from_arg_matches(matches)?;
        let mut actions = Vec::new();
        for action in [Action::Add, Action::Remove, Action::Clear, Action::Enable, Action::Disable] {
            let places = matches.indices_of(action.name()).into_iter().flatten();
            actions.extend(places.map(|at| (at, action.clone())));
        }
        let places = matches.indices_of("merge").into_iter().flatten();
        actions.extend(places.zip(&options.merge).map(|(at, source)| (at, Action::Merge(source.clone()))));
        actions.sort_by_key(|(at, _)| *at);
        Ok(Self { options, actions: actions.into_iter().map(|(_, action)| action).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img bitmap --add disk.qcow2 since-monday
  img bitmap --merge since-monday -b disk.qcow2 -F qcow2 --enable copy.qcow2 all";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let Args { options, actions } = args;
    let granularity_bytes = match &options.granularity {
        Some(text) => Some(size::argument("granularity", text, size::MAX_BYTES).map_err(Failure::new)?),
        None => None,
    };
    options.objects.check(context)?;
    if actions.is_empty() {
        return Err(Failure::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    if granularity_bytes.is_some() && !actions.contains(&Action::Add) {
        return Err(Failure::new("granularity only supported with --add"));
    }
    if options.source_format.is_some() && options.source_file.is_none() {
        return Err(Failure::new("-F only supported with -b"));
    }
    if options.source_file.is_some() && options.merge.is_empty() {
        return Err(Failure::new("Merge bitmap source file only supported with --merge"));
    }
    let [file, name] = options.operands.as_slice() else {
        return Err(Failure::new("Expecting filename and bitmap name"));
    };
    let image =
        Opening { backing: false, ..Opening::new(file, &options.formats, OpenMode::Write) }.open(context)?;
    let other = match &options.source_file {
        Some(source) => {
            let formats = FormatArgs { format: options.source_format.clone(), image_opts: false };
            Some(Opening { backing: false, ..Opening::new(source, &formats, OpenMode::Read) }.open(context)?)
        }
        None => None,
    };
    let done = actions.iter().try_for_each(|action| {
        let wanted = match action {
            // No size at all is no wish.
            Action::Add => Change::Add { granularity_bytes: granularity_bytes.filter(|bytes| *bytes > 0) },
            Action::Remove => Change::Remove,
            Action::Clear => Change::Clear,
            Action::Enable => Change::Enable,
            Action::Disable => Change::Disable,
            Action::Merge(source) => Change::Merge { source, from: other.as_ref().unwrap_or(&image) },
        };
        change(&image, name, wanted).map_err(|error| {
            let why = words(&error);
            Failure::new(format!("Operation {} on bitmap {name} failed: {why}", action.name()))
        })
    });
    let closed = image.close();
    done?;
    closed?;
    Ok(0)
}
