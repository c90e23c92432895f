//! Structured names taken apart: `json:{…}` and `key=value,…` become names with dots and their values.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{Error, Result, format::split_list};

/// Names are no longer than people write; what a file may say is bounded by the file's own format.
const MAX_NAME_BYTES: usize = 64 << 10;

/// Objects inside objects.
const MAX_DEPTH: usize = 128;

/// Dotted names and their values; no value is an object.
#[derive(Debug, Default)]
pub(super) struct Flat {
    entries: BTreeMap<String, Value>,
}

impl Flat {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn put(&mut self, name: &str, value: Value) {
        self.entries.insert(name.to_owned(), value);
    }

    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.entries.remove(name)
    }

    /// Takes a value as text.
    pub(super) fn take_text(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(Error::Invalid(format!("Invalid value for '{name}': {other}"))),
        }
    }

    /// Takes a switch: a boolean, or one of the words for it.
    pub(super) fn take_switch(&mut self, name: &str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(on)),
            Some(Value::String(text)) if matches!(text.as_str(), "on" | "yes" | "true" | "y") => {
                Ok(Some(true))
            }
            Some(Value::String(text)) if matches!(text.as_str(), "off" | "no" | "false" | "n") => {
                Ok(Some(false))
            }
            Some(_) => Err(Error::Invalid(format!("Parameter '{name}' expects 'on' or 'off'"))),
        }
    }

    /// Takes all names that start with `prefix`, without it.
    pub(super) fn take_prefix(&mut self, prefix: &str) -> Self {
        let mut taken = Self::default();
        let names: Vec<String> =
            self.entries.keys().filter(|name| name.starts_with(prefix)).cloned().collect();
        for name in names {
            if let Some(value) = self.entries.remove(&name) {
                taken.entries.insert(name[prefix.len()..].to_owned(), value);
            }
        }
        taken
    }

    pub(super) fn into_entries(self) -> impl Iterator<Item = (String, Value)> {
        self.entries.into_iter()
    }
}

/// The text of a plain value, as options carry it.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        other => other.to_string(),
    }
}

/// `json:{…}`.
pub(super) fn parse_json(name: &str) -> Result<Flat> {
    if name.len() > MAX_NAME_BYTES {
        return Err(Error::Invalid(format!("a json: name is longer than {MAX_NAME_BYTES} bytes")));
    }
    let body = name.strip_prefix("json:").unwrap_or(name);
    if body.trim().is_empty() {
        return Err(Error::Invalid("Could not parse the JSON options: Expecting a JSON value".to_owned()));
    }
    let value: Value = serde_json::from_str(&double_quoted(body)).map_err(|error| {
        let why = if error.is_eof() { "premature EOI".to_owned() } else { error.to_string() };
        Error::Invalid(format!("Could not parse the JSON options: JSON parse error, {why}"))
    })?;
    let Value::Object(members) = value else {
        return Err(Error::Invalid("Invalid JSON object given".to_owned()));
    };
    let mut flat = Flat::default();
    flatten("", Value::Object(members), 0, &mut flat)?;
    Ok(flat)
}

/// The reference takes strings in single quotes as well.
fn double_quoted(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    let mut open = None;
    let mut characters = json.chars();
    while let Some(c) = characters.next() {
        match (open, c) {
            (_, '\\') => match characters.next() {
                // JSON has no such escape, and needs none.
                Some('\'') => plain.push('\''),
                Some(other) => plain.extend(['\\', other]),
                None => plain.push('\\'),
            },
            (None, '"' | '\'') => {
                open = Some(c);
                plain.push('"');
            }
            (Some(quote), _) if c == quote => {
                open = None;
                plain.push('"');
            }
            (Some('\''), '"') => plain.push_str("\\\""),
            _ => plain.push(c),
        }
    }
    plain
}

fn flatten(prefix: &str, value: Value, depth: usize, flat: &mut Flat) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::Invalid(format!("a json: name has more than {MAX_DEPTH} objects in each other")));
    }
    let children: Vec<(String, Value)> = match value {
        Value::Object(members) => members.into_iter().collect(),
        Value::Array(items) => {
            items.into_iter().enumerate().map(|(at, item)| (at.to_string(), item)).collect()
        }
        plain => {
            check_depth(prefix)?;
            if flat.entries.insert(prefix.to_owned(), plain).is_some() {
                return Err(Error::Invalid(format!("'{prefix}' is given twice")));
            }
            return Ok(());
        }
    };
    for (name, child) in children {
        let name = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
        flatten(&name, child, depth + 1, flat)?;
    }
    Ok(())
}

/// Names with dots stand for objects in objects too.
fn check_depth(name: &str) -> Result<()> {
    if name.bytes().filter(|byte| *byte == b'.').count() > MAX_DEPTH {
        return Err(Error::Invalid(format!("an option's name has more than {MAX_DEPTH} dots")));
    }
    Ok(())
}

/// `key=value,key=value`, with `,,` for a comma inside a value. A later value replaces an earlier one.
pub(super) fn parse_list(list: &str) -> Result<Flat> {
    let mut flat = Flat::default();
    for (index, part) in split_list(list).into_iter().enumerate() {
        if part.is_empty() {
            continue;
        }
        match part.split_once('=') {
            Some((name, value)) => {
                check_depth(name)?;
                flat.put(name, Value::String(value.to_owned()));
            }
            // The first part may leave its name out: it then names an existing node, of which there are none.
            None if index == 0 => {
                return Err(Error::Invalid(format!("Cannot find device='{part}' nor node-name='{part}'")));
            }
            None => flat.put(&part, Value::String("on".to_owned())),
        }
    }
    Ok(flat)
}
