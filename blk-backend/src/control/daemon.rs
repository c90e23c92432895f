//! What there is to control.
//!
//! Lock order: `changing` before `server` before `exports`; `nodes` and `subscribers` are taken alone. No request of a
//! guest or client takes any of them.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use img_core::image::CacheMode;
use rustix::event::{EventfdFlags, eventfd};
use serde_json::{Value, json};

use super::command::CommandError;
use crate::{
    disk::Disk,
    nbd::{Export, Log, Server, ServerOptions},
};

/// A disk under a name.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// The device: stays with the disk whatever is put on top of it.
    pub(super) name: String,
    pub(super) disk: Arc<Disk>,
    pub(super) cache: CacheMode,
    /// Names of layers that have one of their own, from the top down.
    pub(super) layer_names: Vec<String>,
}

impl Node {
    /// The node name of the layer at `depth`.
    pub(super) fn layer_name(&self, depth: usize) -> String {
        self.layer_names.get(depth).cloned().unwrap_or_else(|| format!("#{}-{depth}", self.name))
    }
}

/// The way in which an export is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportKind {
    /// By the NBD server.
    Nbd,
    /// By a vhost-user socket; it lives as long as the daemon.
    VhostUserBlk,
}

impl ExportKind {
    /// QEMU's name of the type.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::VhostUserBlk => "vhost-user-blk",
        }
    }
}

/// An export, whoever offers it.
#[derive(Clone, Debug)]
pub(super) struct BlockExport {
    pub(super) id: String,
    pub(super) kind: ExportKind,
    pub(super) node: String,
    /// Where the NBD server offers it.
    pub(super) nbd: Option<Arc<Export>>,
    pub(super) shutting_down: bool,
}

/// Who is told of events.
pub(super) trait Subscriber: Send + Sync {
    fn tell(&self, event: &Value);
}

