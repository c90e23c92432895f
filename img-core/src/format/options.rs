//! Options by name, as `-o` and option strings carry them.

use crate::{Error, Result};

/// The type of an option, as `-o help` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// `<str>`
    Text,
    /// `<size>`: bytes, with suffix.
    Size,
    /// `<num>`
    Number,
    /// `<bool (on/off)>`
    Switch,
}

/// An option of a format, described once.
#[derive(Clone, Copy, Debug)]
pub struct OptionDescription {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub kind: OptionKind,
    /// One line of help.
    pub help: &'static str,
    /// The text that counts when it is not given, where that is worth showing.
    pub default: Option<&'static str>,
    /// The reference's format of that name has no such option.
    pub is_beyond_reference: bool,
}

impl OptionDescription {
    /// An option without a default.
    #[must_use]
    pub const fn new(name: &'static str, kind: OptionKind, help: &'static str) -> Self {
        Self { name, kind, help, default: None, is_beyond_reference: false }
    }

    /// The same with a default that users are shown.
    #[must_use]
    pub const fn or(self, default: &'static str) -> Self {
        Self { default: Some(default), ..self }
    }

    /// The same as an option that the reference has not.
    #[must_use]
    pub const fn beyond_reference(self) -> Self {
        Self { is_beyond_reference: true, ..self }
    }
}

/// What can be said about the host file of a new image, whatever its format, in the order in which
/// `create` reports it.
pub static FILE_OPTIONS: &[OptionDescription] = &[
    OptionDescription::new("size", OptionKind::Size, "Virtual disk size"),
    OptionDescription::new(
        "preallocation",
        OptionKind::Text,
        "Preallocation mode (allowed values: off, falloc, full)",
    ),
    OptionDescription::new("nocow", OptionKind::Switch, "Turn off copy-on-write (valid only on btrfs)"),
    OptionDescription::new(
        "extent_size_hint",
        OptionKind::Size,
        "Extent size hint for the image file, 0 to disable",
    ),
];

/// Options as given: names with values still in text, in the order given; the last of a name counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OptionSet {
    entries: Vec<(String, String)>,
}

impl OptionSet {
    /// No options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `name`, replacing an earlier value.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let name = name.into();
        self.entries.retain(|(known, _)| *known != name);
        self.entries.push((name, value.into()));
    }

    /// Takes `name` out.
    pub fn take(&mut self, name: &str) -> Option<String> {
        let at = self.entries.iter().position(|(known, _)| known == name)?;
        Some(self.entries.remove(at).1)
    }

    /// The text of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.entries.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.entries.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// `on`/`off`, or `None` when absent.
    ///
    /// # Errors
    /// [`Error::Invalid`] in the reference's words.
    pub fn switch(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => Err(Error::Invalid(format!("Parameter '{name}' expects 'on' or 'off'"))),
        }
    }

    /// The number of bytes called `name`, or `None` when absent.
    ///
    /// # Errors
    /// [`Error::Invalid`] in the reference's words.
    pub fn size(&self, name: &str) -> Result<Option<u64>> {
        let Some(text) = self.get(name) else { return Ok(None) };
        match parse_size(text) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(SizeError::OutOfRange) => {
                Err(Error::Invalid(format!("Value '{text}' is out of range for parameter '{name}'")))
            }
            Err(SizeError::Malformed) => Err(Error::Invalid(format!(
                "Parameter '{name}' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively."
            ))),
        }
    }

    /// The number called `name` (decimal, octal after `0`, hexadecimal after `0x`; negative ones wrap, as
    /// in the reference), or `None` when absent.
    ///
    /// # Errors
    /// [`Error::Invalid`] in the reference's words.
    pub fn number(&self, name: &str) -> Result<Option<u64>> {
        let Some(text) = self.get(name) else { return Ok(None) };
        parse_number(text).map(Some).map_err(|error| {
            Error::Invalid(match error {
                SizeError::Malformed => format!("Parameter '{name}' expects a number"),
                SizeError::OutOfRange => format!("Value '{text}' is too large for parameter '{name}'"),
            })
        })
    }

    /// Refuses what `known` does not name, in the reference's words for creating.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the first unknown option.
    pub fn check_names(&self, known: &[&[OptionDescription]]) -> Result<()> {
        let is_known = |name: &str| known.iter().any(|list| list.iter().any(|option| option.name == name));
        match self.iter().find(|(name, _)| !is_known(name)) {
            Some((name, _)) => Err(Error::Invalid(format!("Invalid parameter '{name}'"))),
            None => Ok(()),
        }
    }
}

/// Why a text is not a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number with an optional suffix.
    Malformed,
    /// Negative, or 2^64 and above.
    OutOfRange,
}

