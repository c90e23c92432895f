//! The command line as clap defines it: the one source of the parser, the help, the manual pages and the
//! completions.

use clap::{CommandFactory as _, Parser, Subcommand};

use crate::{
    command::{check, compare, completions, convert, create, info, man, map, resize, snapshot},
    context::Context,
    error::Outcome,
};

/// Make, inspect, convert and check disk images
///
/// A drop-in for qemu-img: the same commands, options, output and exit codes. Called through a link named
/// qemu-img, messages carry that name.
#[derive(Debug, Parser)]
#[command(
    name = "img",
    version,
    args_override_self = true,
    disable_help_subcommand = true,
    subcommand_required = true,
    after_help = AFTER_HELP
)]
pub(crate) struct Cli {
    /// Trace events, as the reference takes them.
    #[arg(
        short = 'T',
        long,
        value_name = "TRACE",
        help = "Trace events: [[enable=]PATTERN][,events=FILE][,file=FILE]. This program has none"
    )]
    pub(crate) trace: Vec<String>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER_HELP: &str = "\
Sizes are bytes, or take a suffix: k, M, G, T, P or E (powers of 1024).

Supported image formats:

  raw qcow2";

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Check(check::Args),
    Compare(compare::Args),
    Convert(Box<convert::Args>),
    Create(create::Args),
    Info(info::Args),
    Map(map::Args),
    Resize(resize::Args),
    Snapshot(snapshot::Args),
    Completions(completions::Args),
    Man(man::Args),
}

impl Command {
    /// Runs it.
    pub(crate) fn run(&self, context: &Context) -> Outcome {
        match self {
            Self::Check(args) => check::run(args, context),
            Self::Compare(args) => compare::run(args, context),
            Self::Convert(args) => convert::run(args, context),
            Self::Create(args) => create::run(args, context),
            Self::Info(args) => info::run(args, context),
            Self::Map(args) => map::run(args, context),
            Self::Resize(args) => resize::run(args, context),
            Self::Snapshot(args) => snapshot::run(args, context),
            Self::Completions(args) => completions::run(args, context),
            Self::Man(args) => man::run(args, context),
        }
    }
}

/// The reference's commands that are not here yet.
pub(crate) const MISSING_COMMANDS: &[&str] =
    &["amend", "bench", "bitmap", "commit", "dd", "measure", "rebase"];

/// clap's definition of everything, built.
pub(crate) fn command() -> clap::Command {
    let mut command = Cli::command().mut_subcommands(|command| command.args_override_self(true));
    command.build();
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definitions_are_sound() {
        Cli::command().debug_assert();
    }

    /// What the reader of the command line counts on, and what users see.
    #[test]
    fn every_option_has_a_long_name_and_a_help_text() {
        for command in command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments() {
                let name = format!("{} {}", command.get_name(), arg.get_id());
                assert!(arg.is_positional() || arg.get_long().is_some(), "{name}");
                assert!(arg.get_help().is_some(), "{name}");
            }
        }
    }
}
