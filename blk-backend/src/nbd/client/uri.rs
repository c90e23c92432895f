//! NBD URIs, as the NBD project's `doc/uri.md` defines them.

use std::{fmt, net::Ipv6Addr, path::PathBuf, str::FromStr};

use crate::nbd::DEFAULT_PORT;

/// Where a server is, and the name of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NbdUri {
    pub(crate) server: ServerAddress,
    /// Empty for the default export.
    pub(crate) export: String,
    text: String,
}

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ServerAddress {
    Unix(PathBuf),
    Tcp { host: String, port: u16 },
}

impl ServerAddress {
    pub(crate) fn is_unix(&self) -> bool {
        matches!(self, Self::Unix(_))
    }
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for NbdUri {
    type Err = String;

    /// Reads `nbd://HOST[:PORT]/[EXPORT]` and `nbd+unix:///[EXPORT]?socket=PATH`. Others, TLS among them, are refused.
    fn from_str(text: &str) -> Result<Self, String> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(format!(
                "'{text}' is no NBD URI: nbd://HOST[:PORT]/[EXPORT] or nbd+unix:///[EXPORT]?socket=PATH"
            ));
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let mut socket = None;
        for (name, value) in query
            .split('&')
            .filter(|part| !part.is_empty())
            .map(|part| part.split_once('=').unwrap_or((part, "")))
        {
            match name {
                "socket" => socket = Some(PathBuf::from(decode(value)?)),
                other => return Err(format!("'{text}': the parameter '{other}' is not supported")),
            }
        }
        let server = match (scheme, socket) {
            ("nbd", None) => tcp(authority).map_err(|why| format!("'{text}': {why}"))?,
            ("nbd", Some(_)) => return Err(format!("'{text}': a socket belongs to nbd+unix")),
            ("nbd+unix", Some(_)) if !authority.is_empty() => {
                return Err(format!("'{text}': a unix socket is on no host"));
            }
            ("nbd+unix", Some(path)) => ServerAddress::Unix(path),
            ("nbd+unix", None) => return Err(format!("'{text}': ?socket=PATH is missing")),
            (other, _) => return Err(format!("'{text}': the scheme '{other}' is not supported")),
        };
        Ok(Self { server, export: decode(path)?, text: text.to_owned() })
    }
}

fn tcp(authority: &str) -> Result<ServerAddress, String> {
    if authority.contains('@') {
        return Err("user names are not supported".to_owned());
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => {
            (host, port.parse().map_err(|_| format!("'{port}' is not a port"))?)
        }
        _ => (authority, DEFAULT_PORT),
    };
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(address) => {
            let address: Ipv6Addr = address.parse().map_err(|_| format!("'{address}' is no IPv6 address"))?;
            address.to_string()
        }
        None => decode(host)?,
    };
    if host.is_empty() {
        return Err("it names no host".to_owned());
    }
    Ok(ServerAddress::Tcp { host, port })
}

/// Undoes percent-encoding (RFC 3986, section 2.1).
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        rest = behind;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let digits = behind.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(byte.ok_or_else(|| format!("'{text}': a percent sign needs two digits behind it"))?);
        rest = &behind[2..];
    }
    String::from_utf8(bytes).map_err(|_| format!("'{text}' is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(ServerAddress, String), String> {
        text.parse::<NbdUri>().map(|uri| (uri.server, uri.export))
    }

    #[test]
    fn uris_read_as_the_document_says() {
        let tcp = |host: &str, port| ServerAddress::Tcp { host: host.to_owned(), port };
        let unix = |path: &str| ServerAddress::Unix(path.into());
        for (text, server, export) in [
            ("nbd://localhost", tcp("localhost", 10809), ""),
            ("nbd://127.0.0.1:1/disk", tcp("127.0.0.1", 1), "disk"),
            ("nbd://[::1]:10810/", tcp("::1", 10810), ""),
            ("nbd://[::1]", tcp("::1", 10809), ""),
            ("nbd://host//slash", tcp("host", 10809), "/slash"),
            ("nbd+unix:///?socket=/run/a.sock", unix("/run/a.sock"), ""),
            ("nbd+unix:///a%20b?socket=x%3fy", unix("x?y"), "a b"),
        ] {
            assert_eq!(read(text), Ok((server, export.to_owned())), "{text}");
        }
        for (text, why) in [
            ("disk.raw", "no NBD URI"),
            ("nbds://host", "scheme"),
            ("nbd:///export", "no host"),
            ("nbd://host:port", "not a port"),
            ("nbd://[host]", "IPv6"),
            ("nbd://me@host", "user"),
            ("nbd://host?tls-certificates=/x", "tls-certificates"),
            ("nbd+unix:///disk", "missing"),
            ("nbd+unix://host/?socket=x", "no host"),
            ("nbd+unix:///?socket=%2", "two digits"),
            ("nbd+unix:///%ff?socket=x", "UTF-8"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
