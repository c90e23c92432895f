//! What a machine boots: what the user names, or what the first disk holds.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
    sync::Arc,
};

use vmm_runner::{
    Error, Result,
    boot::{Boot, BootFile, DirectBoot, from_image::BootDisk},
    drive::Drive,
    machine::Firmware,
};

use crate::cli::RunOptions;

/// The command line of a kernel that is given without one.
const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 quiet";
/// Where distributions put SeaBIOS.
pub(crate) const SEABIOS: [&str; 2] = ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin"];

/// What to boot now. Asked anew after each reset, as a guest may have a new kernel by then.
pub(crate) fn what_to_boot(options: &RunOptions, drives: &[Drive]) -> Result<Boot> {
    if let Some(kernel) = &options.kernel {
        return Ok(Boot::Direct(DirectBoot {
            kernel: BootFile::Host(kernel.clone()),
            initrd: options.initrd.clone().map(BootFile::Host),
            command_line: options.cmdline.clone().unwrap_or_else(|| DEFAULT_COMMAND_LINE.to_owned()),
        }));
    }
    if let Some(path) = &options.firmware {
        let log = options.firmware_log.as_ref().map(|path| {
            File::options().append(true).create(true).open(path).map(Arc::new).map_err(Error::file(path))
        });
        return Ok(Boot::Firmware { firmware: Firmware::read(path)?, log: log.transpose()? });
    }
    let drive = drives.first().ok_or_else(|| {
        Error::Invalid("nothing to boot: name a disk, or give --kernel or --firmware".to_owned())
    })?;
    let disk = BootDisk::look(&drive.disk().image())?;
    let says_how = options.boot_entry.is_some() || options.cmdline.is_some() || options.append.is_some();
    if disk.entries().is_empty() && disk.has_boot_sector() && !says_how {
        let path = SEABIOS.iter().map(Path::new).find(|path| path.exists()).ok_or_else(|| {
            Error::Invalid(
                "no kernel was found in the disk, and no SeaBIOS for its boot sector (package seabios); give --kernel \
                 or --firmware"
                    .to_owned(),
            )
        })?;
        // A standard error that is gone leaves nobody to tell.
        drop(writeln!(
            io::stderr(),
            "vmm-runner: no kernel was found in the disk; booting its boot sector with {}",
            path.display()
        ));
        return Ok(Boot::Firmware { firmware: Firmware::read(path)?, log: None });
    }
    let mut boot = disk.load(options.boot_entry.as_deref())?;
    if let Some(text) = &options.cmdline {
        boot.command_line.clone_from(text);
    }
    // The only screen that this machine has.
    if !boot.command_line.split_whitespace().any(|word| word.starts_with("console=")) {
        boot.command_line.push_str(" console=ttyS0");
    }
    if let Some(more) = &options.append {
        boot.command_line.push_str(&format!(" {more}"));
    }
    Ok(Boot::Direct(boot))
}
