//! The data plane: guest requests on one side, the extents of a disk image on the other, and no waiting
//! between them.
//!
//! A [`Disk`](disk::Disk) is an opened image that several front ends may share. Each queue, or connection, of a
//! front end has a [`Lane`](engine::Lane) of its own, on its own thread: it takes
//! [requests](request::Request) and gives [events](engine::Event) back, and never waits for a disk unless it is
//! told to sleep.
//!
//! `engine` depends on `disk` and `request`; the front ends depend on all three; none of them on another.
#![deny(unsafe_code)]

mod accept;
pub mod bench;
pub mod control;
pub mod disk;
pub mod engine;
pub mod in_process;
pub mod nbd;
pub mod request;
pub mod sandbox;
mod sync;
pub mod vhost_user;
pub mod virtio;
