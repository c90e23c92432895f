//! One connection to a backend: what it offers, and the requests of the protocol in their order.

use std::{
    fmt,
    fs::File,
    net::Shutdown,
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use blk_backend::virtio::{Features, config::CONFIG_BYTES, ring::RingLayout};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use vhost::{
    VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Error as ProtocolError, Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend as _,
        VhostUserFrontendReqHandler,
        message::{
            VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
            VhostUserVirtioFeatures,
        },
    },
};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{Active, ActiveQueue};
use crate::machine::{GuestMemory, shared_fd};

/// The backend's name for guest address 0: addresses in messages are "user addresses", which need to mean nothing
/// in this process.
const USER_OFFSET: u64 = 0x7100_0000_0000;

/// A backend that does not answer for so long is taken for dead: it may first have to wait for all that is under
/// way.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is used of the protocol, where it is offered.
const WANTED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// What of a block device may go through to the guest: all that needs nothing of the transport.
const PASSED_ON: Features = Features::BLOCK_DEVICE
    .without(Features::RING_RESET)
    .with(Features::RO)
    .with(Features::MQ)
    // VIRTIO_BLK_F_GEOMETRY
    .with(Features(1 << 4));

/// `VHOST_USER_F_PROTOCOL_FEATURES`, which the backend sees and the guest does not.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Why a request of the protocol failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The backend is gone, or does not keep to the protocol.
    #[error("{0}")]
    Lost(String),
    /// It is there, and says no.
    #[error("{0}")]
    Refused(String),
}

/// Names the request that failed.
fn during<E: fmt::Display + Into<Failure>>(what: &'static str) -> impl FnOnce(E) -> LinkError {
    move |error| {
        let text = format!("{what}: {error}");
        match error.into() {
            Failure::Refused => LinkError::Refused(text),
            Failure::Lost => LinkError::Lost(text),
        }
    }
}

/// Which of the two an error of the `vhost` crate is.
enum Failure {
    Lost,
    Refused,
}

impl From<ProtocolError> for Failure {
    fn from(error: ProtocolError) -> Self {
        match error {
            ProtocolError::BackendInternalError
            | ProtocolError::InvalidParam
            | ProtocolError::InactiveFeature(_)
            | ProtocolError::InactiveOperation(_) => Self::Refused,
            _ => Self::Lost,
        }
    }
}

impl From<vhost::Error> for Failure {
    fn from(error: vhost::Error) -> Self {
        match error {
            vhost::Error::VhostUserProtocol(error) => error.into(),
            _ => Self::Lost,
        }
    }
}

/// The memory in which a backend keeps what it has, so that the next one finds it.
pub(super) struct Inflight {
    description: VhostUserInflight,
    file: File,
}

/// Where the backend says that its configuration changed.
pub(super) type Requests = FrontendReqHandler<ConfigChange>;

/// Notes that the configuration changed.
#[derive(Debug, Default)]
pub(super) struct ConfigChange(Arc<AtomicBool>);

impl VhostUserFrontendReqHandler for ConfigChange {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.store(true, Ordering::SeqCst);
        Ok(0)
    }
}

/// A connection.
pub(super) struct Link {
    frontend: Frontend,
    /// The same socket, to wait on and to shut down.
    stream: UnixStream,
    protocol: VhostUserProtocolFeatures,
    /// What a guest may accept.
    pub(super) offered: Features,
    /// Queues that it serves.
    pub(super) queues: u64,
    changed: Arc<AtomicBool>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("offered", &self.offered).field("queues", &self.queues).finish()
    }
}

