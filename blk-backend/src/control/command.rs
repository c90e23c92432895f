//! What commands and events are made of.

use serde_json::{Map, Value};

use super::shape::{Member, Shape};

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandError {
    /// QMP's class of the error.
    pub class: &'static str,
    /// For people.
    pub text: String,
}

impl CommandError {
    /// An error without a class of its own.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self { class: "GenericError", text: text.into() }
    }

    /// An error of the class that says that there is no such command.
    #[must_use]
    pub fn not_found(text: impl Into<String>) -> Self {
        Self { class: "CommandNotFound", text: text.into() }
    }
}

impl From<img_core::Error> for CommandError {
    fn from(error: img_core::Error) -> Self {
        Self::new(error.to_string())
    }
}

/// What a command returns.
pub type Outcome = Result<Value, CommandError>;

/// Arguments that were checked against their shape.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Arguments<'a> {
    /// A text, empty where it was left out.
    #[must_use]
    pub fn text(&self, name: &str) -> &'a str {
        self.maybe_text(name).unwrap_or_default()
    }

    /// A text, where it is given.
    #[must_use]
    pub fn maybe_text(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).and_then(Value::as_str)
    }

    /// A switch, where it is given.
    #[must_use]
    pub fn switch(&self, name: &str) -> Option<bool> {
        self.0.get(name).and_then(Value::as_bool)
    }

    /// A number; `None` where it was left out, or is negative.
    #[must_use]
    pub fn size(&self, name: &str) -> Option<u64> {
        self.0.get(name).and_then(Value::as_u64)
    }

    /// An object, where it is given.
    #[must_use]
    pub fn object(&self, name: &str) -> Option<Arguments<'a>> {
        self.0.get(name).and_then(Value::as_object).map(Arguments)
    }

    /// The texts of a list.
    #[must_use]
    pub fn texts(&self, name: &str) -> Vec<String> {
        let values = self.0.get(name).and_then(Value::as_array).into_iter().flatten();
        values.filter_map(Value::as_str).map(str::to_owned).collect()
    }
}

/// A command of the service `S`.
#[derive(Debug)]
pub struct Command<S> {
    /// What clients call it.
    pub name: &'static str,
    /// What it takes.
    pub arguments: Shape,
    /// What it returns.
    pub returns: Shape,
    /// Whether clients should stop using it.
    pub deprecated: bool,
    /// Does it, with arguments that were checked.
    pub run: fn(&S, &Arguments<'_>) -> Outcome,
}

/// An event.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// What clients call it.
    pub name: &'static str,
    /// What it tells.
    pub data: &'static [Member],
}

/// No member at all.
pub const NOTHING: Shape = Shape::Object(&[]);

/// A command that clients may go on using.
pub const fn command<S>(
    name: &'static str,
    arguments: Shape,
    returns: Shape,
    run: fn(&S, &Arguments<'_>) -> Outcome,
) -> Command<S> {
    Command { name, arguments, returns, deprecated: false, run }
}
