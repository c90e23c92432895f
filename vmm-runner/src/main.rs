//! `vmm-runner`: boots a Linux guest from disk images.

mod choice;
mod cli;
mod demo;
mod fence;
mod signals;

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
    sync::Arc,
};

use blk_backend::{control::Qmp, virtio::OnError};
use choice::what_to_boot;
use clap::Parser;
use cli::{Cli, Command, RunOptions};
use vmm_runner::{
    Error, Result,
    boot::from_image::BootDisk,
    console::OpenConsole,
    control::Runner,
    drive::{DiskConfig, Drive, DriveConfig, GuestDisk, close_all},
    machine::{End, Machine, MachineConfig},
    stats::Timeline,
    tap::Tap,
    virtio::{Entropy, Net},
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Some(Command::Demo(options)) => demo::run(options),
        None => run(&cli.run),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// A line for the person at the terminal.
fn tell(text: &str) {
    // A standard error that is gone leaves nobody to tell.
    drop(writeln!(io::stderr(), "vmm-runner: {text}"));
}

fn run(options: &RunOptions) -> Result<()> {
    let timeline = Timeline::default();
    let scratch = options.snapshot.then(tempfile::tempdir).transpose();
    let scratch = scratch.map_err(Error::host("a temporary directory"))?;
    let scratch = scratch.as_ref().map(tempfile::TempDir::path);
    let disks = open_disks(options, scratch)?;
    let drives: Vec<Drive> = disks.iter().filter_map(GuestDisk::drive).cloned().collect();
    let result = if options.list_boot {
        list_boot(&drives)
    } else {
        run_machines(options, scratch, &disks, &drives, &timeline)
    };
    // What the guest flushed is safe whatever happened; this marks the images clean.
    result.and(close_all(drives))
}

/// Opens the disks in the order in which the guest sees them.
fn open_disks(options: &RunOptions, scratch: Option<&Path>) -> Result<Vec<GuestDisk>> {
    let named = options.disks.iter().map(|path| DiskConfig::Image(DriveConfig::new(path)));
    let mut disks = Vec::new();
    for (index, config) in named.chain(options.disk.iter().cloned()).enumerate() {
        let config = match config {
            DiskConfig::Image(config) => with_errors(config, options.qmp.is_some())?,
            DiskConfig::VhostUser(config) => {
                disks.push(GuestDisk::VhostUser(config));
                continue;
            }
        };
        let drive = match (&options.overlay, scratch) {
            (Some(overlay), _) if index == 0 => Drive::open_on_overlay(config, overlay)?,
            (_, Some(scratch)) if !config.read_only => {
                Drive::open_on_overlay(config, &scratch.join(format!("overlay{index}.qcow2")))?
            }
            _ => Drive::open(config)?,
        };
        disks.push(GuestDisk::Image(drive));
    }
    if options.overlay.is_some() && disks.first().and_then(GuestDisk::drive).is_none() {
        return Err(Error::Invalid("--overlay needs a disk".to_owned()));
    }
    if options.snapshot && disks.iter().any(|disk| disk.drive().is_none()) {
        return Err(Error::Invalid("--snapshot needs images: a vhost-user disk has no overlay".to_owned()));
    }
    Ok(disks)
}

/// A guest is held for a disk's sake only where somebody can continue it.
fn with_errors(config: DriveConfig, has_clients: bool) -> Result<DriveConfig> {
    if has_clients {
        let on_write_error = config.on_write_error.or(Some(OnError::StopWithoutSpace));
        return Ok(DriveConfig { on_write_error, ..config });
    }
    if config.wants_holding() {
        let text = format!(
            "{}: werror and rerror hold the guest only with --qmp: nobody could continue it",
            config.path
        );
        return Err(Error::Invalid(text));
    }
    Ok(config)
}

/// Prints what the first disk can boot.
fn list_boot(drives: &[Drive]) -> Result<()> {
    let drive = drives.first().ok_or_else(|| Error::Invalid("--list-boot needs an image".to_owned()))?;
    let disk = BootDisk::look(&drive.disk().image())?;
    let mut text = String::new();
    for entry in disk.entries() {
        let mark = if entry.is_default { "*" } else { " " };
        text.push_str(&format!(
            "{mark} {}\n    kernel  {} ({})\n",
            entry.title,
            entry.kernel,
            disk.volume_name(entry)
        ));
        for initrd in &entry.initrds {
            text.push_str(&format!("    initrd  {initrd}\n"));
        }
        text.push_str(&format!("    options {}\n", entry.options));
    }
    for remark in disk.remarks() {
        text.push_str(&format!("{remark}\n"));
    }
    if text.is_empty() {
        text.push_str("nothing to boot was found\n");
    }
    io::stdout().write_all(text.as_bytes()).map_err(Error::host("standard output"))
}

/// One machine after the other, until one does not reset.
fn run_machines(
    options: &RunOptions,
    scratch: Option<&Path>,
    disks: &[GuestDisk],
    drives: &[Drive],
    timeline: &Timeline,
) -> Result<()> {
    let mut console = OpenConsole::open(&options.serial)?;
    let cards = options.net.iter().map(|net| Ok((Arc::new(Tap::open(&net.tap)?), net.mac)));
    let cards = cards.collect::<Result<Vec<_>>>()?;
    // All that stays open is open by now, and no thread has been started.
    let is_fenced = fence::enter(options, scratch)?;
    let runner = Runner::new(disks)?;
    signals::end_on_termination(Arc::clone(&runner))?;
    // Dropped last: clients learn of the end.
    let _qmp = options
        .qmp
        .as_ref()
        .map(|address| Qmp::start(address, Arc::clone(&runner)).map_err(Error::file(address.to_string())))
        .transpose()?;
    loop {
        let boot = what_to_boot(options, drives)?;
        let mut memory = options.memory;
        // Backends map it.
        memory.is_shared |= disks.len() > drives.len();
        let config = MachineConfig { cpus: options.cpus.clone(), memory, is_fenced };
        let mut machine = Machine::new(config, timeline.watching(console.writer()))?;
        for (index, disk) in disks.iter().enumerate() {
            let device = disk.device(index, options.cpus.count, Arc::new(tell), runner.on_failure())?;
            machine.add_device(device)?;
        }
        for (tap, mac) in &cards {
            machine.add_device(Box::new(Net::new(tap, *mac)))?;
        }
        if options.rng {
            machine.add_device(Box::new(Entropy::default()))?;
        }
        console.attach(machine.serial(), machine.control())?;
        let exits = Arc::clone(machine.exits());
        runner.attach(&machine.handle())?;
        let end = machine.run(&boot).unwrap_or_else(|error| End::Failed(error.to_string()));
        runner.detach(&end, end != End::Reset || options.no_reboot);
        if options.stats.is_some() {
            // In one piece: standard error is not buffered.
            let report = format!("{}\n", timeline.report(&exits, drives));
            io::stderr().write_all(report.as_bytes()).map_err(Error::host("standard error"))?;
        }
        match end {
            End::PowerOff | End::Quit => return Ok(()),
            End::Reset if options.no_reboot => return Ok(()),
            End::Reset => {}
            End::Failed(why) => return Err(Error::Invalid(why)),
        }
    }
}
