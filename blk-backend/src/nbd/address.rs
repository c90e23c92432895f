//! Where a server listens: `unix:PATH` or `tcp:[HOST:]PORT`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs},
    path::{Path, PathBuf},
    str::FromStr,
};

/// "Newstyle negotiation": the port that is registered for NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A TCP port of an address.
    Tcp(SocketAddr),
}

impl ListenAddress {
    /// The socket in the file system, if it is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp(_) => None,
        }
    }

    /// Whether only this host's own programs can connect.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl FromStr for ListenAddress {
    type Err = String;

    /// Reads `unix:PATH`, `tcp:PORT` (of 127.0.0.1), `tcp:HOST:PORT` or `tcp:HOST`; an IPv6 address stands in
    /// brackets. A host name is looked up.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err("unix: needs the path of a socket".to_owned())
            } else {
                Ok(Self::Unix(PathBuf::from(path)))
            };
        }
        let Some(rest) = text.strip_prefix("tcp:") else {
            return Err(format!("'{text}' is neither unix:PATH nor tcp:[HOST:]PORT"));
        };
        if let Ok(port) = rest.parse() {
            return Ok(Self::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)));
        }
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => {
                let port = port.parse().map_err(|_| format!("'{port}' is not a port"))?;
                (host, port)
            }
            _ => (rest, DEFAULT_PORT),
        };
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(format!("'{text}' names no host; 0.0.0.0 or [::] are all addresses"));
        }
        let mut found = (host, port).to_socket_addrs().map_err(|error| format!("{host}: {error}"))?;
        found.next().map(Self::Tcp).ok_or_else(|| format!("{host}: no address"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_written() {
        for (text, shown, local) in [
            ("unix:/run/a b.sock", "unix:/run/a b.sock", true),
            ("tcp:10810", "tcp:127.0.0.1:10810", true),
            ("tcp:127.0.0.2:1", "tcp:127.0.0.2:1", true),
            ("tcp:[::1]:5", "tcp:[::1]:5", true),
            ("tcp:[::1]", "tcp:[::1]:10809", true),
            ("tcp:0.0.0.0:9", "tcp:0.0.0.0:9", false),
            ("tcp:192.0.2.1", "tcp:192.0.2.1:10809", false),
            ("tcp:[::ffff:127.0.0.1]:7", "tcp:[::ffff:127.0.0.1]:7", true),
            ("tcp:[::]:7", "tcp:[::]:7", false),
        ] {
            let address: ListenAddress = text.parse().unwrap();
            assert_eq!((address.to_string().as_str(), address.is_local()), (shown, local), "{text}");
        }
        for text in ["", "unix:", "tcp:", "tcp::10809", "udp:1", "tcp:127.0.0.1:65536", "/run/sock"] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
    }
}
