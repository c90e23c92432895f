//! The one error type of the crate, written for the person at the terminal.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use crate::text;

/// What the library's operations return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on an image failed.
///
/// Every variant carries what a person needs to act: which file, which structure at which offset,
/// what was expected and what was found, which feature is not supported, or who holds the lock.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a host file.
    #[error("{}: {operation}{}: {}", text::from_path(file), at(*at_bytes), os_text(source))]
    Io {
        /// The host file.
        file: PathBuf,
        /// What was tried: a verb such as `"read"`.
        operation: &'static str,
        /// Where in the file, when it has a place.
        at_bytes: Option<u64>,
        /// The system's answer.
        source: io::Error,
    },

    /// A host file could not be opened.
    #[error("Could not open '{}': {}", text::from_path(file), os_text(source))]
    OpenFile {
        /// The host file.
        file: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// A host file could not be made.
    #[error("Could not create '{}': {}", text::from_path(file), os_text(source))]
    CreateFile {
        /// The host file.
        file: PathBuf,
        /// The system's answer.
        source: io::Error,
    },

    /// A structure of the image breaks its format's rules.
    #[error(
        "{}: {structure} at byte {at_bytes:#x}: expected {expected}, found {found}",
        text::from_path(file)
    )]
    Corrupt {
        /// The host file.
        file: PathBuf,
        /// The structure and field, e.g. `header.cluster_bits`.
        structure: &'static str,
        /// Host offset of the structure.
        at_bytes: u64,
        /// The rule, in words.
        expected: String,
        /// The value in the file.
        found: String,
    },

    /// The image is well-formed but needs something this build does not do.
    #[error("{}: {feature} is not supported", text::from_path(file))]
    Unsupported {
        /// The host file.
        file: PathBuf,
        /// The feature by name.
        feature: String,
    },

    /// The bytes are not of the format that the caller named.
    #[error("{}: not a {format} image", text::from_path(file))]
    WrongFormat {
        /// The host file.
        file: PathBuf,
        /// The format that was asked for.
        format: &'static str,
    },

    /// Another process holds a lock that excludes this use.
    #[error("Failed to get {} lock\nIs another process using the image [{}]?", lock_name(permission, *shared), text::from_path(file))]
    Locked {
        /// The host file.
        file: PathBuf,
        /// The permission in QEMU's words: `"write"`, `"consistent read"`, ...
        permission: &'static str,
        /// Whether the refusal concerns sharing that permission rather than using it.
        shared: bool,
    },

    /// The image was opened without write access.
    #[error("{}: the image is read-only", text::from_path(file))]
    ReadOnly {
        /// The host file.
        file: PathBuf,
    },

    /// A change would have overwritten metadata; the image is marked corrupt and no longer written.
    #[error(
        "{}: refused to write {length_bytes} bytes at {at_bytes:#x}: overlaps with {structure}; the image is marked corrupt",
        text::from_path(file)
    )]
    Overlap {
        /// The host file.
        file: PathBuf,
        /// The structure that would have been damaged.
        structure: &'static str,
        /// Host offset of the refused write.
        at_bytes: u64,
        /// Its length.
        length_bytes: u64,
    },

    /// A backing chain names a file that is already above it.
    #[error("{}: the backing chain loops back to this file", text::from_path(file))]
    BackingLoop {
        /// The file met twice.
        file: PathBuf,
    },

    /// An option or argument has a value that is refused.
    #[error("{0}")]
    Invalid(String),

    /// No snapshot has that id or name.
    #[error("{}: no snapshot has the id or name '{name}'", text::from_path(file))]
    NoSuchSnapshot {
        /// The host file.
        file: PathBuf,
        /// What was asked for.
        name: String,
    },

    /// Nothing is written to an image any more: a change of several steps, or a flush, has failed since it was opened.
    #[error("{}: nothing is written until the image is opened again: {cause}", text::from_path(file))]
    Halted {
        /// The image.
        file: PathBuf,
        /// What failed first.
        cause: String,
    },

    /// The caller asked a running job to stop.
    #[error("cancelled")]
    Cancelled,

    /// An error met while doing something to a named image: adds the outer step, keeps the cause.
    #[error("Could not open '{name}': {source}")]
    Open {
        /// The image as the user named it.
        name: String,
        /// What went wrong.
        source: Box<Error>,
    },

    /// The backing file of an image could not be opened.
    #[error("Could not open backing file: {source}")]
    Backing {
        /// The image whose backing file it is.
        file: PathBuf,
        /// What went wrong.
        source: Box<Error>,
    },

    /// A whole-image job had to stop. The place is what a user of the disk sees, the cause says what
    /// happened on the host.
    #[error("error while {step} at {} {at_bytes}: {source}", step.unit())]
    Job {
        /// What the job was doing.
        step: JobStep,
        /// Which of the job's input images it was doing it to, counted from 0.
        input: usize,
        /// Guest offset: in that input for [`JobStep::Map`], in the output of a conversion otherwise.
        at_bytes: u64,
        /// What went wrong.
        source: Box<Error>,
    },
}

/// The steps of a whole-image job, in the reference's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobStep {
    /// Asking where guest bytes live.
    Map,
    /// Reading guest bytes.
    Read,
    /// Writing guest bytes.
    Write,
}

impl JobStep {
    /// What the reference calls the place.
    fn unit(self) -> &'static str {
        match self {
            Self::Map => "offset",
            Self::Read | Self::Write => "byte",
        }
    }
}

impl fmt::Display for JobStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Map => "reading block status",
            Self::Read => "reading",
            Self::Write => "writing",
        })
    }
}

impl Error {
    /// An [`Error::Io`] without a place in the file.
    pub fn io(file: &Path, operation: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Io { file: file.to_owned(), operation, at_bytes: None, source: source.into() }
    }

    /// An [`Error::Io`] at a byte offset.
    pub fn io_at(file: &Path, operation: &'static str, at_bytes: u64, source: impl Into<io::Error>) -> Self {
        Self::Io { file: file.to_owned(), operation, at_bytes: Some(at_bytes), source: source.into() }
    }

    /// An [`Error::Corrupt`].
    pub fn corrupt(
        file: &Path,
        structure: &'static str,
        at_bytes: u64,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Self {
        Self::Corrupt {
            file: file.to_owned(),
            structure,
            at_bytes,
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(file: &Path, feature: impl fmt::Display) -> Self {
        Self::Unsupported { file: file.to_owned(), feature: feature.to_string() }
    }

    /// The operating system's error code at the root of this error, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } | Self::OpenFile { source, .. } | Self::CreateFile { source, .. } => {
                source.raw_os_error()
            }
            Self::Open { source, .. } | Self::Backing { source, .. } | Self::Job { source, .. } => {
                source.raw_os_error()
            }
            _ => None,
        }
    }
}

/// ` at byte 0x…`, or nothing.
fn at(at_bytes: Option<u64>) -> String {
    at_bytes.map(|at| format!(" at byte {at:#x}")).unwrap_or_default()
}

/// The system's message without Rust's ` (os error N)`, as every other tool prints it.
pub(crate) fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

fn lock_name(permission: &str, shared: bool) -> String {
    if shared { format!("shared \"{permission}\"") } else { format!("\"{permission}\"") }
}
