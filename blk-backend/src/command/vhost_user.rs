//! `blk-backend vhost-user`: images as virtio block devices for virtual machine monitors.

use std::{
    io::{PipeReader, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use blk_backend::{
    control::Daemon,
    disk::Disk,
    nbd::{Log, ServerOptions},
    vhost_user::{Listening, Server, Told},
    virtio::{Device, DeviceOptions},
};
use clap::Parser;
use img_core::format::split_list;

use super::{
    Failure, control_options::ControlArgs, disk_options::DiskArgs, engine_options::EngineArgs,
    sandbox_options::SandboxArgs, signals,
};

/// Serve images as virtio block devices over vhost-user sockets
///
/// Serves until SIGTERM, SIGINT or SIGHUP; then requests under way end, and the images are flushed and closed. A
/// front end may leave and another come at any time. After a crash, start it again with the same options: the front
/// end reconnects, and what was under way is done again.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// One more device: the options above without dashes, as NAME=VALUE, with commas between (may be repeated)
    #[arg(long = "device", value_name = "socket=PATH,image=FILE,...", value_parser = parse_device)]
    more: Vec<DeviceArgs>,
    #[command(flatten)]
    control: ControlArgs,
    #[command(flatten)]
    sandbox: SandboxArgs,
}

/// One device
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct DeviceArgs {
    /// Where front ends connect
    #[arg(long, visible_alias = "socket-path", value_name = "PATH")]
    socket: PathBuf,
    #[command(flatten)]
    disk: DiskArgs,
    /// Request queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: u16,
    /// The serial number that the guest sees: up to 20 characters
    #[arg(long, value_name = "TEXT", default_value = "blk-backend")]
    serial: String,
    /// The guest's block size: a power of two from 512 to 4096
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    block_size: u32,
    /// Name of the disk, and id of its export, for QMP and metrics; disk0, disk1, ... where it is not given
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// `NAME=VALUE,…` read by the same definitions as the options, so that both know the same.
fn parse_device(text: &str) -> Result<DeviceArgs, String> {
    #[derive(Parser)]
    #[command(no_binary_name = true, disable_help_flag = true)]
    struct Line {
        #[command(flatten)]
        device: DeviceArgs,
    }
    let mut words = Vec::new();
    for part in split_list(text) {
        match part.split_once('=') {
            // Switches take no value on a command line.
            Some((_, "off")) if is_switch(&part) => {}
            Some((name, "on")) if is_switch(&part) => words.push(format!("--{name}")),
            _ => words.push(format!("--{part}")),
        }
    }
    let line = Line::try_parse_from(words).map_err(|error| {
        let text = error.render().to_string();
        text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
    })?;
    Ok(line.device)
}

fn is_switch(part: &str) -> bool {
    ["read-only=", "force-share="].iter().any(|name| part.starts_with(name))
}

pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    // First of all, so that no signal is too early.
    let asked_to_end = signals::on_termination()?;
    let log: Log = Arc::new(super::warn);
    let options = ServerOptions { lane: args.device.engine.lane_options(), ..ServerOptions::default() };
    let daemon = Daemon::new(options, args.device.engine.device_poll(), Arc::clone(&log))?;
    let mut devices = Vec::new();
    for (index, args) in std::iter::once(&args.device).chain(&args.more).enumerate() {
        let (disk, device) = open(args, &asked_to_end)?;
        let name = args.node_name.clone().unwrap_or_else(|| format!("disk{index}"));
        daemon.add_node(&name, &disk, args.disk.cache)?;
        let failed = |error| Failure::new(format_args!("{}: {error}", args.socket.display()));
        devices.push((name, device, Listening::at(&args.socket).map_err(failed)?, &args.socket));
    }
    args.control.remove_stale_sockets()?;
    let disks = daemon.disks();
    let sockets = devices.iter().map(|(.., socket)| socket.as_path());
    args.sandbox.enter(disks.iter().map(|(_, disk)| &**disk), args.control.socket_paths().chain(sockets))?;
    for args in std::iter::once(&args.device).chain(&args.more) {
        args.engine.announce()?;
    }
    let told: Told = log;
    let mut paths = Vec::new();
    for (name, device, listening, socket) in devices {
        let server = Server::serve(device, listening, Arc::clone(&told))
            .map_err(|error| Failure::new(format_args!("{}: {error}", socket.display())))?;
        paths.push(server.path().to_owned());
        daemon.adopt_device(server, &name, &name)?;
    }
    let controls = args.control.start(&daemon)?;
    // Who reads this finds the control socket as well.
    super::announce(out, |out| {
        paths.iter().try_for_each(|path| writeln!(out, "listening on {}", path.display()))?;
        controls.announce(out)
    });
    controls.serve_until_end(&daemon, &asked_to_end)?;
    Ok(ExitCode::SUCCESS)
}

fn open(args: &DeviceArgs, asked_to_end: &PipeReader) -> Result<(Arc<Disk>, Arc<Device>), Failure> {
    let disk = args.disk.open(Some(asked_to_end), &mut |text| super::warn(text))?;
    let options = DeviceOptions {
        queues: args.queues,
        serial: args.serial.clone(),
        block_bytes: args.block_size,
        read_only: args.disk.read_only,
        poll: args.engine.device_poll(),
        engine: args.engine.engine,
        ..DeviceOptions::default()
    };
    let device = Device::new(&disk, &options).map_err(Failure::new)?;
    Ok((disk, device))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_device_is_named_by_the_same_options() {
        let device =
            parse_device("socket=/tmp/s,image=a,,b.qcow2,read-only=on,queues=4").expect("it is right");
        assert_eq!(device.socket, Path::new("/tmp/s"));
        assert_eq!(
            (device.disk.image.as_str(), device.disk.read_only, device.queues),
            ("a,b.qcow2", true, 4)
        );
        assert!(!parse_device("socket=s,image=i,read-only=off").expect("it is right").disk.read_only);
        for (text, why) in [
            ("socket=s", "were not provided"),
            ("socket=s,image=i,colour=red", "unexpected argument"),
            ("socket=s,image=i,queues=many", "invalid value"),
        ] {
            let error = parse_device(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
