//! Requests that the host failed, on their way from the queues to those who are told.
//!
//! Queues never wait here. What comes too fast for clients is counted and not told; that the guest has to be held is
//! never lost.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
    thread,
};

use blk_backend::virtio::Action;

use super::{Runner, runner::FailedRequest};
use crate::{Error, Result};

/// More than so many are not kept.
const MAX_WAITING: usize = 1024;

#[derive(Debug, Default)]
struct Waiting {
    list: VecDeque<FailedRequest>,
    untold: u64,
    is_closed: bool,
}

/// The failures that nobody was told of yet.
#[derive(Debug, Default)]
pub(super) struct Failures {
    waiting: Mutex<Waiting>,
    came: Condvar,
}

impl Failures {
    /// From a queue: the host failed a request of a disk.
    pub(super) fn add(&self, request: FailedRequest) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // One of these holds its queue, so that there are few.
        if waiting.list.len() < MAX_WAITING || request.failure.action == Action::Stop {
            waiting.list.push_back(request);
        } else {
            waiting.untold += 1;
        }
        self.came.notify_one();
    }

    /// No more are told.
    pub(super) fn close(&self) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_closed = true;
        self.came.notify_one();
    }

    /// The next one, with how many before it are not told. `None` when it is closed.
    fn next(&self) -> Option<(FailedRequest, u64)> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if waiting.is_closed {
                return None;
            }
            if let Some(request) = waiting.list.pop_front() {
                return Some((request, std::mem::take(&mut waiting.untold)));
            }
            waiting = self.came.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Tells a run of its failures for as long as it is there.
///
/// # Errors
/// When the host has no thread.
pub(super) fn start(failures: &Arc<Failures>, runner: Weak<Runner>) -> Result<()> {
    let failures = Arc::clone(failures);
    thread::Builder::new()
        .name("failures".to_owned())
        .spawn(move || {
            while let Some((request, untold)) = failures.next() {
                let Some(runner) = runner.upgrade() else { return };
                if untold > 0 {
                    Runner::tell(&format!("{untold} more requests failed, of which clients were not told"));
                }
                runner.failed(request);
            }
        })
        .map(drop)
        .map_err(Error::host("a thread for failures"))
}

#[cfg(test)]
mod tests {
    use blk_backend::{request::Errno, virtio::Failure};

    use super::*;

    #[test]
    fn a_flood_is_bounded_and_never_hides_that_the_guest_must_be_held() {
        let failures = Failures::default();
        let request = |action| {
            let failure = Failure { is_read: true, errno: Errno::IO, action };
            FailedRequest { disk: 0, machine: 1, failure }
        };
        for _ in 0..MAX_WAITING + 7 {
            failures.add(request(Action::Report));
        }
        failures.add(request(Action::Stop));
        let mut told = Vec::new();
        let mut untold = 0;
        while told.last() != Some(&Action::Stop) {
            let (request, more) = failures.next().expect("it is open");
            told.push(request.failure.action);
            untold += more;
        }
        assert_eq!((told.len(), untold), (MAX_WAITING + 1, 7));
        failures.close();
        assert!(failures.next().is_none());
    }
}
