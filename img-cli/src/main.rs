//! `img`: make, inspect, convert and check disk images.
//!
//! The way of a command line: [`getopt`] brings it into a plain form, [`cli`] (clap's definitions) gives it
//! types, one file in [`command`] runs it. [`context`] and [`output`] carry what is printed, [`error`] how
//! it fails.

mod args;
mod cli;
mod command;
mod context;
mod created;
mod error;
mod getopt;
mod limits;
mod names;
mod object;
mod option_list;
mod output;
mod picture;
mod progress;
mod qdict;
mod size;
mod snapshot_param;
mod snapshot_table;
mod trace;

use std::{env, process::ExitCode};

use img_core::text;

use crate::{cli::Command, context::Context, error::Failure, output::Out, output::complain};

#[global_allocator]
static ALLOCATOR: limits::Bounded = limits::Bounded;

fn main() -> ExitCode {
    let mut words: Vec<String> = env::args_os().map(|word| text::from_os(&word)).collect();
    let called_as = if words.is_empty() { "img".to_owned() } else { words.remove(0) };
    let out = match Out::stdout() {
        Ok(out) => out,
        Err(error) => {
            complain(format_args!("{called_as}: standard output: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let context = Context::new(called_as, out);
    let code = run(&words, &context);
    if let Err(error) = context.out.finish() {
        context.error(&format!("could not write the output: {}", error::os_text(&error)));
        return ExitCode::FAILURE;
    }
    ExitCode::from(code)
}

/// Runs the command line, tells why it failed, and returns the exit code.
fn run(words: &[String], context: &Context) -> u8 {
    let head = match getopt::read(&cli::head(), words, true) {
        Ok(head) => head,
        Err(text) => {
            context.report_usage(None, &text);
            return 1;
        }
    };
    if head.options.iter().any(|option| option == "--version") {
        context.out.print(version(context));
        return 0;
    }
    if head.help {
        context.out.print(cli::command().render_long_help());
        return 0;
    }
    let traces = head.options.iter().filter_map(|option| option.strip_prefix("--trace="));
    for trace in traces {
        if let Err(failure) = trace::accept(trace, context) {
            context.report(None, &failure);
            return failure.code;
        }
    }
    let Some((name, words)) = head.operands.split_first() else {
        context.report(None, &Failure::usage("Not enough arguments"));
        return 1;
    };
    let Some(command) = Command::find(name) else {
        context.report(None, &Failure::usage(format!("Command not found: {name}")));
        return 1;
    };
    let mut definition = command.built();
    let plain = match getopt::read(&definition, words, false) {
        Ok(plain) => plain,
        Err(text) => {
            context.report_usage(Some(name), &text);
            return 1;
        }
    };
    if plain.help {
        context.out.print(definition.render_long_help());
        return 0;
    }
    let words = plain.options.into_iter().chain(["--".to_owned()]).chain(plain.operands);
    match command.run(definition, words, context) {
        Ok(code) => code,
        Err(failure) => {
            context.report(Some(name), &failure);
            failure.code
        }
    }
}

/// What `--version` prints. Scripts look for the reference's number behind its name.
fn version(context: &Context) -> String {
    let own = env!("CARGO_PKG_VERSION");
    if context.is_reference() {
        format!("qemu-img version 10.0.2 (img {own})\n")
    } else {
        format!("img {own} (compatible with qemu-img 10.0.2)\n")
    }
}
