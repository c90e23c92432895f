//! `blk-backend host`: what this host lets the data plane use.

use std::{io::Write, process::ExitCode};

use blk_backend::engine;

use super::Failure;

/// Show what this host lets the data plane use
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

pub(crate) fn run(Args {}: &Args, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    match engine::ring_support() {
        Ok(()) => writeln!(out, "io_uring: yes")?,
        Err(why) => writeln!(out, "io_uring: no ({why}); threads take over")?,
    }
    Ok(ExitCode::SUCCESS)
}
