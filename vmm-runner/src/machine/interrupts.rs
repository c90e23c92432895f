//! Interrupts on their way from devices into KVM: pins of the in-kernel controllers, and messages.
//!
//! Each interrupt is an eventfd bound to a global interrupt number (irqfd), so that whoever signals it, another
//! thread or another process, needs no exit and no call into the runner. Numbers 0 to 23 are the pins; messages
//! get numbers from 24 on, with a route that says their address and data.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_irq_routing_entry,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Hypervisor;
use crate::{Error, Result};

/// Pins of the I/O interrupt controller.
const IOAPIC_PINS: u32 = 24;
/// KVM has room for this many routes, pins included (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: u32 = 4096;

/// What a message-signalled interrupt writes where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Address; names the processors.
    pub address: u64,
    /// Data; names the vector.
    pub data: u32,
}

/// All interrupt routes of a machine.
pub struct Interrupts {
    vm: Arc<dyn Hypervisor>,
    messages: Mutex<Messages>,
}

#[derive(Debug)]
struct Messages {
    /// Route by number. A number without one is masked, or free.
    routes: BTreeMap<u32, Message>,
    next: u32,
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupts").field("messages", &self.messages).finish_non_exhaustive()
    }
}

impl Interrupts {
    /// The routes of a machine whose controllers exist.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(vm: Arc<dyn Hypervisor>) -> Result<Arc<Self>> {
        let messages = Messages { routes: BTreeMap::new(), next: IOAPIC_PINS };
        let interrupts = Self { vm, messages: Mutex::new(messages) };
        interrupts.publish(&BTreeMap::new())?;
        Ok(Arc::new(interrupts))
    }

    /// An eventfd that pulses a pin.
    ///
    /// # Errors
    /// When the host has no descriptors, or KVM refuses.
    pub fn pin(&self, gsi: u32) -> Result<EventFd> {
        let event = new_eventfd()?;
        self.vm.bind_interrupt(&event, gsi)?;
        Ok(event)
    }

    /// An interrupt that is a message, masked at first.
    ///
    /// # Errors
    /// When all are taken, or the host has no descriptors.
    pub fn message(self: &Arc<Self>) -> Result<MessageInterrupt> {
        let event = Arc::new(new_eventfd()?);
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.next >= MAX_ROUTES {
            return Err(Error::Invalid("the machine has no interrupt left".to_owned()));
        }
        let gsi = messages.next;
        messages.next += 1;
        Ok(MessageInterrupt { interrupts: Arc::clone(self), gsi, event, bound: Mutex::new(None) })
    }

    fn publish(&self, routes: &BTreeMap<u32, Message>) -> Result<()> {
        let mut entries = Vec::with_capacity(2 * IOAPIC_PINS as usize + routes.len());
        for gsi in 0..IOAPIC_PINS {
            match gsi {
                0..8 => entries.push(pin_route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
                8..16 => entries.push(pin_route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
                _ => {}
            }
            entries.push(pin_route(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        }
        for (&gsi, message) in routes {
            let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            let [a, b, c, d, high @ ..] = message.address.to_le_bytes();
            entry.u.msi.address_lo = u32::from_le_bytes([a, b, c, d]);
            entry.u.msi.address_hi = u32::from_le_bytes(high);
            entry.u.msi.data = message.data;
            entries.push(entry);
        }
        self.vm.route(&entries)
    }
}

/// An event that nobody has signalled; reading it never waits.
pub(crate) fn new_eventfd() -> Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::host("an event"))
}

fn pin_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

/// One interrupt that is a message. While it is masked its eventfd keeps what is signalled, and KVM delivers it
/// when the eventfd is bound again.
#[derive(Debug)]
pub struct MessageInterrupt {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    event: Arc<EventFd>,
    /// The message that it is bound to; `None` while masked.
    bound: Mutex<Option<Message>>,
}

impl MessageInterrupt {
    /// What a device signals.
    #[must_use]
    pub fn event(&self) -> &Arc<EventFd> {
        &self.event
    }

    /// Delivers as `message` from now on, or keeps what comes for `None`.
    ///
    /// # Errors
    /// When KVM refuses the route.
    pub fn set(&self, message: Option<Message>) -> Result<()> {
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        if *bound == message {
            return Ok(());
        }
        let vm = &self.interrupts.vm;
        if bound.is_some() && message.is_none() {
            vm.unbind_interrupt(&self.event, self.gsi)?;
        }
        {
            let mut messages = self.interrupts.messages.lock().unwrap_or_else(PoisonError::into_inner);
            match message {
                Some(message) => messages.routes.insert(self.gsi, message),
                None => messages.routes.remove(&self.gsi),
            };
            self.interrupts.publish(&messages.routes)?;
        }
        if bound.is_none() && message.is_some() {
            vm.bind_interrupt(&self.event, self.gsi)?;
        }
        *bound = message;
        Ok(())
    }

    /// Whether it was signalled while masked and not delivered yet.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let is_masked = self.bound.lock().unwrap_or_else(PoisonError::into_inner).is_none();
        let event: &EventFd = &self.event;
        // SAFETY: the descriptor is open as long as the event lives.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event)) };
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        is_masked && poll(&mut fds, Some(&rustix::time::Timespec::default())).is_ok_and(|ready| ready > 0)
    }
}
