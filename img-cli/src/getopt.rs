//! Reads the command line as GNU `getopt_long` does, by clap's definitions.
//!
//! Scripts rely on forms that clap reads differently: options behind file names, `-odata_file=x`,
//! unambiguous beginnings of long names, repeated options, values that start with `-`; and on the exact
//! words of refusals. This module turns what the user wrote into the one form that leaves clap no choice:
//! `--long=value` for each option in order, then `--`, then the operands. The options themselves are known
//! from the [`clap::Command`] only.

use clap::{Arg, ArgAction, Command};

/// The command line in its plain form.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plain {
    /// `--long` or `--long=value`, in the order given.
    pub(crate) options: Vec<String>,
    /// What is not an option.
    pub(crate) operands: Vec<String>,
    /// Whether `-h` or `--help` was met: it counts at once, whatever follows.
    pub(crate) help: bool,
}

/// What the options of a command take.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    Nothing,
    Value,
    /// Only when glued with `=`.
    MaybeValue,
}

fn takes(arg: &Arg) -> Takes {
    match arg.get_action() {
        ArgAction::Set | ArgAction::Append => {
            match arg.get_num_args().map(|count| (count.min_values(), count.max_values())) {
                // A switch whose every mention counts.
                Some((_, 0)) => Takes::Nothing,
                Some((0, _)) => Takes::MaybeValue,
                _ => Takes::Value,
            }
        }
        _ => Takes::Nothing,
    }
}

/// Reads `words` by the options of `command`. With `stop_at_operand` the first operand ends the options
/// and everything from it on is returned as operands.
///
/// # Errors
/// In getopt's words, without the name of the program.
pub(crate) fn read(command: &Command, words: &[String], stop_at_operand: bool) -> Result<Plain, String> {
    let mut plain = Plain::default();
    let mut words = words.iter().peekable();
    let sizes_follow = command.get_positionals().any(Arg::is_allow_negative_numbers_set);
    while let Some(word) = words.next() {
        if word == "--" {
            plain.operands.extend(words.cloned());
            break;
        }
        if let Some(long) = word.strip_prefix("--") {
            long_option(command, word, long, &mut words, &mut plain)?;
        } else if word.len() > 1 && word.starts_with('-') {
            short_options(command, &word[1..], &mut words, &mut plain)?;
        } else {
            plain.operands.push(word.clone());
            // The reference takes `-10M` directly behind the first operand for a size.
            if sizes_follow
                && plain.operands.len() == 1
                && let Some(size) = words.next_if(|word| is_negative_number(word))
            {
                plain.operands.push(size.clone());
            }
            if stop_at_operand {
                plain.operands.extend(words.cloned());
                break;
            }
        }
        if plain.help {
            break;
        }
    }
    Ok(plain)
}

fn is_negative_number(word: &str) -> bool {
    word.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn long_option<'a>(
    command: &Command,
    word: &str,
    long: &str,
    words: &mut impl Iterator<Item = &'a String>,
    plain: &mut Plain,
) -> Result<(), String> {
    let (name, glued) = match long.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (long, None),
    };
    let arg = find_long(command, word, name)?;
    let full = arg.get_long().unwrap_or_default();
    match (takes(arg), glued) {
        (Takes::Nothing, Some(_)) => Err(format!("option '--{full}' doesn't allow an argument")),
        (Takes::Value, None) => {
            let value = words.next().ok_or_else(|| format!("option '--{full}' requires an argument"))?;
            push(plain, arg, Some(value));
            Ok(())
        }
        (_, value) => {
            push(plain, arg, value);
            Ok(())
        }
    }
}

/// The option called `name`, or the only one whose name starts so. Aliases count only in full. Options that the
/// reference lacks stand under a heading of the help; they take no beginning from one that it has.
fn find_long<'a>(command: &'a Command, word: &str, name: &str) -> Result<&'a Arg, String> {
    let exact = |arg: &&Arg| {
        arg.get_long() == Some(name) || arg.get_all_aliases().is_some_and(|all| all.contains(&name))
    };
    if let Some(arg) = command.get_arguments().find(exact) {
        return Ok(arg);
    }
    let mut candidates: Vec<&Arg> = command
        .get_arguments()
        .filter(|arg| arg.get_long().is_some_and(|long| long.starts_with(name)))
        .collect();
    if candidates.iter().any(|arg| arg.get_help_heading().is_none()) {
        candidates.retain(|arg| arg.get_help_heading().is_none());
    }
    match candidates.as_slice() {
        [] => Err(format!("unrecognized option '{word}'")),
        [only] => Ok(only),
        several => {
            let names: String =
                several.iter().filter_map(|arg| arg.get_long()).map(|long| format!(" '--{long}'")).collect();
            Err(format!("option '{word}' is ambiguous; possibilities:{names}"))
        }
    }
}

