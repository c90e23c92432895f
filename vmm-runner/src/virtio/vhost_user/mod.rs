//! A block device whose queues another process serves: a vhost-user-blk backend.
//!
//! The backend maps the guest's memory and gets the doorbell and the vector of each queue, so that neither requests
//! nor interrupts pass through this process. What passes are the driver's words to the transport (`link`), and the
//! backend's death: a thread (`watch`) waits for the next one and starts on it what the driver has started. Where the
//! backend keeps its requests in inflight memory, the guest notices no more than a pause.

mod link;
mod watch;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use blk_backend::virtio::{
    Features,
    config::{CONFIG_BYTES, WRITEBACK_AT_BYTES},
    ring::{RingLayout, is_inside},
};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use self::link::{Inflight, Link, LinkError};
use super::{ConfigNotifier, QueueSetup, VirtioDevice};
use crate::{
    Error, Result,
    machine::{GuestMemory, new_eventfd},
};

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;

/// Where `num_queues` is in the configuration (section 5.2.4).
const QUEUES_AT_BYTES: usize = 34;

/// Tells people what happened to a device: each call is one line.
pub type Tell = Arc<dyn Fn(&str) + Send + Sync>;

/// One queue that the driver set up.
#[derive(Debug)]
struct ActiveQueue {
    index: u16,
    rings: RingLayout,
    kick: EventFd,
    call: Arc<EventFd>,
}

/// What the driver started.
#[derive(Debug)]
struct Active {
    memory: Arc<GuestMemory>,
    features: Features,
    queues: Vec<ActiveQueue>,
}

impl Active {
    /// Whether the driver waits for an answer, as far as the rings say.
    fn has_requests(&self) -> bool {
        self.queues.iter().any(|queue| {
            let made = queue.rings.available.checked_add(2).map(|at| self.memory.read_obj::<u16>(at));
            let used = queue.rings.used_idx(&self.memory);
            !matches!((made, used), (Some(Ok(made)), Ok(used)) if u16::from_le(made) == used)
        })
    }
}

struct State {
    /// `None` while there is no backend.
    link: Option<Link>,
    active: Option<Active>,
    inflight: Option<Inflight>,
    /// The configuration, as the guest sees it.
    config: [u8; CONFIG_BYTES],
    /// What the driver chose, for backends to come.
    writeback: Option<u8>,
    /// No backend works on the queues.
    is_paused: bool,
}

/// What the device and its watching thread share.
struct Shared {
    path: PathBuf,
    queues: u16,
    offered: Features,
    /// Held while the backend is asked; never while the notifier is called, whose lock the processors hold when they
    /// call the device.
    state: Mutex<State>,
    notifier: Mutex<Option<Arc<dyn ConfigNotifier>>>,
    /// Written when the device goes away.
    stop: EventFd,
    /// Written by the backend when a queue breaks.
    broken: EventFd,
    tell: Tell,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, text: &str) {
        (self.tell)(&format!("{}: {text}", self.path.display()));
    }

    fn notify(&self, what: impl FnOnce(&dyn ConfigNotifier)) {
        let notifier = self.notifier.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(notifier) = notifier {
            what(&*notifier);
        }
    }

    /// The backend's configuration with the number of queues that this device has.
    fn adapted(&self, mut config: [u8; CONFIG_BYTES]) -> [u8; CONFIG_BYTES] {
        config[QUEUES_AT_BYTES..][..2].copy_from_slice(&self.queues.to_le_bytes());
        config
    }
}

