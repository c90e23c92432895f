//! The ports by which a guest switches itself off, or starts again.

use std::sync::{Arc, Mutex};

use crate::{
    bus::PortDevice,
    machine::{End, RunControl},
};

/// ACPI's sleep control and sleep status registers (ACPI 6.4, section 4.8.3.7): a byte each.
pub const SLEEP_CONTROL_PORT: u16 = 0xCD0;
/// The two of them.
pub const SLEEP_PORT_COUNT: u16 = 2;
/// The sleep type that switches off, as `_S5` says.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// Sleep control: enter the sleep type in bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;

/// System control port A of a PS/2: gate of address line 20, and fast reset.
pub const SYSTEM_CONTROL_PORT: u16 = 0x92;
/// Line 20 is open, always.
const A20_OPEN: u8 = 1 << 1;
/// Writing it resets; all else there stays as it is.
pub const FAST_RESET: u8 = 1;

/// ACPI's sleep registers.
#[derive(Debug)]
pub struct AcpiPorts(Arc<RunControl>);

impl AcpiPorts {
    /// Registers that end the machine of `control`.
    #[must_use]
    pub fn new(control: Arc<RunControl>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self(control)))
    }
}

impl PortDevice for AcpiPorts {
    fn read(&mut self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        let wanted = SLEEP_TYPE_OFF << 2 | SLEEP_ENABLE;
        if offset == 0 && data.first().is_some_and(|value| value & (7 << 2 | SLEEP_ENABLE) == wanted) {
            self.0.end(End::PowerOff);
        }
    }
}

/// System control port A.
#[derive(Debug)]
pub struct ResetPort(Arc<RunControl>);

impl ResetPort {
    /// A port that resets the machine of `control`.
    #[must_use]
    pub fn new(control: Arc<RunControl>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self(control)))
    }
}

impl PortDevice for ResetPort {
    fn read(&mut self, _: u16, data: &mut [u8]) {
        data[0] = A20_OPEN;
    }

    fn write(&mut self, _: u16, data: &[u8]) {
        if data[0] & FAST_RESET != 0 {
            self.0.end(End::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_value_switches_off() {
        let control = Arc::new(RunControl::default());
        let ports = AcpiPorts::new(Arc::clone(&control));
        let mut ports = ports.lock().expect("no panic");
        for value in [0, SLEEP_ENABLE, SLEEP_TYPE_OFF << 2, SLEEP_ENABLE | 1 << 2] {
            ports.write(0, &[value]);
        }
        ports.write(1, &[SLEEP_TYPE_OFF << 2 | SLEEP_ENABLE]);
        assert_eq!(control.ended(), None);
        ports.write(0, &[SLEEP_TYPE_OFF << 2 | SLEEP_ENABLE]);
        assert_eq!(control.ended(), Some(End::PowerOff));
    }

    #[test]
    fn the_fast_reset_bit_resets() {
        let control = Arc::new(RunControl::default());
        let port = ResetPort::new(Arc::clone(&control));
        let mut port = port.lock().expect("no panic");
        port.write(0, &[A20_OPEN]);
        assert_eq!(control.ended(), None);
        port.write(0, &[A20_OPEN | FAST_RESET]);
        assert_eq!(control.ended(), Some(End::Reset));
    }
}
