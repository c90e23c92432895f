//! A board without a hypervisor: devices and guest memory, for tests that are the guest.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry};
use vm_memory::GuestAddress;
use vmm_runner::{
    Error, Result,
    machine::{GuestMemory, Hardware, Hypervisor, MachineConfig},
};
use vmm_sys_util::eventfd::EventFd;

/// The board's RAM, from 0 on.
pub const RAM_BYTES: usize = 0x10_0000;
/// The numbers of messages begin behind those of pins.
const FIRST_MESSAGE: u32 = 24;

/// A hypervisor that does nothing, and holds the runner to the rules of the real one.
#[derive(Default)]
pub struct Rules(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// Descriptor and number.
    interrupts: BTreeSet<(i32, u32)>,
    messages: BTreeSet<u32>,
    /// Descriptor by address.
    doorbells: BTreeMap<u64, i32>,
}

impl Rules {
    /// Where doorbells are.
    #[must_use]
    pub fn doorbells(&self) -> Vec<u64> {
        self.known().doorbells.keys().copied().collect()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hypervisor for Rules {
    fn bind_interrupt(&self, event: &EventFd, gsi: u32) -> Result<()> {
        let mut known = self.known();
        assert!(known.interrupts.insert((event.as_raw_fd(), gsi)), "interrupt {gsi} is bound twice");
        assert!(gsi < FIRST_MESSAGE || known.messages.contains(&gsi), "interrupt {gsi} leads nowhere");
        Ok(())
    }

    fn unbind_interrupt(&self, event: &EventFd, gsi: u32) -> Result<()> {
        assert!(self.known().interrupts.remove(&(event.as_raw_fd(), gsi)), "interrupt {gsi} was not bound");
        Ok(())
    }

    fn route(&self, routes: &[kvm_irq_routing_entry]) -> Result<()> {
        let messages = routes.iter().filter(|route| route.type_ == KVM_IRQ_ROUTING_MSI);
        self.known().messages = messages.map(|route| route.gsi).collect();
        Ok(())
    }

    fn place_doorbell(&self, event: &EventFd, address: u64) -> Result<()> {
        let mut known = self.known();
        if known.doorbells.contains_key(&address) {
            return Err(Error::Invalid("there is a doorbell already".to_owned()));
        }
        known.doorbells.insert(address, event.as_raw_fd());
        Ok(())
    }

    fn remove_doorbell(&self, event: &EventFd, address: u64) -> Result<()> {
        assert_eq!(self.known().doorbells.remove(&address), Some(event.as_raw_fd()), "at {address:#x}");
        Ok(())
    }
}

/// A board with its fixed devices.
///
/// # Panics
/// When the host has no memory or descriptors.
#[must_use]
pub fn board() -> (Hardware, Arc<Rules>) {
    let ram = GuestMemory::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("memory");
    let rules = Arc::new(Rules::default());
    let console = Box::new(std::io::sink());
    let config = MachineConfig::default();
    (Hardware::new(Arc::clone(&rules) as _, Arc::new(ram), &config, console).expect("a board"), rules)
}
