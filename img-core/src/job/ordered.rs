//! What keeps parallel work deterministic: tickets taken in order, turns, and the first outcome.
//!
//! Pieces of a job get a ticket in guest order. [`Turns`] lets threads do one step of each piece in that
//! order, whatever order they became ready in; [`First`] keeps the outcome of the lowest ticket, so that a
//! job ends the same way at any number of threads; [`Done`] reports progress as if pieces ended in order.
//! [`in_order`] is a whole job of such pieces.

use std::{array, collections::BTreeMap, sync::PoisonError};

use crate::{
    Error, Result,
    sync::{
        Condvar, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
        thread,
    },
};

/// Locks, also after another thread panicked: the panic itself reaches the caller through the scope.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A step that is done for one ticket after the other.
#[derive(Debug)]
pub(super) struct Turns {
    state: Mutex<TurnState>,
    passed: Condvar,
}

#[derive(Debug)]
struct TurnState {
    next: u64,
    /// Tickets from this one on have no turn any more.
    end: u64,
    /// How many threads wait. Telling them when there are none would be a system call for each ticket.
    waiting: usize,
}

impl Default for Turns {
    fn default() -> Self {
        Self { state: Mutex::new(TurnState { next: 0, end: u64::MAX, waiting: 0 }), passed: Condvar::new() }
    }
}

/// The turn of one ticket; dropping it passes it to the next.
#[must_use]
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits until all tickets before `ticket` had their turn; `None` when the work was stopped before it.
    pub(super) fn wait(&self, ticket: u64) -> Option<Turn<'_>> {
        let mut state = lock(&self.state);
        while ticket < state.end && state.next != ticket {
            state.waiting += 1;
            state = self.passed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        if ticket < state.end { Some(Turn(self)) } else { None }
    }

    /// Does `step` when all tickets before `ticket` had their turn; `None`, and it is not done, when the work was
    /// stopped before it. When it fails, `stop` is called before the turn is passed on, so that it can keep others
    /// from having theirs.
    ///
    /// # Errors
    /// Of `step`.
    pub(super) fn in_turn<T>(
        &self,
        ticket: u64,
        step: impl FnOnce() -> Result<T>,
        stop: impl FnOnce(),
    ) -> Result<Option<T>> {
        let Some(_turn) = self.wait(ticket) else { return Ok(None) };
        let outcome = step();
        if outcome.is_err() {
            stop();
        }
        outcome.map(Some)
    }

    /// Lets `ticket` and those behind it have no turn any more. Those before it still have theirs: what fails
    /// first in order is told, whatever failed first.
    pub(super) fn stop_from(&self, ticket: u64) {
        let mut state = lock(&self.state);
        state.end = state.end.min(ticket);
        drop(state);
        self.passed.notify_all();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.next += 1;
        if state.waiting > 0 {
            drop(state);
            self.0.passed.notify_all();
        }
    }
}

/// Stops the turns when its thread panics, or others would wait for ever.
pub(super) struct StopOnPanic<'a>(pub(super) &'a Turns);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop_from(0);
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

/// A piece that a thread of [`in_order`] works on.
pub(super) struct Ticket<'a, const STAGES: usize> {
    number: u64,
    crew: &'a Crew<STAGES>,
}

struct Crew<const STAGES: usize> {
    stages: [Turns; STAGES],
    failed: First<Error>,
}

impl<const STAGES: usize> Ticket<'_, STAGES> {
    /// Does `step` when all pieces before had their turn at a stage; `None`, and it is not done, when one of them
    /// failed. A stage at which one piece has a turn is one at which all have.
    ///
    /// # Errors
    /// Of `step`: nobody has a turn behind it.
    pub(super) fn in_turn<T>(&self, stage: usize, step: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        self.crew.stages[stage].in_turn(self.number, step, || self.crew.stop_from(self.number))
    }

    /// Whether a piece before this one failed.
    pub(super) fn is_late(&self) -> bool {
        self.crew.failed.is_before(self.number)
    }
}

impl<const STAGES: usize> Crew<STAGES> {
    fn fail(&self, ticket: u64, error: Error) {
        self.failed.offer(ticket, error);
        self.stop_from(ticket);
    }

    fn stop_from(&self, ticket: u64) {
        for turns in &self.stages {
            turns.stop_from(ticket);
        }
    }
}

