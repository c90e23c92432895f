//! The socket of one device: front ends come one after the other.

use std::{
    fmt,
    io::{self, ErrorKind},
    net::Shutdown,
    os::{
        fd::AsFd,
        unix::{
            fs::FileTypeExt as _,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::fs::{AtFlags, CWD, unlinkat};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::{
    message::{self, Message, Next},
    session::{Channel, Session},
};
use crate::{
    accept::{Acceptor, wait_for},
    control::listen_unix_anew,
    engine::Bell,
    virtio::{Device, DeviceEvent},
};

/// Tells people what happened: each call is one line.
pub type Told = Arc<dyn Fn(&str) + Send + Sync>;

/// A device on a socket, served by a thread. Dropped, it drains and stops.
pub struct Server {
    device: Arc<Device>,
    path: PathBuf,
    connection: Connection,
    acceptor: Mutex<Option<Acceptor>>,
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
        // What a dead device wrote may stand where no table of the image says so, until the first front end has come and
        // told: whoever else uses the disk meanwhile must not take those places.
        device.keep_off_what_is_there(true).map_err(io::Error::other)?;
        let connection = Connection::default();
        let name = path.display().to_string();
        let tell: Told = Arc::new(move |what| tell(&format!("{name}: {what}")));
        let host = Host {
            device: Arc::clone(&device),
            connection: Arc::clone(&connection),
            channel: Channel::default(),
            tell: Arc::clone(&tell),
        };
        host.observe_device();
        let acceptor = Acceptor::start(
            "vhost-user",
            listener.into(),
            Some(path.clone()),
            move |error| tell(&format!("a front end has to wait: {error}")),
            move |connection, end| {
                host.serve(connection.into(), end);
                Ok(())
            },
        )?;
        Ok(Self { device, path, connection, acceptor: Mutex::new(Some(acceptor)) })
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
        let acceptor = self.acceptor.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(acceptor) = acceptor else { return };
        acceptor.end();
        if let Some(connection) = &*self.connection.lock().unwrap_or_else(PoisonError::into_inner) {
            // It may be shut down already.
            connection.shutdown(Shutdown::Both).ok();
        }
        // Which sets what was just looked at.
        drop(acceptor);
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
        Err(error) if error.kind() == ErrorKind::Unsupported => Err(io::Error::new(
            ErrorKind::AddrInUse,
            "a socket is there, and in a sandbox nobody can find out whether somebody listens there; remove it if not",
        )),
        Err(error) => Err(error),
    }
}

/// What the thread of a server serves front ends with.
struct Host {
    device: Arc<Device>,
    connection: Connection,
    channel: Channel,
    /// With the name of the socket.
    tell: Told,
}

impl Host {
    /// The device tells its front end, if there is one just now.
    fn observe_device(&self) {
        let (observer, tell) = (Arc::clone(&self.channel), Arc::clone(&self.tell));
        self.device.observe(move |event| {
            let told = match event {
                DeviceEvent::Broken { why } => format!("a queue is broken: {why}"),
                // The guest was told.
                DeviceEvent::Failed(_) => return,
                DeviceEvent::Config => {
                    let channel = observer.lock().unwrap_or_else(PoisonError::into_inner);
                    match channel.as_ref().map(message::send_config_change) {
                        Some(Err(error)) => {
                            format!("the front end was not told of a change: {error}")
                        }
                        Some(Ok(())) | None => return,
                    }
                }
            };
            tell(&told);
        });
    }

    /// One front end, for as long as it is there.
    fn serve(&self, connection: UnixStream, end: &Bell) {
        if let Err(error) = self.converse(connection, end) {
            (self.tell)(&format!("the connection is closed: {error}"));
        }
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.device.reset();
    }

    /// One connection, to its end.
    fn converse(&self, connection: UnixStream, end: &Bell) -> io::Result<()> {
        let socket = connection.try_clone()?;
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection.try_clone()?);
        let session = Session::new(&self.device, Arc::clone(&self.channel), Arc::clone(&self.tell));
        let session = Arc::new(Mutex::new(session));
        let mut crate_side = BackendReqHandler::from_stream(connection, Arc::clone(&session));
        while wait_for(&socket, end)? {
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
