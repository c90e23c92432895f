//! How a running process is asked and told: QMP on a unix socket, and metrics for Prometheus.
//!
//! - `service`: what a process must be so that it can be controlled. [`Daemon`] is one: disks under node names, exports,
//!   the NBD server, the end.
//! - `shape`, `command`, `schema`: the commands as tables. What a command takes and returns is declared once;
//!   arguments are checked against it, `query-qmp-schema` is made from it, and the tests hold replies against it.
//! - `general`, `block`, `nodes`: what every service has: the protocol's own commands, and disks under names.
//! - `export`: what the daemon has beside.
//! - `qmp`, `framer`: the protocol (QEMU `docs/interop/qmp-spec.rst`): greeting, capabilities, errors, events.
//! - `metrics`: counters as Prometheus text. `listen`: the sockets of both.

mod block;
mod command;
mod daemon;
mod export;
mod framer;
mod general;
mod listen;
mod metrics;
mod nodes;
mod qmp;
mod schema;
mod service;
mod shape;

pub use block::Block;
pub use command::{Arguments, Command, CommandError, Event, NOTHING, Outcome, command};
pub use daemon::Daemon;
pub use general::General;
pub use listen::{ControlAddress, listen_unix, remove_stale_socket};
pub(crate) use listen::{listen_at, listen_unix_anew};
pub use metrics::{Metrics, summary};
pub use nodes::{IoStatus, Node, Nodes};
pub use qmp::Qmp;
pub use service::{Service, Subscribers};
pub use shape::{Member, Shape, Union, optional, required};
