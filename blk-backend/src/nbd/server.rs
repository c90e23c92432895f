//! The server: sockets that listen, a thread for each connection, and the end in good order.
//!
//! Lock order: `registry` is taken alone.

use std::{
    collections::HashMap,
    fmt, io,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::net::sockopt;

use super::{
    address::ListenAddress,
    connection::{Connection, ConnectionError},
    export::{Export, Exports},
    handshake::{self, HandshakeError},
    socket::Socket,
};
use crate::{
    accept::Acceptor,
    control::listen_at,
    engine::{Lane, LaneOptions, LaneWaker},
};

/// A client that has not negotiated by then is sent away; the reference gives as long.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// How long the end of the server waits for requests under way and for clients to take their replies.
const STOP_TIME: Duration = Duration::from_secs(10);

/// How a server is run.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Connections at once, at least one; further ones wait in the listening socket.
    pub max_connections: usize,
    /// How the lanes of connections are made.
    pub lane: LaneOptions,
    /// Let clients of other hosts write. Without, exports that can be written are refused on such addresses.
    pub allow_remote_writes: bool,
}

impl ServerOptions {
    /// So many connections at once, where users mean by 0 that there is no limit, as the reference's do.
    #[must_use]
    pub fn most_connections(wanted: usize) -> usize {
        if wanted == 0 { usize::MAX } else { wanted }
    }
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { max_connections: 100, lane: LaneOptions::default(), allow_remote_writes: false }
    }
}

/// Told of what happens that no client can be told of, one line each.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// An NBD server. Dropping it ends it as [`Server::stop`] does.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    address: ListenAddress,
    acceptor: Mutex<Option<Acceptor>>,
}

struct Shared {
    exports: Exports,
    options: ServerOptions,
    registry: Mutex<Registry>,
    /// A connection has ended, or the server is to.
    ended: Condvar,
    log: Log,
    accepted: AtomicU64,
    violations: AtomicU64,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("exports", &self.exports).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Registry {
    /// The server is to end: nobody waits for room any more.
    stopping: bool,
    next: u64,
    live: HashMap<u64, Arc<Client>>,
}

/// A connection as others see it.
struct Client {
    socket: Socket,
    stop: AtomicBool,
    in_transmission: Mutex<Option<(Arc<Export>, LaneWaker)>>,
}

impl Client {
    fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.socket.stop_hearing();
        if let Some((_, waker)) = &*self.in_transmission() {
            waker.wake();
        }
    }

    fn in_transmission(&self) -> MutexGuard<'_, Option<(Arc<Export>, LaneWaker)>> {
        self.in_transmission.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn uses(&self, export: &Arc<Export>) -> bool {
        self.in_transmission().as_ref().is_some_and(|(used, _)| Arc::ptr_eq(used, export))
    }
}

/// Numbers of a server, for whoever watches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerCounts {
    /// Connections now.
    pub connections: u64,
    /// Connections that were accepted since the start.
    pub accepted: u64,
    /// Connections that ended since the client broke the protocol.
    pub violations: u64,
}

impl Server {
    /// Listens. Clients find what [`Self::add`] adds.
    ///
    /// # Errors
    /// When the address cannot be listened on; a socket that another server left in the file system is replaced, one
    /// that somebody still listens on is not.
    pub fn start(address: &ListenAddress, options: ServerOptions, log: Log) -> io::Result<Self> {
        let (listener, address) = listen_at(address)?;
        let shared = Arc::new(Shared {
            exports: Exports::default(),
            options,
            registry: Mutex::default(),
            ended: Condvar::new(),
            log: Arc::clone(&log),
            accepted: AtomicU64::new(0),
            violations: AtomicU64::new(0),
        });
        let for_acceptor = Arc::clone(&shared);
        let acceptor = Acceptor::start(
            "nbd-accept",
            listener,
            address.path().map(Path::to_owned),
            move |error| log(&format!("no client is served for now: {error}")),
            move |connection, _| {
                admit(&for_acceptor, connection)?;
                for_acceptor.wait_for_room();
                Ok(())
            },
        )?;
        Ok(Self { shared, address, acceptor: Mutex::new(Some(acceptor)) })
    }

