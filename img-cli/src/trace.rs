//! `-T`: accepted as the reference accepts it. There are no trace events here, so naming one is answered as
//! naming an unknown one is there.

use std::fs;

use img_core::text;

use crate::{
    context::Context,
    error::{Failure, os_text},
    output::complain,
};

/// Takes one `-T` value.
///
/// # Errors
/// When it names a list of events that cannot be read.
pub(crate) fn accept(trace: &str, context: &Context) -> Result<(), Failure> {
    for (index, part) in trace.split(',').enumerate() {
        match part.split_once('=') {
            Some(("events", file)) => {
                let list = fs::read_to_string(text::to_path(file)).map_err(|error| {
                    // The reference puts no space between its name and the file's.
                    complain(format_args!("{}:{file}: {}", context.name(), os_text(&error)));
                    Failure::silent(1)
                })?;
                let lines = list.lines().map(str::trim);
                lines.filter(|line| !line.is_empty() && !line.starts_with('#')).for_each(|line| {
                    unknown(line, context);
                });
            }
            Some(("enable", pattern)) => unknown(pattern, context),
            Some(("file", file)) => {
                // There is nothing to trace, so the file stays empty, as the reference leaves it then.
                fs::File::create(text::to_path(file))
                    .map_err(|error| Failure::new(format!("could not open '{file}': {}", os_text(&error))))?;
            }
            Some((name, _)) => return Err(Failure::new(format!("Invalid parameter '{name}'"))),
            // The list of all events, and there are none.
            None if index == 0 && matches!(part, "help" | "?") => {}
            None if index == 0 => unknown(part, context),
            None => return Err(Failure::new(format!("Invalid parameter '{part}'"))),
        }
    }
    Ok(())
}

fn unknown(pattern: &str, context: &Context) {
    let name = pattern.strip_prefix('-').unwrap_or(pattern);
    if !name.is_empty() && !name.contains('*') {
        context.warning(&format!("trace event '{name}' does not exist"));
    }
}
