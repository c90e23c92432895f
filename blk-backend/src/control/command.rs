//! The commands and events, as one table.

use serde_json::{Map, Value};

use super::{
    block,
    daemon::Daemon,
    export, general,
    shape::{Member, Shape, required},
};

/// Why a command failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CommandError {
    pub(super) class: &'static str,
    pub(super) text: String,
}

impl CommandError {
    /// An error without a class of its own.
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self { class: "GenericError", text: text.into() }
    }

    pub(super) fn not_found(text: impl Into<String>) -> Self {
        Self { class: "CommandNotFound", text: text.into() }
    }
}

impl From<img_core::Error> for CommandError {
    fn from(error: img_core::Error) -> Self {
        Self::new(error.to_string())
    }
}

pub(super) type Outcome = Result<Value, CommandError>;

/// Arguments that were checked against their shape.
pub(super) struct Arguments<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Arguments<'a> {
    /// A text, empty where it was left out.
    pub(super) fn text(&self, name: &str) -> &'a str {
        self.maybe_text(name).unwrap_or_default()
    }

    pub(super) fn maybe_text(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).and_then(Value::as_str)
    }

    pub(super) fn switch(&self, name: &str) -> Option<bool> {
        self.0.get(name).and_then(Value::as_bool)
    }

    /// A number; `None` where it was left out, or is negative.
    pub(super) fn size(&self, name: &str) -> Option<u64> {
        self.0.get(name).and_then(Value::as_u64)
    }

    pub(super) fn object(&self, name: &str) -> Option<Arguments<'a>> {
        self.0.get(name).and_then(Value::as_object).map(Arguments)
    }

    pub(super) fn texts(&self, name: &str) -> Vec<String> {
        let values = self.0.get(name).and_then(Value::as_array).into_iter().flatten();
        values.filter_map(Value::as_str).map(str::to_owned).collect()
    }
}

/// A command.
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) arguments: Shape,
    pub(super) returns: Shape,
    pub(super) deprecated: bool,
    pub(super) run: fn(&Daemon, &Arguments<'_>) -> Outcome,
}

/// An event.
pub(super) struct Event {
    pub(super) name: &'static str,
    pub(super) data: &'static [Member],
}

/// No member at all.
pub(super) const NOTHING: Shape = Shape::Object(&[]);

const fn command(
    name: &'static str,
    arguments: Shape,
    returns: Shape,
    run: fn(&Daemon, &Arguments<'_>) -> Outcome,
) -> Command {
    Command { name, arguments, returns, deprecated: false, run }
}

/// The name of the command that ends the negotiation; the session does it.
pub(super) const CAPABILITIES: &str = "qmp_capabilities";

/// All commands.
pub(super) static COMMANDS: &[Command] = &[
    command(CAPABILITIES, general::CAPABILITIES_ARGUMENTS, NOTHING, general::capabilities),
    command("query-version", NOTHING, general::VERSION, general::query_version),
    command("query-commands", NOTHING, general::COMMAND_LIST, general::query_commands),
    command("query-qmp-schema", NOTHING, Shape::List(&Shape::Any), general::query_qmp_schema),
    command("query-status", NOTHING, general::STATUS, general::query_status),
    command("quit", NOTHING, NOTHING, general::quit),
    command("query-block", NOTHING, block::BLOCK_LIST, block::query_block),
    command("query-named-block-nodes", block::NODES_ARGUMENTS, block::NODE_LIST, block::query_nodes),
    command("query-blockstats", block::STATS_ARGUMENTS, block::STATS_LIST, block::query_blockstats),
    command("block_resize", block::RESIZE_ARGUMENTS, NOTHING, block::resize),
    command("blockdev-snapshot-sync", block::SNAPSHOT_SYNC_ARGUMENTS, NOTHING, block::snapshot_sync),
    command("blockdev-snapshot-internal-sync", block::SNAPSHOT_ARGUMENTS, NOTHING, block::snapshot_create),
    command(
        "blockdev-snapshot-delete-internal-sync",
        block::SNAPSHOT_DELETE_ARGUMENTS,
        block::SNAPSHOT,
        block::snapshot_delete,
    ),
    command("query-block-exports", NOTHING, export::EXPORT_LIST, export::query_exports),
    command("block-export-add", export::ADD_ARGUMENTS, NOTHING, export::add),
    command("block-export-del", export::DEL_ARGUMENTS, NOTHING, export::del),
    command("nbd-server-start", export::SERVER_START_ARGUMENTS, NOTHING, export::server_start),
    command("nbd-server-stop", NOTHING, NOTHING, export::server_stop),
    Command {
        deprecated: true,
        ..command("nbd-server-add", export::SERVER_ADD_ARGUMENTS, NOTHING, export::server_add)
    },
    Command {
        deprecated: true,
        ..command("nbd-server-remove", export::SERVER_REMOVE_ARGUMENTS, NOTHING, export::server_remove)
    },
];

/// An export is gone.
pub(super) const EXPORT_DELETED: &str = "BLOCK_EXPORT_DELETED";

/// All events.
pub(super) static EVENTS: &[Event] = &[Event { name: EXPORT_DELETED, data: &[required("id", Shape::Text)] }];
