//! Virtio devices (Virtual I/O Device Version 1.2): the PCI transport, written once, and the devices behind it.

mod block;
mod net;
mod pci;
mod queue;
mod rng;
mod vhost_user;

use std::{fmt, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

pub use block::Block;
pub use net::Net;
pub use pci::{TransportSlot, VirtioPci};
pub use queue::QueueThread;
pub use rng::Entropy;
pub use vhost_user::{Tell, VhostUserBlock};

use crate::{Result, machine::GuestMemory};

/// Feature bit: chains may go on in a table of their own (section 2.7.5.3).
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// Feature bit: each side says at which index it wants to be told (section 2.7.7).
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;
/// Feature bit: the driver knows version 1 (section 6).
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// Feature bit: queues can be reset one at a time (section 6).
pub const FEATURE_RING_RESET: u64 = 1 << 40;

/// A queue that a driver has set up. All numbers are the driver's: addresses may be anywhere.
#[derive(Debug)]
pub struct QueueSetup {
    /// Which.
    pub index: u16,
    /// Descriptors; a power of two up to what the device offered.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Signalled by the driver when it made buffers available.
    pub kick: EventFd,
    /// Signalled by the device when it used buffers.
    pub call: Arc<EventFd>,
}

/// Tells the driver that the configuration changed.
pub trait ConfigNotifier: Send + Sync + fmt::Debug {
    /// Raises the configuration interrupt.
    fn config_changed(&self);

    /// Tells that only a reset of the device helps (section 2.1.2).
    fn needs_reset(&self);
}

/// A device of which queues are reset one at a time, while the others go on (section 2.6.1).
pub trait QueueReset {
    /// Ends the work on a queue. Returns when no more of the guest's memory is touched for it.
    fn stop_queue(&mut self, index: u16);

    /// Works on a queue again, which the driver has set up anew.
    ///
    /// # Errors
    /// When the queue cannot be; the driver is told that the device needs a reset.
    fn start_queue(&mut self, memory: &Arc<GuestMemory>, features: u64, queue: QueueSetup) -> Result<()>;
}

/// A device behind the transport. Calls come from processors, one at a time.
pub trait VirtioDevice: Send + fmt::Debug {
    /// Its number (section 5).
    fn device_type(&self) -> u16;

    /// Its PCI class, subclass and programming interface, as 0xCCSSPP.
    fn pci_class(&self) -> u32;

    /// Features it offers, [`FEATURE_VERSION_1`] among them.
    fn features(&self) -> u64;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads the configuration; bytes behind its end are left alone.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration; what cannot be written is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is ready: works on these queues from now on. Queues that it left out are not in use.
    ///
    /// # Errors
    /// When the device cannot start; the driver is told that it needs a reset.
    fn activate(&mut self, memory: &Arc<GuestMemory>, features: u64, queues: Vec<QueueSetup>) -> Result<()>;

    /// Stops all work. Returns when no more of the guest's memory is touched.
    fn reset(&mut self);

    /// Returns when the device touches nothing of the guest any more, until [`Self::resume`]. Processors are held.
    fn pause(&self);

    /// Goes on.
    fn resume(&self);

    /// How its queues are reset one at a time; a device that offers [`FEATURE_RING_RESET`] says how.
    fn queue_reset(&mut self) -> Option<&mut dyn QueueReset> {
        None
    }

    /// Where the device tells of changes; given once, before the guest runs.
    fn set_config_notifier(&mut self, notifier: Arc<dyn ConfigNotifier>) {
        // Most configurations never change.
        drop(notifier);
    }
}
