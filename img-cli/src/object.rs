//! `--object`: things that images refer to by id.
//!
//! The one kind that this build knows is the secret: it is checked as the reference checks it. No image that
//! can be opened here needs one yet, so none is kept.

use std::{collections::BTreeSet, fs};

use img_core::{format::split_list, text};
use serde_json::{Map, Value};

use crate::{
    context::Context,
    error::{Failure, os_text},
};

/// Kinds that the reference has and this build does not.
const MISSING_KINDS: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-pam",
    "authz-simple",
    "secret_keyring",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// Objects that images may refer to.
#[derive(Debug, clap::Args)]
pub(crate) struct ObjectArgs {
    /// An object that images refer to by id: secret,id=ID,data=TEXT
    #[arg(long, value_name = "OBJDEF")]
    object: Vec<String>,
}

impl ObjectArgs {
    /// # Errors
    /// For the first object that the reference would not make, in its words; without a word and with exit
    /// code 0 when help was asked for, and printed.
    pub(crate) fn check(&self, context: &Context) -> Result<(), Failure> {
        let mut ids = BTreeSet::new();
        for object in &self.object {
            let mut members = members(object).map_err(Failure::new)?;
            if let Some(help) = help(&members) {
                context.out.line(help);
                return Err(Failure::silent(0));
            }
            let id = secret(&mut members).map_err(Failure::new)?;
            if !ids.insert(id.clone()) {
                return Err(Failure::new(format!(
                    "attempt to add duplicate property '{id}' to object (type 'container')"
                )));
            }
        }
        Ok(())
    }
}

/// What is shown where help is asked for.
fn help(members: &Map<String, Value>) -> Option<&'static str> {
    let kind = members.get("qom-type").and_then(Value::as_str);
    match kind {
        Some("help" | "?") => Some("List of user creatable objects:\n  secret"),
        Some("secret") if members.contains_key("help") => Some(
            "secret options:\n  data=<string>\n  file=<string>\n  format=<QCryptoSecretFormat>\n  \
             iv=<string>\n  keyid=<string>",
        ),
        _ => None,
    }
}

/// What an object says: `KIND,NAME=VALUE,…` or JSON.
fn members(object: &str) -> Result<Map<String, Value>, String> {
    if object.starts_with('{') {
        return serde_json::from_str(object).map_err(|error| format!("JSON parse error, {error}"));
    }
    let mut members = Map::new();
    for (index, part) in split_list(object).iter().enumerate() {
        match part.split_once('=') {
            Some((name, value)) => members.insert(name.to_owned(), value.into()),
            None if index == 0 && part.is_empty() => None,
            None if index == 0 => members.insert("qom-type".to_owned(), part.as_str().into()),
            None if part == "help" || part == "?" => members.insert("help".to_owned(), Value::Bool(true)),
            None => return Err(format!("Expected '=' after parameter '{part}'")),
        };
    }
    Ok(members)
}

/// Checks a secret, and returns its id.
fn secret(members: &mut Map<String, Value>) -> Result<String, String> {
    let mut take = |name: &str| match members.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("Invalid parameter type for '{name}', expected: string")),
    };
    let kind = take("qom-type")?.ok_or("Parameter 'qom-type' is missing")?;
    if MISSING_KINDS.contains(&kind.as_str()) {
        return Err(format!("Objects of the kind '{kind}' are not supported yet"));
    }
    if kind != "secret" {
        return Err(format!("Parameter 'qom-type' does not accept value '{kind}'"));
    }
    let id = take("id")?.ok_or("Parameter 'id' is missing")?;
    let [data, file, format, key] = [take("data")?, take("file")?, take("format")?, take("keyid")?];
    if let Some(format) = format.filter(|format| format != "raw" && format != "base64") {
        return Err(format!("Parameter 'format' does not accept value '{format}'"));
    }
    if key.is_some() {
        return Err("The parameter 'keyid' is not supported yet".to_owned());
    }
    if let Some(name) = members.keys().next() {
        return Err(format!("Parameter '{name}' is unexpected"));
    }
    if !is_identifier(&id) {
        return Err("Parameter 'id' expects an identifier\n\
             Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
            .to_owned());
    }
    match (data, file) {
        (Some(_), Some(_)) => Err("'file' and 'data' are mutually exclusive".to_owned()),
        (None, None) => Err("Either 'file' or 'data' must be provided".to_owned()),
        (None, Some(file)) => match fs::File::open(text::to_path(&file)) {
            Ok(_) => Ok(id),
            Err(error) => {
                Err(format!("Unable to read {file}: Failed to open file “{file}”: {}", os_text(&error)))
            }
        },
        (Some(_), None) => Ok(id),
    }
}

fn is_identifier(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_checked_and_others_refused() {
        let check = |object: &str| members(object).and_then(|mut members| secret(&mut members));
        assert_eq!(check("secret,id=a,data=x"), Ok("a".into()));
        assert_eq!(check("qom-type=secret,id=a-1,data=x,,y"), Ok("a-1".into()));
        assert_eq!(check(r#"{"qom-type":"secret","id":"a","data":"x"}"#), Ok("a".into()));
        for (object, error) in [
            ("", "Parameter 'qom-type' is missing"),
            ("id=a", "Parameter 'qom-type' is missing"),
            ("nope,id=a", "Parameter 'qom-type' does not accept value 'nope'"),
            ("throttle-group,id=a", "Objects of the kind 'throttle-group' are not supported yet"),
            ("secret,data=x", "Parameter 'id' is missing"),
            ("secret,id=a", "Either 'file' or 'data' must be provided"),
            ("secret,id=a,data=x,file=y", "'file' and 'data' are mutually exclusive"),
            ("secret,id=a,data=x,foo=1", "Parameter 'foo' is unexpected"),
            ("secret,foo", "Expected '=' after parameter 'foo'"),
        ] {
            assert_eq!(check(object), Err(error.into()), "{object}");
        }
        assert!(
            check("secret,id=1,data=x").unwrap_err().starts_with("Parameter 'id' expects an identifier\n")
        );
    }
}
