//! The formats this build knows: the only list of their names.

use std::path::Path;

use super::{Driver, qcow2, qed, raw};

/// All drivers, in the order of `--help`.
pub static DRIVERS: &[&dyn Driver] = &[&raw::Raw, &qcow2::Qcow2, &qed::Qed];

/// The driver called `name`.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static dyn Driver> {
    DRIVERS.iter().copied().find(|driver| driver.name() == name)
}

/// How many bytes of a file's start [`probe`] looks at.
pub const PROBE_BYTES: usize = 2048;

/// The driver most sure of a file that starts with `head`. Raw claims everything, a little.
#[must_use]
pub fn probe(head: &[u8], name: &Path) -> &'static dyn Driver {
    DRIVERS.iter().copied().max_by_key(|driver| driver.probe(head, name)).expect("the list is not empty")
}
