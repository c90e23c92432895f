//! Storages that misbehave on purpose, over any other storage: for the tests of this and other crates.
//!
//! [`CrashRecorder`] remembers what was written and flushed and makes the states that a power cut may
//! leave; [`FailAt`] fails at the n-th operation; [`Gated`] lets a test hold a chosen operation and go
//! on elsewhere meanwhile.

mod crash;
mod crash_states;
mod fail;
mod gate;
mod interpose;
mod random;

pub use crash::CrashRecorder;
pub use crash_states::{CrashState, CrashStates};
pub use fail::FailAt;
pub use gate::{Gate, Gated};
pub use interpose::{Operation, Request};
#[cfg(test)]
pub(crate) use random::Random;
