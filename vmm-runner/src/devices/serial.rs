//! The first serial port: a 16550 whose other end is the user's console.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::PortDevice;

/// Its ports.
pub const COM1_PORTS: u16 = 0x3F8;
/// How many.
pub const COM1_PORT_COUNT: u16 = 8;
/// Its interrupt pin.
pub const COM1_GSI: u32 = 4;

/// So much typed ahead waits for the guest; who types more waits.
const TYPED_AHEAD_BYTES: usize = 64 << 10;

/// An interrupt pin as the register model wants it.
struct Pin(EventFd);

impl Trigger for Pin {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the guest's bytes go.
pub type Console = Box<dyn Write + Send>;

struct State {
    registers: Serial<Pin, NoEvents, Console>,
    /// Typed, and not yet in the receive buffer.
    typed: VecDeque<u8>,
}

/// The port. Shared by the processors and by who reads what the user types.
pub struct SerialPort {
    state: Mutex<State>,
    taken: Condvar,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port that writes to `console` and pulses `pin`.
    #[must_use]
    pub fn new(pin: EventFd, console: Console) -> Arc<Self> {
        let state = State { registers: Serial::new(Pin(pin), console), typed: VecDeque::new() };
        Arc::new(Self { state: Mutex::new(state), taken: Condvar::new() })
    }

    /// The port as the bus sees it.
    #[must_use]
    pub fn device(self: &Arc<Self>) -> Arc<Mutex<dyn PortDevice>> {
        Arc::new(Mutex::new(Registers(Arc::clone(self))))
    }

    /// Types bytes. Waits while the guest has not read what was typed before.
    pub fn type_bytes(&self, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.typed.len() >= TYPED_AHEAD_BYTES {
            state = self.taken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.typed.extend(bytes);
        state.receive();
    }
}

impl State {
    /// Moves what was typed into the receive buffer while there is room.
    fn receive(&mut self) {
        let room = self.registers.fifo_capacity().min(self.typed.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.typed.drain(..room).collect();
        if let Ok(taken) = self.registers.enqueue_raw_bytes(&bytes)
            && taken < bytes.len()
        {
            for byte in bytes[taken..].iter().rev() {
                self.typed.push_front(*byte);
            }
        }
    }
}

struct Registers(Arc<SerialPort>);

impl PortDevice for Registers {
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        data[0] = state.registers.read(offset);
        if !state.typed.is_empty() {
            state.receive();
            self.0.taken.notify_all();
        }
    }

    fn write(&mut self, offset: u16, data: &[u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        // A console that is gone, or full, is to the guest like a cable that is pulled: its bytes are lost.
        drop(state.registers.write(offset, data[0]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn bytes_go_both_ways_however_many_are_typed_ahead() {
        let screen = Screen::default();
        let port = SerialPort::new(EventFd::new(0).expect("an event"), Box::new(screen.clone()));
        let device = port.device();
        let mut device = device.lock().expect("no panic");
        for byte in b"login:" {
            device.write(0, &[*byte]);
        }
        assert_eq!(*screen.0.lock().expect("no panic"), b"login:");
        let typed: Vec<u8> = (0..1000u32).map(|number| (number % 251) as u8).collect();
        port.type_bytes(&typed);
        let mut read = Vec::new();
        let mut data = [0];
        loop {
            device.read(5, &mut data);
            if data[0] & 1 == 0 {
                break;
            }
            device.read(0, &mut data);
            read.push(data[0]);
        }
        assert_eq!(read, typed);
    }
}
