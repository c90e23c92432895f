//! The power management function of a PIIX4: the clock by which firmware and boot loaders wait, and the registers by
//! which they, and operating systems that firmware started, switch off.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::SLEEP_TYPE_OFF;
use crate::{
    bus::MovablePorts,
    machine::{End, RunControl},
    pci::{BOARD_SUBSYSTEM, ConfigSpace, Identity, PciFunction, VENDOR_INTEL},
};

/// Where the ports are (PIIX4 datasheet, section 7.2.1): bits 6 to 15; bit 0 says that it is about ports.
const PORTS_BASE: usize = 0x40;
/// Device activity B: the byte whose bit 1 says that writes to the APM port interrupt into system management. Set
/// from the start, it tells firmware that somebody has seen to that.
const DEVICE_ACTIVITY_B: usize = 0x5B;
const APM_ENABLE: u8 = 1 << 1;
/// Bit 0 switches the ports on (section 7.2.4).
const PORTS_ENABLE: usize = 0x80;

/// Where the ports always are, besides where the guest puts them: firmwares differ in that, and ACPI needs one place.
/// It is where SeaBIOS puts them.
pub const POWER_PORTS: u16 = 0x600;
/// How many ports.
const PORT_COUNT: u16 = 64;
/// The PM1 enable register (section 7.1.2), behind the status register.
const PM1_ENABLE: u16 = 2;
/// The PM1 control register (section 7.1.3).
pub const PM1_CONTROL: u16 = 4;
/// The timer (section 7.1.4).
pub const TIMER: u16 = 8;
/// PM1 control: events are ACPI's affair. They are, always.
const ACPI_MODE: u16 = 1;
/// PM1 control: enter the sleep type in bits 10 to 12.
const SLEEP_ENABLE: u16 = 1 << 13;
/// PM1 control: where the sleep type stands. None is off, as on a PIIX4, and so is what ACPI is told.
const SLEEP_TYPE_SHIFT: u32 = 10;

/// The timer counts at this rate, in 24 bits.
const TIMER_HZ: u128 = 3_579_545;
const TIMER_MASK: u32 = 0xFF_FFFF;

#[derive(Debug)]
struct State {
    space: ConfigSpace,
    pm1_enable: u16,
    pm1_control: u16,
}

/// The function, with its ports.
#[derive(Debug)]
pub struct PowerManagement {
    control: Arc<RunControl>,
    began: Instant,
    state: Mutex<State>,
}