impl Link {
    /// Connects to the backend at `path` and learns what it offers. The other end of the result is where the backend
    /// asks; it has none where it never does.
    pub(super) fn connect(path: &Path) -> Result<(Self, Option<Requests>), LinkError> {
        let lost = |error: std::io::Error| LinkError::Lost(error.to_string());
        let stream = UnixStream::connect(path).map_err(lost)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(lost)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(lost)?;
        // One queue until the backend says how many there are.
        let mut frontend = Frontend::from_stream(stream.try_clone().map_err(lost)?, 1);
        frontend.set_owner().map_err(during("SET_OWNER"))?;
        let features = frontend.get_features().map_err(during("GET_FEATURES"))?;
        if features & PROTOCOL_FEATURES == 0 {
            return Err(LinkError::Refused("it does not offer protocol features".to_owned()));
        }
        let protocol = frontend.get_protocol_features().map_err(during("GET_PROTOCOL_FEATURES"))? & WANTED;
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(LinkError::Refused("it does not give its configuration space".to_owned()));
        }
        frontend.set_protocol_features(protocol).map_err(during("SET_PROTOCOL_FEATURES"))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let queues = match protocol.contains(VhostUserProtocolFeatures::MQ) {
            true => frontend.get_queue_num().map_err(during("GET_QUEUE_NUM"))?,
            false => 1,
        };
        let offered = Features(features & PASSED_ON.0);
        if !offered.has(Features::VERSION_1) {
            return Err(LinkError::Refused("it does not offer virtio version 1".to_owned()));
        }
        let change = ConfigChange::default();
        let changed = Arc::clone(&change.0);
        let requests = match protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            true => Some(requests(&mut frontend, change, protocol)?),
            false => None,
        };
        Ok((Self { frontend, stream, protocol, offered, queues, changed }, requests))
    }

    /// Becomes readable, with nothing to read, when the backend is gone.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Gives the connection up, so that who waits on it notices.
    pub(super) fn shut_down(&self) {
        // It may be shut down already.
        self.stream.shutdown(Shutdown::Both).ok();
    }

    /// Whether the backend said since the last call that its configuration changed.
    pub(super) fn config_changed(&self) -> bool {
        self.changed.swap(false, Ordering::SeqCst)
    }

    /// The configuration space.
    pub(super) fn config(&mut self) -> Result<[u8; CONFIG_BYTES], LinkError> {
        let size = u32::try_from(CONFIG_BYTES).expect("60");
        let (_, bytes) = self
            .frontend
            .get_config(0, size, VhostUserConfigFlags::empty(), &[0; CONFIG_BYTES])
            .map_err(during("GET_CONFIG"))?;
        bytes.try_into().map_err(|_| LinkError::Lost("GET_CONFIG: not as long as asked for".to_owned()))
    }

    /// Writes a byte of the configuration space.
    pub(super) fn write_config(&mut self, offset: usize, value: u8) -> Result<(), LinkError> {
        let offset = u32::try_from(offset).expect("inside the configuration");
        self.frontend
            .set_config(offset, VhostUserConfigFlags::WRITABLE, &[value])
            .map_err(during("SET_CONFIG"))
    }

    /// Starts the queues, whose errors are told through `error`. They go on where the used rings are; with `inflight`
    /// memory of an earlier backend, what that one had under way is done as well. Where there is none and the backend
    /// has such memory, it is made.
    pub(super) fn start(
        &mut self,
        active: &Active,
        error: &EventFd,
        inflight: &mut Option<Inflight>,
    ) -> Result<(), LinkError> {
        let Active { memory, features, queues } = active;
        self.frontend.set_features(features.0 | PROTOCOL_FEATURES).map_err(during("SET_FEATURES"))?;
        self.set_inflight(queues, inflight)?;
        self.frontend.set_mem_table(&regions(memory)?).map_err(during("SET_MEM_TABLE"))?;
        for queue in queues {
            let (index, rings) = (usize::from(queue.index), queue.rings);
            let base =
                rings.used_idx(memory).map_err(|error| LinkError::Refused(format!("used ring: {error}")))?;
            let frontend = &mut self.frontend;
            frontend.set_vring_num(index, rings.size).map_err(during("SET_VRING_NUM"))?;
            frontend.set_vring_base(index, base).map_err(during("SET_VRING_BASE"))?;
            frontend.set_vring_addr(index, &addresses(&rings)).map_err(during("SET_VRING_ADDR"))?;
            frontend.set_vring_err(index, error).map_err(during("SET_VRING_ERR"))?;
            frontend.set_vring_call(index, &queue.call).map_err(during("SET_VRING_CALL"))?;
            frontend.set_vring_kick(index, &queue.kick).map_err(during("SET_VRING_KICK"))?;
            frontend.set_vring_enable(index, true).map_err(during("SET_VRING_ENABLE"))?;
        }
        for queue in queues {
            // What the driver made available before has rung already, and what an earlier backend used may not have
            // been told: both counters count such things once.
            let rung = queue.kick.write(1).and_then(|()| queue.call.write(1));
            rung.map_err(|error| LinkError::Refused(format!("an event: {error}")))?;
        }
        Ok(())
    }

    fn set_inflight(
        &mut self,
        queues: &[ActiveQueue],
        inflight: &mut Option<Inflight>,
    ) -> Result<(), LinkError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) || queues.is_empty() {
            return Ok(());
        }
        if inflight.is_none() {
            let count = queues.iter().map(|queue| queue.index + 1).max().unwrap_or(0);
            let size = queues.iter().map(|queue| queue.rings.size).max().unwrap_or(0);
            let wanted = VhostUserInflight::new(0, 0, count, size);
            let (description, file) =
                self.frontend.get_inflight_fd(&wanted).map_err(during("GET_INFLIGHT_FD"))?;
            *inflight = Some(Inflight { description, file });
        }
        let Some(Inflight { description, file }) = inflight else { return Ok(()) };
        self.frontend.set_inflight_fd(description, file.as_raw_fd()).map_err(during("SET_INFLIGHT_FD"))
    }

    /// Stops `queues` until they are started again. When it returns without an error the backend has ended all that
    /// was under way.
    pub(super) fn hold(&mut self, queues: &[ActiveQueue]) -> Result<(), LinkError> {
        for queue in queues {
            let index = usize::from(queue.index);
            self.frontend.set_vring_enable(index, false).map_err(during("SET_VRING_ENABLE"))?;
            self.frontend.get_vring_base(index).map_err(during("GET_VRING_BASE"))?;
        }
        Ok(())
    }

    /// Stops `queues` for good, as [`Self::hold`].
    pub(super) fn stop(&mut self, queues: &[ActiveQueue]) -> Result<(), LinkError> {
        self.hold(queues)?;
        if self.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE) {
            self.frontend.reset_device().map_err(during("RESET_DEVICE"))?;
        }
        Ok(())
    }
}

