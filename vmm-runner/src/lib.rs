//! A small KVM runner that boots unmodified Linux guests from layered disk images.
//!
//! `machine` is the guest's hardware: memory, vCPUs, interrupts and the one board they sit on. `bus` is the only
//! place that knows port addresses, `pci` the only one that knows where BARs are; `devices` has one file a device.
//! `virtio` has the PCI transport, written once, and the devices behind it. `boot` puts a kernel into memory.
//! `control` is how a run is held, continued and ended from outside.
//!
//! Everything that a guest writes into a register or a ring is checked where it arrives; a guest can stop itself,
//! and nothing else.

pub mod boot;
pub mod bus;
pub mod console;
pub mod control;
pub mod devices;
pub mod drive;
mod error;
pub mod machine;
pub mod pci;
pub mod stats;
pub mod tap;
pub mod virtio;

pub use error::{Error, Result};
