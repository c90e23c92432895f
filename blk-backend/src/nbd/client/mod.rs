//! The client's side of the protocol, for the load generator: one export, over any number of connections.
//!
//! `uri` names an export, `handshake` agrees on it with the server, and a [`Connection`] (in `connection`) has requests
//! under way. The server is not trusted: what it sends is checked before it is used.
//!
//! Errors are [`std::io::Error`]s: of kind `InvalidData` for a server that breaks the protocol, `UnexpectedEof` for one
//! that is gone.

mod connection;
mod handshake;
mod uri;

use std::io;

pub(crate) use connection::{Connection, Kind};
pub(crate) use handshake::{ExportInfo, Negotiated};
pub(crate) use uri::NbdUri;

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}
