//! The device inside a virtual machine monitor: guest memory, a queue, a kick and a call descriptor.
//!
//! ```no_run
//! # use std::sync::Arc;
//! # use blk_backend::{disk::{Disk, DiskOptions}, in_process::QueueThread, virtio::{Device, DeviceOptions, Features, GuestRam, ring::RingLayout, setup::QueueSetup}};
//! # use img_core::image::ImageName;
//! # fn f(ram: Arc<GuestRam>, rings: RingLayout, kick: std::os::fd::OwnedFd, call: std::os::fd::OwnedFd, accepted: Features) -> Result<(), Box<dyn std::error::Error>> {
//! let disk = Disk::open(&ImageName::parse("disk.qcow2")?, &DiskOptions::default())?;
//! let device = Device::new(&disk, &DeviceOptions::default())?;
//! // … the driver reads `device.offered()` and `device.config()`, and accepts features …
//! device.negotiate(accepted)?;
//! // … it sets up a queue …
//! let queue = QueueThread::start(&device, "disk0-q0", QueueSetup {
//!     ram, rings, next_avail: 0, features: accepted,
//!     kick: Some(kick), call: Some(call), error: None, inflight: None, redo: None, log: None, paused: false,
//! })?;
//! queue.pause()?; // returns when nothing is under way
//! queue.resume();
//! queue.stop()?;  // also the reset of one queue (virtio 1.2, section 2.6.1)
//! # Ok(()) }
//! ```

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, mpsc::sync_channel},
    thread::JoinHandle,
};

use rustix::{
    process::getpid,
    thread::{sched_getaffinity, sched_setaffinity},
};

use crate::virtio::{
    Device, GuestRam,
    dirty_log::QueueLog,
    orders::Orders,
    setup::{QueueError, QueueSetup, QueueState},
    worker::Worker,
};

/// One queue at work on a thread of its own. Dropped, it drains and stops.
#[derive(Debug)]
pub struct QueueThread {
    orders: Arc<Orders>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// Lets the calling thread run where the process's first thread may. A thread begins where its maker may run, and a
/// queue is started by the thread of a processor of the guest, which may be pinned: serving the guest from there as well
/// would take the guest's own time.
///
/// # Errors
/// When the system refuses.
pub fn unpin_thread() -> io::Result<()> {
    let of_process = sched_getaffinity(Some(getpid()))?;
    Ok(sched_setaffinity(None, &of_process)?)
}

/// The thread of a queue has ended by itself: the system refused it something that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the thread of the queue has ended")]
pub struct QueueGone;

/// Says that no order is followed any more, however the thread ends.
struct Closing(Arc<Orders>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl QueueThread {
    /// Starts a thread called `name` for a queue of `device`. What is available already is served at once.
    ///
    /// # Errors
    /// [`QueueError`] when the setup cannot be, or there can be no thread.
    pub fn start(device: &Arc<Device>, name: &str, setup: QueueSetup) -> Result<Self, QueueError> {
        let device = Arc::clone(device);
        let (started, result) = sync_channel(1);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let unpinned = unpin_thread().map_err(QueueError::Io);
            let mut worker = match unpinned.and_then(|()| Worker::new(&device, setup)) {
                Ok(worker) => worker,
                Err(error) => {
                    started.send(Err(error)).ok(); // `start` waits for it
                    return Ok(());
                }
            };
            let orders = Arc::new(worker.orders());
            let _closing = Closing(Arc::clone(&orders));
            started.send(Ok(Arc::clone(&orders))).ok(); // as above
            let ended = worker.run(&orders);
            if let Err(error) = &ended {
                device.break_down(error);
            }
            ended
        })?;
        let orders = result.recv().map_err(|_| io::Error::other("the thread of the queue has ended"))??;
        Ok(Self { orders, thread: Some(thread) })
    }

    /// Takes nothing more off the ring, and returns when nothing is under way.
    ///
    /// # Errors
    /// [`QueueGone`].
    pub fn pause(&self) -> Result<(), QueueGone> {
        self.drained(|worker| worker.set_paused(true))
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&self) {
        self.orders.now(|worker| worker.set_paused(false));
    }

    /// Replaces the descriptor that is written when something was used; it is written once at once.
    pub fn set_call(&self, call: Option<OwnedFd>) {
        self.orders.now(|worker| worker.set_call(call));
    }

    /// Replaces the descriptor that is written when the queue breaks.
    pub fn set_error(&self, error: Option<OwnedFd>) {
        self.orders.now(|worker| worker.set_error(error));
    }

    /// Replaces the guest's memory while nothing is under way. The rings are in the new memory as well.
    ///
    /// # Errors
    /// [`QueueGone`].
    pub fn set_ram(&self, ram: Arc<GuestRam>) -> Result<(), QueueGone> {
        self.drained(|worker| worker.set_ram(ram))
    }

    /// Notes the pages that are written from now on, or no longer.
    ///
    /// # Errors
    /// [`QueueGone`].
    pub fn set_log(&self, log: Option<QueueLog>) -> Result<(), QueueGone> {
        self.drained(|worker| worker.set_log(log))
    }

    /// Ends what is under way, then the queue: the reset of one queue. It is started again with another
    /// [`QueueSetup`].
    ///
    /// # Errors
    /// [`QueueGone`].
    pub fn stop(mut self) -> Result<QueueState, QueueGone> {
        self.finish().ok_or(QueueGone)
    }

    fn drained(&self, job: impl FnOnce(&mut Worker) + Send + 'static) -> Result<(), QueueGone> {
        let (done, wait) = sync_channel(1);
        self.orders.drained(move |worker| {
            job(worker);
            done.send(()).ok(); // somebody waits below
        });
        wait.recv().map_err(|_| QueueGone)
    }

    fn finish(&mut self) -> Option<QueueState> {
        let thread = self.thread.take()?;
        let (done, wait) = sync_channel(1);
        self.orders.stop(done);
        let state = wait.recv().ok();
        // A panic of the thread was told on standard error; an error broke the device.
        thread.join().is_ok().then_some(state).flatten()
    }
}

impl Drop for QueueThread {
    fn drop(&mut self) {
        self.finish();
    }
}
