//! The disks that the user names.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use blk_backend::{
    disk::{Disk, DiskOptions},
    virtio::{DeviceOptions, Failure, OnError},
};
use img_core::{
    format::{Backing, OpenMode, OptionSet, registry},
    image::{CacheMode, Image, ImageName, OpenOptions},
    job::create::{CreateImage, create},
};

use crate::{
    Error, Result,
    virtio::{Block, Tell, VhostUserBlock, VirtioDevice},
};

/// What overlays are made in.
const OVERLAY_FORMAT: &str = "qcow2";

/// One disk, as `--disk` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriveConfig {
    /// The image: a file's name, or any name that `img` takes.
    pub path: String,
    /// Its format, or `None` to look.
    pub format: Option<String>,
    /// The guest may not write.
    pub read_only: bool,
    /// The host's page cache.
    pub cache: CacheMode,
    /// Queues; one for each processor where nothing is said.
    pub queues: Option<u16>,
    /// What the guest sees as serial number.
    pub serial: Option<String>,
    /// What becomes of reads that the host fails; the guest is told where nothing is said.
    pub on_read_error: Option<OnError>,
    /// What becomes of writes and flushes; where nothing is said the guest is held when the host has no space, as long
    /// as somebody can continue it.
    pub on_write_error: Option<OnError>,
}

impl DriveConfig {
    /// A disk with nothing said but its name.
    #[must_use]
    pub fn new(path: &str) -> Self {
        Self {
            path: path.to_owned(),
            format: None,
            read_only: false,
            cache: CacheMode::Writeback,
            queues: None,
            serial: None,
            on_read_error: None,
            on_write_error: None,
        }
    }

    /// Whether a guest may be held for this disk's sake because the user wants so.
    #[must_use]
    pub fn wants_holding(&self) -> bool {
        let holds = |on_error| matches!(on_error, Some(OnError::Stop | OnError::StopWithoutSpace));
        holds(self.on_read_error) || holds(self.on_write_error)
    }
}

impl FromStr for DriveConfig {
    type Err = String;

    /// `FILE`, or `path=FILE[,format=..][,read-only[=on]][,cache=..][,queues=N][,serial=..][,werror=..][,rerror=..]`. A
    /// comma in a value is written twice, as the reference has it.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut config = Self::new("");
        for (index, part) in split_at_commas(text).into_iter().enumerate() {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None if index == 0 => ("path", Some(part.as_str())),
                None => (part.as_str(), None),
            };
            let needed = || value.ok_or_else(|| format!("{name} needs a value"));
            match name {
                "path" => config.path = needed()?.to_owned(),
                "format" => config.format = Some(needed()?.to_owned()),
                "read-only" => {
                    config.read_only = match value {
                        None | Some("on") => true,
                        Some("off") => false,
                        Some(_) => return Err("read-only is on or off".to_owned()),
                    }
                }
                "cache" => {
                    let mode = CacheMode::from_name(needed()?);
                    config.cache =
                        mode.ok_or("cache is none, writeback, writethrough, directsync or unsafe")?;
                }
                "queues" => config.queues = Some(parse_queues(needed()?)?),
                "serial" => config.serial = Some(needed()?.to_owned()),
                "werror" => {
                    let known = OnError::from_name(needed()?);
                    config.on_write_error = Some(known.ok_or("werror is report, ignore, stop or enospc")?);
                }
                "rerror" => {
                    let known = OnError::from_name(needed()?).filter(|it| *it != OnError::StopWithoutSpace);
                    config.on_read_error = Some(known.ok_or("rerror is report, ignore or stop")?);
                }
                _ => return Err(format!("a disk has no option '{name}'")),
            }
        }
        if config.path.is_empty() {
            return Err("a disk needs path=FILE".to_owned());
        }
        Ok(config)
    }
}

/// A number of queues.
fn parse_queues(text: &str) -> std::result::Result<u16, String> {
    let count = text.parse().ok().filter(|count| (1..=64).contains(count));
    count.ok_or_else(|| "queues is a number from 1 to 64".to_owned())
}

/// Queues of a disk where the user says nothing: one for each processor.
fn usual_queues(cpus: u32) -> u16 {
    u16::try_from(cpus.min(64)).unwrap_or(1)
}

