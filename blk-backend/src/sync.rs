//! The locks and atomics by which lanes, workers and others hand things to each other: the standard library's. Tests
//! that explore schedules (the package `explore`) compile the same sources with others, which let them choose who goes
//! on at each step.

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};
