//! Commands about disks.

use std::{
    io::ErrorKind,
    marker::PhantomData,
    time::{SystemTime, UNIX_EPOCH},
};

use img_core::{
    Error,
    format::{HostFile, Layer, SnapshotInfo},
    image::{CacheMode, Image, ImageName, full_backing_name},
    text,
};
use serde_json::{Value, json};

use super::{
    command::{Arguments, Command, CommandError, NOTHING, Outcome, command},
    nodes::Node,
    service::Service,
    shape::{Shape, optional, required},
};
use crate::engine::{LaneSnapshot, OpKind};

/// Commands about the disks of a service.
#[derive(Debug)]
pub struct Block<S>(PhantomData<S>);

impl<S: Service> Block<S> {
    /// They are these.
    pub const COMMANDS: &'static [Command<S>] = &[
        command("query-block", NOTHING, BLOCK_LIST, query_block),
        command("query-named-block-nodes", NODES_ARGUMENTS, NODE_LIST, query_nodes),
        command("query-blockstats", STATS_ARGUMENTS, STATS_LIST, query_blockstats),
        command("block_resize", RESIZE_ARGUMENTS, NOTHING, resize),
        command("blockdev-snapshot-sync", SNAPSHOT_SYNC_ARGUMENTS, NOTHING, snapshot_sync),
        command("blockdev-snapshot-internal-sync", SNAPSHOT_ARGUMENTS, NOTHING, snapshot_create),
        command(
            "blockdev-snapshot-delete-internal-sync",
            SNAPSHOT_DELETE_ARGUMENTS,
            SNAPSHOT,
            snapshot_delete,
        ),
    ];
}

const SNAPSHOT: Shape = Shape::Object(&[
    required("id", Shape::Text),
    required("name", Shape::Text),
    required("vm-state-size", Shape::Integer),
    required("date-sec", Shape::Integer),
    required("date-nsec", Shape::Integer),
    required("vm-clock-sec", Shape::Integer),
    required("vm-clock-nsec", Shape::Integer),
    optional("icount", Shape::Integer),
]);

const IMAGE: Shape = Shape::Object(&[
    required("filename", Shape::Text),
    required("format", Shape::Text),
    required("virtual-size", Shape::Integer),
    required("dirty-flag", Shape::Switch),
    optional("actual-size", Shape::Integer),
    optional("cluster-size", Shape::Integer),
    optional("encrypted", Shape::Switch),
    optional("backing-filename", Shape::Text),
    optional("full-backing-filename", Shape::Text),
    optional("backing-filename-format", Shape::Text),
    optional("snapshots", Shape::List(&SNAPSHOT)),
    optional("format-specific", Shape::Any),
]);

const CACHE: Shape = Shape::Object(&[
    required("writeback", Shape::Switch),
    required("direct", Shape::Switch),
    required("no-flush", Shape::Switch),
]);

const NODE: Shape = Shape::Object(&[
    required("node-name", Shape::Text),
    required("file", Shape::Text),
    required("drv", Shape::Text),
    required("ro", Shape::Switch),
    required("encrypted", Shape::Switch),
    required("backing_file_depth", Shape::Integer),
    optional("backing_file", Shape::Text),
    required("cache", CACHE),
    required("image", IMAGE),
]);

const NODE_LIST: Shape = Shape::List(&NODE);
const NODES_ARGUMENTS: Shape = Shape::Object(&[optional("flat", Shape::Switch)]);

const BLOCK_LIST: Shape = Shape::List(&Shape::Object(&[
    required("device", Shape::Text),
    required("type", Shape::Text),
    required("removable", Shape::Switch),
    required("locked", Shape::Switch),
    required("inserted", NODE),
    optional("io-status", Shape::Choice(&["ok", "failed", "nospace"])),
]));

