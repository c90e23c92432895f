//! The devices of the board that are not on the PCI bus; one file each.

mod debug_port;
mod fw_cfg;
mod power;
mod power_management;
mod rtc;
mod serial;

pub use debug_port::{DEBUG_PORT, DebugPort};
pub use fw_cfg::{FW_CFG_PORT_COUNT, FW_CFG_PORTS, FwCfg, FwCfgItems};
pub use power::{
    AcpiPorts, FAST_RESET, ResetPort, SLEEP_CONTROL_PORT, SLEEP_PORT_COUNT, SLEEP_TYPE_OFF,
    SYSTEM_CONTROL_PORT,
};
pub use power_management::{PM1_CONTROL, POWER_PORTS, PowerManagement, TIMER};
pub use rtc::{RTC_PORT_COUNT, RTC_PORTS, Rtc};
pub use serial::{COM1_GSI, COM1_PORT_COUNT, COM1_PORTS, Console, SerialPort};
