//! Letting requests through, and holding them back while the whole image changes.

use std::{sync::PoisonError, task::Waker};

use crate::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};

/// Set while someone wants the image alone.
const CLOSED: u64 = 1 << 63;

/// Counts the requests in flight. A request takes no lock to get in; who wants the image alone
/// ([`drain`](Self::drain)) closes the gate and waits until the last one has left.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// Requests inside, and [`CLOSED`].
    state: AtomicU64,
    /// Held by who has, or is waiting for, the image alone.
    alone: Mutex<()>,
    /// Guards waiting for a change of `state` by the two condition variables.
    waiting: Mutex<()>,
    emptied: Condvar,
    opened: Condvar,
    parked: Parked,
}

/// Those who wait for progress without blocking.
#[derive(Debug, Default)]
struct Parked {
    wakers: Mutex<Vec<Waker>>,
    /// Whether there are any.
    any: AtomicBool,
}

/// A request that is inside.
#[must_use = "the request ends when this is dropped"]
#[derive(Debug)]
pub(crate) struct Pass<'a>(&'a Gate);

/// The image alone.
#[must_use = "requests go on when this is dropped"]
pub(super) struct Alone<'a> {
    gate: &'a Gate,
    _turn: MutexGuard<'a, ()>,
}

impl Gate {
    /// Waits only while someone has the image alone. Must not be called by who is inside already.
    pub(super) fn enter(&self) -> Pass<'_> {
        loop {
            if self.state.fetch_add(1, Ordering::SeqCst) & CLOSED == 0 {
                return Pass(self);
            }
            self.leave();
            let mut waiting = self.lock_waiting();
            while self.state.load(Ordering::SeqCst) & CLOSED != 0 {
                waiting = self.opened.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// A pass, unless someone has, or wants, the image alone. Never waits.
    pub(super) fn try_enter(&self) -> Option<Pass<'_>> {
        if self.state.fetch_add(1, Ordering::SeqCst) & CLOSED == 0 {
            return Some(Pass(self));
        }
        self.leave();
        None
    }

    /// Wakes `waker` once, after the next progress.
    pub(super) fn wake_on_progress(&self, waker: &Waker) {
        let mut wakers = self.parked.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        if !wakers.iter().any(|known| known.will_wake(waker)) {
            wakers.push(waker.clone());
        }
        self.parked.any.store(true, Ordering::SeqCst);
        // Either whoever makes progress sees the waker, or the second try of who parks sees the progress.
        fence(Ordering::SeqCst);
    }

    /// Something ended that others may have found in their way.
    pub(super) fn progressed(&self) {
        fence(Ordering::SeqCst);
        if !self.parked.any.load(Ordering::SeqCst) {
            return;
        }
        let wakers = {
            let mut wakers = self.parked.wakers.lock().unwrap_or_else(PoisonError::into_inner);
            self.parked.any.store(false, Ordering::SeqCst);
            std::mem::take(&mut *wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Holds new requests back and waits for those inside.
    pub(super) fn drain(&self) -> Alone<'_> {
        let turn = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        let mut waiting = self.lock_waiting();
        while self.state.load(Ordering::SeqCst) != CLOSED {
            waiting = self.emptied.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        drop(waiting);
        Alone { gate: self, _turn: turn }
    }

    /// Ends a pass that was [kept](Pass::keep).
    pub(super) fn leave(&self) {
        if self.state.fetch_sub(1, Ordering::SeqCst) == CLOSED + 1 {
            let _waiting = self.lock_waiting();
            self.emptied.notify_all();
        }
    }

    fn lock_waiting(&self) -> MutexGuard<'_, ()> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass<'_> {
    /// Leaves it to the caller to [`Gate::leave`].
    pub(super) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.gate.state.fetch_and(!CLOSED, Ordering::SeqCst);
        let waiting = self.gate.lock_waiting();
        self.gate.opened.notify_all();
        drop(waiting);
        self.gate.progressed();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicUsize, thread};

    use super::*;

    #[test]
    fn nobody_is_inside_while_someone_is_alone() {
        let (gate, inside) = (Gate::default(), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let _pass = gate.enter();
                        inside.fetch_add(1, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _alone = gate.drain();
                        for _ in 0..20 {
                            assert_eq!(inside.load(Ordering::SeqCst), 0);
                        }
                    }
                });
            }
        });
        assert_eq!(gate.state.load(Ordering::SeqCst), 0);
    }
}
