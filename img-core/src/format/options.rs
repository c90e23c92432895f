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
}

impl OptionDescription {
    /// An option without a default.
    #[must_use]
    pub const fn new(name: &'static str, kind: OptionKind, help: &'static str) -> Self {
        Self { name, kind, help, default: None }
    }

    /// The same with a default that users are shown.
    #[must_use]
    pub const fn or(self, default: &'static str) -> Self {
        Self { default: Some(default), ..self }
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
}
