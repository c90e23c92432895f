//! `blk-backend nbd`: one image over the NBD protocol.

use std::{io::Write, process::ExitCode, sync::Arc};

use blk_backend::{
    control::{Daemon, remove_stale_socket},
    nbd::{Export, ExportOptions, ListenAddress, Log, Server, ServerOptions},
};

use super::{
    Failure, control_options::ControlArgs, disk_options::DiskArgs, engine_options::EngineArgs,
    sandbox_options::SandboxArgs, signals,
};

/// Serve an image to NBD clients
///
/// Serves until SIGTERM, SIGINT or SIGHUP, or QMP's quit; then requests under way are answered, and the image is
/// flushed and closed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen: unix:PATH, or tcp:[HOST:]PORT of 127.0.0.1 where no host is named
    #[arg(long, value_name = "ADDR")]
    listen: ListenAddress,
    #[command(flatten)]
    disk: DiskArgs,
    /// Name of the export; clients that name none get the one with the empty name
    #[arg(long, default_value = "", hide_default_value = true)]
    name: String,
    /// Text that clients may show
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    description: String,
    /// Offer a dirty bitmap of the image as qemu:dirty-bitmap:NAME (may be repeated)
    #[arg(long = "bitmap", value_name = "NAME")]
    bitmaps: Vec<String>,
    /// Connections at once; further ones wait. 0 for no limit
    #[arg(long, value_name = "N", default_value_t = ServerOptions::default().max_connections)]
    max_connections: usize,
    /// Let other hosts write: anybody who reaches the address can
    #[arg(long)]
    allow_remote_writes: bool,
    #[command(flatten)]
    engine: EngineArgs,
    /// Name of the disk, and id of its export, for QMP and metrics
    #[arg(long, value_name = "NAME", default_value = "disk0")]
    node_name: String,
    #[command(flatten)]
    control: ControlArgs,
    #[command(flatten)]
    sandbox: SandboxArgs,
}

pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    // First of all, so that no signal is too early.
    let asked_to_end = signals::on_termination()?;
    let disk = args.disk.open(Some(&asked_to_end), &mut |text| super::warn(text))?;
    let options = ServerOptions {
        max_connections: ServerOptions::most_connections(args.max_connections),
        lane: args.engine.lane_options(),
        allow_remote_writes: args.allow_remote_writes,
    };
    args.control.remove_stale_sockets()?;
    if let Some(path) = args.listen.path() {
        remove_stale_socket(path).map_err(|error| Failure::new(format_args!("{}: {error}", args.listen)))?;
    }
    let sockets = args.control.socket_paths().chain(args.listen.path());
    args.sandbox.enter([&*disk], sockets)?;
    args.engine.announce()?;
    let log: Log = Arc::new(super::warn);
    let daemon = Daemon::new(options.clone(), args.engine.device_poll(), Arc::clone(&log))?;
    daemon.add_node(&args.node_name, &disk, args.disk.cache)?;
    let server = Server::start(&args.listen, options, log)
        .map_err(|error| Failure::new(format_args!("{}: {error}", args.listen)))?;
    let address = server.address().clone();
    let export = ExportOptions {
        name: args.name.clone(),
        description: args.description.clone(),
        read_only: args.disk.read_only,
        bitmaps: args.bitmaps.clone(),
        allocation_depth: true,
    };
    let export = server.add(Export::new(Arc::clone(&disk), export)?)?;
    daemon.adopt_server(server, export, &args.node_name, &args.node_name)?;
    let controls = args.control.start(&daemon)?;
    super::announce(out, |out| {
        writeln!(out, "listening on {address}")?;
        controls.announce(out)
    });
    controls.serve_until_end(&daemon, &asked_to_end)?;
    Ok(ExitCode::SUCCESS)
}