/// The parts of a list; two commas stand for one.
fn split_at_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        let last = parts.last_mut().expect("never empty");
        match letter {
            ',' if letters.next_if_eq(&',').is_some() => last.push(','),
            ',' => parts.push(String::new()),
            letter => last.push(letter),
        }
    }
    parts
}

/// A disk that is open. It stays so over resets of the machine.
#[derive(Clone, Debug)]
pub struct Drive {
    config: DriveConfig,
    disk: Arc<Disk>,
}

impl Drive {
    /// Opens the image and its chain.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open(config: DriveConfig) -> Result<Self> {
        let options = DiskOptions {
            format: config.format.clone(),
            read_only: config.read_only,
            cache: config.cache,
            ..DiskOptions::default()
        };
        let disk = Disk::open(&ImageName::parse(&config.path)?, &options)?;
        Ok(Self { config, disk })
    }

    /// Makes `overlay`, a new qcow2 image on top of the disk that `config` names, and opens that instead: the disk
    /// itself is only read.
    ///
    /// # Errors
    /// When the disk cannot be opened, or the overlay is there already or cannot be made.
    pub fn open_on_overlay(config: DriveConfig, overlay: &Path) -> Result<Self> {
        if overlay.exists() {
            let text =
                format!("{}: it is there already; to go on with it, name it as the disk", overlay.display());
            return Err(Error::Invalid(text));
        }
        let base = ImageName::parse(&config.path)?;
        let mut options = OpenOptions::new(OpenMode::Inspect);
        options.format.clone_from(&config.format);
        let image = Image::open(&base, &options)?;
        let format = image.layers()[0].driver().name();
        let name = ImageName::parse(&overlay.to_string_lossy())?;
        let below = image.backing_name_for(name.path_to_create()?)?;
        create(&CreateImage {
            name: &name,
            driver: registry::by_name(OVERLAY_FORMAT)
                .ok_or_else(|| Error::Invalid(format!("'{OVERLAY_FORMAT}' is not a format")))?,
            virtual_size_bytes: image.virtual_size_bytes(),
            backing: Some(Backing { name: below, format: Some(format.to_owned()) }),
            options: OptionSet::new(),
        })?;
        Self::open(DriveConfig {
            path: overlay.to_string_lossy().into_owned(),
            format: Some(OVERLAY_FORMAT.to_owned()),
            ..config
        })
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// The host's page cache.
    #[must_use]
    pub fn cache(&self) -> CacheMode {
        self.config.cache
    }

    /// The device through which a guest with that many processors sees it; `index` makes up a serial number.
    /// `on_failure` is told of requests that the host failed.
    ///
    /// # Errors
    /// When an option cannot be.
    pub fn device(
        &self,
        index: usize,
        cpus: u32,
        on_failure: impl Fn(Failure) + Send + Sync + 'static,
    ) -> Result<Block> {
        let options = DeviceOptions {
            queues: self.config.queues.unwrap_or_else(|| usual_queues(cpus)),
            serial: self.config.serial.clone().unwrap_or_else(|| format!("disk{index}")),
            on_read_error: self.config.on_read_error.unwrap_or_default(),
            on_write_error: self.config.on_write_error.unwrap_or_default(),
            ..DeviceOptions::default()
        };
        Block::new(&self.disk, &options, on_failure)
    }

    /// Flushes and marks the image clean.
    ///
    /// # Errors
    /// When metadata or data cannot be written.
    pub fn close(self) -> Result<()> {
        Ok(self.disk.close()?)
    }

    /// The image's name as it was given.
    #[must_use]
    pub fn name(&self) -> PathBuf {
        PathBuf::from(&self.config.path)
    }
}

/// A disk that another process serves, as `--disk` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUserConfig {
    /// Where the backend listens.
    pub socket: PathBuf,
    /// Queues; one for each processor where nothing is said, and no more than the backend has.
    pub queues: Option<u16>,
}

/// A disk of the guest, as `--disk` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskConfig {
    /// An image that this process opens.
    Image(DriveConfig),
    /// What a vhost-user-blk backend serves.
    VhostUser(VhostUserConfig),
}

impl FromStr for DiskConfig {
    type Err = String;

