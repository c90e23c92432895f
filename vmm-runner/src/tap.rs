//! The host's side of a network card: a TAP interface.
//!
//! Each packet has the header of virtio (12 bytes, as with version 1) in front of it, both ways, so that checksums
//! and the cutting of large packets are left to who does them best: the host's stack, or nobody.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    str::FromStr,
};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::{Error, Result};

/// Bytes of the header in front of each packet: `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6).
pub const HEADER_BYTES: usize = 12;

/// What the interface is: packets with Ethernet headers, nothing of its own in front, then the header of virtio.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Where the packets of a network card go, as `--net` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// The interface.
    pub tap: TapName,
    /// The guest's address; one made from the interface where nothing is said.
    pub mac: Option<Mac>,
}

/// An Ethernet address.
pub type Mac = [u8; 6];

/// A TAP interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapName {
    /// By name; made where it is not there, and then gone with this process.
    Name(String),
    /// Opened by who started this process.
    Fd(i32),
}

impl FromStr for NetConfig {
    type Err = String;

    /// `tap=NAME[,mac=XX:XX:XX:XX:XX:XX]` or `fd=N[,mac=..]`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (mut tap, mut mac) = (None, None);
        for part in text.split(',') {
            let (name, value) =
                part.split_once('=').ok_or_else(|| format!("'{part}' is not NAME=VALUE (tap=tap0)"))?;
            match name {
                "tap" | "fd" if tap.is_some() => {
                    return Err("a network card has one TAP interface".to_owned());
                }
                // The kernel's limit on names (IFNAMSIZ), and what it would take as a pattern.
                "tap" if value.is_empty() || value.len() >= libc::IFNAMSIZ || value.contains(['%', '/']) => {
                    return Err(format!("'{value}' is not the name of an interface"));
                }
                "tap" => tap = Some(TapName::Name(value.to_owned())),
                "fd" => {
                    let fd = value.parse().ok().filter(|fd| *fd > 2);
                    tap = Some(TapName::Fd(fd.ok_or("fd is the number of an open descriptor, from 3 on")?));
                }
                "mac" => mac = Some(parse_mac(value)?),
                _ => return Err(format!("a network card has no option '{name}'")),
            }
        }
        Ok(Self { tap: tap.ok_or("a network card needs tap=NAME or fd=N")?, mac })
    }
}

fn parse_mac(text: &str) -> std::result::Result<Mac, String> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2);
        *byte = part
            .and_then(|part| u8::from_str_radix(part, 16).ok())
            .ok_or_else(|| format!("'{text}' is not an Ethernet address (52:54:00:12:34:56)"))?;
    }
    if parts.next().is_some() {
        return Err(format!("'{text}' is longer than an Ethernet address"));
    }
    if mac[0] & 1 != 0 {
        return Err(format!("{text} is the address of a group, not of one card"));
    }
    Ok(mac)
}

/// A TAP interface that is open. Reading and writing never wait.
pub struct Tap {
    fd: OwnedFd,
    name: String,
    /// Whether it is one: tests have sockets in its place.
    is_tap: bool,
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tap").field("name", &self.name).finish_non_exhaustive()
    }
}

