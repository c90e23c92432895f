//! Sockets that listen for control clients: nobody but the owner, or this host, can connect.

use std::{
    fmt, fs, io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    str::FromStr,
    thread::{self, JoinHandle},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with},
};

use crate::{BREATH, nbd::ListenAddress};

/// Where a control socket is: `unix:PATH`, or where that is allowed `tcp:[HOST:]PORT` on a loopback address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlAddress(ListenAddress);

impl ControlAddress {
    /// Reads the address of a QMP socket, `unix:PATH`: any user's programs can connect to a port of the host.
    ///
    /// # Errors
    /// What is wrong with it, for the user.
    pub fn of_qmp(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(_) => text.parse(),
            None => Err("QMP is answered on a unix socket: unix:PATH".to_owned()),
        }
    }

    /// The socket in the file system, if it is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.path()
    }

    /// Whether it is in the file system.
    #[must_use]
    pub fn is_unix(&self) -> bool {
        matches!(self.0, ListenAddress::Unix(_))
    }
}

impl fmt::Display for ControlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ControlAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address: ListenAddress = text.parse()?;
        if address.is_local() {
            Ok(Self(address))
        } else {
            Err(format!("'{text}' can be reached from other hosts"))
        }
    }
}

/// Accepts connections on a thread of its own until it is dropped.
pub(super) struct Acceptor {
    bell: OwnedFd,
    thread: Option<JoinHandle<()>>,
    path: Option<PathBuf>,
    address: ListenAddress,
}

impl Acceptor {
    /// Listens, and calls `accepted` for each connection.
    pub(super) fn start(
        address: &ControlAddress,
        mut accepted: impl FnMut(OwnedFd) + Send + 'static,
    ) -> io::Result<Self> {
        let (listener, path, address): (OwnedFd, _, _) = match &address.0 {
            ListenAddress::Unix(path) => (listen_unix(path)?.into(), Some(path.clone()), address.0.clone()),
            ListenAddress::Tcp(address) => {
                let (listener, address) = listen_tcp(*address)?;
                (listener, None, ListenAddress::Tcp(address))
            }
        };
        rustix::io::ioctl_fionbio(&listener, true)?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let heard = bell.try_clone()?;
        let thread = thread::Builder::new()
            .name("control-accept".to_owned())
            .spawn(move || accept_all(&listener, &heard, &mut accepted))?;
        Ok(Self { bell, thread: Some(thread), path, address })
    }

    pub(super) fn address(&self) -> &ListenAddress {
        &self.address
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        // The counter of an eventfd is full after 2^64 - 2 of these.
        rustix::io::write(&self.bell, &1_u64.to_ne_bytes()).ok();
        if let Some(thread) = self.thread.take() {
            // A panic of it was told when it happened.
            thread.join().ok();
        }
        if let Some(path) = &self.path {
            // Somebody else may have taken the socket away.
            fs::remove_file(path).ok();
        }
    }
}

fn accept_all(listener: &OwnedFd, bell: &OwnedFd, accepted: &mut impl FnMut(OwnedFd)) {
    let mut out_of_breath = false;
    loop {
        let mut fds = [PollFd::new(bell, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        let listens = if out_of_breath { 1 } else { 2 };
        let waited = poll(&mut fds[..listens], out_of_breath.then_some(&BREATH));
        if !fds[0].revents().is_empty() {
            return;
        }
        let was_out_of_breath = std::mem::replace(&mut out_of_breath, false);
        match waited {
            Ok(_) if was_out_of_breath => continue,
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => {
                out_of_breath = true;
                continue;
            }
        }
        match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => accepted(socket),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => out_of_breath = true,
        }
    }
}

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Listens on a socket that was never open to others: its mode is set before anybody can connect. Takes the place of
/// one that a dead process left.
///
/// # Errors
/// When somebody listens there, something else is there, or the system refuses.
pub fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    remove_stale_socket(path)?;
    listen_unix_anew(path)
}

/// [`listen_unix`], where nothing is in the way.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] when something is there; when the system refuses.
pub(crate) fn listen_unix_anew(path: &Path) -> io::Result<UnixListener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn listen_tcp(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    let bound = listener.local_addr()?;
    Ok((listener.into(), bound))
}

/// Removes a socket that nobody listens on any more. Connects to it to find out, which a sandbox forbids.
///
/// # Errors
/// When it cannot be removed.
pub fn remove_stale_socket(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err_and(refused) {
        fs::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qmp_is_answered_on_unix_sockets_only() {
        assert_eq!(ControlAddress::of_qmp("unix:a").expect("a path").to_string(), "unix:a");
        for refused in ["tcp:127.0.0.1:4444", "a", "unix:", ""] {
            assert!(ControlAddress::of_qmp(refused).is_err(), "{refused}");
        }
    }
}