/// A disk of the guest that a backend serves.
pub struct VhostUserBlock {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for VhostUserBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostUserBlock").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

impl VhostUserBlock {
    /// Connects to the backend that listens at `path`, for up to `queues` queues: as many as it has, where it has
    /// fewer.
    ///
    /// # Errors
    /// When there is no backend, or it lacks what a guest needs.
    pub fn connect(path: &Path, queues: u16, tell: Tell) -> Result<Self> {
        let failed = |error: LinkError| Error::Invalid(format!("vhost-user {}: {error}", path.display()));
        let (mut link, requests) = Link::connect(path).map_err(failed)?;
        let queues = u16::try_from(link.queues).unwrap_or(u16::MAX).min(queues).max(1);
        let config = link.config().map_err(failed)?;
        let offered = if queues > 1 { link.offered } else { link.offered.without(Features::MQ) };
        let state = State {
            link: Some(link),
            active: None,
            inflight: None,
            config,
            writeback: None,
            is_paused: false,
        };
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            queues,
            offered,
            state: Mutex::new(state),
            notifier: Mutex::new(None),
            stop: new_eventfd()?,
            broken: new_eventfd()?,
            tell,
        });
        shared.lock().config = shared.adapted(config);
        let watched = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("vhost-user".to_owned())
            .spawn(move || watch::watch(&watched, requests))
            .map_err(Error::host("a thread for a backend"))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl VirtioDevice for VhostUserBlock {
    fn device_type(&self) -> u16 {
        2
    }

    fn pci_class(&self) -> u32 {
        // A mass storage controller of no other kind.
        0x01_8000
    }

    fn features(&self) -> u64 {
        self.shared.offered.0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.shared.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.shared.lock().config;
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(config.get(from..).unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // A write to what cannot be written has no effect (section 2.5).
        let is_writeback =
            offset == WRITEBACK_AT_BYTES as u64 && self.shared.offered.has(Features::CONFIG_WCE);
        let ([value @ (0 | 1)], true) = (data, is_writeback) else { return };
        let mut state = self.shared.lock();
        (state.writeback, state.config[WRITEBACK_AT_BYTES]) = (Some(*value), *value);
        if let Some(link) = &mut state.link
            && let Err(error) = link.write_config(WRITEBACK_AT_BYTES, *value)
        {
            // The next connection is told.
            link.shut_down();
            self.shared.tell(&error.to_string());
        }
    }

    fn activate(&mut self, memory: &Arc<GuestMemory>, features: u64, queues: Vec<QueueSetup>) -> Result<()> {
        let queues = queues.into_iter().map(|queue| checked(memory, queue)).collect::<Result<_>>()?;
        let active = Active { memory: Arc::clone(memory), features: Features(features), queues };
        let mut state = self.shared.lock();
        let State { link, inflight, .. } = &mut *state;
        // Without a backend, the next one is told.
        if let Some(link) = link {
            match link.start(&active, &self.shared.broken, inflight) {
                Ok(()) => {}
                Err(LinkError::Lost(error)) => {
                    link.shut_down();
                    self.shared.tell(&error);
                }
                Err(LinkError::Refused(error)) => {
                    self.shared.tell(&error);
                    return Err(Error::Guest(error));
                }
            }
        }
        state.active = Some(active);
        Ok(())
    }

    fn reset(&mut self) {
        let mut state = self.shared.lock();
        let State { link, active, inflight, writeback, .. } = &mut *state;
        (*inflight, *writeback) = (None, None);
        if let (Some(active), Some(link)) = (active.take(), link)
            && let Err(error) = link.stop(&active.queues)
        {
            // A backend that does not stop loses the connection, and with it the memory.
            link.shut_down();
            self.shared.tell(&error.to_string());
        }
    }

    fn pause(&self) {
        let mut state = self.shared.lock();
        state.is_paused = true;
        let State { link, active, .. } = &mut *state;
        if let (Some(active), Some(link)) = (active, link)
            && let Err(error) = link.hold(&active.queues)
        {
            // A backend that does not stop loses the connection, and with it the memory.
            link.shut_down();
            self.shared.tell(&error.to_string());
        }
    }

    fn resume(&self) {
        let mut state = self.shared.lock();
        state.is_paused = false;
        let State { link, active, inflight, .. } = &mut *state;
        if let (Some(active), Some(link)) = (active, link)
            && let Err(error) = link.start(active, &self.shared.broken, inflight)
        {
            // The next one is told.
            link.shut_down();
            self.shared.tell(&error.to_string());
        }
    }

    fn set_config_notifier(&mut self, notifier: Arc<dyn ConfigNotifier>) {
        *self.shared.notifier.lock().unwrap_or_else(PoisonError::into_inner) = Some(notifier);
    }
}

impl Drop for VhostUserBlock {
    fn drop(&mut self) {
        self.reset();
        // The counter cannot be full: it is written once.
        drop(self.shared.stop.write(1));
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            drop(thread.join());
        }
    }
}

/// A queue whose rings are in memory.
fn checked(memory: &GuestMemory, queue: QueueSetup) -> Result<ActiveQueue> {
    let rings = RingLayout {
        size: queue.size,
        descriptors: GuestAddress(queue.descriptors),
        available: GuestAddress(queue.available),
        used: GuestAddress(queue.used),
    };
    if !is_inside(&rings, memory) {
        return Err(Error::Guest(format!("queue {}: its rings are not in memory", queue.index)));
    }
    Ok(ActiveQueue { index: queue.index, rings, kick: queue.kick, call: queue.call })
}
