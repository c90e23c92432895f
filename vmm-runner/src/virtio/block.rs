//! The block device (section 5.2): the data plane's, with a thread and a ring a queue, in this process.

use std::{
    collections::BTreeMap,
    fmt,
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use blk_backend::{
    disk::Disk,
    in_process::QueueThread,
    virtio::{
        Device, DeviceEvent, DeviceOptions, Failure, Features, ring::RingLayout,
        setup::QueueSetup as BackendQueue,
    },
};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{ConfigNotifier, QueueReset, QueueSetup, VirtioDevice};
use crate::{Error, Result, machine::GuestMemory};

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;

/// A disk of the guest.
pub struct Block {
    device: Arc<Device>,
    /// By number.
    queues: BTreeMap<u16, QueueThread>,
    notifier: Arc<Mutex<Option<Arc<dyn ConfigNotifier>>>>,
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("device", &self.device).finish_non_exhaustive()
    }
}

impl Block {
    /// A device over an opened disk. Its queues tell `on_failure` of requests that the host failed.
    ///
    /// # Errors
    /// When an option cannot be.
    pub fn new(
        disk: &Arc<Disk>,
        options: &DeviceOptions,
        on_failure: impl Fn(Failure) + Send + Sync + 'static,
    ) -> Result<Self> {
        let device = Device::new(disk, options).map_err(|error| Error::Invalid(error.to_string()))?;
        let notifier: Arc<Mutex<Option<Arc<dyn ConfigNotifier>>>> = Arc::default();
        let to_tell = Arc::clone(&notifier);
        device.observe(move |event| {
            let notify = |what: fn(&dyn ConfigNotifier)| {
                let notifier = to_tell.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(notifier) = notifier {
                    what(&*notifier);
                }
            };
            match event {
                DeviceEvent::Config => notify(|notifier| notifier.config_changed()),
                DeviceEvent::Broken { .. } => notify(|notifier| notifier.needs_reset()),
                DeviceEvent::Failed(failure) => on_failure(*failure),
            }
        });
        Ok(Self { device, queues: BTreeMap::new(), notifier })
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        2
    }

    fn pci_class(&self) -> u32 {
        // A mass storage controller of no other kind.
        0x01_8000
    }

    fn features(&self) -> u64 {
        self.device.offered().0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.device.queues())]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.device.config();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(config.get(from..).unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // A write to what cannot be written has no effect (section 2.5).
        self.device.write_config(offset, data).ok();
    }

    fn activate(&mut self, memory: &Arc<GuestMemory>, features: u64, queues: Vec<QueueSetup>) -> Result<()> {
        self.device.negotiate(Features(features)).map_err(|error| Error::Guest(error.to_string()))?;
        queues.into_iter().try_for_each(|queue| self.start_queue(memory, features, queue))
    }

    fn reset(&mut self) {
        // Each drains what is under way before it ends.
        self.queues.clear();
        self.device.reset();
    }

    fn pause(&self) {
        for queue in self.queues.values() {
            // One that has ended by itself has broken the device, and touches nothing.
            queue.pause().ok();
        }
    }

    fn resume(&self) {
        self.queues.values().for_each(QueueThread::resume);
    }

    fn queue_reset(&mut self) -> Option<&mut dyn QueueReset> {
        Some(self)
    }

    fn set_config_notifier(&mut self, notifier: Arc<dyn ConfigNotifier>) {
        *self.notifier.lock().unwrap_or_else(PoisonError::into_inner) = Some(notifier);
    }
}

impl QueueReset for Block {
    fn stop_queue(&mut self, index: u16) {
        // It drains what is under way before it ends.
        self.queues.remove(&index);
    }

    fn start_queue(&mut self, memory: &Arc<GuestMemory>, features: u64, queue: QueueSetup) -> Result<()> {
        let setup = BackendQueue {
            ram: Arc::clone(memory),
            rings: RingLayout {
                size: queue.size,
                descriptors: GuestAddress(queue.descriptors),
                available: GuestAddress(queue.available),
                used: GuestAddress(queue.used),
            },
            next_avail: 0,
            features: Features(features),
            kick: Some(owned(queue.kick)),
            call: Some(owned(queue.call.try_clone().map_err(Error::host("an event for a queue"))?)),
            error: None,
            inflight: None,
            redo: None,
            log: None,
            paused: false,
        };
        let name = format!("blk-q{}", queue.index);
        let thread = QueueThread::start(&self.device, &name, setup);
        let thread = thread.map_err(|error| Error::Guest(error.to_string()))?;
        self.queues.insert(queue.index, thread);
        Ok(())
    }
}

/// The descriptor of an event, which has no other owner.
fn owned(event: EventFd) -> OwnedFd {
    // SAFETY: the event gave its descriptor up.
    unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) }
}
