//! What devices need of the hypervisor: events that become interrupts, and writes of the guest that become events.

use kvm_bindings::{KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::{Error, Result};

/// A virtual machine as its devices see it. Besides KVM's there are those of tests.
pub trait Hypervisor: Send + Sync {
    /// Raises interrupt `gsi` whenever `event` is signalled.
    ///
    /// # Errors
    /// When it refuses, as when the event is bound already.
    fn bind_interrupt(&self, event: &EventFd, gsi: u32) -> Result<()>;

    /// Does so no longer.
    ///
    /// # Errors
    /// When it was not bound.
    fn unbind_interrupt(&self, event: &EventFd, gsi: u32) -> Result<()>;

    /// Replaces all routes from interrupt numbers to controllers and messages.
    ///
    /// # Errors
    /// When there are too many.
    fn route(&self, routes: &[kvm_irq_routing_entry]) -> Result<()>;

    /// Signals `event` whenever the guest writes to `address`, whatever it writes.
    ///
    /// # Errors
    /// When there is a doorbell already.
    fn place_doorbell(&self, event: &EventFd, address: u64) -> Result<()>;

    /// Does so no longer.
    ///
    /// # Errors
    /// When there is none.
    fn remove_doorbell(&self, event: &EventFd, address: u64) -> Result<()>;
}

impl Hypervisor for VmFd {
    fn bind_interrupt(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.register_irqfd(event, gsi).map_err(Error::kvm("bind an interrupt"))
    }

    fn unbind_interrupt(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.unregister_irqfd(event, gsi).map_err(Error::kvm("unbind an interrupt"))
    }

    fn route(&self, routes: &[kvm_irq_routing_entry]) -> Result<()> {
        let routes = KvmIrqRouting::from_entries(routes)
            .map_err(|_| Error::Invalid("too many interrupt routes".to_owned()))?;
        self.set_gsi_routing(&routes).map_err(Error::kvm("route interrupts"))
    }

    fn place_doorbell(&self, event: &EventFd, address: u64) -> Result<()> {
        self.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::kvm("place a doorbell"))
    }

    fn remove_doorbell(&self, event: &EventFd, address: u64) -> Result<()> {
        self.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Error::kvm("take a doorbell away"))
    }
}
