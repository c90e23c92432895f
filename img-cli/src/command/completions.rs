//! `img completions`: completions for a shell.

use clap::ValueEnum as _;
use clap_complete::Shell;

use crate::{
    cli,
    context::Context,
    error::{Failure, Outcome},
};

/// Print completions for a shell
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// bash, elvish, fish, powershell or zsh
    #[arg(value_name = "SHELL")]
    shells: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let [shell] = args.shells.as_slice() else {
        return Err(Failure::usage("Expecting the name of a shell"));
    };
    let shell = Shell::from_str(shell, true)
        .map_err(|_| Failure::usage(format!("No completions for the shell '{shell}'")))?;
    let mut bytes = Vec::new();
    clap_complete::generate(shell, &mut cli::command(), context.name(), &mut bytes);
    context.out.bytes(&bytes);
    Ok(0)
}
