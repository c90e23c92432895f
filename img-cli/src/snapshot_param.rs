//! `convert -l`: which snapshot.

use img_core::format::{SnapshotInfo, split_list};

use crate::{context::Context, error::Failure};

/// The snapshot that is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// By its id, or else by its name.
    Either(String),
    /// By what is given, all of it.
    Exactly {
        /// `snapshot.id=`
        id: Option<String>,
        /// `snapshot.name=`
        name: Option<String>,
    },
}

/// # Errors
/// For an unknown `snapshot.…`.
pub(crate) fn parse(text: &str, context: &Context) -> Result<Wanted, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(Wanted::Either(text.to_owned()));
    }
    let (mut id, mut name) = (None, None);
    let mut parts = split_list(text);
    if parts.last().is_some_and(String::is_empty) {
        // A comma may stand behind the last.
        parts.pop();
    }
    for part in &parts {
        match part.split_once('=') {
            Some(("snapshot.id", value)) => id = Some(value.to_owned()),
            Some(("snapshot.name", value)) => name = Some(value.to_owned()),
            Some((key, _)) => return Err(unknown(key, text, context)),
            // A name alone is switched on, or off with a `no` in front, as if it were a switch.
            None => {
                let (key, value) = part.strip_prefix("no").map_or((part.as_str(), "on"), |key| (key, "off"));
                context.warning(&format!(
                    "short-form boolean option '{part}' deprecated\nPlease use {key}={value} instead"
                ));
                match key {
                    "snapshot.id" => id = Some(value.to_owned()),
                    "snapshot.name" => name = Some(value.to_owned()),
                    _ => return Err(unknown(key, text, context)),
                }
            }
        }
    }
    Ok(Wanted::Exactly { id, name })
}

fn unknown(key: &str, text: &str, context: &Context) -> Failure {
    context.error(&format!("Invalid parameter '{key}'"));
    Failure::new(format!("Failed in parsing snapshot param '{text}'"))
}

impl Wanted {
    /// The first of `snapshots` that fits.
    pub(crate) fn find<'a>(&self, snapshots: &'a [SnapshotInfo]) -> Option<&'a SnapshotInfo> {
        match self {
            Self::Either(text) => snapshots
                .iter()
                .find(|snapshot| snapshot.id == *text)
                .or_else(|| snapshots.iter().find(|snapshot| snapshot.name == *text)),
            Self::Exactly { id, name } => snapshots.iter().find(|snapshot| {
                id.as_ref().is_none_or(|id| snapshot.id == *id)
                    && name.as_ref().is_none_or(|name| snapshot.name == *name)
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Out;

    fn snapshot(id: &str, name: &str) -> SnapshotInfo {
        SnapshotInfo {
            id: id.to_owned(),
            name: name.to_owned(),
            vm_state_bytes: 0,
            date: (0, 0),
            vm_clock_nsec: 0,
            icount: None,
            virtual_size_bytes: 0,
        }
    }

    #[test]
    fn ids_come_before_names() {
        let list = [snapshot("1", "2"), snapshot("2", "a")];
        let context = Context::new("img".to_owned(), Out::memory());
        let find = |text| parse(text, &context).unwrap().find(&list).map(|found| found.id.clone());
        assert_eq!(find("2").as_deref(), Some("2"));
        assert_eq!(find("snapshot.name=2").as_deref(), Some("1"));
        assert_eq!(find("snapshot.id=2,snapshot.name=2"), None);
        assert!(parse("snapshot.foo=1", &context).is_err());
    }
}