    /// Where it listens; a TCP port of 0 has become the one that was given.
    #[must_use]
    pub fn address(&self) -> &ListenAddress {
        &self.address
    }

    /// Offers an export.
    ///
    /// # Errors
    /// [`img_core::Error::Invalid`] when the name is taken, or other hosts' clients could write and that was not
    /// allowed.
    pub fn add(&self, export: Export) -> img_core::Result<Arc<Export>> {
        if !export.is_read_only() && !self.address.is_local() && !self.shared.options.allow_remote_writes {
            return Err(img_core::Error::Invalid(format!(
                "{} can be reached from other hosts, and anybody there could write to export '{}': make it read-only, \
                 listen on a loopback address or a unix socket, or allow remote writes",
                self.address,
                export.name()
            )));
        }
        self.shared.exports.add(export)
    }

    /// Takes an export back. Clients of it are sent away with `by_force`; without, there must not be any.
    ///
    /// # Errors
    /// [`img_core::Error::Invalid`] when it is in use.
    pub fn remove(&self, export: &Arc<Export>, by_force: bool) -> img_core::Result<()> {
        if !by_force && self.users(export) > 0 {
            return Err(img_core::Error::Invalid(format!("export '{}' still in use", export.name())));
        }
        // A client that found it before sees that it is gone, or is seen here.
        self.shared.exports.remove(export);
        let users = self.shared.clients(|client| client.uses(export));
        users.iter().for_each(|client| client.stop());
        self.shared.wait(|client| client.uses(export));
        Ok(())
    }

    /// Clients that use the export.
    #[must_use]
    pub fn users(&self, export: &Arc<Export>) -> usize {
        self.shared.clients(|client| client.uses(export)).len()
    }

    /// Its exports.
    #[must_use]
    pub fn exports(&self) -> Vec<Arc<Export>> {
        self.shared.exports.all()
    }

    /// Numbers, as of now.
    #[must_use]
    pub fn counts(&self) -> ServerCounts {
        ServerCounts {
            connections: self.shared.registry().live.len() as u64,
            accepted: self.shared.accepted.load(Ordering::Relaxed),
            violations: self.shared.violations.load(Ordering::Relaxed),
        }
    }

