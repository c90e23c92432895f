//! A device behind a vhost-user socket, driven as a virtual machine monitor and its guest drive one: the front end's
//! side of the protocol, memory to share, and a driver's side of each ring (`queue`).
//!
//! The device is another program, and may be wrong: what it writes into the rings is looked at before it is used.

mod memory;
mod queue;

use std::{
    fmt,
    fs::File,
    os::{fd::AsRawFd as _, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use vhost::{
    VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend as _,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures},
    },
};
use zerocopy::FromBytes as _;

use self::{
    memory::{QueuePlan, SharedMemory},
    queue::RingQueue,
};
use super::{
    cpu::CpuClock,
    job::Job,
    run::BenchError,
    target::{Facts, Shape, Target, TargetQueue},
};
use crate::virtio::{
    Features,
    config::{CONFIG_BYTES, RawConfig, SECTOR_BYTES},
};

/// `VHOST_USER_F_PROTOCOL_FEATURES`: there are more messages to agree on.
const PROTOCOL_FEATURES: Features = Features(1 << 30);

/// Where the device is told that the front end has guest memory mapped. It must not use it as an address.
const USER_ADDRESS: u64 = 0x7100_0000_0000;

/// The largest queue that both QEMU and the devices here take.
const MOST_DESCRIPTORS: u16 = 1024;

/// What of a device is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VhostOptions {
    /// `VIRTIO_F_EVENT_IDX`, where it is offered.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`, where it is offered.
    pub indirect: bool,
    /// Inflight memory (`INFLIGHT_SHMFD`), where it is offered, as QEMU asks for it.
    pub inflight: bool,
    /// Memory added slot by slot (`CONFIGURE_MEM_SLOTS`, which must be offered), not as one table.
    pub memory_slots: bool,
    /// Look for answers so long before sleeping.
    pub poll: Duration,
}

impl Default for VhostOptions {
    fn default() -> Self {
        Self { event_idx: true, indirect: true, inflight: true, memory_slots: false, poll: Duration::ZERO }
    }
}

/// A device with its queues started.
pub struct VhostTarget {
    path: PathBuf,
    facts: Facts,
    features: Features,
    options: VhostOptions,
    plan: QueuePlan,
    memory: SharedMemory,
    clock: Option<CpuClock>,
    /// To see that the device is gone.
    socket: UnixStream,
    frontend: Mutex<Frontend>,
    /// What the device keeps of requests that are under way; kept for it.
    _inflight: Option<File>,
}

impl fmt::Debug for VhostTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VhostTarget").field("path", &self.path).finish_non_exhaustive()
    }
}

impl VhostTarget {
    /// Connects to the device at `path`, and shares memory for the queues, depth and blocks of `job`. Its CPU time is
    /// that of `backend`, or of whoever listens at `path`.
    ///
    /// # Errors
    /// [`BenchError`]: nobody is there, it does not do its part, or it has not what was asked for.
    pub fn connect(
        path: &Path,
        job: &Job,
        options: VhostOptions,
        backend: Option<CpuClock>,
    ) -> Result<Self, BenchError> {
        let gone = |error| BenchError::Gone(format!("{}: {error}", path.display()));
        let socket = UnixStream::connect(path).map_err(gone)?;
        let clock = match backend {
            Some(clock) => Some(clock),
            None => CpuClock::of_peer(&socket)?,
        };
        let talk = Talk { path, frontend: Frontend::from_stream(socket.try_clone()?, job.queues.into()) };
        talk.negotiate(job, options, clock, socket)
    }
}

/// The conversation that sets a device up.
struct Talk<'a> {
    path: &'a Path,
    frontend: Frontend,
}

