//! Disk images as maps.
//!
//! A virtual disk is a function from guest ranges to [extents](format::Extent); this crate
//! reads, writes and changes that function for every format it knows.
//!
//! The modules depend on each other in one direction only:
//! [`storage`] (bytes of one host object) ← [`format`](mod@format) (one layer: a map and its changes) ←
//! [`image`] (an opened chain of layers) ← [`job`] (whole-image work).
//!
//! The crate prints nothing and starts no runtime.
#![deny(unsafe_code)]

mod error;

pub mod format;
pub mod image;
pub mod job;
pub mod limits;
pub mod storage;
mod sync;
pub mod text;
mod zeroes;

pub use error::{Error, JobStep, Result};
