//! What both benchmarks share: what they print, how they end, and who comes first.

use std::{io, process::ExitCode};

use clap::Parser;

/// Tells the person at the terminal how far it is.
#[expect(clippy::print_stderr, reason = "progress of a program for the terminal")]
pub fn say(text: &str) {
    eprintln!("{text}");
}

/// Prints a line of the result.
#[expect(clippy::print_stdout, reason = "the tables are the program's output")]
pub fn print(text: &str) {
    println!("{text}");
}

/// The whole of a program: reads the command line, runs, and says under the program's name why it failed.
pub fn program<Arguments: Parser>(run: impl FnOnce(&Arguments) -> io::Result<()>) -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("{}: {error}", Arguments::command().get_bin_name().unwrap_or_default()));
            ExitCode::FAILURE
        }
    }
}

/// The two sides of a pair in the order of run number `run`: by turns, and by turns first, as who comes second finds
/// memory that the other has just given back.
pub fn by_turns<Side>(run: u32, one: Side, other: Side) -> [Side; 2] {
    if run.is_multiple_of(2) { [one, other] } else { [other, one] }
}
