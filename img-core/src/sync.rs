//! The locks and atomics of [`format`](crate::format), [`image`](crate::image) and [`job`](crate::job), and the threads of
//! jobs: the standard library's, or, where a test explores schedules (the package `explore`), ones that let it choose who
//! goes on at each of their steps.

#[cfg(explore)]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic},
    thread,
};
#[cfg(not(explore))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic},
    thread,
};

/// How many cores this process may use. Schedules that are explored are the same on every machine.
pub(crate) fn cores() -> usize {
    if cfg!(explore) { 2 } else { std::thread::available_parallelism().map_or(1, std::num::NonZero::get) }
}
