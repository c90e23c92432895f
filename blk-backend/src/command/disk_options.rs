//! The options with which every daemon opens its image.

use std::{
    io::PipeReader,
    sync::Arc,
    time::{Duration, Instant},
};

use blk_backend::disk::{Disk, DiskOptions};
use img_core::{
    Error,
    image::{CacheMode, ImageName},
};

use super::{Failure, signals};

/// Which image, and how
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct DiskArgs {
    /// The image: a file name, or json:{...}
    #[arg(long, value_name = "FILE")]
    pub(crate) image: String,
    /// Its format, instead of probing
    #[arg(long, value_name = "FMT")]
    pub(crate) format: Option<String>,
    /// Open without write access, and refuse what writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The host's cache: none, writeback, writethrough, directsync or unsafe
    #[arg(long, value_name = "MODE", default_value = "writeback", value_parser = cache_mode)]
    pub(crate) cache: CacheMode,
    /// Take no locks: the image may be in use elsewhere
    #[arg(long)]
    pub(crate) force_share: bool,
    /// Wait this long for an image that is in use: by a process that was killed, say, and whose last writes are
    /// still on their way
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) wait_for_lock: u64,
}

/// How often a lock that is held is asked for again.
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

impl DiskArgs {
    /// Opens the image; what is worth a warning is told. Waiting for its lock ends when the process is asked to end,
    /// where it has such a pipe.
    ///
    /// # Errors
    /// When it cannot be opened; [`Failure::AskedToEnd`].
    pub(crate) fn open(
        &self,
        asked_to_end: Option<&PipeReader>,
        warn: &mut dyn FnMut(&str),
    ) -> Result<Arc<Disk>, Failure> {
        let name = ImageName::parse(&self.image)?;
        let options = DiskOptions {
            format: self.format.clone(),
            read_only: self.read_only,
            cache: self.cache,
            force_share: self.force_share,
            ..DiskOptions::default()
        };
        // What no clock reaches is waited for without an end.
        let until = Instant::now().checked_add(Duration::from_secs(self.wait_for_lock));
        let disk = loop {
            match Disk::open(&name, &options) {
                Err(error) if is_locked(&error) && until.is_none_or(|until| Instant::now() < until) => {
                    match asked_to_end {
                        Some(asked) if signals::asked_within(asked, LOCK_INTERVAL)? => {
                            return Err(Failure::AskedToEnd);
                        }
                        Some(_) => {}
                        None => std::thread::sleep(LOCK_INTERVAL),
                    }
                }
                result => break result?,
            }
        };
        for warning in disk.image().warnings() {
            warn(&warning.text);
            warning.hints.iter().for_each(|hint| warn(hint));
        }
        Ok(disk)
    }
}

fn is_locked(error: &Error) -> bool {
    match error {
        Error::Locked { .. } => true,
        Error::Open { source, .. } | Error::Backing { source, .. } => is_locked(source),
        _ => false,
    }
}

fn cache_mode(text: &str) -> Result<CacheMode, String> {
    CacheMode::from_name(text).ok_or_else(|| format!("'{text}' is not a cache mode"))
}
