//! What there is to control.
//!
//! Lock order: `changing` before `server` before `exports`. No request of a guest or client takes any of them.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use img_core::image::CacheMode;
use rustix::event::{EventfdFlags, eventfd};
use serde_json::json;

use super::{
    block::Block,
    command::{Arguments, Command, Event, NOTHING, Outcome, command},
    export,
    general::General,
    nodes::Nodes,
    service::{Service, Subscribers},
    shape::{Shape, required},
};
use crate::{
    disk::Disk,
    engine::Poll,
    nbd::{Export, Log, Server, ServerOptions},
    vhost_user,
};

/// What offers an export.
#[derive(Clone, Debug)]
pub(super) enum Offered {
    /// The NBD server.
    Nbd(Arc<Export>),
    /// A vhost-user socket of its own.
    VhostUserBlk(Arc<vhost_user::Server>),
}

impl Offered {
    /// QEMU's name of the type.
    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::Nbd(_) => "nbd",
            Self::VhostUserBlk(_) => "vhost-user-blk",
        }
    }
}

/// An export, whoever offers it.
#[derive(Clone, Debug)]
pub(super) struct BlockExport {
    pub(super) id: String,
    pub(super) node: String,
    pub(super) offered: Offered,
    pub(super) shutting_down: bool,
}

/// A daemon: its disks, its exports, its NBD server, and its end.
pub struct Daemon {
    nodes: Nodes,
    /// One command at a time changes servers and exports.
    changing: Mutex<()>,
    server: Mutex<Option<Arc<Server>>>,
    exports: Mutex<Vec<BlockExport>>,
    subscribers: Subscribers,
    ending: AtomicBool,
    /// Readable when the daemon is to end.
    end: OwnedFd,
    /// How NBD servers are run that clients of the control socket start, and lanes of exports that they add.
    /// Of NBD servers that are started.
    pub(super) server_options: ServerOptions,
    /// Of devices that are added.
    pub(super) device_poll: Poll,
    pub(super) log: Log,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they hold is whole whenever they are free.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Daemon {
    /// A daemon without anything. NBD servers that it is told to start, and their lanes, are as `server_options` say;
    /// devices that it is told to add have the engine of those lanes, and poll as `device_poll` says.
    ///
    /// # Errors
    /// When the system has no descriptors left.
    pub fn new(server_options: ServerOptions, device_poll: Poll, log: Log) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            nodes: Nodes::default(),
            changing: Mutex::default(),
            server: Mutex::default(),
            exports: Mutex::default(),
            subscribers: Subscribers::default(),
            ending: AtomicBool::new(false),
            end: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            server_options,
            device_poll,
            log,
        }))
    }

    /// Puts a disk under a name. `cache` is the mode it was opened in.
    ///
    /// # Errors
    /// [`img_core::Error::Invalid`] when the name is taken.
    pub fn add_node(&self, name: &str, disk: &Arc<Disk>, cache: CacheMode) -> img_core::Result<()> {
        self.nodes.add(name, disk, cache)
    }

    /// Takes over a vhost-user socket that offers `node` under the id `id`.
    ///
    /// # Errors
    /// [`img_core::Error::Invalid`] when the id is taken.
    pub fn adopt_device(&self, server: vhost_user::Server, id: &str, node: &str) -> img_core::Result<()> {
        let _one = self.change();
        self.register(id, node, Offered::VhostUserBlk(Arc::new(server)))
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
        self.register(id, node, Offered::Nbd(export))
    }

    /// A descriptor that becomes readable when the daemon is asked to end.
    #[must_use]
    pub fn end_requested(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Stops all that serves disks, in good order.
    pub fn stop_serving(&self) {
        let exports = std::mem::take(&mut *lock(&self.exports));
        for export in exports {
            if let Offered::VhostUserBlk(server) = export.offered {
                server.finish();
            }
        }
        self.stop_server();
    }

    /// Stops the NBD server, in good order.
    pub(super) fn stop_server(&self) {
        let server = lock(&self.server).take();
        if let Some(server) = server {
            server.stop();
        }
    }

    /// The disks, by name.
    #[must_use]
    pub fn disks(&self) -> Vec<(String, Arc<Disk>)> {
        self.nodes.all().into_iter().map(|node| (node.name, node.disk)).collect()
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

    pub(super) fn register(&self, id: &str, node: &str, offered: Offered) -> img_core::Result<()> {
        let mut exports = lock(&self.exports);
        if exports.iter().any(|known| known.id == id) {
            return Err(img_core::Error::Invalid(format!("Block export id '{id}' is already in use")));
        }
        let (id, node) = (id.to_owned(), node.to_owned());
        exports.push(BlockExport { id, node, offered, shutting_down: false });
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
}

impl Service for Daemon {
    const PACKAGE: &'static str = concat!("blk-backend ", env!("CARGO_PKG_VERSION"));
    const COMMANDS: &'static [&'static [Command<Self>]] =
        &[General::<Self>::COMMANDS, Block::<Self>::COMMANDS, OWN_COMMANDS, export::COMMANDS];
    const EVENTS: &'static [Event] = export::EVENTS;

    fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    fn subscribers(&self) -> &Subscribers {
        &self.subscribers
    }

    fn log(&self, text: &str) {
        (self.log)(text);
    }
}

/// What concerns the daemon itself.
static OWN_COMMANDS: &[Command<Daemon>] =
    &[command("query-status", NOTHING, STATUS, query_status), command("quit", NOTHING, NOTHING, quit)];

const STATUS: Shape = Shape::Object(&[
    required("running", Shape::Switch),
    required("status", Shape::Choice(&["running", "shutdown"])),
]);

fn query_status(daemon: &Daemon, _: &Arguments<'_>) -> Outcome {
    let ends = daemon.is_ending();
    Ok(json!({"running": !ends, "status": if ends { "shutdown" } else { "running" }}))
}

fn quit(daemon: &Daemon, _: &Arguments<'_>) -> Outcome {
    daemon.end();
    Ok(json!({}))
}
