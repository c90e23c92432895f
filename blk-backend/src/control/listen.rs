//! Sockets that listen for control clients: nobody but the owner, or this host, can connect.

use std::{
    fmt, fs, io,
    net::TcpListener,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::Path,
    str::FromStr,
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use crate::{accept::Acceptor, nbd::ListenAddress};

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

    /// Listens, and calls `serve` for each connection. Where the system has no more of something, clients wait: nobody
    /// is told, as they find out themselves. Also where it listens, as [`listen_at`] tells it.
    pub(super) fn accept(
        &self,
        mut serve: impl FnMut(OwnedFd) + Send + 'static,
    ) -> io::Result<(Acceptor, ListenAddress)> {
        let (listener, address) = listen_at(&self.0)?;
        let serve = move |connection, _: &_| {
            serve(connection);
            Ok(())
        };
        let path = self.path().map(Path::to_owned);
        Ok((Acceptor::start("control-accept", listener, path, |_| {}, serve)?, address))
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

/// Listens at `address`. A TCP port of 0 becomes the one that was given.
///
/// # Errors
/// As [`listen_unix`].
pub(crate) fn listen_at(address: &ListenAddress) -> io::Result<(OwnedFd, ListenAddress)> {
    match address {
        ListenAddress::Unix(path) => Ok((listen_unix(path)?.into(), address.clone())),
        ListenAddress::Tcp(wanted) => {
            let listener = TcpListener::bind(wanted)?;
            let bound = listener.local_addr()?;
            Ok((listener.into(), ListenAddress::Tcp(bound)))
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
