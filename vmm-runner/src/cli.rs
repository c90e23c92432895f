//! The command line.

use std::path::PathBuf;

use blk_backend::control::ControlAddress;
use clap::{Args, Parser, Subcommand};
use vmm_runner::{
    console::ConsoleConfig,
    drive::DiskConfig,
    machine::{CpuConfig, MemoryConfig},
    tap::NetConfig,
};

use crate::demo::DemoOptions;

/// Boots a Linux guest from disk images, with KVM.
#[derive(Debug, Parser)]
#[command(name = "vmm-runner", version, max_term_width = 100, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    #[command(flatten)]
    pub(crate) run: RunOptions,
}

/// What else it does.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Shows the whole project in one run.
    Demo(DemoOptions),
}

/// What the machine is, and what it boots.
#[derive(Debug, Args)]
pub(crate) struct RunOptions {
    /// Kernel: a bzImage, or an ELF file with a PVH entry. Without one the first disk's own kernel is booted.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,

    /// Initial file system.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,

    /// Command line of the kernel, in place of the disk's own; for --kernel, "console=ttyS0 quiet" where none is
    /// given.
    #[arg(long, value_name = "TEXT")]
    pub(crate) cmdline: Option<String>,

    /// More words behind the command line that the disk has.
    #[arg(long, value_name = "TEXT", conflicts_with = "kernel")]
    pub(crate) append: Option<String>,

    /// Boots the entry of this title, rather than the disk's default.
    #[arg(long, value_name = "TITLE", conflicts_with = "kernel")]
    pub(crate) boot_entry: Option<String>,

    /// Shows the boot entries that are in the first disk, and ends.
    #[arg(long, conflicts_with = "kernel")]
    pub(crate) list_boot: bool,

    /// Boots through this firmware (SeaBIOS, OVMF). SeaBIOS is used without being named for a disk that has a boot
    /// sector and no kernel that can be found.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "cmdline", "append", "boot_entry", "list_boot"])]
    pub(crate) firmware: Option<PathBuf>,

    /// What the firmware says of its work is written to this file.
    #[arg(long, value_name = "FILE", requires = "firmware")]
    pub(crate) firmware_log: Option<PathBuf>,

    /// RAM: SIZE, or size=SIZE[,hugepages=2M|1G][,shared=on][,mergeable=on][,prefault=on][,numa-node=N][,dump=off].
    #[arg(long, value_name = "SPEC", default_value = "1G")]
    pub(crate) memory: MemoryConfig,

    /// Processors: N[,affinity=FIRST-LAST[:...]], one host processor each in turn.
    #[arg(long, value_name = "SPEC", default_value = "1")]
    pub(crate) cpus: CpuConfig,

    /// Serial port: stdio (control-A x ends the machine), pty, unix:PATH, file:PATH, off.
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub(crate) serial: ConsoleConfig,

    /// A disk of the guest: an image file of any format, with its chain.
    #[arg(value_name = "DISK")]
    pub(crate) disks: Vec<String>,

    /// A disk with options:
    /// path=FILE[,format=..][,read-only][,cache=MODE][,queues=N][,serial=TEXT][,werror=ACTION][,rerror=ACTION], or one
    /// that a vhost-user-blk backend serves: vhost-user=SOCKET[,queues=N]. A comma in a value is written twice.
    #[arg(long, value_name = "SPEC")]
    pub(crate) disk: Vec<DiskConfig>,

    /// A network card on a TAP interface: tap=NAME[,mac=XX:XX:XX:XX:XX:XX], or fd=N for one that is open already.
    #[arg(long, value_name = "SPEC")]
    pub(crate) net: Vec<NetConfig>,

    /// Writes go to temporary overlays, which are gone afterwards.
    #[arg(long)]
    pub(crate) snapshot: bool,

    /// Makes a new qcow2 image on top of the first disk, and runs on that: the disk itself is only read.
    #[arg(long, value_name = "FILE", conflicts_with = "snapshot")]
    pub(crate) overlay: Option<PathBuf>,

    /// At the end, one JSON object on standard error: a timeline of the boot, exits by reason, what the disks did.
    #[arg(long, value_name = "FORMAT", value_parser = ["json"])]
    pub(crate) stats: Option<String>,

    /// Answers QMP on this socket: unix:PATH.
    #[arg(long, value_name = "ADDR", value_parser = ControlAddress::of_qmp)]
    pub(crate) qmp: Option<ControlAddress>,

    /// Gives up all files and system calls that running the guest does not take: on, off.
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = ["on", "off"])]
    pub(crate) sandbox: String,

    /// A directory in which live snapshots may be made (may be repeated).
    #[arg(long, value_name = "DIR")]
    pub(crate) allow_dir: Vec<PathBuf>,

    /// A source of random numbers for the guest.
    #[arg(long)]
    pub(crate) rng: bool,

    /// End when the guest resets, rather than start it again.
    #[arg(long)]
    pub(crate) no_reboot: bool,
}

const EXAMPLES: &str = "\
Examples:
  vmm-runner demo
  vmm-runner disk.qcow2 --memory 2G --cpus 2
  vmm-runner disk.qcow2 --list-boot
  vmm-runner --overlay try.qcow2 disk.qcow2
  vmm-runner --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0 root=/dev/vda1' disk.qcow2";