const STATS: Shape = Shape::Object(&[
    required("rd_bytes", Shape::Integer),
    required("wr_bytes", Shape::Integer),
    required("unmap_bytes", Shape::Integer),
    required("rd_operations", Shape::Integer),
    required("wr_operations", Shape::Integer),
    required("flush_operations", Shape::Integer),
    required("unmap_operations", Shape::Integer),
    required("rd_total_time_ns", Shape::Integer),
    required("wr_total_time_ns", Shape::Integer),
    required("flush_total_time_ns", Shape::Integer),
    required("unmap_total_time_ns", Shape::Integer),
    required("failed_rd_operations", Shape::Integer),
    required("failed_wr_operations", Shape::Integer),
    required("failed_flush_operations", Shape::Integer),
    required("failed_unmap_operations", Shape::Integer),
]);

const STATS_LIST: Shape = Shape::List(&Shape::Object(&[
    optional("device", Shape::Text),
    required("node-name", Shape::Text),
    required("stats", STATS),
]));
const STATS_ARGUMENTS: Shape = Shape::Object(&[optional("query-nodes", Shape::Switch)]);

const RESIZE_ARGUMENTS: Shape = Shape::Object(&[
    optional("device", Shape::Text),
    optional("node-name", Shape::Text),
    required("size", Shape::Integer),
]);

const SNAPSHOT_ARGUMENTS: Shape =
    Shape::Object(&[required("device", Shape::Text), required("name", Shape::Text)]);

const SNAPSHOT_DELETE_ARGUMENTS: Shape = Shape::Object(&[
    required("device", Shape::Text),
    optional("id", Shape::Text),
    optional("name", Shape::Text),
]);

const SNAPSHOT_SYNC_ARGUMENTS: Shape = Shape::Object(&[
    optional("device", Shape::Text),
    optional("node-name", Shape::Text),
    required("snapshot-file", Shape::Text),
    optional("snapshot-node-name", Shape::Text),
    optional("format", Shape::Text),
    optional("mode", Shape::Choice(&["existing", "absolute-paths"])),
]);

fn query_block<S: Service>(service: &S, _: &Arguments<'_>) -> Outcome {
    let device = |node: Node| -> Outcome {
        let mut entry = json!({
            "device": node.name, "type": "unknown", "removable": false, "locked": false,
            "inserted": node_of(&node.disk.image(), 0, &node)?,
        });
        if let Some(status) = node.io_status {
            entry["io-status"] = status.name().into();
        }
        Ok(entry)
    };
    service.nodes().all().into_iter().map(device).collect()
}

/// One for each disk, and one for each layer below it. `flat` changes nothing: images do not hold those below them
/// here, which have entries of their own.
fn query_nodes<S: Service>(service: &S, _: &Arguments<'_>) -> Outcome {
    let mut all = Vec::new();
    for node in service.nodes().all() {
        let image = node.disk.image();
        for depth in 0..image.layers().len() {
            all.push(node_of(&image, depth, &node)?);
        }
    }
    Ok(Value::Array(all))
}

/// What is known of a layer of a disk.
fn node_of(image: &Image, depth: usize, node: &Node) -> Outcome {
    let layer = &image.layers()[depth];
    let file = file_name(&**layer);
    let mut entry = json!({
        "node-name": node.layer_name(depth),
        "file": file,
        "drv": layer.driver().name(),
        "ro": layer.writer().is_none() || depth > 0,
        "encrypted": layer.is_encrypted(),
        "backing_file_depth": image.layers().len() - 1 - depth,
        "cache": {
            // Nothing is written to those below.
            "writeback": depth > 0 || !node.cache.writes_through(),
            "direct": node.cache.is_direct(),
            "no-flush": node.cache == CacheMode::Unsafe,
        },
        "image": image_info(&**layer, &file)?,
    });
    if let Some(backing) = image.layers().get(depth + 1) {
        entry["backing_file"] = file_name(&**backing).into();
    }
    Ok(entry)
}

fn file_name(layer: &dyn Layer) -> String {
    layer.file(HostFile::IMAGE).map_or(String::new(), |file| text::from_path(file.path()))
}

