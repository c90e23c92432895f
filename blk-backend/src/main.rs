//! `blk-backend`: serves disk images to virtual machines and network clients.

mod command;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

use clap::{Parser, Subcommand};

/// Serve disk images to virtual machines and network clients
#[derive(Debug, Parser)]
#[command(name = "blk-backend", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Bench(command::bench::Args),
    Host(command::host::Args),
    Nbd(Box<command::nbd::Args>),
    VhostUser(Box<command::vhost_user::Args>),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = io::stdout().lock();
    let result = match &cli.command {
        Command::Bench(args) => command::bench::run(args, &mut out),
        Command::Host(args) => command::host::run(args, &mut out),
        Command::Nbd(args) => command::nbd::run(args, &mut out),
        Command::VhostUser(args) => command::vhost_user::run(args, &mut out),
    };
    // What daemons say has been said, or could not be, long ago.
    let has_results = matches!(cli.command, Command::Bench(_) | Command::Host(_));
    let flushed = if has_results { out.flush() } else { Ok(()) };
    match result.and_then(|code| flushed.map(|()| code).map_err(command::Failure::from)) {
        Ok(code) => code,
        Err(failure) => failure.tell(&mut io::stderr().lock()),
    }
}
