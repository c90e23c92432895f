//! Commands about exports and the NBD server.

use std::net::ToSocketAddrs as _;
use std::sync::Arc;

use serde_json::json;

use super::{
    command::{Arguments, Command, CommandError, Event, NOTHING, Outcome, command},
    daemon::{BlockExport, Daemon, Offered},
    nodes::{Node, is_well_formed},
    service::Service as _,
    shape::{Shape, Union, optional, required},
};
use crate::{
    nbd::{Export, ExportOptions, ListenAddress, Server, ServerOptions},
    vhost_user::{self, Listening},
    virtio::{Device, DeviceOptions},
};

pub(super) static COMMANDS: &[Command<Daemon>] = &[
    command("query-block-exports", NOTHING, EXPORT_LIST, query_exports),
    command("block-export-add", ADD_ARGUMENTS, NOTHING, add),
    command("block-export-del", DEL_ARGUMENTS, NOTHING, del),
    command("nbd-server-start", SERVER_START_ARGUMENTS, NOTHING, server_start),
    command("nbd-server-stop", NOTHING, NOTHING, server_stop),
    Command { deprecated: true, ..command("nbd-server-add", SERVER_ADD_ARGUMENTS, NOTHING, server_add) },
    Command {
        deprecated: true,
        ..command("nbd-server-remove", SERVER_REMOVE_ARGUMENTS, NOTHING, server_remove)
    },
];

/// An export is gone.
const EXPORT_DELETED: &str = "BLOCK_EXPORT_DELETED";

pub(super) static EVENTS: &[Event] = &[Event { name: EXPORT_DELETED, data: &[required("id", Shape::Text)] }];

const REMOVE_MODE: Shape = Shape::Choice(&["safe", "hard"]);

const EXPORT_LIST: Shape = Shape::List(&Shape::Object(&[
    required("id", Shape::Text),
    required("type", Shape::Choice(&["nbd", "vhost-user-blk"])),
    required("node-name", Shape::Text),
    required("shutting-down", Shape::Switch),
]));

const ADD_ARGUMENTS: Shape = Shape::Union(&Union {
    members: &[
        required("type", Shape::Choice(&["nbd", "vhost-user-blk"])),
        required("id", Shape::Text),
        required("node-name", Shape::Text),
        optional("writable", Shape::Switch),
    ],
    tag: "type",
    cases: &[
        (
            "nbd",
            &[
                optional("name", Shape::Text),
                optional("description", Shape::Text),
                optional("bitmaps", Shape::List(&Shape::Text)),
                optional("allocation-depth", Shape::Switch),
            ],
        ),
        (
            "vhost-user-blk",
            &[
                required("addr", DEVICE_ADDRESS),
                optional("logical-block-size", Shape::Integer),
                optional("num-queues", Shape::Integer),
            ],
        ),
    ],
});

/// Where front ends connect.
const DEVICE_ADDRESS: Shape = Shape::Union(&Union {
    members: &[required("type", Shape::Choice(&["unix"]))],
    tag: "type",
    cases: &[("unix", &[required("path", Shape::Text)])],
});

const DEL_ARGUMENTS: Shape = Shape::Object(&[required("id", Shape::Text), optional("mode", REMOVE_MODE)]);

const UNIX_ADDRESS: Shape = Shape::Object(&[required("path", Shape::Text)]);
const INET_ADDRESS: Shape = Shape::Object(&[required("host", Shape::Text), required("port", Shape::Text)]);

const ADDRESS: Shape = Shape::Union(&Union {
    members: &[required("type", Shape::Choice(&["unix", "inet"]))],
    tag: "type",
    cases: &[("unix", &[required("data", UNIX_ADDRESS)]), ("inet", &[required("data", INET_ADDRESS)])],
});

const SERVER_START_ARGUMENTS: Shape =
    Shape::Object(&[required("addr", ADDRESS), optional("max-connections", Shape::Integer)]);

const SERVER_ADD_ARGUMENTS: Shape = Shape::Object(&[
    required("device", Shape::Text),
    optional("name", Shape::Text),
    optional("description", Shape::Text),
    optional("writable", Shape::Switch),
    optional("bitmap", Shape::Text),
]);

const SERVER_REMOVE_ARGUMENTS: Shape =
    Shape::Object(&[required("name", Shape::Text), optional("mode", REMOVE_MODE)]);

