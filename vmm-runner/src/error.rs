//! What can go wrong, in words for the person at the terminal.

use std::{io, path::PathBuf};

/// A result of the runner.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. Printed as one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` is not there or may not be opened.
    #[error("cannot open /dev/kvm: {0}{hint}", hint = kvm_hint(.0))]
    OpenKvm(io::Error),
    /// A call into KVM failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of the host.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Any other call into the host's kernel.
    #[error("{what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A disk image.
    #[error(transparent)]
    Image(#[from] img_core::Error),
    /// What was asked for makes no sense, or is not in this machine.
    #[error("{0}")]
    Invalid(String),
    /// The guest cannot go on.
    #[error("the guest stopped: {0}")]
    Guest(String),
}

impl Error {
    /// Names the KVM call that failed.
    pub fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |errno| Self::Kvm { what, source: io::Error::from_raw_os_error(errno.errno()) }
    }

    /// Names the host call that failed.
    pub fn host<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Host { what, source: source.into() }
    }

    /// Names the host file that a call failed on.
    pub fn file<E: Into<io::Error>>(path: impl Into<PathBuf>) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::File { path, source: source.into() }
    }
}

fn kvm_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "; load the module kvm_intel or kvm_amd, or switch virtualisation on in the firmware or in the outer machine"
        }
        io::ErrorKind::PermissionDenied => "; join the group that owns it (usually kvm), then log in again",
        _ => "",
    }
}
