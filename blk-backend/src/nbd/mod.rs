//! The NBD server: disks over a socket, to the NBD project's protocol document (`doc/proto.md`).
//!
//! - `wire`: the protocol's numbers and fixed structures.
//! - `handshake`, `option`: fixed newstyle negotiation, up to a `Session`.
//! - `command`, `reply`: requests and replies as bytes. `context`, `status`: metadata contexts.
//! - `connection`: the transmission phase on a [`Lane`](crate::engine::Lane) of its own; `flight`, `input`, `output`,
//!   `buffer`, `straight`, `room` and `socket` are its parts.
//! - `server`, `export`, `address`: what listens, what is offered, and where.
//! - `client`: the other side, for the load generator.
//!
//! A client is hostile until it has proved otherwise, and then still: what it sends is checked before it is used, what
//! a connection holds is bounded, and a broken rule ends that connection alone.

mod address;
mod buffer;
pub(crate) mod client;
mod command;
mod connection;
mod context;
mod export;
mod flight;
mod handshake;
mod input;
mod option;
mod output;
mod reply;
mod room;
mod server;
mod socket;
mod status;
mod straight;
mod wire;

pub use address::{DEFAULT_PORT, ListenAddress};
pub use export::{Export, ExportOptions, Exports};
pub use server::{Log, Server, ServerCounts, ServerOptions};
