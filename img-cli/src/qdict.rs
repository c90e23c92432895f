//! JSON as QEMU prints it: the keys in the order of its hash table, four spaces a level.

use std::fmt::Write as _;

use img_core::text::is_raw_byte;
use serde_json::{Map, Value};

/// How many buckets QEMU's dictionary has.
const BUCKETS: u32 = 512;

/// The bucket of a key.
fn bucket(key: &str) -> u32 {
    let length = u32::try_from(key.len()).unwrap_or(u32::MAX);
    let mut hash = 0x238F_13AF_u32.wrapping_mul(length);
    let mut shift = 0;
    for byte in key.bytes() {
        hash = hash.wrapping_add(u32::from(byte) << shift);
        shift = (shift + 5) % 24;
    }
    hash.wrapping_mul(1_103_515_243).wrapping_add(12345) % BUCKETS
}

/// The members of `map` in the order of QEMU's dictionary: by bucket, and inside one the youngest first.
pub(crate) fn ordered(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut members: Vec<_> = map.iter().rev().collect();
    members.sort_by_key(|(key, _)| bucket(key));
    members
}

/// `value` over several lines, without a newline at the end.
pub(crate) fn pretty(value: &Value) -> String {
    let mut text = String::new();
    write_value(&mut text, value, 0);
    text
}

fn write_value(text: &mut String, value: &Value, level: usize) {
    match value {
        Value::Object(map) => {
            let members = ordered(map).into_iter().map(|(key, value)| (Some(key.as_str()), value));
            write_members(text, ['{', '}'], members, level);
        }
        Value::Array(items) => {
            write_members(text, ['[', ']'], items.iter().map(|value| (None, value)), level);
        }
        Value::String(string) => write_string(text, string),
        other => text.push_str(&other.to_string()),
    }
}

fn write_members<'a>(
    text: &mut String,
    [open, close]: [char; 2],
    members: impl Iterator<Item = (Option<&'a str>, &'a Value)>,
    level: usize,
) {
    text.push(open);
    for (index, (key, value)) in members.enumerate() {
        if index > 0 {
            text.push(',');
        }
        new_line(text, level + 1);
        if let Some(key) = key {
            write_string(text, key);
            text.push_str(": ");
        }
        write_value(text, value, level + 1);
    }
    new_line(text, level);
    text.push(close);
}

fn new_line(text: &mut String, level: usize) {
    text.push('\n');
    text.extend(std::iter::repeat_n("    ", level));
}

fn write_string(text: &mut String, string: &str) {
    text.push('"');
    for character in string.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            ' '..='~' => text.push(character),
            _ if is_raw_byte(character) => text.push_str("\\uFFFD"),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(text, "\\u{unit:04X}").expect("a String takes everything");
                }
            }
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn keys(value: &Value) -> Vec<&str> {
        ordered(value.as_object().unwrap()).into_iter().map(|(key, _)| key.as_str()).collect()
    }

    #[test]
    fn keys_stand_in_the_order_of_the_dictionary() {
        let info = json!({
            "actual-size": 0, "backing-filename": 0, "backing-filename-format": 0, "children": 0,
            "cluster-size": 0, "dirty-flag": 0, "encrypted": 0, "filename": 0, "format": 0,
            "format-specific": 0, "full-backing-filename": 0, "virtual-size": 0,
        });
        assert_eq!(
            keys(&info),
            [
                "children",
                "backing-filename-format",
                "virtual-size",
                "filename",
                "cluster-size",
                "format",
                "actual-size",
                "format-specific",
                "full-backing-filename",
                "encrypted",
                "backing-filename",
                "dirty-flag",
            ]
        );
        let details = json!({
            "bitmaps": 0, "compat": 0, "compression-type": 0, "corrupt": 0, "data-file": 0,
            "data-file-raw": 0, "encrypt": 0, "extended-l2": 0, "lazy-refcounts": 0, "refcount-bits": 0,
        });
        assert_eq!(
            keys(&details),
            [
                "compat",
                "compression-type",
                "lazy-refcounts",
                "bitmaps",
                "refcount-bits",
                "data-file",
                "encrypt",
                "data-file-raw",
                "corrupt",
                "extended-l2",
            ]
        );
    }

    #[test]
    fn empty_and_strange_values_are_laid_out_as_qemu_does() {
        let value = json!({ "data": {}, "flags": [], "name": "\u{fc}\"\n\\x\u{1}\u{1f600}" });
        let lines: Vec<String> = pretty(&value).lines().map(str::to_owned).collect();
        let name = r#"    "name": "\u00FC\"\n\\x\u0001\uD83D\uDE00","#;
        assert!(lines.iter().any(|line| line == name), "{lines:?}");
        assert!(pretty(&value).contains("\"flags\": [\n    ]"));
        assert!(pretty(&value).contains("\"data\": {\n    }"));
    }
}