/// `struct ifreq` of the kernel, as far as TAP interfaces go.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}
const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl Tap {
    /// Opens an interface.
    ///
    /// # Errors
    /// When there is none, or this process may not.
    pub fn open(name: &TapName) -> Result<Self> {
        match name {
            TapName::Name(name) => Self::attach(name),
            TapName::Fd(fd) => Self::adopt(*fd),
        }
    }

    fn attach(name: &str) -> Result<Self> {
        let path = "/dev/net/tun";
        let file = File::options().read(true).write(true).open(path).map_err(Error::file(path))?;
        let mut request =
            InterfaceRequest { name: [0; libc::IFNAMSIZ], flags: short(FLAGS), padding: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes()); // shorter: checked when it was parsed
        // SAFETY: the request is as long as the kernel's, and outlives the call.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        let failed = |error: io::Error| match error.raw_os_error() {
            Some(libc::EPERM) => Error::Invalid(format!(
                "TAP interface {name}: {error}; let an administrator make it for you: ip tuntap add dev {name} mode tap \
                 user $USER vnet_hdr"
            )),
            _ => Error::Invalid(format!("TAP interface {name}: {error}")),
        };
        check(result).map_err(failed)?;
        Self::prepare(file.into(), name.to_owned())
    }

    fn adopt(number: i32) -> Result<Self> {
        // SAFETY: only asks whether the descriptor is open.
        let result = unsafe { libc::fcntl(number, libc::F_GETFD) };
        let failed = |error: io::Error| Error::Invalid(format!("TAP descriptor {number}: {error}"));
        check(result).map_err(failed)?;
        // SAFETY: it is open, and the user gave it to this network card alone.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        let mut request = InterfaceRequest { name: [0; libc::IFNAMSIZ], flags: 0, padding: [0; 22] };
        // SAFETY: the request is as long as the kernel's, and outlives the call.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        check(result).map_err(failed)?;
        if request.flags & short(FLAGS) != short(FLAGS) {
            return Err(Error::Invalid(format!(
                "TAP descriptor {number}: it needs the flags IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
            )));
        }
        let name = request.name.split(|byte| *byte == 0).next().unwrap_or_default();
        Self::prepare(fd, String::from_utf8_lossy(name).into_owned())
    }

    fn prepare(fd: OwnedFd, name: String) -> Result<Self> {
        let flags = fcntl_getfl(&fd).map_err(Error::host("a TAP descriptor"))?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(Error::host("a TAP descriptor"))?;
        let header = libc::c_int::try_from(HEADER_BYTES).expect("12");
        // SAFETY: the kernel reads an int, which outlives the call.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) };
        check(result).map_err(Error::host("the header of a TAP interface"))?;
        Ok(Self { fd, name, is_tap: true })
    }

    /// A socket that keeps packets apart, in place of an interface.
    #[cfg(test)]
    pub(crate) fn over(fd: OwnedFd) -> Self {
        Self { fd, name: "socket".to_owned(), is_tap: false }
    }

    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Says what packets the guest takes: `TUN_F_*`. Others are finished by the host.
    ///
    /// # Errors
    /// When the host cannot do that.
    pub fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        if !self.is_tap {
            return Ok(());
        }
        // SAFETY: the argument is a number.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    }

    /// Reads one packet behind its header, and returns how long both are.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when there is none; others when the interface is gone.
    pub fn read(&self, packet: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.fd, packet)?)
    }

    /// Sends one packet with its header, in pieces.
    ///
    /// # Safety
    /// The pieces are memory that may be read during the call.
    ///
    /// # Errors
    /// When the host does not take it.
    pub unsafe fn write(&self, pieces: &[libc::iovec]) -> io::Result<()> {
        let count = libc::c_int::try_from(pieces.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the caller's promise.
        let written = unsafe { libc::writev(self.fd.as_raw_fd(), pieces.as_ptr(), count) };
        if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn short(flags: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(flags).expect("below 2^15")
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_cards_are_named_or_refused() {
        let parse = |text: &str| text.parse::<NetConfig>();
        let tap = TapName::Name("tap0".to_owned());
        assert_eq!(parse("tap=tap0"), Ok(NetConfig { tap: tap.clone(), mac: None }));
        let mac = Some([0x52, 0x54, 0, 0x12, 0xAB, 0xFF]);
        assert_eq!(parse("mac=52:54:00:12:ab:FF,tap=tap0"), Ok(NetConfig { tap, mac }));
        assert_eq!(parse("fd=5"), Ok(NetConfig { tap: TapName::Fd(5), mac: None }));
        for bad in [
            "",
            "tap0",
            "tap=",
            "tap=a/b",
            "tap=tap%d",
            "tap=a-name-that-is-too-long",
            "fd=2",
            "fd=x",
            "tap=t,fd=4",
            "mac=52:54:00:12:34:56",
            "tap=t,mac=52:54:00:12:34",
            "tap=t,mac=52:54:00:12:34:56:78",
            "tap=t,mac=5:254:00:12:34:56",
            "tap=t,mac=53:54:00:12:34:56",
            "tap=t,queues=2",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn descriptors_that_are_no_interface_are_refused() {
        let closed = Tap::open(&TapName::Fd(1_000_000)).expect_err("not open").to_string();
        assert_eq!(closed, "TAP descriptor 1000000: Bad file descriptor (os error 9)");
        let file: OwnedFd = File::open("/dev/null").expect("it is there").into();
        let error = Tap::open(&TapName::Fd(std::os::fd::IntoRawFd::into_raw_fd(file)));
        assert!(error.expect_err("no interface").to_string().starts_with("TAP descriptor "));
    }
}
