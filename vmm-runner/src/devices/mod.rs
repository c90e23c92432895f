//! The devices of the board that are not on the PCI bus; one file each.

mod power;
mod rtc;
mod serial;

pub use power::{
    AcpiPorts, ResetPort, SLEEP_CONTROL_PORT, SLEEP_PORT_COUNT, SLEEP_TYPE_OFF, SYSTEM_CONTROL_PORT,
};
pub use rtc::{RTC_PORT_COUNT, RTC_PORTS, Rtc};
pub use serial::{COM1_GSI, COM1_PORT_COUNT, COM1_PORTS, Console, SerialPort};
