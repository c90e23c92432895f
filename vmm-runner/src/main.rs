//! `vmm-runner`: boots a Linux guest from disk images.

mod cli;
mod demo;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use cli::{Cli, Command, RunOptions};
use vmm_runner::{
    Error, Result,
    boot::DirectBoot,
    console::OpenConsole,
    drive::{Drive, DriveConfig, close_all},
    machine::{End, Machine, MachineConfig},
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
    let kernel = options.kernel.clone();
    let boot = DirectBoot {
        kernel: kernel.ok_or_else(|| Error::Invalid("nothing to boot: give --kernel".to_owned()))?,
        initrd: options.initrd.clone(),
        command_line: options.cmdline.clone(),
    };
    let mut console = OpenConsole::open(&options.serial)?;
    let named = options.disks.iter().map(|path| DriveConfig::new(path));
    let drives: Vec<Drive> =
        named.chain(options.disk.iter().cloned()).map(Drive::open).collect::<Result<_>>()?;
    let result = run_machines(options, &boot, &mut console, &drives);
    // What the guest flushed is safe whatever happened; this marks the images clean.
    result.and(close_all(drives))
}

/// One machine after the other, until one does not reset.
fn run_machines(
    options: &RunOptions,
    boot: &DirectBoot,
    console: &mut OpenConsole,
    drives: &[Drive],
) -> Result<()> {
    loop {
        let config = MachineConfig { cpus: options.cpus.clone(), memory: options.memory };
        let mut machine = Machine::new(config, console.writer())?;
        for (index, drive) in drives.iter().enumerate() {
            machine.add_device(Box::new(drive.device(index, options.cpus.count)?))?;
        }
        if options.rng {
            machine.add_device(Box::new(Entropy::default()))?;
        }
        console.attach(machine.serial(), machine.control())?;
        match machine.run(boot)? {
            End::PowerOff | End::Quit => return Ok(()),
            End::Reset if options.no_reboot => return Ok(()),
            End::Reset => {}
            End::Failed(why) => return Err(Error::Invalid(why)),
        }
    }
}
