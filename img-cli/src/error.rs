//! How a command fails: what is printed, and the exit code.

use img_core::{Error, text};

use crate::context::Context;

/// Why a command stopped, ready to print.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What is said after the program's name. Further lines follow without it. Empty: nothing is said.
    pub(crate) text: String,
    /// Whether the way to the command's help is shown.
    pub(crate) show_help_hint: bool,
    /// The exit code.
    pub(crate) code: u8,
}

/// What a command returns: its exit code.
pub(crate) type Outcome = Result<u8, Failure>;

impl Failure {
    /// A failure with exit code 1.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), show_help_hint: false, code: 1 }
    }

    /// A command line that makes no sense.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self { text: text.into(), show_help_hint: true, code: 1 }
    }

    /// An exit code without a message.
    pub(crate) fn silent(code: u8) -> Self {
        Self { text: String::new(), show_help_hint: false, code }
    }

    /// The same with another exit code.
    pub(crate) fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// The same with the place on the host where `error` began, unless the text has it: the reference does not tell.
    pub(crate) fn with_place(self, error: &Error, context: &Context) -> Self {
        match host_place(error) {
            Some(place) if !context.is_reference() && !self.text.contains(&place) => {
                Self { text: format!("{} ({place})", self.text), ..self }
            }
            _ => self,
        }
    }

    /// A job had to stop. Where the host refused something, the reference has no words but the system's for it.
    pub(crate) fn of_job(error: &Error, context: &Context) -> Self {
        let told = words(error);
        match error {
            Error::Job { source, .. } if context.is_reference() && error.raw_os_error().is_some() => {
                let step = told.strip_suffix(&source.to_string()).unwrap_or(&told);
                Self::new(format!("{step}{}", system_reason(error)))
            }
            _ => Self::new(told),
        }
    }

    /// The image called `name` could not be opened.
    pub(crate) fn open(name: &str, error: &Error) -> Self {
        match error {
            Error::Cancelled => Self::from(error),
            Error::Open { source, .. } => Self::open(name, source),
            _ => Self::new(format!("Could not open '{name}': {}", words(error))),
        }
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self::new(words(error))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

/// The text of `error` in the reference's words where it has words for it, and in ours elsewhere.
pub(crate) fn words(error: &Error) -> String {
    match error {
        Error::Io { file, operation: "open", source, .. } => {
            format!("Could not open '{}': {}", text::from_path(file), os_text(source))
        }
        Error::Io { file, operation: "create", source, .. } => {
            format!("Could not create '{}': {}", text::from_path(file), os_text(source))
        }
        Error::Io { operation: "resize", source, .. } => {
            format!("Could not resize file: {}", os_text(source))
        }
        Error::Io { operation: "preallocate", source, .. } => {
            format!("Could not preallocate new data: {}", os_text(source))
        }
        Error::Io { operation: "write zeros for preallocation", source, .. } => {
            format!("Could not write zeros for preallocation: {}", os_text(source))
        }
        Error::WrongFormat { format: "vmdk", .. } => "invalid VMDK image descriptor".to_owned(),
        Error::WrongFormat { format, .. } => format!("Image is not in {format} format"),
        Error::Open { source, .. } => words(source),
        Error::Backing { source, .. } => format!("Could not open backing file: {}", words(source)),
        other => other.to_string(),
    }
}

/// The file, the operation and the offset at the root of `error`, where the system refused something.
fn host_place(error: &Error) -> Option<String> {
    match error {
        Error::Io { file, operation, at_bytes, .. } => {
            let at = at_bytes.map(|at| format!(" at byte {at:#x}")).unwrap_or_default();
            Some(format!("{}: {operation}{at}", text::from_path(file)))
        }
        Error::Open { source, .. } | Error::Backing { source, .. } | Error::Job { source, .. } => {
            host_place(source)
        }
        _ => None,
    }
}

/// The host's reason at the root of `error`, in the words of `strerror`, or the error itself.
pub(crate) fn reason(error: &Error) -> String {
    match error {
        Error::Io { source, .. } => os_text(source),
        other => words(other),
    }
}

/// The system's code at the root of `error` in the words of `strerror`; damage in an image counts as an I/O
/// error.
pub(crate) fn system_reason(error: &Error) -> String {
    /// `EIO`.
    const IO_ERROR: i32 = 5;
    os_text(&std::io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(IO_ERROR)))
}

/// The system's message without Rust's ` (os error N)`.
pub(crate) fn os_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
