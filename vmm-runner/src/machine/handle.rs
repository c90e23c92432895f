//! A machine as other threads see it: what they hold, continue and end it by.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::{End, Machine, RunControl};
use crate::{Error, Result, virtio::VirtioPci};

/// Holds, continues and ends a machine. The machine's memory and devices live as long as its handles.
#[derive(Clone)]
pub struct MachineHandle {
    vm: Arc<VmFd>,
    control: Arc<RunControl>,
    devices: Vec<Arc<VirtioPci>>,
    power_button: Arc<EventFd>,
    /// The guest's clock, while it is held.
    clock: Arc<Mutex<Option<kvm_clock_data>>>,
}

impl fmt::Debug for MachineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineHandle").field("control", &self.control).finish_non_exhaustive()
    }
}

impl MachineHandle {
    pub(super) fn new(machine: &Machine) -> Self {
        Self {
            vm: Arc::clone(&machine.vm),
            control: Arc::clone(machine.hardware.control()),
            devices: machine.hardware.devices().to_vec(),
            power_button: Arc::clone(machine.hardware.power_button()),
            clock: Arc::default(),
        }
    }

    /// Returns when no processor runs the guest, no request is under way, and its clock stands still. It goes on with
    /// [`Self::resume`], or ends. Not called by processors and devices.
    ///
    /// # Errors
    /// When KVM does not tell the clock: everything else is held.
    pub fn pause(&self) -> Result<()> {
        // Processors first: they start and reset devices.
        self.control.pause();
        self.devices.iter().for_each(|device| device.pause());
        let now = self.vm.get_clock().map_err(Error::kvm("stop the clock"))?;
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        Ok(())
    }

    /// Lets it go on. Requests that failed while it had to be held are tried again.
    ///
    /// # Errors
    /// When KVM does not set the clock: the guest sees a jump, and goes on.
    pub fn resume(&self) -> Result<()> {
        let clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The flags say what was read, not what to set.
        let set = clock.map_or(Ok(()), |clock| self.vm.set_clock(&kvm_clock_data { flags: 0, ..clock }));
        self.devices.iter().for_each(|device| device.resume());
        self.control.resume();
        set.map_err(Error::kvm("start the clock"))
    }

    /// Ends it, held or not. The first reason counts.
    pub fn end(&self, why: End) {
        self.control.end(why);
    }

    /// Whether it has ended, or is about to.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.control.ended().is_some()
    }

    /// Presses the power button: what happens is the guest's business.
    ///
    /// # Errors
    /// When it was pressed too often for the guest to notice.
    pub fn press_power_button(&self) -> Result<()> {
        self.power_button.write(1).map_err(Error::host("press the power button"))
    }

    /// Number and thread id of each processor that has begun.
    #[must_use]
    pub fn processors(&self) -> Vec<(u32, i32)> {
        self.control.threads()
    }
}