fn query_exports(daemon: &Daemon, _: &Arguments<'_>) -> Outcome {
    let entry = |export: BlockExport| {
        // What is offered is the top of the disk, whatever came on top since.
        let node = daemon.nodes().find(&export.node, "")?;
        Ok(json!({
            "id": export.id,
            "type": export.offered.kind(),
            "node-name": node.layer_name(0),
            "shutting-down": export.shutting_down,
        }))
    };
    daemon.exports().into_iter().map(entry).collect()
}

fn add(daemon: &Daemon, arguments: &Arguments<'_>) -> Outcome {
    let _one = daemon.change();
    let node_name = arguments.text("node-name");
    let node = daemon.nodes().find("", node_name)?;
    let writable = arguments.switch("writable") == Some(true);
    if writable && node.disk.is_read_only() {
        return Err(CommandError::new(format!("Block node '{node_name}' is read-only")));
    }
    if arguments.text("type") == "vhost-user-blk" {
        return offer_device(daemon, &node, arguments, writable);
    }
    let options = ExportOptions {
        name: arguments.maybe_text("name").unwrap_or(node_name).to_owned(),
        description: arguments.text("description").to_owned(),
        read_only: !writable,
        bitmaps: arguments.texts("bitmaps"),
        allocation_depth: arguments.switch("allocation-depth") == Some(true),
    };
    offer(daemon, &node, arguments.text("id"), options)
}

/// The caller is the one that changes exports.
fn offer(daemon: &Daemon, node: &Node, id: &str, options: ExportOptions) -> Outcome {
    check_id(daemon, id)?;
    let server = daemon.server().ok_or_else(|| CommandError::new("NBD server not running"))?;
    let export = server.add(Export::new(Arc::clone(&node.disk), options)?)?;
    daemon.register(id, &node.name, Offered::Nbd(export))?;
    Ok(json!({}))
}

fn check_id(daemon: &Daemon, id: &str) -> Result<(), CommandError> {
    if !is_well_formed(id) {
        return Err(CommandError::new("Invalid block export id"));
    }
    if daemon.exports().iter().any(|known| known.id == id) {
        return Err(CommandError::new(format!("Block export id '{id}' is already in use")));
    }
    Ok(())
}

/// A vhost-user socket. The caller is the one that changes exports.
fn offer_device(daemon: &Daemon, node: &Node, arguments: &Arguments<'_>, writable: bool) -> Outcome {
    let id = arguments.text("id");
    check_id(daemon, id)?;
    // What a guest wrote and did not flush is noted in the memory of one front end, and found there by the next daemon.
    let writes = |export: &BlockExport| {
        let Offered::VhostUserBlk(server) = &export.offered else { return false };
        export.node == node.name && !server.device().is_read_only()
    };
    if writable && let Some(other) = daemon.exports().into_iter().find(writes) {
        let (node, other) = (&node.name, other.id);
        return Err(CommandError::new(format!(
            "Block node '{node}' is written by the guest of export '{other}': a second one can be read-only"
        )));
    }
    let default = DeviceOptions::default();
    let options = DeviceOptions {
        queues: number(arguments, "num-queues", default.queues)?,
        block_bytes: number(arguments, "logical-block-size", default.block_bytes)?,
        read_only: !writable,
        poll: daemon.device_poll,
        engine: daemon.server_options.lane.engine,
        ..default
    };
    let device = Device::new(&node.disk, &options).map_err(|error| CommandError::new(error.to_string()))?;
    let path = arguments.object("addr").expect("it was checked").text("path");
    let failed = |error| CommandError::new(format!("Failed to bind socket to {path}: {error}"));
    let listening = Listening::at(path.as_ref()).map_err(failed)?;
    let server = vhost_user::Server::serve(device, listening, Arc::clone(&daemon.log)).map_err(failed)?;
    daemon.register(id, &node.name, Offered::VhostUserBlk(Arc::new(server)))?;
    Ok(json!({}))
}

/// A number of the unsigned type that an option has; `default` where it was left out.
fn number<T: TryFrom<u64>>(arguments: &Arguments<'_>, name: &str, default: T) -> Result<T, CommandError> {
    let Some(value) = arguments.0.get(name) else { return Ok(default) };
    let number = value.as_u64().and_then(|number| T::try_from(number).ok());
    number
        .ok_or_else(|| CommandError::new(format!("Parameter '{name}' expects uint{}_t", 8 * size_of::<T>())))
}

fn del(daemon: &Daemon, arguments: &Arguments<'_>) -> Outcome {
    let _one = daemon.change();
    let id = arguments.text("id");
    let found = daemon.exports().into_iter().find(|export| export.id == id);
    let export = found.ok_or_else(|| CommandError::new(format!("Export '{id}' is not found")))?;
    withdraw(daemon, &export, arguments.maybe_text("mode") == Some("hard"))
}

