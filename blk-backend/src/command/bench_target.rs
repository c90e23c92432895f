//! The options that say which disk a load is put on.

use std::{num::NonZeroI32, path::PathBuf, time::Duration};

use blk_backend::{
    bench::{BenchError, CpuClock, ImageTarget, Job, NbdTarget, Target, VhostOptions, VhostTarget},
    engine::{LaneOptions, Poll},
};
use clap::ValueEnum;

use super::{Failure, disk_options::DiskArgs};

/// Which disk; one of --image, --vhost-user and --nbd
#[derive(Debug, clap::Args)]
#[group(id = "target", args = ["image", "vhost_user", "nbd"], required = true, multiple = false)]
pub(crate) struct TargetArgs {
    #[command(flatten)]
    disk: Option<DiskArgs>,
    /// A device behind a vhost-user socket
    #[arg(long, value_name = "SOCKET", conflicts_with_all = IMAGE_ONLY)]
    vhost_user: Option<PathBuf>,
    /// An export: nbd://HOST[:PORT]/[EXPORT] or nbd+unix:///[EXPORT]?socket=PATH
    #[arg(long, value_name = "URI", conflicts_with_all = IMAGE_ONLY)]
    nbd: Option<String>,
    /// Do not use a feature of the device, nor memory of its requests under way (may be repeated)
    #[arg(long, value_name = "FEATURE", conflicts_with_all = ["image", "nbd"])]
    without: Vec<Feature>,
    /// How the device is given memory
    #[arg(long, value_enum, default_value = "table", conflicts_with_all = ["image", "nbd"])]
    memory: Memory,
    /// The process that does the work, for its CPU time; without it whoever listens at the unix socket
    #[arg(long, value_name = "PID", conflicts_with = "image")]
    backend_pid: Option<NonZeroI32>,
    /// Look for answers this long before sleeping
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0, conflicts_with = "nbd")]
    poll: u64,
}

/// Options that only an image in this process has.
const IMAGE_ONLY: [&str; 5] = ["format", "read_only", "cache", "force_share", "wait_for_lock"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Feature {
    EventIdx,
    Indirect,
    Inflight,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Memory {
    /// One table of regions
    Table,
    /// Slot by slot
    Slots,
}

impl TargetArgs {
    /// As it was named.
    pub(crate) fn name(&self) -> &str {
        let socket = self.vhost_user.as_ref().and_then(|path| path.to_str());
        let image = self.disk.as_ref().map(|disk| disk.image.as_str());
        image.or(self.nbd.as_deref()).or(socket).unwrap_or("a socket whose name is not UTF-8")
    }

    /// Opens the disk, ready for `job`, and uses it.
    pub(crate) fn with<T>(
        &self,
        job: &Job,
        work: impl FnOnce(&dyn Target) -> Result<T, BenchError>,
    ) -> Result<T, Failure> {
        let clock = self.backend_pid.map(|pid| CpuClock::of_process(pid.get())).transpose();
        let clock = clock.map_err(Failure::new)?;
        let poll = Duration::from_micros(self.poll);
        if let Some(uri) = &self.nbd {
            let target = NbdTarget::connect(uri, job.queues, clock).map_err(Failure::new)?;
            return work(&target).map_err(Failure::new);
        }
        if let Some(path) = &self.vhost_user {
            let uses = |feature| !self.without.contains(&feature);
            let options = VhostOptions {
                event_idx: uses(Feature::EventIdx),
                indirect: uses(Feature::Indirect),
                inflight: uses(Feature::Inflight),
                memory_slots: self.memory == Memory::Slots,
                poll,
            };
            let target = VhostTarget::connect(path, job, options, clock).map_err(Failure::new)?;
            return work(&target).map_err(Failure::new);
        }
        let disk = self.disk.as_ref().ok_or_else(|| Failure::new("no disk is named"))?;
        let disk = disk.open(None, &mut |text| super::warn(text))?;
        let target = ImageTarget::new(&disk, LaneOptions { poll: Poll::For(poll), ..LaneOptions::default() });
        let result = work(&target).map_err(Failure::new);
        let closed = disk.close();
        let result = result?;
        closed?;
        Ok(result)
    }
}