fn short_options<'a>(
    command: &Command,
    letters: &str,
    words: &mut impl Iterator<Item = &'a String>,
    plain: &mut Plain,
) -> Result<(), String> {
    let mut rest = letters.chars();
    while let Some(letter) = rest.next() {
        let arg = command
            .get_arguments()
            .find(|arg| arg.get_short() == Some(letter))
            .ok_or_else(|| format!("invalid option -- '{letter}'"))?;
        if takes(arg) == Takes::Value {
            let glued = rest.as_str();
            let value = if glued.is_empty() {
                words.next().ok_or_else(|| format!("option requires an argument -- '{letter}'"))?
            } else {
                glued
            };
            push(plain, arg, Some(value));
            return Ok(());
        }
        push(plain, arg, None);
        if plain.help {
            return Ok(());
        }
    }
    Ok(())
}

fn push(plain: &mut Plain, arg: &Arg, value: Option<&str>) {
    if matches!(arg.get_action(), ArgAction::Help | ArgAction::HelpLong | ArgAction::HelpShort) {
        plain.help = true;
        return;
    }
    // Every option has a long name: the definitions' own test sees to that.
    let long = arg.get_long().unwrap_or_default();
    plain.options.push(match value {
        Some(value) => format!("--{long}={value}"),
        None => format!("--{long}"),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command() -> Command {
        let mut command = Command::new("x")
            .arg(Arg::new("format").short('f').long("format").action(ArgAction::Set))
            .arg(Arg::new("force").short('U').long("force-share").action(ArgAction::SetTrue))
            .arg(Arg::new("progress").short('p').long("progress").num_args(0..=1).require_equals(true))
            .arg(Arg::new("forge").long("forge").num_args(1).help_heading("Beyond the reference"))
            .arg(Arg::new("name").num_args(0..));
        command.build();
        command
    }

    fn read_words(words: &[&str]) -> Result<Plain, String> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        read(&command(), &words, false)
    }

    #[test]
    fn options_are_found_anywhere_and_glued() {
        let plain = read_words(&["a", "-Ufraw", "b", "--for=-x", "--progress", "--", "-c"]);
        assert_eq!(
            plain.unwrap_err(),
            "option '--for=-x' is ambiguous; possibilities: '--format' '--force-share'"
        );
        let plain = read_words(&["a", "-Ufraw", "b", "--form", "-x", "--progress=j", "-p", "-", "--", "-c"]);
        let plain = plain.unwrap();
        assert_eq!(
            plain.options,
            ["--force-share", "--format=raw", "--format=-x", "--progress=j", "--progress"]
        );
        assert_eq!(plain.operands, ["a", "b", "-", "-c"]);
    }

    #[test]
    fn beginnings_are_the_references_own_first() {
        assert_eq!(read_words(&["--forc"]).unwrap().options, ["--force-share"]);
        assert_eq!(read_words(&["--forg", "x"]).unwrap().options, ["--forge=x"]);
    }

    #[test]
    fn refusals_are_in_the_words_of_getopt() {
        for (words, text) in [
            (&["-Z"][..], "invalid option -- 'Z'"),
            (&["-f"], "option requires an argument -- 'f'"),
            (&["--format"], "option '--format' requires an argument"),
            (&["--force-share=1"], "option '--force-share' doesn't allow an argument"),
            (&["--bogus=1"], "unrecognized option '--bogus=1'"),
        ] {
            assert_eq!(read_words(words).unwrap_err(), text);
        }
    }

    #[test]
    fn help_counts_at_once() {
        assert!(read_words(&["-U", "--help", "-Z"]).unwrap().help);
        assert!(read_words(&["-Uh"]).unwrap().help);
    }
}
