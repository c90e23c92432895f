//! The locks and atomics of [`format`](crate::format) and [`image`](crate::image): the standard library's, or, where
//! a test explores schedules (the package `explore`), ones that let it choose who goes on at each of their steps.

#[cfg(explore)]
pub(crate) use shuttle::sync::{
    Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic,
};
#[cfg(not(explore))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic};
