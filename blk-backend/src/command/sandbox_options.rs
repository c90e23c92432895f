//! The options that say how far a daemon is fenced in.

use std::path::{Path, PathBuf};

use blk_backend::{
    disk::Disk,
    sandbox::{self, Fences, Sandbox},
};
use clap::ValueEnum;
use img_core::format::HostFile;

use super::Failure;

/// Fences
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SandboxArgs {
    /// Give up all system calls and directories that serving does not need
    #[arg(long, value_enum, value_name = "on|off", default_value = "on")]
    sandbox: Switch,
    /// A directory, beside those of images and sockets, where files may be opened and made while serving: that of a
    /// live snapshot, say (may be repeated)
    #[arg(long = "allow-dir", value_name = "DIR")]
    directories: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl SandboxArgs {
    /// Fences the process in: the images are open, no thread has been started. What the host has no fence for is
    /// told.
    pub(crate) fn enter<'a>(
        &self,
        disks: impl IntoIterator<Item = &'a Disk>,
        sockets: impl IntoIterator<Item = &'a Path>,
    ) -> Result<(), Failure> {
        if self.sandbox == Switch::Off {
            return Ok(());
        }
        for directory in &self.directories {
            sandbox::check_directory(directory)
                .map_err(|error| Failure::new(format_args!("{}: {error}", directory.display())))?;
        }
        let mut directories = self.directories.clone();
        for disk in disks {
            let image = disk.image();
            let Some(file) = image.layers()[0].file(HostFile::IMAGE) else { continue };
            // A device's directory is full of other devices.
            if file.path().is_file() {
                directories.push(directory_of(file.path()));
            }
        }
        directories.extend(sockets.into_iter().map(directory_of));
        let Fences { landlock, seccomp } = sandbox::enter(&Sandbox { directories, ..Sandbox::default() })
            .map_err(|error| {
                Failure::new(format_args!("the sandbox: {error} (--sandbox off goes without)"))
            })?;
        if !landlock {
            super::warn("this kernel has no Landlock: files outside the image's directory stay in reach");
        }
        if !seccomp {
            super::warn("no list of system calls for this processor: they are not filtered");
        }
        Ok(())
    }
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
