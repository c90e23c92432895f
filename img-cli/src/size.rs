//! Numbers of bytes, read and written as the reference does.

use std::fmt;

use img_core::format::{SizeError, parse_number, parse_size};

/// The largest size that the reference accepts from the command line.
pub(crate) const MAX_BYTES: u64 = i64::MAX as u64;

/// The largest number of bytes in one request.
pub(crate) const MAX_SMALL: u64 = i32::MAX as u64;

/// A command line number with the reference's complaints: `what` is for example `image size`.
pub(crate) fn argument(what: &str, text: &str, max: u64) -> Result<u64, String> {
    ranged(what, text, parse_size(text), 0, max)
}

/// A command line number from 1 to what a signed 32-bit number holds, or from 0.
pub(crate) fn small(what: &str, text: &str, min: u64) -> Result<u64, String> {
    ranged(what, text, parse_size(text), min, MAX_SMALL)
}

/// A plain count between `min` and `max`: decimal, hexadecimal or octal as C has it, no suffix.
pub(crate) fn count(what: &str, text: &str, min: u64, max: u64) -> Result<u64, String> {
    ranged(what, text, parse_number(text), min, max)
}

fn ranged(what: &str, text: &str, value: Result<u64, SizeError>, min: u64, max: u64) -> Result<u64, String> {
    match value {
        Ok(value) if (min..=max).contains(&value) => Ok(value),
        Err(SizeError::Malformed) => Err(format!("Invalid {what} specified: '{text}'.")),
        Ok(_) | Err(SizeError::OutOfRange) => {
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
        for (text, number) in [("16", 16), ("0x10", 16), ("020", 16), (" +5", 5)] {
            assert_eq!(count("number", text, 1, 16), Ok(number), "{text}");
        }
        assert_eq!(count("number", "8k", 1, 16), Err("Invalid number specified: '8k'.".into()));
        assert_eq!(
            count("number", "17", 1, 16),
            Err("Invalid number specified. Must be between 1 and 16.".into())
        );
    }
}
