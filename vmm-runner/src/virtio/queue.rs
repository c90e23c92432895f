//! A thread that serves one queue of a simple device.

use std::{
    os::fd::AsRawFd,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::QueueSetup;
use crate::{
    Error, Result,
    machine::{GuestMemory, new_eventfd},
};

/// What a device does with one chain: returns how many bytes it wrote.
pub(super) type Serve = Box<dyn FnMut(DescriptorChain<&GuestMemory>) -> u32 + Send>;

/// A thread on a queue; stops when dropped.
#[derive(Debug)]
pub struct QueueThread {
    stop: Arc<EventFd>,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

impl QueueThread {
    /// Serves the chains of a queue, one after the other.
    ///
    /// # Errors
    /// When the driver's rings are not in memory, or the host has no thread.
    pub(super) fn start(
        name: &str,
        memory: &Arc<GuestMemory>,
        setup: QueueSetup,
        mut serve: Serve,
    ) -> Result<Self> {
        let mut queue = rings(memory, &setup)?;
        let stop = Arc::new(new_eventfd()?);
        let gate = Arc::<Gate>::default();
        let (memory, stopped, open) = (Arc::clone(memory), Arc::clone(&stop), Arc::clone(&gate));
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                while wait(&setup.kick, &stopped) {
                    // Rings that are broken end the work on this queue, until the driver resets the device.
                    if !open.pass(|| run(&mut queue, &memory, &setup, &mut serve)) {
                        break;
                    }
                }
            })
            .map_err(Error::host("a thread for a queue"))?;
        Ok(Self { stop, gate, thread: Some(thread) })
    }

    /// Returns when nothing is served any more, until [`Self::resume`].
    pub(super) fn pause(&self) {
        self.gate.set_closed(true);
    }

    /// Goes on.
    pub(super) fn resume(&self) {
        self.gate.set_closed(false);
    }
}

/// What the thread passes before it serves.
#[derive(Debug, Default)]
struct Gate {
    is_closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Waits until it is open, and keeps others from closing it meanwhile.
    fn pass<T>(&self, work: impl FnOnce() -> T) -> T {
        let mut is_closed = self.is_closed.lock().unwrap_or_else(PoisonError::into_inner);
        while *is_closed {
            is_closed = self.opened.wait(is_closed).unwrap_or_else(PoisonError::into_inner);
        }
        work()
    }

    fn set_closed(&self, is_closed: bool) {
        *self.is_closed.lock().unwrap_or_else(PoisonError::into_inner) = is_closed;
        self.opened.notify_all();
    }
}

impl Drop for QueueThread {
    fn drop(&mut self) {
        // The counter cannot be full: it is written once.
        drop(self.stop.write(1));
        self.gate.set_closed(false);
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            drop(thread.join());
        }
    }
}

/// The rings of a queue, checked to lie in memory.
fn rings(memory: &GuestMemory, setup: &QueueSetup) -> Result<Queue> {
    let broken = |what: &str| Error::Guest(format!("queue {}: {what}", setup.index));
    let mut queue = Queue::new(setup.size).map_err(|error| broken(&error.to_string()))?;
    queue.set_size(setup.size);
    let set = [
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors)),
        queue.try_set_avail_ring_address(GuestAddress(setup.available)),
        queue.try_set_used_ring_address(GuestAddress(setup.used)),
    ];
    for result in set {
        result.map_err(|error| broken(&error.to_string()))?;
    }
    queue.set_ready(true);
    if !queue.is_valid(memory) {
        return Err(broken("its rings are not in memory"));
    }
    Ok(queue)
}

/// Waits for a kick; false when it is time to stop.
fn wait(kick: &EventFd, stop: &EventFd) -> bool {
    // SAFETY: both descriptors are open for the whole call.
    let borrow = |event: &EventFd| unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
    loop {
        let fds = [borrow(kick), borrow(stop)];
        let mut fds = [
            PollFd::from_borrowed_fd(fds[0], PollFlags::IN),
            PollFd::from_borrowed_fd(fds[1], PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        if !fds[1].revents().is_empty() {
            return false;
        }
        if !fds[0].revents().is_empty() {
            // Someone else may have taken the kick.
            drop(kick.read());
            return true;
        }
    }
}

/// Serves what is available. False when the rings are broken.
fn run(queue: &mut Queue, memory: &GuestMemory, setup: &QueueSetup, serve: &mut Serve) -> bool {
    loop {
        let mut used = false;
        if queue.disable_notification(memory).is_err() {
            return false;
        }
        while let Some(chain) = queue.pop_descriptor_chain(memory) {
            let head = chain.head_index();
            let written = serve(chain);
            if queue.add_used(memory, head, written).is_err() {
                return false;
            }
            used = true;
        }
        if used {
            match queue.needs_notification(memory) {
                // A counter that is full is an interrupt that is pending already.
                Ok(true) => drop(setup.call.write(1)),
                Ok(false) => {}
                Err(_) => return false,
            }
        }
        match queue.enable_notification(memory) {
            Ok(true) => {}
            Ok(false) => return true,
            Err(_) => return false,
        }
    }
}
