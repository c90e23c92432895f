//! `-o` lists: `name=value,name,…` with `,,` for a comma, checked against a format's descriptions.

use img_core::format::{Driver, FILE_OPTIONS, OptionDescription, OptionKind, OptionSet, split_list};

use crate::{context::Context, error::Failure};

/// Joins the lists of several `-o`.
///
/// # Errors
/// When one of them is empty, or starts or ends with a comma.
pub(crate) fn join(lists: &[String]) -> Result<Option<String>, Failure> {
    for list in lists {
        if !is_well_formed(list) {
            return Err(Failure::new(format!("Invalid option list: {list}")));
        }
    }
    Ok((!lists.is_empty()).then(|| lists.join(",")))
}

fn is_well_formed(list: &str) -> bool {
    let parts = split_list(list);
    parts.iter().all(|part| !part.is_empty() && !part.starts_with(','))
}

/// Whether the list asks for help rather than naming options.
pub(crate) fn asks_for_help(list: &str) -> bool {
    split_list(list).iter().any(|part| part == "help" || part == "?")
}

/// The options that a new image of a format may have: its own, and with `on_file` those of its host file.
/// Whoever stands in for the reference has none but its options.
pub(crate) fn descriptions(driver: &dyn Driver, on_file: bool, context: &Context) -> Vec<OptionDescription> {
    let mut all = driver.create_options().to_vec();
    all.retain(|option| !(option.is_beyond_reference && context.is_reference()));
    if on_file {
        for option in FILE_OPTIONS {
            if all.iter().all(|known| known.name != option.name) {
                all.push(*option);
            }
        }
    }
    all
}

/// Prints the help of `-o help`.
pub(crate) fn print_help(driver: &dyn Driver, on_file: bool, context: &Context) {
    let out = &context.out;
    let mut options = descriptions(driver, on_file, context);
    options.sort_by_key(|option| option.name);
    if on_file {
        out.line("Supported options:");
    } else {
        out.line(format_args!("Supported {} options:", driver.name()));
    }
    print_descriptions(&options, context);
    if !on_file {
        out.line("\nThe protocol level may support further options.");
        out.line("Specify the target filename to include those options.");
    }
}

/// Prints a line for each option.
pub(crate) fn print_descriptions(options: &[OptionDescription], context: &Context) {
    for option in options {
        let kind = match option.kind {
            OptionKind::Text => "str",
            OptionKind::Size => "size",
            OptionKind::Number => "num",
            OptionKind::Switch => "bool (on/off)",
        };
        let name = format!("{}=<{kind}>", option.name);
        context.out.line(format_args!("  {name:<22} - {}", option.help));
    }
}

/// Reads a list by `known`. Sizes and numbers come out in plain decimal.
///
/// # Errors
/// For the first option that is unknown or has a wrong value, in the reference's words.
pub(crate) fn parse(list: &str, known: &[OptionDescription]) -> Result<OptionSet, String> {
    let mut options = OptionSet::new();
    for part in split_list(list) {
        let (name, value) = match part.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            // Without a value there is nothing to escape a comma in: the name ends there.
            None => bare(part.split(',').next().unwrap_or_default(), known),
        };
        let option = known
            .iter()
            .find(|option| option.name == name)
            .ok_or_else(|| format!("Invalid parameter '{name}'"))?;
        options.set(name, checked(option, &value)?);
    }
    Ok(options)
}

/// An option without a value is switched on, or off when `no` stands before its name.
fn bare(part: &str, known: &[OptionDescription]) -> (String, String) {
    match part.strip_prefix("no") {
        Some(name) if known.iter().all(|option| option.name != part) => (name.to_owned(), "off".to_owned()),
        _ => (part.to_owned(), "on".to_owned()),
    }
}

