//! Waiting for a change of what a lock guards.

use std::sync::PoisonError;

use crate::sync::{
    Condvar, MutexGuard,
    atomic::{AtomicUsize, Ordering},
};

/// A condition variable that costs nothing to notify while nobody waits: the standard library's makes a system call
/// each time.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    condition: Condvar,
    /// Changed with the lock held.
    waiting: AtomicUsize,
}

impl Waiters {
    /// Gives the lock up until somebody may have changed what it guards. As with any condition variable that may be
    /// nobody.
    pub(super) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let guard = self.condition.wait(guard).unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    /// Wakes those who wait, after a change that was made with the lock held: who gave the lock up before that is
    /// counted by then.
    pub(super) fn notify_all(&self) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.condition.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;
    use crate::sync::Mutex;

    /// A number that two threads count up by turns: one lost wake-up, and it never ends.
    #[test]
    fn nobody_who_waits_is_forgotten() {
        const LAST: u64 = 20_000;
        let shared = Arc::new((Mutex::new(0_u64), Waiters::default()));
        let threads: Vec<_> = (0..2)
            .map(|own| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let (number, waiters) = &*shared;
                    for _ in 0..LAST / 2 {
                        let mut number = number.lock().expect("no panic");
                        while *number % 2 != own {
                            number = waiters.wait(number);
                        }
                        *number += 1;
                        drop(number);
                        waiters.notify_all();
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        assert_eq!(*shared.0.lock().expect("no panic"), LAST);
        assert_eq!(shared.1.waiting.load(Ordering::Relaxed), 0);
    }
}