/// The caller is the one that changes exports.
fn withdraw(daemon: &Daemon, export: &BlockExport, by_force: bool) -> Outcome {
    daemon.set_shutting_down(&export.id, true);
    let removed = match &export.offered {
        Offered::Nbd(nbd) => match daemon.server() {
            Some(server) => server.remove(nbd, by_force).map_err(CommandError::from),
            None => Ok(()),
        },
        Offered::VhostUserBlk(server) if !by_force && server.is_connected() => {
            Err(CommandError::new(format!("export '{}' still in use", export.id)))
        }
        Offered::VhostUserBlk(server) => {
            server.finish();
            Ok(())
        }
    };
    if let Err(error) = removed {
        daemon.set_shutting_down(&export.id, false);
        return Err(error);
    }
    daemon.unregister(&export.id);
    daemon.subscribers().emit(EXPORT_DELETED, Some(json!({"id": export.id})));
    Ok(json!({}))
}

fn server_start(daemon: &Daemon, arguments: &Arguments<'_>) -> Outcome {
    let _one = daemon.change();
    let mut options = daemon.server_options.clone();
    if arguments.0.contains_key("max-connections") {
        let wanted: u32 = number(arguments, "max-connections", 0)?;
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        options.max_connections = ServerOptions::most_connections(wanted);
    }
    if daemon.server().is_some() {
        return Err(CommandError::new("NBD server already running"));
    }
    let address = listen_address(&arguments.object("addr").expect("it was checked"))?;
    let server = Server::start(&address, options, Arc::clone(&daemon.log))
        .map_err(|error| CommandError::new(format!("Failed to bind socket to {address}: {error}")))?;
    daemon.set_server(server);
    Ok(json!({}))
}

fn listen_address(address: &Arguments<'_>) -> Result<ListenAddress, CommandError> {
    let data = address.object("data").expect("it was checked");
    if address.text("type") == "unix" {
        let path = data.text("path");
        if path.is_empty() {
            // The kernel would make a name up, which nobody could be told.
            return Err(CommandError::new("the address of a unix socket is its path, not ''"));
        }
        return Ok(ListenAddress::Unix(path.into()));
    }
    let (host, port) = (data.text("host"), data.text("port"));
    let number: u16 =
        port.parse().map_err(|_| CommandError::new(format!("'{port}' is not the number of a port")))?;
    let mut found = (host, number).to_socket_addrs().map_err(|error| {
        CommandError::new(format!("address resolution failed for {host}:{port}: {error}"))
    })?;
    let found = found.next().ok_or_else(|| CommandError::new(format!("{host} has no address")))?;
    Ok(ListenAddress::Tcp(found))
}

fn server_stop(daemon: &Daemon, _: &Arguments<'_>) -> Outcome {
    let _one = daemon.change();
    if daemon.server().is_none() {
        return Err(CommandError::new("NBD server not running"));
    }
    let is_nbd = |export: &&BlockExport| matches!(export.offered, Offered::Nbd(_));
    for export in daemon.exports().iter().filter(is_nbd) {
        withdraw(daemon, export, true)?;
    }
    daemon.stop_server();
    Ok(json!({}))
}

/// The old way to add an export: its id is its name, and a disk that cannot be written is offered read-only.
fn server_add(daemon: &Daemon, arguments: &Arguments<'_>) -> Outcome {
    let _one = daemon.change();
    let device = arguments.text("device");
    let node = daemon.nodes().find(device, device)?;
    let name = arguments.maybe_text("name").unwrap_or(device);
    let options = ExportOptions {
        name: name.to_owned(),
        description: arguments.text("description").to_owned(),
        read_only: arguments.switch("writable") != Some(true) || node.disk.is_read_only(),
        bitmaps: arguments.maybe_text("bitmap").map(str::to_owned).into_iter().collect(),
        allocation_depth: false,
    };
    offer(daemon, &node, name, options)
}

fn server_remove(daemon: &Daemon, arguments: &Arguments<'_>) -> Outcome {
    let _one = daemon.change();
    let name = arguments.text("name");
    let by_name = |export: &BlockExport| matches!(&export.offered, Offered::Nbd(nbd) if nbd.name() == name);
    let found = daemon.exports().into_iter().find(by_name);
    let export = found.ok_or_else(|| CommandError::new(format!("Export '{name}' is not found")))?;
    withdraw(daemon, &export, arguments.maybe_text("mode") == Some("hard"))
}