/// Does `work` on all pieces that `next` gives, on so many threads, each with hands of its own that `next` may fill
/// for the piece. `next` is called by one thread at a time; of the steps of `work`, those that have a turn at one
/// of the `STAGES` come in the order of the pieces.
///
/// # Errors
/// Of the first piece that failed; no piece is begun behind it, and none has a turn.
pub(super) fn in_order<const STAGES: usize, H: Default, P>(
    threads: usize,
    next: &mut (dyn FnMut(&mut H) -> Result<Option<P>> + Send),
    work: &(dyn Fn(&Ticket<'_, STAGES>, P, &mut H) -> Result<()> + Sync),
) -> Result<()> {
    let crew = Crew { stages: array::from_fn(|_| Turns::default()), failed: First::new() };
    // What gives the pieces, until there are no more, and the number of the next one.
    let tickets = Mutex::new((Some(next), 0));
    let claim = |hands: &mut H| {
        let mut tickets = lock(&tickets);
        let (next, number) = &mut *tickets;
        let ticket = *number;
        let piece = if crew.failed.is_before(ticket) { Ok(None) } else { next.as_mut()?(hands) };
        let piece = piece.unwrap_or_else(|error| {
            crew.fail(ticket, error);
            None
        });
        if piece.is_none() {
            *next = None;
        }
        *number += 1;
        piece.map(|piece| (ticket, piece))
    };
    let run = || {
        let _stops = crew.stages.each_ref().map(StopOnPanic);
        let mut hands = H::default();
        while let Some((number, piece)) = claim(&mut hands) {
            if let Err(error) = work(&Ticket { number, crew: &crew }, piece, &mut hands) {
                return crew.fail(number, error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(run);
        }
        run();
    });
    crew.failed.into_inner().map_or(Ok(()), Err)
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
        thread::scope(|scope| {
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
    fn stopping_frees_those_who_wait_behind() {
        let turns = Turns::default();
        thread::scope(|scope| {
            let waits = scope.spawn(|| turns.wait(7).is_none());
            turns.stop_from(1);
            assert!(waits.join().expect("no panic"));
        });
        assert!(turns.wait(0).is_some(), "the one before still has its turn");
        assert!(turns.wait(1).is_none());
    }

    /// Those who wait for their turn behind a step that fails have been stopped when it ends.
    #[test]
    fn a_step_that_fails_stops_others_in_its_own_turn() {
        let turns = Turns::default();
        let passed = turns.in_turn(0, || Ok(7), || panic!("nothing fails"));
        assert_eq!(passed.expect("nothing fails"), Some(7));
        let failed = turns.in_turn(
            1,
            || Err::<(), _>(Error::Invalid("no".to_owned())),
            || {
                assert_eq!(lock(&turns.state).next, 1, "it still has its turn");
                turns.stop_from(1);
            },
        );
        assert_eq!(failed.expect_err("it fails").to_string(), "no");
        let behind = turns.in_turn(2, || -> Result<()> { panic!("it has no turn") }, || ());
        assert!(behind.expect("nothing fails").is_none());
    }

    /// Two stages, each in order, for pieces that `next` put into the hands; and what fails first in order is told,
    /// though a later piece failed before it.
    #[test]
    fn pieces_pass_every_stage_in_order_until_the_first_that_fails() {
        for fails in [u64::MAX, 500] {
            let (seen, mut count) = (Mutex::new([Vec::new(), Vec::new()]), 0);
            let outcome = in_order(
                4,
                &mut |hands: &mut u64| {
                    *hands = count;
                    count += 1;
                    match *hands {
                        1000 => Ok(None),
                        // Told before the work on those before it is done.
                        at if at == fails.saturating_add(2) => Err(Error::Invalid("later".to_owned())),
                        at => Ok(Some(at)),
                    }
                },
                &|ticket: &Ticket<'_, 2>, piece, hands: &mut u64| {
                    assert_eq!(piece, *hands);
                    for stage in 0..2 {
                        ticket.in_turn(stage, || {
                            if stage == 1 && piece == fails {
                                return Err(Error::Invalid("first".to_owned()));
                            }
                            lock(&seen)[stage].push(piece);
                            Ok(())
                        })?;
                    }
                    Ok(())
                },
            );
            let seen = seen.into_inner().expect("no panic");
            if fails == u64::MAX {
                outcome.expect("nothing fails");
                assert_eq!(seen, [0, 1].map(|_| (0..1000).collect::<Vec<_>>()));
            } else {
                assert_eq!(outcome.expect_err("one fails").to_string(), "first");
                assert_eq!(seen[1], (0..500).collect::<Vec<_>>());
            }
        }
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