fn image_info(layer: &dyn Layer, file: &str) -> Outcome {
    let mut info = json!({
        "filename": file,
        "format": layer.driver().name(),
        "virtual-size": layer.virtual_size_bytes(),
        "dirty-flag": layer.is_dirty(),
    });
    if let Some(Ok(bytes)) = layer.file(HostFile::IMAGE).map(|file| file.allocated_bytes()) {
        info["actual-size"] = bytes.into();
    }
    if let Some(bytes) = layer.cluster_size_bytes() {
        info["cluster-size"] = bytes.into();
    }
    if layer.is_encrypted() {
        info["encrypted"] = true.into();
    }
    if let Some(backing) = layer.backing() {
        info["backing-filename"] = backing.name.as_str().into();
        info["full-backing-filename"] = full_backing_name(file, &backing.name).into();
        if let Some(format) = &backing.format {
            info["backing-filename-format"] = format.as_str().into();
        }
    }
    if let Some(snapshots) = layer.snapshots() {
        let list = snapshots.list()?;
        if !list.is_empty() {
            info["snapshots"] = list.iter().map(snapshot).collect();
        }
    }
    if let Some(details) = layer.details()? {
        info["format-specific"] = details;
    }
    Ok(info)
}

fn snapshot(known: &SnapshotInfo) -> Value {
    let mut entry = json!({
        "id": known.id,
        "name": known.name,
        "vm-state-size": known.vm_state_bytes,
        "date-sec": known.date.0,
        "date-nsec": known.date.1,
        "vm-clock-sec": known.vm_clock_nsec / 1_000_000_000,
        "vm-clock-nsec": known.vm_clock_nsec % 1_000_000_000,
    });
    if let Some(icount) = known.icount {
        entry["icount"] = icount.into();
    }
    entry
}

fn query_blockstats<S: Service>(service: &S, arguments: &Arguments<'_>) -> Outcome {
    let of_nodes = arguments.switch("query-nodes") == Some(true);
    let entry = |node: Node| {
        let mut entry = json!({"node-name": node.layer_name(0), "stats": stats(&node.disk.stats())});
        if !of_nodes {
            entry["device"] = node.name.into();
        }
        entry
    };
    Ok(service.nodes().all().into_iter().map(entry).collect())
}

/// Zero writes count as writes, as in the reference.
fn stats(counted: &LaneSnapshot) -> Value {
    let (read, flush, unmap) =
        (counted.op(OpKind::Read), counted.op(OpKind::Flush), counted.op(OpKind::Discard));
    let (write, zeroes) = (counted.op(OpKind::Write), counted.op(OpKind::WriteZeroes));
    json!({
        "rd_bytes": read.bytes,
        "wr_bytes": write.bytes + zeroes.bytes,
        "unmap_bytes": unmap.bytes,
        "rd_operations": read.done,
        "wr_operations": write.done + zeroes.done,
        "flush_operations": flush.done,
        "unmap_operations": unmap.done,
        "rd_total_time_ns": read.nanoseconds,
        "wr_total_time_ns": write.nanoseconds + zeroes.nanoseconds,
        "flush_total_time_ns": flush.nanoseconds,
        "unmap_total_time_ns": unmap.nanoseconds,
        "failed_rd_operations": read.failed,
        "failed_wr_operations": write.failed + zeroes.failed,
        "failed_flush_operations": flush.failed,
        "failed_unmap_operations": unmap.failed,
    })
}

fn resize<S: Service>(service: &S, arguments: &Arguments<'_>) -> Outcome {
    let node = service.nodes().find(arguments.text("device"), arguments.text("node-name"))?;
    let size =
        arguments.size("size").ok_or_else(|| CommandError::new("Parameter 'size' expects a >0 size"))?;
    if !size.is_multiple_of(512) {
        return Err(CommandError::new("The new size must be a multiple of 512"));
    }
    node.disk.resize(size)?;
    Ok(json!({}))
}

/// Puts a new image on top of a disk in use.
fn snapshot_sync<S: Service>(service: &S, arguments: &Arguments<'_>) -> Outcome {
    let _one = service.nodes().change();
    let node = service.nodes().find(arguments.text("device"), arguments.text("node-name"))?;
    let layer_name = service.nodes().name_for_top(&node, arguments.maybe_text("snapshot-node-name"))?;
    let overlay = ImageName::parse(arguments.text("snapshot-file"))?;
    let format = arguments.maybe_text("format").unwrap_or("qcow2");
    let existing = arguments.maybe_text("mode") == Some("existing");
    node.disk.snapshot_external(&overlay, format, existing).map_err(where_allowed)?;
    service.nodes().put_on_top(&node.name, layer_name);
    Ok(json!({}))
}