/// Gives the backend a channel for its own requests.
fn requests(
    frontend: &mut Frontend,
    change: ConfigChange,
    protocol: VhostUserProtocolFeatures,
) -> Result<Requests, LinkError> {
    let mut requests =
        Requests::new(Arc::new(change)).map_err(during("a channel for requests of the backend"))?;
    requests.set_reply_ack_flag(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
    // SAFETY: the descriptor is open as long as `requests` lives.
    let socket = unsafe { std::os::fd::BorrowedFd::borrow_raw(requests.as_raw_fd()) };
    // A backend that stops in the middle of a message does not stop who reads it.
    set_socket_timeout(socket, Timeout::Recv, Some(PATIENCE))
        .map_err(|error| LinkError::Refused(format!("a time limit of a socket: {error}")))?;
    let to_send = requests.get_tx_raw_fd();
    frontend.set_backend_request_fd(&to_send).map_err(during("SET_BACKEND_REQ_FD"))?;
    Ok(requests)
}

/// The guest's memory, as the backend maps it.
fn regions(memory: &GuestMemory) -> Result<Vec<VhostUserMemoryRegionInfo>, LinkError> {
    let describe = |region| {
        let (fd, offset) = shared_fd(region).ok_or_else(|| {
            LinkError::Refused("guest memory is not shared (--memory shared=on)".to_owned())
        })?;
        Ok(VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.start_addr().0 + USER_OFFSET,
            mmap_offset: offset,
            mmap_handle: fd,
        })
    };
    memory.iter().map(describe).collect()
}

/// The addresses of a queue, as messages name them.
fn addresses(rings: &RingLayout) -> VringConfigData {
    // Rings are in memory, which ends far below 2^47.
    let user = |address: GuestAddress| address.0 + USER_OFFSET;
    VringConfigData {
        queue_max_size: rings.size,
        queue_size: rings.size,
        flags: 0,
        desc_table_addr: user(rings.descriptors),
        used_ring_addr: user(rings.used),
        avail_ring_addr: user(rings.available),
        log_addr: None,
    }
}
