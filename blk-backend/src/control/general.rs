//! Commands about the daemon itself.

use serde_json::{Value, json};

use super::{
    command::{Arguments, COMMANDS, CommandError, Outcome},
    daemon::Daemon,
    schema,
    shape::{Shape, optional, required},
};

pub(super) const CAPABILITIES_ARGUMENTS: Shape =
    Shape::Object(&[optional("enable", Shape::List(&Shape::Text))]);

const NUMBERS: Shape = Shape::Object(&[
    required("major", Shape::Integer),
    required("minor", Shape::Integer),
    required("micro", Shape::Integer),
]);

pub(super) const VERSION: Shape =
    Shape::Object(&[required("qemu", NUMBERS), required("package", Shape::Text)]);

pub(super) const COMMAND_LIST: Shape = Shape::List(&Shape::Object(&[required("name", Shape::Text)]));

pub(super) const STATUS: Shape = Shape::Object(&[
    required("running", Shape::Switch),
    required("status", Shape::Choice(&["running", "shutdown"])),
]);

/// The release of QEMU whose QMP this is; clients look at it before they speak. The package says who speaks.
pub(super) fn version() -> Value {
    let package = concat!("blk-backend ", env!("CARGO_PKG_VERSION"));
    json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": package})
}

/// Only ever called once negotiation is over.
pub(super) fn capabilities(_: &Daemon, _: &Arguments<'_>) -> Outcome {
    Err(CommandError::not_found("Capabilities negotiation is already complete, command ignored"))
}

pub(super) fn query_version(_: &Daemon, _: &Arguments<'_>) -> Outcome {
    Ok(version())
}

pub(super) fn query_commands(_: &Daemon, _: &Arguments<'_>) -> Outcome {
    Ok(COMMANDS.iter().map(|command| json!({"name": command.name})).collect())
}

pub(super) fn query_qmp_schema(_: &Daemon, _: &Arguments<'_>) -> Outcome {
    Ok(schema::schema())
}

pub(super) fn query_status(daemon: &Daemon, _: &Arguments<'_>) -> Outcome {
    let ends = daemon.is_ending();
    Ok(json!({"running": !ends, "status": if ends { "shutdown" } else { "running" }}))
}

pub(super) fn quit(daemon: &Daemon, _: &Arguments<'_>) -> Outcome {
    daemon.end();
    Ok(json!({}))
}
