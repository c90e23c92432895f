//! Numbers of bytes, read and written as the reference does.

use std::fmt;

/// The largest size that the reference accepts from the command line.
pub(crate) const MAX_BYTES: u64 = i64::MAX as u64;

/// Why a text is not a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SizeError {
    /// Not a number with an optional suffix.
    Syntax,
    /// Negative, or more than 64 bits.
    Range,
}

/// Reads a number of bytes: decimal, possibly with a fraction, or hexadecimal; then one of the suffixes
/// `bkKmMgGtTpPeE` (not `b` after a fraction, none but `b` after hexadecimal digits, where it is a digit).
pub(crate) fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    if let Some(digits) = text.strip_prefix('-') {
        // Well-formed but negative is out of range, except for zero.
        return match parse_unsigned(digits)? {
            0 => Ok(0),
            _ => Err(SizeError::Range),
        };
    }
    parse_unsigned(text.strip_prefix('+').unwrap_or(text))
}

fn parse_unsigned(text: &str) -> Result<u64, SizeError> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(SizeError::Syntax);
        }
        return u64::from_str_radix(hex, 16).map_err(|_| SizeError::Range);
    }
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole, mut rest) = text.split_at(end);
    let mut fraction = "";
    if let Some(behind) = rest.strip_prefix('.') {
        let end = behind.find(|c: char| !c.is_ascii_digit()).unwrap_or(behind.len());
        (fraction, rest) = behind.split_at(end);
    }
    if whole.is_empty() && fraction.is_empty() {
        return Err(SizeError::Syntax);
    }
    let shift = match rest {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(SizeError::Syntax),
    };
    let has_fraction = fraction.bytes().any(|digit| digit != b'0');
    if has_fraction && shift == 0 {
        return Err(SizeError::Syntax);
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| SizeError::Range)? };
    let bytes = whole.checked_mul(1 << shift).ok_or(SizeError::Range)?;
    bytes.checked_add(fraction_bytes(fraction, shift)).ok_or(SizeError::Range)
}

/// `0.fraction × 2^shift`, rounded to the nearest byte.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a fraction below one times at most 2^60 is a small non-negative number"
)]
fn fraction_bytes(fraction: &str, shift: u32) -> u64 {
    let value: f64 = format!("0.{fraction}0").parse().unwrap_or(0.0);
    (value * (1u64 << shift) as f64 + 0.5) as u64
}

/// A command line number with the reference's complaints: `what` is for example `image size`.
pub(crate) fn argument(what: &str, text: &str, max: u64) -> Result<u64, String> {
    ranged(what, text, parse(text), 0, max)
}

/// A plain count between `min` and `max`: decimal or hexadecimal, no suffix.
pub(crate) fn count(what: &str, text: &str, min: u64, max: u64) -> Result<u64, String> {
    let plain = !text.is_empty() && !text.ends_with(|c: char| !c.is_ascii_hexdigit());
    let fraction = text.contains('.');
    let hex = text.starts_with("0x");
    let suffix = !hex && text.ends_with(|c: char| !c.is_ascii_digit());
    let value = if plain && !fraction && !suffix { parse(text) } else { Err(SizeError::Syntax) };
    ranged(what, text, value, min, max)
}

fn ranged(what: &str, text: &str, value: Result<u64, SizeError>, min: u64, max: u64) -> Result<u64, String> {
    match value {
        Ok(value) if (min..=max).contains(&value) => Ok(value),
        Err(SizeError::Syntax) => Err(format!("Invalid {what} specified: '{text}'.")),
        Ok(_) | Err(SizeError::Range) => {
            Err(format!("Invalid {what} specified. Must be between {min} and {max}."))
        }
    }
}

/// A number of bytes for people: three significant digits, ties to even, `0.977 TiB`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Human(pub(crate) u64);

impl fmt::Display for Human {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        // The unit changes at 1000, not at 1024, so that three digits are enough.
        let scaled = self.0 as f64 / (1000.0 / 1024.0);
        let exponent = if self.0 == 0 { 0 } else { (scaled.to_bits() >> 52 & 0x7ff) - 1022 };
        let unit = usize::try_from(exponent.saturating_sub(1) / 10).unwrap_or(0).min(SUFFIXES.len() - 1);
        let value = self.0 as f64 / (1u64 << (unit * 10)) as f64;
        write!(f, "{} {}B", three_digits(value), SUFFIXES[unit])
    }
}

/// C's `%.3g`.
fn three_digits(value: f64) -> String {
    let scientific = format!("{value:.2e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..3).contains(&exponent) {
        let digits = usize::try_from(2 - exponent).unwrap_or(0);
        strip_zeroes(&format!("{value:.digits$}")).to_owned()
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{}e{sign}{:02}", strip_zeroes(mantissa), exponent.unsigned_abs())
    }
}

fn strip_zeroes(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_the_reference_reads_them() {
        for (text, bytes) in [
            ("1.5G", 1_610_612_736),
            ("0x10000", 65536),
            (".5k", 512),
            ("1.k", 1024),
            (" 1k", 1024),
            ("+1k", 1024),
            ("1000b", 1000),
            ("0x1B", 27),
            ("010", 10),
            ("7E", 7 << 60),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "abc", "1e3", "1kb", "1KiB", "0x1.5", "0x10k", "1.1b", "1Z", ".", "-", "k"] {
            assert_eq!(parse(text), Err(SizeError::Syntax), "{text}");
        }
        for text in ["16E", "-1", "99999999999999999999"] {
            assert_eq!(parse(text), Err(SizeError::Range), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1, "1 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1023, "0.999 KiB"),
            (1024, "1 KiB"),
            (1_835_520, "1.75 MiB"),
            (100_000_000_000, "93.1 GiB"),
            (1_074_790_400, "1 GiB"),
            (198_144, "194 KiB"),
            (1_023_949, "1e+03 KiB"),
            (1 << 63, "8 EiB"),
        ] {
            assert_eq!(Human(bytes).to_string(), text, "{bytes}");
        }
    }

    #[test]
    fn counts_take_no_suffix() {
        assert_eq!(count("number", "16", 1, 16), Ok(16));
        assert_eq!(count("number", "8k", 1, 16), Err("Invalid number specified: '8k'.".into()));
        assert_eq!(
            count("number", "17", 1, 16),
            Err("Invalid number specified. Must be between 1 and 16.".into())
        );
    }
}
