//! What the runner gives up once its disks are open.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use blk_backend::sandbox::{self, Fences, Sandbox};
use vmm_runner::{Error, Result, console::ConsoleConfig};

use crate::{choice::SEABIOS, cli::RunOptions, tell};

/// System calls beyond those that serving disks takes: backends are connected to anew for each machine, memory may be
/// bound to a node of the host, and threads that run the guest give up more.
const CALLS: [i64; 3] = [libc::SYS_connect, libc::SYS_mbind, libc::SYS_seccomp];

/// Fences the process in: images are open, and no thread has been started. `scratch` is where temporary overlays are.
/// What the host has no fence for is told. Returns whether threads that run the guest are to give up more.
pub(crate) fn enter(options: &RunOptions, scratch: Option<&Path>) -> Result<bool> {
    if options.sandbox == "off" {
        return Ok(false);
    }
    for directory in &options.allow_dir {
        sandbox::check_directory(directory).map_err(Error::file(directory))?;
    }
    let mut allowed = Sandbox {
        directories: options.allow_dir.clone(),
        writable: vec![PathBuf::from("/dev/kvm")],
        calls: CALLS.to_vec(),
        ..Sandbox::default()
    };
    // Looked at again after each reset of the guest.
    allowed
        .readable
        .extend([&options.kernel, &options.initrd, &options.firmware].into_iter().flatten().cloned());
    if options.kernel.is_none() && options.firmware.is_none() {
        allowed.readable.extend(SEABIOS.map(PathBuf::from));
    }
    if let Some(log) = &options.firmware_log {
        // A rule is about a file that is there.
        File::options().append(true).create(true).open(log).map_err(Error::file(log))?;
        allowed.writable.push(log.clone());
    }
    let mut sockets: Vec<&Path> = options.qmp.iter().filter_map(|address| address.path()).collect();
    if let ConsoleConfig::Unix(path) = &options.serial {
        sockets.push(path);
    }
    allowed.socket_directories.extend(sockets.into_iter().map(directory_of));
    if let Some(scratch) = scratch {
        allowed.directories.push(scratch.to_owned());
        allowed.scratch_directories.push(directory_of(scratch));
    }
    let Fences { landlock, seccomp } = sandbox::enter(&allowed)
        .map_err(|error| Error::Invalid(format!("the sandbox: {error} (--sandbox off goes without)")))?;
    if !landlock {
        tell("this kernel has no Landlock: all files of the user stay in reach");
    }
    if !seccomp {
        tell("no list of system calls for this processor: they are not filtered");
    }
    Ok(true)
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