/// Reads a number of bytes: decimal digits with an optional fraction and one of the suffixes `bkKmMgGtTpPeE`
/// (base 1024), or hexadecimal digits after `0x` without any. A fraction needs a suffix from `k` up, unless it
/// is zero.
///
/// # Errors
/// [`SizeError`] says which of the reference's two refusals fits.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start();
    if let Some(digits) = text.strip_prefix('-') {
        let all_digits = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        return Err(if all_digits { SizeError::OutOfRange } else { SizeError::Malformed });
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(SizeError::Malformed);
        }
        return u64::from_str_radix(digits, 16).map_err(|_| SizeError::OutOfRange);
    }
    let digits_end = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, rest) = text.split_at(digits_end(text));
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits_end(rest)),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(SizeError::Malformed);
    }
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(SizeError::Malformed),
    };
    if shift == 0 && fraction.bytes().any(|digit| digit != b'0') {
        return Err(SizeError::Malformed);
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| SizeError::OutOfRange)? };
    let bytes = whole.checked_mul(1 << shift).ok_or(SizeError::OutOfRange)?;
    bytes.checked_add(fraction_bytes(fraction, shift)).ok_or(SizeError::OutOfRange)
}

/// `0.digits` times 2 to the power of `shift`, rounded to the nearest; digits past the 18th change nothing
/// that could be seen.
fn fraction_bytes(digits: &str, shift: u32) -> u64 {
    let (mut numerator, mut denominator) = (0u128, 1u128);
    for digit in digits.bytes().take(18) {
        numerator = numerator * 10 + u128::from(digit - b'0'); // below 10^18: fits
        denominator *= 10;
    }
    let scaled = (numerator << shift) + denominator / 2; // below 2^60 × 2^60 + 2^60
    u64::try_from(scaled / denominator).expect("at most 2^shift, shift at most 60")
}

/// Reads a number without a unit as C's `strtoull` does in base 0: decimal, `0x10`, or octal behind a zero; what
/// stands behind a minus counts down from 2^64.
///
/// # Errors
/// When it is no such number, or more than 64 bits.
pub fn parse_number(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (radix, digits) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => (16, digits),
        None if digits.len() > 1 && digits.starts_with('0') => (8, &digits[1..]),
        None => (10, digits),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(SizeError::Malformed);
    }
    let number = u64::from_str_radix(digits, radix).map_err(|_| SizeError::OutOfRange)?;
    Ok(if negative { number.wrapping_neg() } else { number })
}

/// The parts of a list of options, with doubled commas made single.
#[must_use]
pub fn split_list(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = list.chars().peekable();
    while let Some(c) = rest.next() {
        match parts.last_mut() {
            Some(part) if c != ',' || rest.next_if_eq(&',').is_some() => part.push(c),
            _ => parts.push(String::new()),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_the_reference_reads_them() {
        for (text, bytes) in [
            ("0x10", 16),
            ("0x10b", 267),
            ("0X10", 16),
            ("1.5k", 1536),
            ("1.", 1),
            ("1.k", 1024),
            (".5k", 512),
            ("1b", 1),
            ("1B", 1),
            ("1.0", 1),
            (" 1", 1),
            ("+1", 1),
            ("010", 10),
            ("1.9999999999k", 2048),
            ("0.1k", 102),
            ("8191P", 9_222_246_136_947_933_184),
            ("1.5e", 1_729_382_256_910_270_464),
            ("1E", 1 << 60),
            ("18446744073709551615", u64::MAX),
            ("1.5m", 1_572_864),
            ("0.00000000001k", 0),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "0x10k", "0x", "0x1.8k", "1.5", ".", "k", "1kb", "1 ", "-1k", "1.5b", "0.5", "inf", "nan", "1,5",
            "1e1k", "", "1e3", "1Z",
        ] {
            assert_eq!(parse_size(text), Err(SizeError::Malformed), "{text}");
        }
        for text in ["-1", "-0", "18446744073709551616", "16E", "20000000000000000000000"] {
            assert_eq!(parse_size(text), Err(SizeError::OutOfRange), "{text}");
        }
    }

    #[test]
    fn numbers_have_the_reference_s_bases_and_refusals() {
        let number = |text: &str| {
            let mut set = OptionSet::new();
            set.set("n", text);
            set.number("n").map_err(|error| error.to_string())
        };
        for (text, value) in [("0x10", 16), ("010", 8), (" 16", 16), ("+16", 16), ("-0", 0), ("0", 0)] {
            assert_eq!(number(text), Ok(Some(value)), "{text}");
        }
        assert_eq!(number("-3"), Ok(Some(u64::MAX - 2)));
        for text in ["16 ", "0x", "16k", "1e1", "", "foo", "09"] {
            assert_eq!(number(text), Err("Parameter 'n' expects a number".to_owned()), "{text}");
        }
        assert_eq!(
            number("99999999999999999999999"),
            Err("Value '99999999999999999999999' is too large for parameter 'n'".to_owned())
        );
    }
}
