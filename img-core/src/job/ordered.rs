//! What keeps parallel work deterministic: tickets taken in order, turns, and the first outcome.
//!
//! Pieces of a job get a ticket in guest order. [`Turns`] lets threads do one step of each piece in that
//! order, whatever order they became ready in; [`First`] keeps the outcome of the lowest ticket, so that a
//! job ends the same way at any number of threads; [`Done`] reports progress as if pieces ended in order.

use std::{
    collections::BTreeMap,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Locks, also after another thread panicked: the panic itself reaches the caller through the scope.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A step that is done for one ticket after the other.
#[derive(Debug, Default)]
pub(super) struct Turns {
    state: Mutex<TurnState>,
    passed: Condvar,
}

#[derive(Debug, Default)]
struct TurnState {
    next: u64,
    stopped: bool,
}

/// The turn of one ticket; dropping it passes it to the next.
#[must_use]
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits until all tickets before `ticket` had their turn; `None` when the work was stopped.
    pub(super) fn wait(&self, ticket: u64) -> Option<Turn<'_>> {
        let mut state = lock(&self.state);
        while !state.stopped && state.next != ticket {
            state = self.passed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped { None } else { Some(Turn(self)) }
    }

    /// Lets nobody have a turn any more.
    pub(super) fn stop(&self) {
        lock(&self.state).stopped = true;
        self.passed.notify_all();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).next += 1;
        self.0.passed.notify_all();
    }
}

/// Stops the turns when its thread panics, or others would wait for ever.
pub(super) struct StopOnPanic<'a>(pub(super) &'a Turns);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// The outcome of the lowest ticket that had one.
#[derive(Debug)]
pub(super) struct First<T> {
    found: Mutex<Option<(u64, T)>>,
    ticket: AtomicU64,
}

impl<T> First<T> {
    pub(super) fn new() -> Self {
        Self { found: Mutex::new(None), ticket: AtomicU64::new(u64::MAX) }
    }

    /// Offers the outcome of `ticket`.
    pub(super) fn offer(&self, ticket: u64, outcome: T) {
        let mut found = lock(&self.found);
        if found.as_ref().is_none_or(|(known, _)| ticket < *known) {
            *found = Some((ticket, outcome));
            self.ticket.store(ticket, Ordering::Release);
        }
    }

    /// Whether work on `ticket` cannot change the outcome any more.
    pub(super) fn is_before(&self, ticket: u64) -> bool {
        self.ticket.load(Ordering::Acquire) < ticket
    }

    pub(super) fn into_inner(self) -> Option<T> {
        self.found.into_inner().unwrap_or_else(PoisonError::into_inner).map(|(_, outcome)| outcome)
    }
}

/// Pieces that are done, told on in order.
#[derive(Debug, Default)]
pub(super) struct Done(Mutex<DoneState>);

#[derive(Debug, Default)]
struct DoneState {
    next: u64,
    done: u64,
    /// Done before their turn: bounded by the number of threads.
    early: BTreeMap<u64, u64>,
}

impl Done {
    /// Notes that `ticket` is done and was `amount` long; calls `tell` with the sum for each ticket that has
    /// none undone before it.
    pub(super) fn add(&self, ticket: u64, amount: u64, tell: impl Fn(u64)) {
        let mut state = lock(&self.0);
        state.early.insert(ticket, amount);
        while let Some(amount) = {
            let next = state.next;
            state.early.remove(&next)
        } {
            state.next += 1;
            state.done += amount;
            tell(state.done);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_come_in_order_whoever_is_first() {
        let (turns, seen, tickets) = (Turns::default(), Mutex::new(Vec::new()), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let ticket = tickets.fetch_add(1, Ordering::Relaxed);
                        if ticket >= 1000 {
                            break;
                        }
                        let _turn = turns.wait(ticket).expect("nobody stops");
                        lock(&seen).push(ticket);
                    }
                });
            }
        });
        assert_eq!(seen.into_inner().expect("no panic"), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn stopping_frees_those_who_wait() {
        let turns = Turns::default();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| turns.wait(7).is_none());
            turns.stop();
            assert!(waits.join().expect("no panic"));
        });
    }

    #[test]
    fn the_lowest_ticket_decides() {
        let first = First::new();
        first.offer(5, "five");
        assert!(first.is_before(6) && !first.is_before(4));
        first.offer(3, "three");
        first.offer(4, "four");
        assert_eq!(first.into_inner(), Some("three"));
    }

    #[test]
    fn done_pieces_are_told_in_order() {
        let (done, told) = (Done::default(), Mutex::new(Vec::new()));
        for (ticket, amount) in [(1, 10), (0, 1), (3, 1000), (2, 100)] {
            done.add(ticket, amount, |sum| lock(&told).push(sum));
        }
        assert_eq!(told.into_inner().expect("no panic"), [1, 11, 111, 1111]);
    }
}