impl PowerManagement {
    /// A function that switches the machine of `control` off. Its ports are nowhere until firmware places them.
    #[must_use]
    pub fn new(control: Arc<RunControl>) -> Arc<Self> {
        let mut space = ConfigSpace::new(Identity {
            vendor: VENDOR_INTEL,
            device: 0x7113,
            revision: 3,
            class: 0x06_8000,
            subsystem: BOARD_SUBSYSTEM,
            is_multifunction: false,
        });
        space.add_register(PORTS_BASE, 1, 0xC0);
        space.add_register(PORTS_BASE + 1, 0, 0xFF);
        space.add_register(DEVICE_ACTIVITY_B, APM_ENABLE, 0xFF);
        space.add_register(PORTS_ENABLE, 0, 1);
        let state = Mutex::new(State { space, pm1_enable: 0, pm1_control: ACPI_MODE });
        Arc::new(Self { control, began: Instant::now(), state })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The timer after so long.
fn ticks(since: Duration) -> u32 {
    let ticks = since.as_nanos() * TIMER_HZ / 1_000_000_000; // u64 seconds in nanoseconds times 2^22 fits u128
    u32::try_from(ticks & u128::from(TIMER_MASK)).expect("24 bits")
}

impl PciFunction for PowerManagement {
    fn read_config(&self, register: u8) -> u32 {
        self.lock().space.read(register)
    }

    fn write_config(&self, offset: u8, data: &[u8]) {
        self.lock().space.write(offset, data);
    }

    fn decoded(&self) -> Vec<(usize, Range<u64>)> {
        Vec::new()
    }

    fn read_bar(&self, _: usize, _: u64, _: &mut [u8]) {}

    fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
}

impl MovablePorts for PowerManagement {
    fn offset_of(&self, port: u16) -> Option<u16> {
        let state = self.lock();
        let base =
            u16::from_le_bytes([state.space.byte(PORTS_BASE) & 0xC0, state.space.byte(PORTS_BASE + 1)]);
        let is_on = state.space.byte(PORTS_ENABLE) & 1 != 0;
        let moved = port.checked_sub(base).filter(|offset| is_on && *offset < PORT_COUNT);
        moved.or_else(|| port.checked_sub(POWER_PORTS).filter(|offset| *offset < PORT_COUNT))
    }

    fn read(&self, offset: u16, data: &mut [u8]) {
        let state = self.lock();
        // No event ever happens: the status registers are zero.
        let mut registers = [0; PORT_COUNT as usize];
        for (at, value) in [(PM1_ENABLE, state.pm1_enable), (PM1_CONTROL, state.pm1_control)] {
            registers[usize::from(at)..usize::from(at) + 2].copy_from_slice(&value.to_le_bytes());
        }
        let timer = usize::from(TIMER);
        registers[timer..timer + 4].copy_from_slice(&ticks(self.began.elapsed()).to_le_bytes());
        for (byte, value) in data.iter_mut().zip(&registers[usize::from(offset)..]) {
            *byte = *value;
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        let mut registers = [state.pm1_enable.to_le_bytes(), state.pm1_control.to_le_bytes()];
        let bytes = registers.as_flattened_mut();
        for (at, &value) in (usize::from(offset)..).zip(data) {
            if let Some(byte) = at.checked_sub(usize::from(PM1_ENABLE)).and_then(|at| bytes.get_mut(at)) {
                *byte = value;
            }
        }
        let [enable, control] = registers.map(u16::from_le_bytes);
        // The bit that enters a sleep reads as zero.
        (state.pm1_enable, state.pm1_control) = (enable, control & !SLEEP_ENABLE | ACPI_MODE);
        let sleep_type = control >> SLEEP_TYPE_SHIFT & 7;
        if control & SLEEP_ENABLE != 0 && (sleep_type == 0 || sleep_type == u16::from(SLEEP_TYPE_OFF)) {
            self.control.end(End::PowerOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed() -> (Arc<PowerManagement>, Arc<RunControl>) {
        let control = Arc::new(RunControl::default());
        let function = PowerManagement::new(Arc::clone(&control));
        function.write_config(0x40, &0xB001u32.to_le_bytes());
        function.write_config(0x80, &[1]);
        (function, control)
    }

    #[test]
    fn the_ports_are_where_firmware_puts_them() {
        let (function, _) = placed();
        assert_eq!(
            [0x5FF, 0x600, 0x63F, 0x640].map(|port| function.offset_of(port)),
            [None, Some(0), Some(63), None]
        );
        function.write_config(0x40, &0xFFFF_FFFFu32.to_le_bytes());
        assert_eq!(function.read_config(0x40), 0xFFC1);
        assert_eq!([function.offset_of(0xFFC0), function.offset_of(0xFFFF)], [Some(0), Some(63)]);
        function.write_config(0x80, &[0]);
        assert_eq!(function.offset_of(0xFFC0), None);
    }

    #[test]
    fn the_timer_counts_3579545_times_a_second_and_wraps() {
        assert_eq!(ticks(Duration::from_secs(1)), 3_579_545);
        assert_eq!(ticks(Duration::from_millis(1)), 3579);
        let around = u32::try_from((3_579_545u64 * 3600) & 0xFF_FFFF).expect("24 bits");
        assert_eq!(ticks(Duration::from_secs(3600)), around);
        let (function, _) = placed();
        let mut data = [0xFF; 4];
        function.read(TIMER, &mut data);
        assert_eq!(data[3], 0);
    }

    #[test]
    fn only_a_sleep_of_the_right_type_switches_off() {
        let off_by_acpi = SLEEP_ENABLE | u16::from(SLEEP_TYPE_OFF) << SLEEP_TYPE_SHIFT;
        for off in [SLEEP_ENABLE, off_by_acpi] {
            let (function, control) = placed();
            function.write(PM1_CONTROL, &off.to_le_bytes());
            assert_eq!(control.ended(), Some(End::PowerOff));
        }
        let (function, control) = placed();
        function.write(PM1_CONTROL, &1u16.to_le_bytes());
        function.write(PM1_CONTROL, &(SLEEP_ENABLE | 1 << 10).to_le_bytes());
        assert_eq!(control.ended(), None);
        let mut data = [0; 2];
        function.read(PM1_CONTROL, &mut data);
        assert_eq!(u16::from_le_bytes(data), 1 << 10 | ACPI_MODE);
        // What enables events is kept, and none comes.
        function.write(0, &0xFFFF_FFFFu32.to_le_bytes());
        let mut events = [0xFF; 4];
        function.read(0, &mut events);
        assert_eq!(events, [0, 0, 0xFF, 0xFF]);
        function.write(PM1_CONTROL, &[0, 0]);
        function.write(PM1_CONTROL + 1, &[0x20]);
        assert_eq!(control.ended(), Some(End::PowerOff));
    }
}