fn checked(option: &OptionDescription, value: &str) -> Result<String, String> {
    let name = option.name;
    match option.kind {
        OptionKind::Text => Ok(value.to_owned()),
        OptionKind::Switch => match value {
            "on" | "yes" | "true" | "y" | "off" | "no" | "false" | "n" => Ok(value.to_owned()),
            _ => Err(format!("Parameter '{name}' expects 'on' or 'off'")),
        },
        // Shown as a signed number: -1 is read as 2^64 - 1.
        OptionKind::Number => {
            one(name, value, OptionSet::number).map(|number| number.cast_signed().to_string())
        }
        OptionKind::Size => size(name, value).map(|bytes| bytes.to_string()),
    }
}

/// The size that `value` says for the option `name`.
///
/// # Errors
/// When it is none, in the reference's words.
pub(crate) fn size(name: &str, value: &str) -> Result<u64, String> {
    one(name, value, OptionSet::size)
}

/// Reads the value of one option as the library does.
fn one(
    name: &str,
    value: &str,
    read: impl Fn(&OptionSet, &str) -> img_core::Result<Option<u64>>,
) -> Result<u64, String> {
    let mut set = OptionSet::new();
    set.set(name, value);
    read(&set, name).map(Option::unwrap_or_default).map_err(|error| error.to_string())
}

/// The options as `create` announces them: ` name=value` each, defaults included, in the order of `known`.
pub(crate) fn announce(options: &OptionSet, known: &[OptionDescription]) -> String {
    let mut text = String::new();
    for option in known {
        if let Some(value) = options.get(option.name).or(option.default) {
            text.push(' ');
            text.push_str(option.name);
            text.push('=');
            match option.kind {
                OptionKind::Text => text.push_str(&value.replace(',', ",,")),
                // Signed, as the reference shows them.
                OptionKind::Size => match value.parse::<u64>() {
                    Ok(bytes) => text.push_str(&bytes.cast_signed().to_string()),
                    Err(_) => text.push_str(value),
                },
                OptionKind::Number | OptionKind::Switch => text.push_str(value),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[OptionDescription] = &[
        OptionDescription::new("size", OptionKind::Size, ""),
        OptionDescription::new("name", OptionKind::Text, ""),
        OptionDescription::new("lazy", OptionKind::Switch, "").or("off"),
        OptionDescription::new("bits", OptionKind::Number, "").or("16"),
    ];

    #[test]
    fn lists_are_joined_and_split() {
        let join = |lists: &[&str]| {
            join(&lists.iter().map(|list| (*list).to_owned()).collect::<Vec<_>>()).map_err(|e| e.text)
        };
        assert_eq!(join(&["a=1", "b"]), Ok(Some("a=1,b".into())));
        assert_eq!(join(&[]), Ok(None));
        for bad in ["", ",", "a=b,", ",a", ",,a"] {
            assert_eq!(join(&[bad]), Err(format!("Invalid option list: {bad}")));
        }
        assert_eq!(split_list("a,,b,c"), ["a,b", "c"]);
        assert!(asks_for_help("a=1,help") && asks_for_help("?") && !asks_for_help("help=1"));
    }

    #[test]
    fn values_are_checked_and_announced() {
        let options = parse("lazy,name=a,,b,size=1k,bits=0x10", KNOWN).unwrap();
        assert_eq!(announce(&options, KNOWN), " size=1024 name=a,,b lazy=on bits=16");
        assert_eq!(announce(&parse("nolazy", KNOWN).unwrap(), KNOWN), " lazy=off bits=16");
        assert_eq!(announce(&parse("bits=-1", KNOWN).unwrap(), KNOWN), " lazy=off bits=-1");
        for (list, error) in [
            ("foo", "Invalid parameter 'foo'"),
            ("lazy=maybe", "Parameter 'lazy' expects 'on' or 'off'"),
            ("bits=16k", "Parameter 'bits' expects a number"),
            ("size=16E", "Value '16E' is out of range for parameter 'size'"),
        ] {
            assert_eq!(parse(list, KNOWN).unwrap_err(), error);
        }
    }
}