impl Talk<'_> {
    fn negotiate(
        mut self,
        job: &Job,
        options: VhostOptions,
        clock: Option<CpuClock>,
        socket: UnixStream,
    ) -> Result<VhostTarget, BenchError> {
        self.say("SET_OWNER", |frontend| frontend.set_owner())?;
        let offered = Features(self.say("GET_FEATURES", |frontend| frontend.get_features())?);
        let needed = Features::VERSION_1.with(PROTOCOL_FEATURES);
        if !offered.has(needed) {
            return Err(
                self.protocol(format_args!("the device offers features {offered:#x}, not {needed:#x}"))
            );
        }
        let features = wanted(options, Features(offered.0 & known().0));
        let protocol = self.negotiate_protocol(options)?;
        let queues = if protocol.contains(VhostUserProtocolFeatures::MQ) {
            self.say("GET_QUEUE_NUM", |frontend| frontend.get_queue_num())?
        } else {
            1
        };
        let config = self.config()?;
        let facts = facts(features, &config, u32::try_from(queues).unwrap_or(u32::MAX));
        let plan = QueuePlan::new(job, features, &config)?;
        if job.queues > facts.most_queues.0 {
            // `run` says so better; the queues beyond are not started.
            let most = facts.most_queues.0;
            return Err(BenchError::Job(format!("{} queues, and the device has {most}", job.queues)));
        }
        self.say("SET_FEATURES", |frontend| frontend.set_features(features.0))?;
        let has_inflight = options.inflight && protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        let inflight = if has_inflight { Some(self.inflight(job.queues, plan.descriptors)?) } else { None };
        let memory = SharedMemory::new(&plan, job.queues)?;
        self.share(&memory, options.memory_slots)?;
        Ok(VhostTarget {
            path: self.path.to_owned(),
            facts,
            features,
            options,
            plan,
            memory,
            clock,
            socket,
            frontend: Mutex::new(self.frontend),
            _inflight: inflight,
        })
    }

    fn negotiate_protocol(&mut self, options: VhostOptions) -> Result<VhostUserProtocolFeatures, BenchError> {
        let offered = self.say("GET_PROTOCOL_FEATURES", |frontend| frontend.get_protocol_features())?;
        let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        if !offered.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(self.protocol("the device does not offer its configuration (CONFIG)"));
        }
        if options.memory_slots && !offered.contains(slots) {
            return Err(BenchError::Job(
                "the device offers no memory slots (CONFIGURE_MEM_SLOTS)".to_owned(),
            ));
        }
        let used = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | slots;
        let agreed = offered & used;
        self.say("SET_PROTOCOL_FEATURES", |frontend| frontend.set_protocol_features(agreed))?;
        if agreed.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // What the device refuses is told at once.
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(agreed)
    }

    /// Has inflight memory made, and gives it to the device.
    fn inflight(&mut self, queues: u32, descriptors: u16) -> Result<File, BenchError> {
        let queues = u16::try_from(queues).map_err(|_| self.protocol("65536 queues or more"))?;
        let wish = VhostUserInflight::new(0, 0, queues, descriptors);
        let (description, file) = self.say("GET_INFLIGHT_FD", |frontend| frontend.get_inflight_fd(&wish))?;
        let fd = file.as_raw_fd();
        self.say("SET_INFLIGHT_FD", |frontend| frontend.set_inflight_fd(&description, fd))?;
        Ok(file)
    }

    fn config(&mut self) -> Result<RawConfig, BenchError> {
        let size = u32::try_from(CONFIG_BYTES).expect("60");
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) =
            self.say("GET_CONFIG", |frontend| frontend.get_config(0, size, flags, &[0; CONFIG_BYTES]))?;
        RawConfig::read_from_bytes(&bytes)
            .map_err(|_| self.protocol(format_args!("a configuration of {} bytes", bytes.len())))
    }

    fn share(&mut self, memory: &SharedMemory, slots: bool) -> Result<(), BenchError> {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: memory.len_bytes,
            userspace_addr: USER_ADDRESS,
            mmap_offset: 0,
            mmap_handle: memory.file.as_raw_fd(),
        };
        if slots {
            if self.say("GET_MAX_MEM_SLOTS", |frontend| frontend.get_max_mem_slots())? == 0 {
                return Err(self.protocol("the device has room for no memory slot"));
            }
            self.say("ADD_MEM_REG", |frontend| frontend.add_mem_region(&region)).map(drop)
        } else {
            self.say("SET_MEM_TABLE", |frontend| frontend.set_mem_table(&[region])).map(drop)
        }
    }

    fn say<T>(
        &mut self,
        what: &str,
        message: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, BenchError> {
        say(self.path, &mut self.frontend, what, message)
    }

    fn protocol(&self, why: impl fmt::Display) -> BenchError {
        BenchError::Protocol(format!("{}: {why}", self.path.display()))
    }
}