/// A daemon: its disks, its exports, its NBD server, and its end.
pub struct Daemon {
    nodes: Mutex<Vec<Node>>,
    /// One command at a time changes servers and exports.
    changing: Mutex<()>,
    server: Mutex<Option<Arc<Server>>>,
    exports: Mutex<Vec<BlockExport>>,
    subscribers: Mutex<Vec<(u64, Arc<dyn Subscriber>)>>,
    ending: AtomicBool,
    /// Readable when the daemon is to end.
    end: OwnedFd,
    /// How NBD servers are run that clients of the control socket start.
    pub(super) server_options: ServerOptions,
    pub(super) log: Log,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they hold is whole whenever they are free.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Daemon {
    /// A daemon without anything.
    ///
    /// # Errors
    /// When the system has no descriptors left.
    pub fn new(server_options: ServerOptions, log: Log) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            nodes: Mutex::default(),
            changing: Mutex::default(),
            server: Mutex::default(),
            exports: Mutex::default(),
            subscribers: Mutex::default(),
            ending: AtomicBool::new(false),
            end: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            server_options,
            log,
        }))
    }

    /// Puts a disk under a name. `cache` is the mode it was opened in.
    ///
    /// # Errors
    /// [`img_core::Error::Invalid`] when the name is taken.
    pub fn add_node(&self, name: &str, disk: &Arc<Disk>, cache: CacheMode) -> img_core::Result<()> {
        let mut nodes = lock(&self.nodes);
        if nodes.iter().any(|node| node.name == name) {
            return Err(img_core::Error::Invalid(format!("Duplicate nodes with node-name='{name}'")));
        }
        nodes.push(Node {
            name: name.to_owned(),
            disk: Arc::clone(disk),
            cache,
            layer_names: vec![name.to_owned()],
        });
        Ok(())
    }

    /// Tells of an export that somebody else offers, for as long as the daemon lives.
    ///
    /// # Errors
    /// [`img_core::Error::Invalid`] when the id is taken.
    pub fn add_export(&self, id: &str, kind: ExportKind, node: &str) -> img_core::Result<()> {
        self.register(BlockExport {
            id: id.to_owned(),
            kind,
            node: node.to_owned(),
            nbd: None,
            shutting_down: false,
        })
    }

    /// Takes over an NBD server that offers `export` of `node` under the id `id`.
    ///
    /// # Errors
    /// [`img_core::Error::Invalid`] when the id is taken.
    pub fn adopt_server(
        &self,
        server: Server,
        export: Arc<Export>,
        id: &str,
        node: &str,
    ) -> img_core::Result<()> {
        let _one = self.change();
        *lock(&self.server) = Some(Arc::new(server));
        self.register(BlockExport {
            id: id.to_owned(),
            kind: ExportKind::Nbd,
            node: node.to_owned(),
            nbd: Some(export),
            shutting_down: false,
        })
    }

    /// A descriptor that becomes readable when the daemon is asked to end.
    #[must_use]
    pub fn end_requested(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Stops the NBD server, in good order.
    pub fn stop_server(&self) {
        let server = lock(&self.server).take();
        if let Some(server) = server {
            server.stop();
        }
    }

    /// The disks, by name.
    #[must_use]
    pub fn disks(&self) -> Vec<(String, Arc<Disk>)> {
        self.nodes().into_iter().map(|node| (node.name, node.disk)).collect()
    }

    /// Asks the daemon to end.
    pub(super) fn end(&self) {
        self.ending.store(true, Ordering::Release);
        // The counter of an eventfd is full after 2^64 - 2 of these.
        rustix::io::write(&self.end, &1_u64.to_ne_bytes()).ok();
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    pub(super) fn nodes(&self) -> Vec<Node> {
        lock(&self.nodes).clone()
    }

    /// A disk by its device, or by the node name of its top layer.
    pub(super) fn device_or_node(&self, device: &str, node_name: &str) -> Result<Node, CommandError> {
        let nodes = lock(&self.nodes);
        let found = nodes.iter().find(|node| {
            if device.is_empty() { node.layer_names[0] == node_name } else { node.name == device }
        });
        if let Some(node) = found {
            return Ok(node.clone());
        }
        let above = nodes.iter().find_map(|node| {
            let depth = node.layer_names.iter().position(|name| device.is_empty() && name == node_name)?;
            Some(node.layer_name(depth - 1))
        });
        Err(CommandError::new(match above {
            Some(above) => format!("Node '{node_name}' is busy: node is used as backing hd of '{above}'"),
            None => format!("Cannot find device='{device}' nor node-name='{node_name}'"),
        }))
    }

    /// Whether a node or a device has that name.
    pub(super) fn is_taken(&self, name: &str) -> bool {
        lock(&self.nodes)
            .iter()
            .any(|node| node.name == name || node.layer_names.iter().any(|known| known == name))
    }

    /// A layer of that name was put on top of a disk.
    pub(super) fn put_on_top(&self, device: &str, layer_name: String) {
        if let Some(node) = lock(&self.nodes).iter_mut().find(|node| node.name == device) {
            node.layer_names.insert(0, layer_name);
        }
    }

    /// Held by commands that change servers and exports.
    pub(super) fn change(&self) -> MutexGuard<'_, ()> {
        lock(&self.changing)
    }

    pub(super) fn server(&self) -> Option<Arc<Server>> {
        lock(&self.server).clone()
    }

    pub(super) fn set_server(&self, server: Server) {
        *lock(&self.server) = Some(Arc::new(server));
    }

    pub(super) fn exports(&self) -> Vec<BlockExport> {
        lock(&self.exports).clone()
    }

    pub(super) fn register(&self, export: BlockExport) -> img_core::Result<()> {
        let mut exports = lock(&self.exports);
        if exports.iter().any(|known| known.id == export.id) {
            return Err(img_core::Error::Invalid(format!(
                "Block export id '{}' is already in use",
                export.id
            )));
        }
        exports.push(export);
        Ok(())
    }

    pub(super) fn set_shutting_down(&self, id: &str, shutting_down: bool) {
        if let Some(export) = lock(&self.exports).iter_mut().find(|export| export.id == id) {
            export.shutting_down = shutting_down;
        }
    }

    pub(super) fn unregister(&self, id: &str) {
        lock(&self.exports).retain(|export| export.id != id);
    }

    pub(super) fn subscribe(&self, id: u64, subscriber: Arc<dyn Subscriber>) {
        lock(&self.subscribers).push((id, subscriber));
    }

    pub(super) fn unsubscribe(&self, id: u64) {
        lock(&self.subscribers).retain(|(known, _)| *known != id);
    }

    /// Tells all clients of the control socket that something happened.
    pub(super) fn emit(&self, event: &str, data: Value) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event = json!({
            "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
            "event": event,
            "data": data,
        });
        // Not under the lock: a client that reads slowly holds nobody else up.
        let subscribers = lock(&self.subscribers).clone();
        subscribers.iter().for_each(|(_, subscriber)| subscriber.tell(&event));
    }
}
