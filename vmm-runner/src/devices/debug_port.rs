//! The port on which firmware writes down what it does.

use std::{
    fmt,
    io::Write,
    sync::{Arc, Mutex},
};

use super::Console;
use crate::bus::PortDevice;

/// Where SeaBIOS and OVMF look for it.
pub const DEBUG_PORT: u16 = 0x402;
/// What it reads as where it is there; firmware is silent otherwise.
const PRESENT: u8 = 0xE9;

/// A port whose bytes go to the user's log.
pub struct DebugPort(Console);

impl fmt::Debug for DebugPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DebugPort").finish_non_exhaustive()
    }
}

impl DebugPort {
    /// A port that writes to `log`.
    #[must_use]
    pub fn new(log: Console) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self(log)))
    }
}

impl PortDevice for DebugPort {
    fn read(&mut self, _: u16, data: &mut [u8]) {
        data[0] = PRESENT;
    }

    fn write(&mut self, _: u16, data: &[u8]) {
        // A log that is full loses what comes; the guest goes on.
        drop(self.0.write_all(&data[..1]));
    }
}