    /// Ends the server in good order: nobody is let in any more, requests under way are answered, connections are
    /// closed. Clients that do not take their replies are cut off after ten seconds.
    pub fn stop(&self) {
        let acceptor = self.acceptor.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(acceptor) = acceptor else { return };
        self.shared.exports.close();
        // First, so that who goes on when nobody has to wait for room any more lets nobody in.
        acceptor.end();
        self.shared.registry().stopping = true;
        self.shared.ended.notify_all();
        drop(acceptor);
        self.shared.clients(|_| true).iter().for_each(|client| client.stop());
        self.shared.wait(|_| true);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clients(&self, which: impl Fn(&Client) -> bool) -> Vec<Arc<Client>> {
        self.registry().live.values().filter(|client| which(client)).cloned().collect()
    }

    /// Waits until no such client is left; those that linger are cut off.
    fn wait(&self, which: impl Fn(&Client) -> bool) {
        let deadline = Instant::now() + STOP_TIME;
        let mut registry = self.registry();
        while registry.live.values().any(|client| which(client)) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                registry
                    .live
                    .values()
                    .filter(|client| which(client))
                    .for_each(|client| client.socket.hang_up());
                registry = self.ended.wait(registry).unwrap_or_else(PoisonError::into_inner);
            } else {
                registry = self.ended.wait_timeout(registry, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Waits until there may be one more connection, or the server is to end.
    fn wait_for_room(&self) {
        let is_full = |registry: &mut Registry| {
            registry.live.len() >= self.options.max_connections && !registry.stopping
        };
        drop(self.ended.wait_while(self.registry(), is_full).unwrap_or_else(PoisonError::into_inner));
    }
}

/// Starts the thread of a connection.
fn admit(shared: &Arc<Shared>, fd: OwnedFd) -> io::Result<()> {
    // Replies are complete when they are sent; a unix socket has no such option.
    sockopt::set_tcp_nodelay(&fd, true).ok();
    // A client whose host is gone is noticed in the end.
    sockopt::set_socket_keepalive(&fd, true).ok();
    let client = Arc::new(Client {
        socket: Socket::new(fd)?,
        stop: AtomicBool::new(false),
        in_transmission: Mutex::default(),
    });
    shared.accepted.fetch_add(1, Ordering::Relaxed);
    let id = {
        let mut registry = shared.registry();
        registry.next += 1;
        let id = registry.next;
        registry.live.insert(id, Arc::clone(&client));
        id
    };
    let registered = Registered { shared: Arc::clone(shared), id };
    thread::Builder::new().name(format!("nbd-{id}")).spawn(move || {
        let shared = &*registered.shared;
        match serve(shared, &client) {
            Ok(()) | Err(End::Io(_)) => {}
            Err(End::Violation(what)) => {
                shared.violations.fetch_add(1, Ordering::Relaxed);
                (shared.log)(&format!("connection {id} ended: {what}"));
            }
            Err(End::Host(error)) => (shared.log)(&format!("connection {id} ended: {error}")),
        }
        client.socket.hang_up();
    })?;
    Ok(())
}

/// A connection's place in the registry, for as long as its thread lives, however it ends.
struct Registered {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.registry().live.remove(&self.id);
        self.shared.ended.notify_all();
    }
}

/// Why a connection ended.
enum End {
    /// The client is gone.
    Io(#[expect(dead_code, reason = "for the debugger")] io::Error),
    Violation(String),
    /// This host has no more of something.
    Host(io::Error),
}

fn serve(shared: &Shared, client: &Client) -> Result<(), End> {
    let dialogue = client.socket.until(Instant::now() + HANDSHAKE_TIME);
    let session = match handshake::negotiate(dialogue, &shared.exports) {
        Ok(Some(session)) => session,
        Ok(None) => return Ok(()),
        Err(HandshakeError::Io(error)) => return Err(End::Io(error)),
        Err(HandshakeError::Violation(what)) => return Err(End::Violation(what)),
    };
    let export = Arc::clone(&session.export);
    let lane = Lane::new(export.disk(), &shared.options.lane).map_err(End::Host)?;
    *client.in_transmission() = Some((Arc::clone(&export), lane.waker()));
    if !shared.exports.has(&export) {
        return Ok(());
    }
    let ended = Connection::new(lane, session, &client.socket, &client.stop).map_err(End::Host)?.run();
    *client.in_transmission() = None;
    match ended {
        Ok(()) => Ok(()),
        Err(ConnectionError::Io(error)) => Err(End::Io(error)),
        Err(ConnectionError::Violation(violation)) => Err(End::Violation(violation.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn clients_beyond_the_limit_wait_for_room_and_not_beyond_the_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let options = ServerOptions { max_connections: 1, ..ServerOptions::default() };
        let log: Log = Arc::new(|_: &str| {});
        let server = Server::start(&ListenAddress::Unix(path.clone()), options, log).expect("it listens");
        let connect = || UnixStream::connect(&path).expect("it listens");
        let greeting = |client: &mut UnixStream| {
            let mut bytes = [0; 18];
            client.read_exact(&mut bytes).map(|()| bytes.starts_with(b"NBDMAGIC"))
        };
        let (mut first, mut second) = (connect(), connect());
        assert!(greeting(&mut first).expect("there is room"));
        second.set_read_timeout(Some(Duration::from_millis(100))).expect("a socket");
        assert!(greeting(&mut second).is_err(), "there is no room");
        second.set_read_timeout(None).expect("a socket");
        drop(first);
        assert!(greeting(&mut second).expect("there is room"));
        let mut third = connect();
        server.stop();
        assert!(greeting(&mut third).is_err(), "nobody is let in");
        assert_eq!(server.counts().accepted, 2);
        assert!(!path.exists());
    }
}
