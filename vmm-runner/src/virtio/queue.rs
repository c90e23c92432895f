//! A thread that serves one queue of a simple device.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use blk_backend::in_process::unpin_thread;
use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{FEATURE_EVENT_IDX, QueueSetup};
use crate::{
    Error, Result,
    machine::{GuestMemory, new_eventfd},
};

/// Chains that are served before the thread looks whether it is asked to stop: a driver on another processor may
/// make new ones available for ever.
const BATCH: usize = 256;

/// What a device does with one chain: returns how many bytes it wrote.
pub(super) type Serve = Box<dyn FnMut(DescriptorChain<&GuestMemory>) -> u32 + Send>;

/// What the thread of a queue does.
pub(super) trait Work: Send {
    /// Waits for something to do; false when it is time to stop.
    fn wait(&self, stop: &EventFd) -> bool;

    /// Does some of it. False when no more can be done, until the driver resets the device.
    fn run(&mut self) -> bool;
}

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
        features: u64,
        serve: Serve,
    ) -> Result<Self> {
        let queue = rings(memory, &setup, features)?;
        Self::work(name, Chains { memory: Arc::clone(memory), queue, setup, serve })
    }

    /// Does any work.
    ///
    /// # Errors
    /// When the host has no thread.
    pub(super) fn work(name: &str, mut work: impl Work + 'static) -> Result<Self> {
        let stop = Arc::new(new_eventfd()?);
        let gate = Arc::<Gate>::default();
        let (stopped, open) = (Arc::clone(&stop), Arc::clone(&gate));
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                // Where the system refuses, it works from where its maker may run.
                unpin_thread().ok();
                while work.wait(&stopped) && open.pass(|| work.run()) {}
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
pub(super) fn rings(memory: &GuestMemory, setup: &QueueSetup, features: u64) -> Result<Queue> {
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
    queue.set_event_idx(features & FEATURE_EVENT_IDX != 0);
    queue.set_ready(true);
    if !queue.is_valid(memory) {
        return Err(broken("its rings are not in memory"));
    }
    Ok(queue)
}

/// Waits until something can be read from `fd`; false when it is time to stop.
pub(super) fn wait(fd: BorrowedFd<'_>, stop: &EventFd) -> bool {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(borrow(stop), PollFlags::IN),
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
            Ok(_) => return fds[0].revents().is_empty(),
        }
    }
}

/// The descriptor of an event.
pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as the event lives, which is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// A queue whose chains are served as they come.
struct Chains {
    memory: Arc<GuestMemory>,
    queue: Queue,
    setup: QueueSetup,
    serve: Serve,
}

impl Work for Chains {
    fn wait(&self, stop: &EventFd) -> bool {
        wait(borrow(&self.setup.kick), stop)
    }

    fn run(&mut self) -> bool {
        // Someone else may have taken the kick.
        drop(self.setup.kick.read());
        self.serve().is_ok()
    }
}

impl Chains {
    /// Serves what is available.
    ///
    /// # Errors
    /// When the rings are broken.
    fn serve(&mut self) -> std::result::Result<(), virtio_queue::Error> {
        let memory = &*self.memory;
        let mut served = 0;
        self.queue.disable_notification(memory)?;
        loop {
            while served < BATCH
                && let Some(chain) = self.queue.pop_descriptor_chain(memory)
            {
                let head = chain.head_index();
                let written = (self.serve)(chain);
                self.queue.add_used(memory, head, written)?;
                served += 1;
            }
            if served == BATCH {
                // A counter that is full is a kick that is there already.
                drop(self.setup.kick.write(1));
                break;
            }
            if !self.queue.enable_notification(memory)? {
                break;
            }
        }
        if served > 0 && self.queue.needs_notification(memory)? {
            // A counter that is full is an interrupt that is pending already.
            drop(self.setup.call.write(1));
        }
        Ok(())
    }
}
