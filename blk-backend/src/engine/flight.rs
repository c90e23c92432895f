//! Changes under way, by guest cluster; who would run into one waits here as a value, not as a thread.
//!
//! A change that may allocate, copy or give up clusters *enters* with the clusters it touches. A second one that
//! touches any of them is parked and handed to its lane when its turn comes; it has entered by then. Whoever came
//! first goes first: a parked change holds back what came later, too.

use std::{
    ops::Range,
    sync::{Arc, PoisonError},
};

use super::Mailbox;
use crate::sync::{Mutex, MutexGuard};

/// The changes under way on one disk.
#[derive(Debug, Default)]
pub(crate) struct Flight {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    entered: Vec<Change>,
    /// In the order of arrival.
    parked: Vec<Change>,
}

/// A change: which bytes, and whose.
#[derive(Debug)]
struct Change {
    guest_bytes: Range<u64>,
    owner: Arc<Mailbox>,
    slot: u32,
}

impl Change {
    fn touches(&self, range: &Range<u64>) -> bool {
        self.guest_bytes.start < range.end && range.start < self.guest_bytes.end
    }

    fn is_of(&self, owner: &Arc<Mailbox>, slot: u32) -> bool {
        self.slot == slot && Arc::ptr_eq(&self.owner, owner)
    }
}

impl Flight {
    /// Enters, or parks until the mailbox is told that `slot` has entered. The range is whole clusters. Returns
    /// whether it has entered.
    pub(crate) fn enter(&self, guest_bytes: Range<u64>, owner: &Arc<Mailbox>, slot: u32) -> bool {
        let mut state = self.state();
        let free = !state.entered.iter().chain(&state.parked).any(|other| other.touches(&guest_bytes));
        let change = Change { guest_bytes, owner: Arc::clone(owner), slot };
        if free {
            state.entered.push(change)
        } else {
            state.parked.push(change)
        }
        free
    }

    /// Ends a change that has entered, and lets those in who waited for it.
    pub(crate) fn leave(&self, owner: &Arc<Mailbox>, slot: u32) {
        let mut state = self.state();
        if let Some(at) = state.entered.iter().position(|change| change.is_of(owner, slot)) {
            let left = state.entered.swap_remove(at);
            state.let_in(&left.guest_bytes);
        }
    }

    /// Takes a parked change back. False when it has entered already.
    pub(crate) fn forget(&self, owner: &Arc<Mailbox>, slot: u32) -> bool {
        let mut state = self.state();
        let Some(at) = state.parked.iter().position(|change| change.is_of(owner, slot)) else { return false };
        let gone = state.parked.remove(at);
        state.let_in(&gone.guest_bytes);
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// After something that touched `freed` has gone.
    fn let_in(&mut self, freed: &Range<u64>) {
        let mut at = 0;
        while at < self.parked.len() {
            let (earlier, rest) = self.parked.split_at(at);
            let candidate = &rest[0];
            let waits = !candidate.touches(freed)
                || self.entered.iter().chain(earlier).any(|other| other.touches(&candidate.guest_bytes));
            if waits {
                at += 1;
                continue;
            }
            let change = self.parked.remove(at);
            change.owner.release(change.slot);
            self.entered.push(change);
        }
    }
}

#[cfg(all(test, not(explore)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lane() -> Arc<Mailbox> {
        Arc::new(Mailbox::new().expect("an eventfd"))
    }

    #[test]
    fn who_came_first_goes_first() {
        let (flight, lane) = (Flight::default(), lane());
        assert!(flight.enter(0..10, &lane, 1));
        assert!(!flight.enter(5..15, &lane, 2));
        assert!(!flight.enter(12..20, &lane, 3), "it would overtake the parked one");
        assert!(flight.enter(20..30, &lane, 4));
        flight.leave(&lane, 1);
        assert_eq!(lane.take_released(), [2]);
        flight.leave(&lane, 2);
        assert_eq!(lane.take_released(), [3]);
    }

    #[test]
    fn a_forgotten_change_holds_nobody_back() {
        let (flight, lane) = (Flight::default(), lane());
        assert!(flight.enter(0..10, &lane, 1));
        assert!(!flight.enter(5..15, &lane, 2));
        assert!(!flight.enter(12..20, &lane, 3));
        assert!(flight.forget(&lane, 2));
        assert_eq!(lane.take_released(), [3]);
        assert!(!flight.forget(&lane, 3), "it has entered");
    }

    proptest! {
        /// Whatever comes and goes, no two that have entered overlap, and none waits for nothing.
        #[test]
        fn entered_changes_never_overlap(steps in prop::collection::vec((0u64..40, 1u64..12, any::<bool>()), 1..80)) {
            let (flight, lane) = (Flight::default(), lane());
            let mut inside: Vec<(u32, Range<u64>)> = Vec::new();
            let mut outside: Vec<(u32, Range<u64>)> = Vec::new();
            for (slot, (start, length, leaves)) in (0u32..).zip(steps) {
                if leaves && !inside.is_empty() {
                    let at = usize::try_from(start).expect("small") % inside.len();
                    flight.leave(&lane, inside.swap_remove(at).0);
                    for slot in lane.take_released() {
                        let at = outside.iter().position(|parked| parked.0 == slot).expect("was parked");
                        inside.push(outside.remove(at));
                    }
                } else {
                    let range = start..start + length;
                    let entered = flight.enter(range.clone(), &lane, slot);
                    if entered { inside.push((slot, range)) } else { outside.push((slot, range)) }
                }
                let overlap = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
                for (index, (slot, range)) in inside.iter().enumerate() {
                    prop_assert!(inside[..index].iter().all(|(_, other)| !overlap(range, other)), "{slot}");
                }
                for (index, (_, range)) in outside.iter().enumerate() {
                    let before = inside.iter().chain(&outside[..index]);
                    prop_assert!(before.into_iter().any(|(_, other)| overlap(range, other)), "waits for nothing");
                }
            }
        }
    }
}