    /// `vhost-user=SOCKET[,queues=N]`, or as [`DriveConfig`].
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parts = split_at_commas(text);
        let Some(socket) = parts[0].strip_prefix("vhost-user=") else {
            return text.parse().map(Self::Image);
        };
        if socket.is_empty() {
            return Err("a vhost-user disk needs vhost-user=SOCKET".to_owned());
        }
        let mut config = VhostUserConfig { socket: PathBuf::from(socket), queues: None };
        for part in &parts[1..] {
            match part.split_once('=') {
                Some(("queues", count)) => config.queues = Some(parse_queues(count)?),
                _ => {
                    return Err(format!(
                        "a vhost-user disk has no option '{part}': its backend says the rest"
                    ));
                }
            }
        }
        Ok(Self::VhostUser(config))
    }
}

/// A disk of the guest that is there. It stays so over resets of the machine.
#[derive(Clone, Debug)]
pub enum GuestDisk {
    /// An open image.
    Image(Drive),
    /// A backend, which is connected to for each machine anew.
    VhostUser(VhostUserConfig),
}

impl GuestDisk {
    /// The image, where this process has it.
    #[must_use]
    pub fn drive(&self) -> Option<&Drive> {
        match self {
            Self::Image(drive) => Some(drive),
            Self::VhostUser(_) => None,
        }
    }

    /// The device through which a guest with that many processors sees it; `tell` gets what people should know of it
    /// later, `on_failure` the requests that the host failed, with `index`.
    ///
    /// # Errors
    /// As [`Drive::device`] and [`VhostUserBlock::connect`].
    pub fn device(
        &self,
        index: usize,
        cpus: u32,
        tell: Tell,
        on_failure: Arc<dyn Fn(usize, Failure) + Send + Sync>,
    ) -> Result<Box<dyn VirtioDevice>> {
        Ok(match self {
            Self::Image(drive) => {
                Box::new(drive.device(index, cpus, move |failure| on_failure(index, failure))?)
            }
            Self::VhostUser(config) => {
                let queues = config.queues.unwrap_or_else(|| usual_queues(cpus));
                Box::new(VhostUserBlock::connect(&config.socket, queues, tell)?)
            }
        })
    }
}

/// Closes all; the first error is told.
///
/// # Errors
/// As [`Drive::close`].
pub fn close_all(drives: Vec<Drive>) -> Result<()> {
    let mut first = None;
    for drive in drives {
        let name = drive.name();
        if let Err(error) = drive.close() {
            first.get_or_insert(Error::Invalid(format!("{}: {error}", name.display())));
        }
    }
    first.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_named_or_refused() {
        let parse = |text: &str| text.parse::<DriveConfig>();
        assert_eq!(parse("disk.qcow2"), Ok(DriveConfig::new("disk.qcow2")));
        assert_eq!(parse("path=a,,b=c,read-only").expect("a name").path, "a,b=c");
        let all = parse("path=d,format=raw,read-only=on,cache=none,queues=2,serial=S1").expect("all options");
        assert_eq!((all.format.as_deref(), all.read_only, all.queues), (Some("raw"), true, Some(2)));
        let on_error = parse("d,werror=ignore,rerror=stop").expect("both");
        assert_eq!(
            (on_error.on_write_error, on_error.on_read_error),
            (Some(OnError::Ignore), Some(OnError::Stop))
        );
        assert!(on_error.wants_holding() && !all.wants_holding());
        assert_eq!((all.cache, all.serial.as_deref()), (CacheMode::None, Some("S1")));
        for bad in [
            "",
            "format=raw",
            "d,cache=fast",
            "d,queues=0",
            "d,colour=red",
            "d,read-only=maybe",
            "d,serial",
            "d,werror=auto",
            "d,rerror=enospc",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_disk_of_a_backend_has_a_socket_and_queues() {
        let parse = |text: &str| text.parse::<DiskConfig>();
        let backend = |socket: &str, queues| {
            Ok(DiskConfig::VhostUser(VhostUserConfig { socket: PathBuf::from(socket), queues }))
        };
        assert_eq!(parse("vhost-user=a,,b"), backend("a,b", None));
        assert_eq!(parse("vhost-user=s,queues=4"), backend("s", Some(4)));
        assert_eq!(parse("path=vhost-user=s"), Ok(DiskConfig::Image(DriveConfig::new("vhost-user=s"))));
        for bad in ["vhost-user=", "vhost-user=s,queues=65", "vhost-user=s,path=d", "path=d,vhost-user=s"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