/// What is told where an image could not be made: the sandbox's refusal looks like any other.
fn where_allowed(error: Error) -> CommandError {
    match &error {
        Error::CreateFile { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
            CommandError::new(format!(
                "{error} (a sandbox lets images be made only in the directories of --allow-dir)"
            ))
        }
        _ => error.into(),
    }
}

fn snapshot_create<S: Service>(service: &S, arguments: &Arguments<'_>) -> Outcome {
    let _one = service.nodes().change();
    let (device, name) = (arguments.text("device"), arguments.text("name"));
    let node = service.nodes().find(device, device)?;
    if name.is_empty() {
        return Err(CommandError::new("Name is empty"));
    }
    if snapshots(&node)?.iter().any(|known| known.name == name) {
        return Err(CommandError::new(format!(
            "Snapshot with name '{name}' already exists on device '{device}'"
        )));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
    node.disk.snapshot_create(name, (seconds, now.subsec_nanos()))?;
    Ok(json!({}))
}

fn snapshot_delete<S: Service>(service: &S, arguments: &Arguments<'_>) -> Outcome {
    let _one = service.nodes().change();
    let device = arguments.text("device");
    let node = service.nodes().find(device, device)?;
    let (id, name) = (arguments.maybe_text("id"), arguments.maybe_text("name"));
    if id.is_none() && name.is_none() {
        return Err(CommandError::new("Name or id must be provided"));
    }
    let matches = |known: &SnapshotInfo| {
        id.is_none_or(|id| known.id == id) && name.is_none_or(|name| known.name == name)
    };
    let all = snapshots(&node)?;
    let Some(known) = all.iter().find(|known| matches(known)) else {
        let (id, name) = (id.unwrap_or("null"), name.unwrap_or("null"));
        return Err(CommandError::new(format!(
            "Snapshot with id '{id}' and name '{name}' does not exist on device '{device}'"
        )));
    };
    // Images delete by name: of several with one name, the first.
    if all.iter().find(|other| other.name == known.name).is_some_and(|first| first.id != known.id) {
        let text = format!("Several snapshots are called '{}': delete the others first", known.name);
        return Err(CommandError::new(text));
    }
    node.disk.snapshot_delete(&known.name)?;
    Ok(snapshot(known))
}

fn snapshots(node: &Node) -> Result<Vec<SnapshotInfo>, CommandError> {
    let image = node.disk.image();
    match image.layers()[0].snapshots() {
        Some(snapshots) => Ok(snapshots.list()?),
        None => {
            let format = image.layers()[0].driver().name();
            let name = &node.name;
            Err(CommandError::new(format!(
                "Block format '{format}' used by device '{name}' does not support feature 'internal snapshots'"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Barrier},
        thread,
    };

    use super::*;
    use crate::{
        control::Daemon,
        disk::{Disk, DiskOptions},
        engine::{Poll, tests::image},
        nbd::ServerOptions,
    };

    #[test]
    fn of_two_clients_who_want_the_same_name_one_has_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let name = image(dir.path(), "disk", "qcow2", &[], 1 << 20, None);
        let disk = Disk::open(&name, &DiskOptions::default()).expect("it was just made");
        let daemon = Daemon::new(ServerOptions::default(), Poll::Off, Arc::new(|_: &str| {}));
        let daemon = daemon.expect("a daemon");
        daemon.add_node("disk0", &disk, CacheMode::Writeback).expect("the name is free");
        for round in 0..50 {
            let both = Barrier::new(2);
            let take = || {
                let arguments = json!({"device": "disk0", "name": format!("s{round}")});
                both.wait();
                snapshot_create(&*daemon, &Arguments(arguments.as_object().expect("it is one"))).is_ok()
            };
            let taken = thread::scope(|scope| [scope.spawn(take), scope.spawn(take)].map(|one| one.join()));
            assert_eq!(taken.map(|one| u32::from(one.expect("no panic"))).iter().sum::<u32>(), 1, "{round}");
        }
    }
}
