//! `blk-backend nbd`: one image over the NBD protocol.

use std::{io::Write, process::ExitCode, sync::Arc, time::Duration};

use blk_backend::{
    engine::LaneOptions,
    nbd::{Export, ExportOptions, ListenAddress, Log, Server, ServerOptions},
};
use rustix::event::{PollFd, PollFlags, poll};

use super::{Failure, disk_options::DiskArgs, signals};

/// Serve an image to NBD clients
///
/// Serves until SIGTERM, SIGINT or SIGHUP; then requests under way are answered, the image is flushed and closed.
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
    /// Connections at once; further ones wait
    #[arg(long, value_name = "N", default_value_t = ServerOptions::default().max_connections)]
    max_connections: usize,
    /// Let other hosts write: anybody who reaches the address can
    #[arg(long)]
    allow_remote_writes: bool,
    /// Look for work this long before sleeping
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
    poll: u64,
}

pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<ExitCode, Failure> {
    // First of all, so that no signal is too early.
    let asked_to_end = signals::on_termination()?;
    let disk = args.disk.open(&mut |text| super::warn(text))?;
    let options = ServerOptions {
        max_connections: args.max_connections.max(1),
        lane: LaneOptions { poll: Duration::from_micros(args.poll), ..LaneOptions::default() },
        allow_remote_writes: args.allow_remote_writes,
    };
    let log: Log = Arc::new(super::warn);
    let server = Server::start(&args.listen, options, log)
        .map_err(|error| Failure::new(format_args!("{}: {error}", args.listen)))?;
    let export = ExportOptions {
        name: args.name.clone(),
        description: args.description.clone(),
        read_only: args.disk.read_only,
        bitmaps: args.bitmaps.clone(),
    };
    server.add(Export::new(Arc::clone(&disk), export)?)?;
    writeln!(out, "listening on {}", server.address())?;
    out.flush()?;
    loop {
        let mut fds = [PollFd::new(&asked_to_end, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Failure::new(errno)),
        }
    }
    server.stop();
    disk.close()?;
    Ok(ExitCode::SUCCESS)
}
