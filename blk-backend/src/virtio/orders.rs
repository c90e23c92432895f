//! How other threads reach a worker.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::SyncSender,
    },
};

use super::{setup::QueueState, worker::Worker};
use crate::engine::LaneWaker;

/// Something to do on the worker's thread.
type Job = Box<dyn FnOnce(&mut Worker) + Send>;

pub(super) enum Order {
    /// Now.
    Now(Job),
    /// When no request is under way; nothing new begins before.
    Drained(Job),
    /// Drained, then the end.
    Stop(SyncSender<QueueState>),
}

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Now(_) => "Now",
            Self::Drained(_) => "Drained",
            Self::Stop(_) => "Stop",
        })
    }
}

/// A list of orders that wakes its worker.
#[derive(Debug)]
pub struct Orders {
    /// There are some.
    posted: AtomicBool,
    /// `None` when nobody follows them any more.
    list: Mutex<Option<VecDeque<Order>>>,
    waker: LaneWaker,
}

impl Orders {
    /// For the worker that `waker` wakes.
    pub(super) fn new(waker: LaneWaker) -> Self {
        Self { posted: AtomicBool::new(false), list: Mutex::new(Some(VecDeque::new())), waker }
    }

    pub(crate) fn now(&self, job: impl FnOnce(&mut Worker) + Send + 'static) {
        self.post(Order::Now(Box::new(job)));
    }

    pub(crate) fn drained(&self, job: impl FnOnce(&mut Worker) + Send + 'static) {
        self.post(Order::Drained(Box::new(job)));
    }

    pub(crate) fn stop(&self, state: SyncSender<QueueState>) {
        self.post(Order::Stop(state));
    }

    /// Nobody follows orders any more: those that are left, and all that come, are dropped, and whoever waits for
    /// their end learns that.
    pub(crate) fn close(&self) {
        drop(self.list.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn post(&self, order: Order) {
        if let Some(list) = self.list.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            list.push_back(order);
        }
        self.posted.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Takes those that came since.
    pub(super) fn take(&self, into: &mut VecDeque<Order>) {
        if self.posted.load(Ordering::Relaxed) && self.posted.swap(false, Ordering::Acquire) {
            let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            into.extend(list.iter_mut().flat_map(|list| list.drain(..)));
        }
    }
}
