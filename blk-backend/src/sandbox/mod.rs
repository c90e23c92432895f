//! What a process that serves images to others gives up once it is set up.
//!
//! Three fences, each for what gets past the one before: the rings of the lanes take reads, writes, syncs and polls of
//! files in their own tables and nothing else (`engine::ring`); `seccomp` leaves the process the system calls that
//! serving an image takes, and kills it for those that only an intruder makes; Landlock leaves it the directories of
//! its images and sockets. None can be opened again. A thread that deals with a guest gives up more:
//! [`restrict_thread`].
//!
//! Landlock holds for the calling thread and those it starts later: [`enter`] comes before the threads.

mod seccomp;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetStatus, Scope, path_beneath_rules,
};

/// What stays allowed.
#[derive(Clone, Debug, Default)]
pub struct Sandbox {
    /// Files below these directories may be opened for reading and writing, made and removed: images, overlays that
    /// live snapshots will make, sockets.
    pub directories: Vec<PathBuf>,
    /// Sockets may be made and removed in these.
    pub socket_directories: Vec<PathBuf>,
    /// Directories may be removed from these, once they are empty.
    pub scratch_directories: Vec<PathBuf>,
    /// Files that may be opened for reading.
    pub readable: Vec<PathBuf>,
    /// Files that may be opened for reading and writing, and devices that may be asked by `ioctl` as well.
    pub writable: Vec<PathBuf>,
    /// System calls beyond those that serving takes.
    pub calls: Vec<i64>,
}

/// Which fences stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fences {
    /// Whether Landlock keeps the process to its directories; not on kernels without it.
    pub landlock: bool,
    /// Whether the system calls are filtered; not on processors for which there is no list.
    pub seccomp: bool,
}

/// Looks whether users may name `path` as a directory that stays theirs to use: Landlock passes over what is not there.
///
/// # Errors
/// When it cannot be looked at; [`io::ErrorKind::NotADirectory`].
pub fn check_directory(path: &Path) -> io::Result<()> {
    if fs::metadata(path)?.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) }
}

/// Gives everything else up, for good. The calling thread has started no other that is to be trusted less.
///
/// # Errors
/// When the kernel has a fence and refuses it. What it does not have is left out; see [`Fences`].
pub fn enter(sandbox: &Sandbox) -> io::Result<Fences> {
    let landlock = restrict_files(sandbox).map_err(io::Error::other)?;
    let seccomp = seccomp::restrict_calls(&sandbox.calls)?;
    Ok(Fences { landlock, seccomp })
}

/// Leaves the calling thread, and those it starts later, no way to a file or a peer that is not open: opening a file
/// fails, and a call that makes or takes a connection kills the process. For threads that run a guest or serve its
/// queues, in a process that has [entered](enter) its sandbox.
///
/// # Errors
/// When the kernel refuses the filter.
pub fn restrict_thread() -> io::Result<()> {
    seccomp::restrict_thread()
}

/// The directories, no new TCP connections, no signals to others, no abstract sockets of others.
fn restrict_files(sandbox: &Sandbox) -> Result<bool, landlock::RulesetError> {
    let abi = ABI::V6;
    let all = AccessFs::from_all(abi);
    let inside: BitFlags<AccessFs> = AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::RemoveFile
        | AccessFs::IoctlDev;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .handle_access(AccessNet::ConnectTcp)?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rules(path_beneath_rules(&sandbox.directories, inside))?
        .add_rules(path_beneath_rules(
            &sandbox.socket_directories,
            AccessFs::MakeSock | AccessFs::RemoveFile,
        ))?
        .add_rules(path_beneath_rules(&sandbox.scratch_directories, AccessFs::RemoveDir))?
        .add_rules(path_beneath_rules(&sandbox.readable, AccessFs::ReadFile))?
        .add_rules(path_beneath_rules(
            &sandbox.writable,
            AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
        ))?
        // What the metrics tell of the process itself.
        .add_rules(path_beneath_rules(["/proc/self"], AccessFs::ReadFile | AccessFs::ReadDir))?
        .restrict_self()?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
