//! `img man`: manual pages, one for the program and one for each command.

use clap::ValueHint;

use crate::{
    cli,
    context::Context,
    error::{Failure, Outcome, os_text},
};

/// Write the manual pages into a directory
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory, which must exist
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    directories: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &Args, _context: &Context) -> Outcome {
    let [directory] = args.directories.as_slice() else {
        return Err(Failure::usage("Expecting one directory"));
    };
    clap_mangen::generate_to(cli::command(), directory).map_err(|error| {
        Failure::new(format!("Could not write manual pages into '{directory}': {}", os_text(&error)))
    })?;
    Ok(0)
}
