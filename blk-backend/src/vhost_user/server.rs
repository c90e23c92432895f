//! The socket of one device: front ends come one after the other.

use std::{
    fmt,
    io::{self, ErrorKind},
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::FileTypeExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    fs::{AtFlags, CWD, unlinkat},
};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::{
    message::{self, Message, Next},
    session::{Channel, Session},
};
use crate::{
    BREATH,
    control::listen_unix_anew,
    virtio::{Device, DeviceEvent},
};

/// Tells people what happened: each call is one line.
pub type Told = Arc<dyn Fn(&str) + Send + Sync>;

/// A device on a socket, served by a thread. Dropped, it drains and stops.
pub struct Server {
    device: Arc<Device>,
    path: PathBuf,
    stop: Arc<OwnedFd>,
    connection: Connection,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The connection there is, to be shut down under a front end that stops in the middle of a message.
type Connection = Arc<Mutex<Option<UnixStream>>>;

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Server {
    /// Listens at `path`, and serves front ends from now on. `tell` gets what people should know.
    ///
    /// # Errors
    /// As [`Listening::at`]; when the system refuses a thread.
    pub fn start(device: Arc<Device>, path: &Path, tell: Told) -> io::Result<Self> {
        Self::serve(device, Listening::at(path)?, tell)
    }

    /// Serves front ends from now on. `tell` gets what people should know.
    ///
    /// # Errors
    /// When the system refuses a thread or a descriptor.
    pub fn serve(device: Arc<Device>, listening: Listening, tell: Told) -> io::Result<Self> {
        let Listening { listener, path } = listening;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let connection = Connection::default();
        let door = Door {
            device: Arc::clone(&device),
            listener,
            stop: Arc::clone(&stop),
            connection: Arc::clone(&connection),
            name: path.display().to_string(),
            tell,
        };
        let thread = std::thread::Builder::new().name("vhost-user".to_owned()).spawn(move || door.serve())?;
        Ok(Self { device, path, stop, connection, thread: Mutex::new(Some(thread)) })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Whether a front end is there.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Ends the connection there is, once its requests have ended, and listens no more.
    pub fn stop(self) {
        self.finish();
    }

    /// [`Self::stop`] for one that is shared: it serves nobody afterwards.
    pub(crate) fn finish(&self) {
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).expect("an eventfd that is written once");
        if let Some(connection) = &*self.connection.lock().unwrap_or_else(PoisonError::into_inner) {
            // It may be shut down already.
            connection.shutdown(Shutdown::Both).ok();
        }
        // A panic of the thread was told on standard error.
        thread.join().ok();
        // Somebody may have taken it away already.
        unlinkat(CWD, &self.path, AtFlags::empty()).ok();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A socket that nobody serves yet. Made before a process gives up the right to connect to others: that is how it
/// finds out whether a socket that is there already is a dead process's.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    path: PathBuf,
}

impl Listening {
    /// Listens at `path`, which is not there or is a socket that nobody listens at any more.
    ///
    /// # Errors
    /// When `path` is something else or in use, or the system refuses.
    pub fn at(path: &Path) -> io::Result<Self> {
        let listener = match listen_unix_anew(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => take_over(path)?,
            result => result?,
        };
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path: path.to_owned() })
    }
}

/// Removes the socket that a dead process left, and listens there.
fn take_over(path: &Path) -> io::Result<UnixListener> {
    if !path.symlink_metadata()?.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "there is a file that is not a socket"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(ErrorKind::AddrInUse, "somebody listens there already")),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            unlinkat(CWD, path, AtFlags::empty())?;
            listen_unix_anew(path)
        }
        Err(error) => Err(error),
    }
}

/// The thread of a server.
struct Door {
    device: Arc<Device>,
    listener: UnixListener,
    stop: Arc<OwnedFd>,
    connection: Connection,
    name: String,
    tell: Told,
}

impl Door {
    fn serve(self) {
        // The device tells its front end, if there is one just now.
        let channel = Channel::default();
        let (observer, name, tell) = (Arc::clone(&channel), self.name.clone(), Arc::clone(&self.tell));
        self.device.observe(move |event| {
            let told = match event {
                DeviceEvent::Broken { why } => format!("{name}: a queue is broken: {why}"),
                // The guest was told.
                DeviceEvent::Failed(_) => return,
                DeviceEvent::Config => {
                    let channel = observer.lock().unwrap_or_else(PoisonError::into_inner);
                    match channel.as_ref().map(message::send_config_change) {
                        Some(Err(error)) => {
                            format!("{name}: the front end was not told of a change: {error}")
                        }
                        Some(Ok(())) | None => return,
                    }
                }
            };
            tell(&told);
        });
        while let Some(connection) = self.next_connection() {
            if let Err(error) = self.converse(connection, &channel) {
                self.tell(&format!("the connection is closed: {error}"));
            }
            *channel.lock().unwrap_or_else(PoisonError::into_inner) = None;
            *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
            self.device.reset();
        }
    }

    /// The next front end. `None` when the server stops.
    fn next_connection(&self) -> Option<UnixStream> {
        let mut is_told = false;
        while self.wait_for(&self.listener) {
            match self.listener.accept() {
                Ok((connection, _)) => return Some(connection),
                // It went away before it came.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                    ) => {}
                // No descriptors are left, say. The front end waits in the queue of the socket.
                Err(error) => {
                    if !std::mem::replace(&mut is_told, true) {
                        self.tell(&format!("a front end has to wait: {error}"));
                    }
                    let mut stop = [PollFd::new(&self.stop, PollFlags::IN)];
                    // Whatever comes of it: the loop looks again.
                    poll(&mut stop, Some(&BREATH)).ok();
                }
            }
        }
        None
    }

    fn tell(&self, what: &str) {
        (self.tell)(&format!("{}: {what}", self.name));
    }

    /// Waits until `source` is readable. False when the server stops.
    fn wait_for(&self, source: &impl AsFd) -> bool {
        loop {
            let mut fds = [PollFd::new(&self.stop, PollFlags::IN), PollFd::new(source, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) if !fds[0].revents().is_empty() => return false,
                Ok(_) if !fds[1].revents().is_empty() => return true,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    self.tell(&format!("cannot wait: {errno}"));
                    return false;
                }
            }
        }
    }

    /// One connection, to its end.
    fn converse(&self, connection: UnixStream, channel: &Channel) -> io::Result<()> {
        connection.set_nonblocking(false)?;
        let socket = connection.try_clone()?;
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection.try_clone()?);
        let (name, told) = (self.name.clone(), Arc::clone(&self.tell));
        let tell: Told = Arc::new(move |what| told(&format!("{name}: {what}")));
        let session = Arc::new(Mutex::new(Session::new(&self.device, Arc::clone(channel), tell)));
        let mut crate_side = BackendReqHandler::from_stream(connection, Arc::clone(&session));
        while self.wait_for(&socket) {
            match message::next(socket.as_fd())? {
                Next::End => break,
                Next::Theirs => match crate_side.handle_request() {
                    Ok(()) => {}
                    Err(Error::Disconnected) => break,
                    Err(error) => return Err(io::Error::other(error)),
                },
                Next::Ours(message, answer) => {
                    let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
                    let reply_ack = session.acknowledges();
                    match message {
                        Message::SetStatus(status) => session.set_status(status).map_err(io::Error::other)?,
                        Message::BackendChannel(channel) => session.set_channel(channel),
                        Message::GetStatus => {
                            answer.reply(socket.as_fd(), session.status())?;
                            continue;
                        }
                    }
                    answer.acknowledge(socket.as_fd(), reply_ack)?;
                }
            }
        }
        Ok(())
    }
}
