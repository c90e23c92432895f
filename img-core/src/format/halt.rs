//! The end of all writing to a layer, and what was its cause.

use std::path::Path;

use super::table_cache::lock;
use crate::{
    Error, Result,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

/// Whether a layer still writes. After a change of several steps has failed between two of them, or a flush has, nobody
/// can tell what is on disk and what may follow it: nothing is written until the image is opened again. What is there
/// then is what a power cut would have left.
#[derive(Debug, Default)]
pub(super) struct Halt {
    is_halted: AtomicBool,
    /// What failed first. Set before the flag is.
    cause: Mutex<Option<String>>,
}

impl Halt {
    /// Passes a result on; when it is an error, nothing is written any more.
    pub(super) fn or_halt<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.halt(|| error.to_string());
        }
        result
    }

    /// Nothing is written any more, for this cause unless there was one before.
    pub(super) fn halt(&self, cause: impl FnOnce() -> String) {
        lock(&self.cause).get_or_insert_with(cause);
        self.is_halted.store(true, Ordering::SeqCst);
    }

    /// Whether nothing is written any more.
    pub(super) fn is_halted(&self) -> bool {
        self.is_halted.load(Ordering::SeqCst)
    }

    /// Refuses when nothing may be written to `file`. Somebody else may have met the cause, and may tell it later, or
    /// to nobody: it is told here, too.
    pub(super) fn check(&self, file: &Path) -> Result<()> {
        if !self.is_halted() {
            return Ok(());
        }
        let cause = lock(&self.cause).clone().expect("set before the flag is");
        Err(Error::Halted { file: file.to_owned(), cause })
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn whoever_is_refused_hears_what_failed_first() {
        let (halt, file) = (Halt::default(), Path::new("disk"));
        halt.or_halt(Ok(())).expect("passed on");
        halt.check(file).expect("nothing has failed");
        for errno in [Errno::IO, Errno::NOSPC] {
            let error = Error::Io {
                file: file.to_owned(),
                operation: "write",
                at_bytes: Some(8),
                source: errno.into(),
            };
            halt.or_halt(Err::<(), _>(error)).expect_err("passed on");
        }
        assert!(halt.is_halted());
        assert_eq!(
            halt.check(file).expect_err("nothing is written").to_string(),
            "disk: nothing is written until the image is opened again: disk: write at byte 0x8: Input/output error"
        );
    }
}
