//! How a running daemon is asked and told: QMP on a unix socket, and metrics for Prometheus.
//!
//! - `daemon`: what there is to control: disks under node names, exports, the NBD server, the end.
//! - `shape`, `command`, `schema`: the commands as one table. What a command takes and returns is declared once;
//!   arguments are checked against it, `query-qmp-schema` is made from it, and the tests hold replies against it.
//! - `block`, `export`, `general`: what the commands do.
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
mod qmp;
mod schema;
mod shape;

pub use daemon::{Daemon, ExportKind};
pub use listen::ControlAddress;
pub(crate) use listen::remove_stale_socket;
pub use metrics::{Metrics, summary};
pub use qmp::Qmp;
