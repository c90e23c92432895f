//! Commands about the protocol itself: every service has them.

use std::marker::PhantomData;

use serde_json::{Value, json};

use super::{
    command::{Arguments, Command, CommandError, NOTHING, Outcome, command},
    schema,
    service::Service,
    shape::{Shape, optional, required},
};

/// The name of the command that ends the negotiation; the session does it.
pub(super) const CAPABILITIES: &str = "qmp_capabilities";

/// Commands that every service has.
#[derive(Debug)]
pub struct General<S>(PhantomData<S>);

impl<S: Service> General<S> {
    /// They are these.
    pub const COMMANDS: &'static [Command<S>] = &[
        command(CAPABILITIES, CAPABILITIES_ARGUMENTS, NOTHING, capabilities),
        command("query-version", NOTHING, VERSION, query_version),
        command("query-commands", NOTHING, COMMAND_LIST, query_commands),
        command("query-qmp-schema", NOTHING, Shape::List(&Shape::Any), query_qmp_schema),
    ];
}

pub(super) const CAPABILITIES_ARGUMENTS: Shape =
    Shape::Object(&[optional("enable", Shape::List(&Shape::Text))]);

const NUMBERS: Shape = Shape::Object(&[
    required("major", Shape::Integer),
    required("minor", Shape::Integer),
    required("micro", Shape::Integer),
]);

const VERSION: Shape = Shape::Object(&[required("qemu", NUMBERS), required("package", Shape::Text)]);

const COMMAND_LIST: Shape = Shape::List(&Shape::Object(&[required("name", Shape::Text)]));

/// The release of QEMU whose QMP this is; clients look at it before they speak. The package says who speaks.
pub(super) fn version<S: Service>() -> Value {
    json!({"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": S::PACKAGE})
}

/// Only ever called once negotiation is over.
fn capabilities<S: Service>(_: &S, _: &Arguments<'_>) -> Outcome {
    Err(CommandError::not_found("Capabilities negotiation is already complete, command ignored"))
}

fn query_version<S: Service>(_: &S, _: &Arguments<'_>) -> Outcome {
    Ok(version::<S>())
}

fn query_commands<S: Service>(_: &S, _: &Arguments<'_>) -> Outcome {
    Ok(S::COMMANDS.iter().copied().flatten().map(|command| json!({"name": command.name})).collect())
}

fn query_qmp_schema<S: Service>(_: &S, _: &Arguments<'_>) -> Outcome {
    Ok(schema::schema::<S>())
}
