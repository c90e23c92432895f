//! `vmm-runner`: boots a Linux guest from disk images.

mod choice;
mod cli;
mod demo;

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
    sync::Arc,
};

use choice::what_to_boot;
use clap::Parser;
use cli::{Cli, Command, RunOptions};
use vmm_runner::{
    Error, Result,
    boot::from_image::BootDisk,
    console::OpenConsole,
    drive::{Drive, DriveConfig, close_all},
    machine::{End, Machine, MachineConfig},
    stats::Timeline,
    virtio::Entropy,
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
            // A standard error that is gone leaves nobody to tell.
            drop(writeln!(io::stderr(), "vmm-runner: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &RunOptions) -> Result<()> {
    let timeline = Timeline::default();
    let scratch = tempfile::tempdir().map_err(Error::host("a temporary directory"))?;
    let drives = open_drives(options, scratch.path())?;
    let result =
        if options.list_boot { list_boot(&drives) } else { run_machines(options, &drives, &timeline) };
    // What the guest flushed is safe whatever happened; this marks the images clean.
    result.and(close_all(drives))
}

/// Opens the disks in the order in which the guest sees them.
fn open_drives(options: &RunOptions, scratch: &Path) -> Result<Vec<Drive>> {
    let named = options.disks.iter().map(|path| DriveConfig::new(path)).chain(options.disk.iter().cloned());
    let mut drives = Vec::new();
    for (index, config) in named.enumerate() {
        let drive = match &options.overlay {
            Some(overlay) if index == 0 => Drive::open_on_overlay(config, overlay)?,
            _ if options.snapshot && !config.read_only => {
                Drive::open_on_overlay(config, &scratch.join(format!("overlay{index}.qcow2")))?
            }
            _ => Drive::open(config)?,
        };
        drives.push(drive);
    }
    if options.overlay.is_some() && drives.is_empty() {
        return Err(Error::Invalid("--overlay needs a disk".to_owned()));
    }
    Ok(drives)
}

/// Prints what the first disk can boot.
fn list_boot(drives: &[Drive]) -> Result<()> {
    let drive = drives.first().ok_or_else(|| Error::Invalid("--list-boot needs a disk".to_owned()))?;
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
fn run_machines(options: &RunOptions, drives: &[Drive], timeline: &Timeline) -> Result<()> {
    let mut console = OpenConsole::open(&options.serial)?;
    loop {
        let boot = what_to_boot(options, drives)?;
        let config = MachineConfig { cpus: options.cpus.clone(), memory: options.memory };
        let mut machine = Machine::new(config, timeline.watching(console.writer()))?;
        for (index, drive) in drives.iter().enumerate() {
            machine.add_device(Box::new(drive.device(index, options.cpus.count)?))?;
        }
        if options.rng {
            machine.add_device(Box::new(Entropy::default()))?;
        }
        console.attach(machine.serial(), machine.control())?;
        let exits = Arc::clone(machine.exits());
        let end = machine.run(&boot)?;
        if options.stats.is_some() {
            let report = timeline.report(&exits, drives);
            writeln!(io::stderr(), "{report}").map_err(Error::host("standard error"))?;
        }
        match end {
            End::PowerOff | End::Quit => return Ok(()),
            End::Reset if options.no_reboot => return Ok(()),
            End::Reset => {}
            End::Failed(why) => return Err(Error::Invalid(why)),
        }
    }
}
