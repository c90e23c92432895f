//! The system calls that serving an image takes. Any other answers `ENOSYS`, as a kernel would that has never heard
//! of it: the C library then falls back from new calls to old ones, and nothing is killed halfway through a write.
//! Those that no honest way leads to kill the process. Where filters disagree the kernel does the harsher thing.

use std::{collections::BTreeMap, io};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// `cachestat`: what of a file is in memory.
const SYS_CACHESTAT: i64 = 451;

/// Moving bytes, in files and between processes.
const FILES: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_copy_file_range,
    libc::SYS_splice,
    SYS_CACHESTAT,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_unlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_umask,
    libc::SYS_getcwd,
    libc::SYS_pipe2,
    libc::SYS_dup,
    libc::SYS_dup3,
];

/// Waiting, and being told.
const EVENTS: &[i64] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_restart_syscall,
];

/// Serving sockets; those of other kinds are refused by [`restrict_calls`].
const SOCKETS: &[i64] = &[
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_socketpair,
];

/// Memory and threads.
const PROCESS: &[i64] = &[
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_memfd_create,
    libc::SYS_membarrier,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_prctl,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getrusage,
    libc::SYS_prlimit64,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The same under the names that only this processor has.
#[cfg(target_arch = "x86_64")]
const OLD: &[i64] = &[
    libc::SYS_open,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[i64] = &[];

/// Other programs, other processes' memory, more rights, another view of the host: nothing here asks for them, and no
/// library does on its way to something else.
const HOSTILE: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_open_by_handle_at,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_capset,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_add_key,
    libc::SYS_keyctl,
];

/// What gives files that are not open yet, or takes them away. (A panic looks for a program's symbols in this way: it
/// is to be told all the same, so that these fail and do not kill.)
const OPENING: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_unlinkat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
];

/// What gives peers.
const CONNECTING: &[i64] =
    &[libc::SYS_socket, libc::SYS_bind, libc::SYS_listen, libc::SYS_accept4, libc::SYS_connect];

/// Filters the system calls of all threads of the process; `more` are allowed beside those of serving. False where
/// there is no list for the processor.
///
/// # Errors
/// When the kernel refuses the filter.
pub(super) fn restrict_calls(more: &[i64]) -> io::Result<bool> {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(false) };
    let mut rules = rules().map_err(io::Error::other)?;
    rules.extend(more.iter().map(|call| (*call, Vec::new())));
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let filter = SeccompFilter::new(rules, missing, SeccompAction::Allow, arch);
    let allowed: BpfProgram = filter.and_then(BpfProgram::try_from).map_err(io::Error::other)?;
    let deadly = all_but(HOSTILE, SeccompAction::KillProcess, arch)?;
    seccompiler::apply_filter_all_threads(&deadly).map_err(io::Error::other)?;
    seccompiler::apply_filter_all_threads(&allowed).map_err(io::Error::other)?;
    Ok(true)
}

/// Filters the system calls of this thread and of those it starts later, where there is a list for the processor.
pub(super) fn restrict_thread() -> io::Result<()> {
    let Ok(arch) = TargetArch::try_from(std::env::consts::ARCH) else { return Ok(()) };
    let refused = SeccompAction::Errno(libc::EACCES.unsigned_abs());
    for (calls, action) in [(OPENING, refused), (CONNECTING, SeccompAction::KillProcess)] {
        seccompiler::apply_filter(&all_but(calls, action, arch)?).map_err(io::Error::other)?;
    }
    Ok(())
}

/// A filter that allows all but these.
fn all_but(calls: &[i64], action: SeccompAction, arch: TargetArch) -> io::Result<BpfProgram> {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, arch);
    filter.and_then(BpfProgram::try_from).map_err(io::Error::other)
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = [FILES, EVENTS, SOCKETS, PROCESS, OLD]
        .into_iter()
        .flatten()
        .map(|call| (*call, Vec::new()))
        .collect();
    // Threads, no processes. (`clone3` passes its flags where a filter cannot see them, and is not on the list.)
    let threads = u64::from((libc::CLONE_THREAD | libc::CLONE_VM).unsigned_abs());
    rules.insert(libc::SYS_clone, vec![only(0, SeccompCmpOp::MaskedEq(threads), threads)?]);
    // Local sockets, and those of NBD.
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6];
    let families = families.map(|family| only(0, SeccompCmpOp::Eq, u64::from(family.unsigned_abs())));
    rules.insert(libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?);
    Ok(rules)
}

/// A call is allowed when its argument is so.
fn only(argument: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value)?])
}
