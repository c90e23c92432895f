//! The options with which every daemon is watched and controlled, and its life from there to its end.

use std::{
    io::{self, PipeReader, Write},
    os::fd::AsFd,
    path::Path,
    sync::Arc,
};

use blk_backend::{
    control::{ControlAddress, Daemon, Metrics, Qmp, remove_stale_socket, summary},
    nbd::ListenAddress,
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use super::Failure;

/// Control and metrics
#[derive(Debug, clap::Args)]
pub(crate) struct ControlArgs {
    /// Answer QMP on this socket: unix:PATH
    #[arg(long, value_name = "ADDR", value_parser = ControlAddress::of_qmp)]
    qmp: Option<ControlAddress>,
    /// Answer Prometheus on this socket (HTTP): unix:PATH, or tcp:[HOST:]PORT of this host
    #[arg(long, value_name = "ADDR")]
    metrics: Option<ControlAddress>,
}

/// The sockets of a daemon.
pub(crate) struct Controls {
    qmp: Option<Qmp<Daemon>>,
    metrics: Option<Metrics>,
}

impl ControlArgs {
    /// The sockets in the file system.
    pub(crate) fn socket_paths(&self) -> impl Iterator<Item = &Path> {
        [&self.qmp, &self.metrics].into_iter().flatten().filter_map(ControlAddress::path)
    }

    /// Takes away sockets that dead processes left. In a sandbox nobody can find out whether they are dead.
    pub(crate) fn remove_stale_sockets(&self) -> Result<(), Failure> {
        self.socket_paths().try_for_each(|path| {
            remove_stale_socket(path)
                .map_err(|error| Failure::new(format_args!("{}: {error}", path.display())))
        })
    }

    /// Listens as asked.
    pub(crate) fn start(&self, daemon: &Arc<Daemon>) -> Result<Controls, Failure> {
        let failed =
            |address: &ControlAddress, error: io::Error| Failure::new(format_args!("{address}: {error}"));
        let qmp = self
            .qmp
            .as_ref()
            .map(|address| Qmp::start(address, Arc::clone(daemon)).map_err(|error| failed(address, error)));
        let metrics = self.metrics.as_ref().map(|address| {
            Metrics::start(address, Arc::clone(daemon)).map_err(|error| failed(address, error))
        });
        Ok(Controls { qmp: qmp.transpose()?, metrics: metrics.transpose()? })
    }
}

impl Controls {
    /// Says at which port the metrics are: it may be one that the system chose.
    pub(crate) fn announce(&self, out: &mut dyn Write) -> io::Result<()> {
        match self.metrics.as_ref().map(Metrics::address) {
            Some(address @ ListenAddress::Tcp(_)) => writeln!(out, "metrics on {address}"),
            Some(ListenAddress::Unix(_)) | None => Ok(()),
        }
    }

    /// Serves until a signal or a client of QMP ends the daemon. Then commands end, and all that serves the disks;
    /// they are flushed and closed, and the log says what was done.
    pub(crate) fn serve_until_end(self, daemon: &Daemon, asked: &PipeReader) -> Result<(), Failure> {
        loop {
            let end_requested = daemon.end_requested();
            let mut fds = [
                PollFd::from_borrowed_fd(asked.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(end_requested, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Failure::new(errno)),
            }
        }
        drop(self.qmp);
        daemon.stop_serving();
        let mut closed = Ok(());
        for (name, disk) in daemon.disks() {
            if let Err(error) = disk.close() {
                super::warn(&format!("{name}: {error}"));
                closed = Err(Failure::new("a disk could not be flushed and closed"));
            }
        }
        drop(self.metrics);
        summary(daemon).iter().for_each(|line| super::warn(line));
        closed
    }
}