fn say<T>(
    path: &Path,
    frontend: &mut Frontend,
    what: &str,
    message: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
) -> Result<T, BenchError> {
    message(frontend).map_err(|error| BenchError::Protocol(format!("{}: {what}: {error}", path.display())))
}

/// What this driver understands.
fn known() -> Features {
    [
        Features::SIZE_MAX,
        Features::SEG_MAX,
        Features::RO,
        Features::BLK_SIZE,
        Features::FLUSH,
        Features::TOPOLOGY,
        Features::MQ,
        Features::DISCARD,
        Features::WRITE_ZEROES,
        Features::INDIRECT_DESC,
        Features::EVENT_IDX,
        PROTOCOL_FEATURES,
        Features::VERSION_1,
    ]
    .into_iter()
    .fold(Features::default(), Features::with)
}

fn wanted(options: VhostOptions, offered: Features) -> Features {
    let without = |features: Features, feature, wanted: bool| {
        if wanted { features } else { features.without(feature) }
    };
    let features = without(offered, Features::EVENT_IDX, options.event_idx);
    without(features, Features::INDIRECT_DESC, options.indirect)
}

fn facts(features: Features, config: &RawConfig, queues: u32) -> Facts {
    let ours = if features.has(Features::MQ) { config.num_queues.get().max(1) } else { 1 };
    let discard_sectors = match config.max_discard_sectors.get() {
        // "May be ignored" (5.2.4): Linux takes that for no limit.
        0 => u32::MAX,
        most => most,
    };
    Facts {
        size_bytes: config.capacity_sectors.get().saturating_mul(SECTOR_BYTES),
        read_only: features.has(Features::RO),
        most_queues: (queues.min(ours.into()), "the device has no more"),
        most_block_bytes: memory::most_block_bytes(features, config),
        can_flush: features.has(Features::FLUSH),
        most_discard_bytes: if features.has(Features::DISCARD) {
            u64::from(discard_sectors) * SECTOR_BYTES
        } else {
            0
        },
    }
}

impl Target for VhostTarget {
    fn facts(&self) -> Facts {
        self.facts
    }

    fn queue<'a>(&'a self, number: u32, shape: &Shape) -> Result<Box<dyn TargetQueue + 'a>, BenchError> {
        let queue = RingQueue::new(self, number, shape)?;
        let index = usize::try_from(number).expect("a number of 16 bits");
        let rings = queue.layout();
        let addresses = VringConfigData {
            queue_max_size: rings.size,
            queue_size: rings.size,
            flags: 0,
            desc_table_addr: rings.descriptors.0 + USER_ADDRESS,
            used_ring_addr: rings.used.0 + USER_ADDRESS,
            avail_ring_addr: rings.available.0 + USER_ADDRESS,
            log_addr: None,
        };
        let mut frontend = self.frontend.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let frontend = &mut *frontend;
        let path = &self.path;
        say(path, frontend, "SET_VRING_NUM", |to| to.set_vring_num(index, rings.size))?;
        say(path, frontend, "SET_VRING_BASE", |to| to.set_vring_base(index, 0))?;
        say(path, frontend, "SET_VRING_ADDR", |to| to.set_vring_addr(index, &addresses))?;
        say(path, frontend, "SET_VRING_CALL", |to| to.set_vring_call(index, queue.call()))?;
        say(path, frontend, "SET_VRING_KICK", |to| to.set_vring_kick(index, queue.kick()))?;
        say(path, frontend, "SET_VRING_ENABLE", |to| to.set_vring_enable(index, true))?;
        Ok(Box::new(queue))
    }

    fn backend_cpu(&self) -> Result<Option<Duration>, BenchError> {
        self.clock.map(|clock| clock.now()).transpose()
    }
}
