//! A storage that fails at the n-th operation.

use std::{
    fmt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::io::Errno;

use super::interpose::{Hook, Interposed, Operation, Request, delegate_storage};
use crate::{Error, Result, storage::Storage};

/// Fails one operation, or all from one on, with an I/O error; what fails does not happen.
///
/// A test runs its sequence with `nth` = 0, 1, 2, … until [`Self::seen`] is not past `nth` any more: then
/// every operation has failed once.
#[derive(Debug)]
pub struct FailAt {
    storage: Interposed<Failing>,
}

struct Failing {
    which: fn(Operation) -> bool,
    nth: u64,
    for_good: bool,
    seen: AtomicU64,
}

impl FailAt {
    /// Fails the `nth` (from 0) of the operations that `which` chooses, once.
    pub fn once(inner: Arc<dyn Storage>, which: fn(Operation) -> bool, nth: u64) -> Self {
        Self::new(inner, which, nth, false)
    }

    /// Fails the `nth` (from 0) of the operations that `which` chooses and all of them after it.
    pub fn for_good(inner: Arc<dyn Storage>, which: fn(Operation) -> bool, nth: u64) -> Self {
        Self::new(inner, which, nth, true)
    }

    fn new(inner: Arc<dyn Storage>, which: fn(Operation) -> bool, nth: u64, for_good: bool) -> Self {
        Self {
            storage: Interposed { inner, hook: Failing { which, nth, for_good, seen: AtomicU64::new(0) } },
        }
    }

    /// How many of the chosen operations were tried, failed ones included.
    pub fn seen(&self) -> u64 {
        self.storage.hook.seen.load(Ordering::Relaxed)
    }
}

delegate_storage!(FailAt);

impl Hook for Failing {
    fn before(&self, path: &Path, request: &Request) -> Result<()> {
        if !(self.which)(request.operation) {
            return Ok(());
        }
        let this = self.seen.fetch_add(1, Ordering::Relaxed);
        if this == self.nth || (self.for_good && this > self.nth) {
            return Err(Error::io_at(path, request.operation.verb(), request.range_bytes.start, Errno::IO));
        }
        Ok(())
    }
}

impl fmt::Debug for Failing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failing").field("nth", &self.nth).field("for_good", &self.for_good).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Flush, MemoryStorage};

    #[test]
    fn the_chosen_operation_fails_and_does_not_happen() -> Result<()> {
        let memory = Arc::new(MemoryStorage::new("m"));
        let failing = FailAt::once(memory.clone(), Operation::is_change, 1);
        failing.write_at(b"a", 0)?;
        failing.read_at(&mut [0], 0)?;
        let error = failing.write_at(b"b", 1).expect_err("the second change");
        assert_eq!(error.to_string(), "m: write at byte 0x1: Input/output error");
        failing.flush(Flush::Data)?;
        assert_eq!((memory.to_vec(), failing.seen()), (b"a".to_vec(), 3));

        let dead = FailAt::for_good(memory, |operation| operation == Operation::Flush, 0);
        dead.write_at(b"c", 0)?;
        assert!(dead.flush(Flush::Data).is_err() && dead.flush(Flush::All).is_err());
        Ok(())
    }
}
