//! What one connection of a front end has set up: memory, queues, logs; and the protocol's requests on it.
//!
//! Each queue works on its own thread while it is started: from its kick descriptor until `GET_VRING_BASE`, a reset
//! or the end of the connection. What changes under a working queue changes while nothing of it is under way.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
};

use img_core::image::ChangeLog;
use vhost::VhostUserMemoryRegionBase as RegionBase;
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    message::{
        VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
        VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
        VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
    },
};
use vm_memory::GuestAddress;

use super::{MAX_MEMORY_SLOTS, Told, memory::SharedMemory, message};
use crate::{
    in_process::{QueueGone, QueueThread},
    virtio::{
        Device, Features,
        config::CONFIG_BYTES,
        dirty_log::{DirtyLog, QueueLog},
        inflight::InflightRegion,
        redo::{RedoError, RedoLog},
        ring::RingLayout,
        setup::{MAX_QUEUE_SIZE, QueueError, QueueSetup},
    },
};

/// `VHOST_F_LOG_ALL`: pages that are written are logged.
const LOG_ALL: Features = Features(1 << 26);
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: Features = Features(1 << 30);

/// `DEVICE_NEEDS_RESET` of the device status (virtio 1.2, section 2.1).
const NEEDS_RESET: u64 = 0x40;

/// Bytes of configuration space that a front end may ask for: more than there are read as zeroes, so that one that
/// knows newer fields than this device can ask for its whole structure.
const CONFIG_SPACE_BYTES: usize = 256;

/// The protocol features of this back end.
fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::STATUS
}

/// Where a message to the front end goes, once it gave a channel for it.
pub(super) type Channel = Arc<Mutex<Option<UnixStream>>>;

/// One queue, as far as it is set up.
#[derive(Debug, Default)]
struct Vring {
    size: u16,
    next_avail: u16,
    rings: Option<RingLayout>,
    /// Where writes to the used ring are logged.
    log_used_at: Option<GuestAddress>,
    /// `Some(None)`: set to be looked at without kicks.
    kick: Option<Option<OwnedFd>>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    enabled: bool,
    /// While it is started.
    thread: Option<QueueThread>,
}

/// One connection. Dropped, its queues drain and stop.
pub(super) struct Session {
    device: Arc<Device>,
    features: Features,
    protocol: VhostUserProtocolFeatures,
    memory: SharedMemory,
    vrings: Vec<Vring>,
    inflight: Option<Arc<InflightRegion>>,
    redo: Option<Arc<RedoLog>>,
    log: Option<Arc<DirtyLog>>,
    status: u64,
    channel: Channel,
    tell: Told,
}

fn failed(error: impl Into<io::Error>) -> Error {
    Error::ReqHandlerError(error.into())
}

fn queue_failed(error: QueueError) -> Error {
    match error {
        QueueError::Io(error) => failed(error),
        error => failed(io::Error::other(error)),
    }
}

fn gone(error: QueueGone) -> Error {
    failed(io::Error::other(error))
}

impl Session {
    pub(super) fn new(device: &Arc<Device>, channel: Channel, tell: Told) -> Self {
        Self {
            vrings: std::iter::repeat_with(Vring::default).take(device.queues().into()).collect(),
            device: Arc::clone(device),
            features: Features::default(),
            protocol: VhostUserProtocolFeatures::empty(),
            memory: SharedMemory::default(),
            inflight: None,
            redo: None,
            log: None,
            status: 0,
            channel,
            tell,
        }
    }

    /// Whether requests that ask for it are acknowledged.
    pub(super) fn acknowledges(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK)
    }

    /// The device status, as the driver wrote it and with what only the device knows.
    pub(super) fn status(&self) -> u64 {
        self.status | if self.device.needs_reset() { NEEDS_RESET } else { 0 }
    }

    /// The driver wrote the device status. Zero resets the device (virtio 1.2, section 2.1).
    pub(super) fn set_status(&mut self, status: u64) -> Result<()> {
        if !self.protocol.contains(VhostUserProtocolFeatures::STATUS) {
            return Err(Error::InactiveOperation(VhostUserProtocolFeatures::STATUS));
        }
        self.status = status & !NEEDS_RESET;
        if status == 0 { self.reset() } else { Ok(()) }
    }

    /// Takes the channel for messages to the front end.
    pub(super) fn set_channel(&mut self, channel: UnixStream) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = Some(channel);
    }

    fn reset(&mut self) -> Result<()> {
        for vring in &mut self.vrings {
            vring.enabled = false;
            vring.stop()?;
        }
        self.features = Features::default();
        self.device.reset();
        Ok(())
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.vrings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Starts a queue that has all it needs.
    fn start(&mut self, index: u16) -> Result<()> {
        let log = self.queue_log(index);
        let vring = &mut self.vrings[usize::from(index)];
        let (Some(rings), Some(kick), None) = (vring.rings, &vring.kick, &vring.thread) else {
            return Ok(());
        };
        // Size and addresses may come in any order.
        let rings = RingLayout { size: vring.size, ..rings };
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        let inflight = match &self.inflight {
            None => {
                self.device.keep_off_what_is_there(false).map_err(io::Error::other).map_err(failed)?;
                None
            }
            Some(region) => Some(region.queue(index, rings.size).ok_or_else(|| {
                failed(io::Error::other(format!(
                    "the inflight memory has no queue {index} of {}",
                    rings.size
                )))
            })?),
        };
        let setup = QueueSetup {
            ram: self.memory.ram().map_err(failed)?,
            rings,
            next_avail: vring.next_avail,
            features: self.features,
            kick: copy(kick).map_err(failed)?,
            call: copy(&vring.call).map_err(failed)?,
            error: copy(&vring.error).map_err(failed)?,
            inflight,
            redo: self.redo.clone(),
            log,
            paused: !vring.enabled,
        };
        let name = format!("vhost-user-q{index}");
        vring.thread = Some(QueueThread::start(&self.device, &name, setup).map_err(queue_failed)?);
        Ok(())
    }

    /// What queue `index` has to log, now.
    fn queue_log(&self, index: u16) -> Option<QueueLog> {
        let log = self.log.as_ref().filter(|_| self.features.has(LOG_ALL))?;
        Some(QueueLog { log: Arc::clone(log), used_at: self.vrings[usize::from(index)].log_used_at })
    }

    /// Queues at work learn what they have to log.
    fn tell_log(&self) -> Result<()> {
        for (index, vring) in (0..).zip(&self.vrings) {
            if let Some(thread) = &vring.thread {
                thread.set_log(self.queue_log(index)).map_err(gone)?;
            }
        }
        Ok(())
    }

    /// Takes another set of regions. Queues at work go over to it.
    fn set_memory(&mut self, memory: SharedMemory) -> Result<()> {
        let ram = memory.ram().map_err(failed)?;
        for thread in self.vrings.iter().filter_map(|vring| vring.thread.as_ref()) {
            thread.set_ram(Arc::clone(&ram)).map_err(gone)?;
        }
        self.memory = memory;
        Ok(())
    }

    /// Takes inflight memory. What an earlier device noted in it and nobody flushed is done again first. Where the host
    /// refuses that, the guest waits rather than misses what it wrote: its front end is sent away, and finds all notes
    /// in its memory when it comes again.
    fn set_inflight(&mut self, region: Arc<InflightRegion>) -> Result<()> {
        let disk = self.device.disk();
        let redo = Arc::new(region.redo_log());
        match redo.replay(&disk.image()) {
            Ok(0) => {}
            Ok(count) => (self.tell)(&format!("{count} changes of a device that died were done again")),
            Err(error @ RedoError::Image(_)) => return Err(failed(io::Error::other(error))),
            Err(error) => (self.tell)(&error.to_string()),
        }
        self.inflight = Some(region);
        if self.device.is_read_only() {
            // Its guest changes nothing, and what another one's does is noted elsewhere.
            return Ok(());
        }
        if let Err(error) = disk.keep_change_log(Some(Arc::clone(&redo) as Arc<dyn ChangeLog>)) {
            (self.tell)(&format!("changes are not noted for a device to come: {error}"));
        }
        self.redo = Some(redo);
        Ok(())
    }

    fn check_no_queue_works(&self, otherwise: &'static str) -> Result<()> {
        let works = self.vrings.iter().any(|vring| vring.thread.is_some());
        if works { Err(Error::InvalidOperation(otherwise)) } else { Ok(()) }
    }

    fn index(&self, index: u8) -> Result<u16> {
        let index = u16::from(index);
        if usize::from(index) < self.vrings.len() { Ok(index) } else { Err(Error::InvalidParam) }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Before the memory with the notes goes; the queues drain when they are dropped.
        self.vrings.clear();
        if self.redo.is_some()
            && let Err(error) = self.device.disk().keep_change_log(None)
        {
            (self.tell)(&error.to_string());
        }
    }
}

impl Vring {
    /// Ends what is under way; the queue goes on from there when it is started again.
    fn stop(&mut self) -> Result<()> {
        if let Some(thread) = self.thread.take() {
            self.next_avail = thread.stop().map_err(gone)?.next_avail;
        }
        self.kick = None;
        self.call = None;
        Ok(())
    }
}

fn event_fd(file: Option<File>) -> Result<Option<OwnedFd>> {
    file.map(message::event_fd).transpose().map_err(failed)
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated by the protocol, which recommends to disable all rings or to do nothing.
    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.status = 0;
        self.reset()
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.offered().with(LOG_ALL).with(PROTOCOL_FEATURES).0)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let (before, features) = (self.features, Features(features));
        let transport = LOG_ALL.with(PROTOCOL_FEATURES);
        self.device
            .negotiate(features.without(transport))
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let is_working = self.vrings.iter().any(|vring| vring.thread.is_some());
        if is_working && before.without(transport) != features.without(transport) {
            return Err(Error::InvalidOperation("features change while queues are started"));
        }
        self.features = features;
        if !features.has(PROTOCOL_FEATURES) {
            // Without them there is no message to enable a ring: all are enabled ("Ring states").
            for vring in &mut self.vrings {
                vring.enabled = true;
                vring.thread.iter().for_each(QueueThread::resume);
            }
        }
        self.tell_log()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<RegionBase>>> {
        let mut memory = SharedMemory::default();
        for (region, file) in regions.iter().zip(files) {
            memory.add(region, file).map_err(failed)?;
        }
        self.set_memory(memory)?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEMORY_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<RegionBase>> {
        let mut memory = self.memory.clone();
        memory.add(region, file).map_err(failed)?;
        self.set_memory(memory)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let mut memory = self.memory.clone();
        memory.remove(region).map_err(failed)?;
        self.set_memory(memory)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE);
        let size = size.ok_or_else(|| {
            let what =
                format!("a queue of {num} descriptors; powers of two up to {MAX_QUEUE_SIZE} are served");
            failed(io::Error::new(io::ErrorKind::InvalidInput, what))
        })?;
        let vring = self.vring(index)?;
        if vring.thread.is_some() && vring.size != size {
            return Err(Error::InvalidOperation("the size of a queue changes while it is started"));
        }
        vring.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let descriptors = self.memory.guest_address(descriptor).map_err(failed)?;
        let used = self.memory.guest_address(used).map_err(failed)?;
        let available = self.memory.guest_address(available).map_err(failed)?;
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        let vring = self.vring(index)?;
        let rings = RingLayout { size: vring.size, descriptors, available, used };
        if vring.thread.is_some() && vring.rings != Some(rings) {
            return Err(Error::InvalidOperation("the rings of a queue move while it is started"));
        }
        vring.rings = Some(rings);
        vring.log_used_at = logged.then_some(GuestAddress(log));
        self.tell_log()
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let vring = self.vring(index)?;
        if vring.thread.is_some() {
            return Err(Error::InvalidOperation("the base of a queue changes while it is started"));
        }
        vring.next_avail = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.stop()?;
        Ok(VhostUserVringState::new(index, vring.next_avail.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.index(index)?;
        let vring = &mut self.vrings[usize::from(index)];
        if vring.thread.is_some() {
            return Err(Error::InvalidOperation("the kick of a queue changes while it is started"));
        }
        vring.kick = Some(event_fd(fd)?);
        self.start(index)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.index(index)?;
        let vring = &mut self.vrings[usize::from(index)];
        vring.call = event_fd(fd)?;
        if let Some(thread) = &vring.thread {
            thread.set_call(vring.call.as_ref().map(OwnedFd::try_clone).transpose().map_err(failed)?);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.index(index)?;
        let vring = &mut self.vrings[usize::from(index)];
        vring.error = event_fd(fd)?;
        if let Some(thread) = &vring.thread {
            thread.set_error(vring.error.as_ref().map(OwnedFd::try_clone).transpose().map_err(failed)?);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let known = VhostUserProtocolFeatures::from_bits(features);
        self.protocol =
            known.filter(|features| protocol_features().contains(*features)).ok_or(Error::FeatureMismatch)?;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.queues().into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let vring = self.vring(index)?;
        vring.enabled = enable;
        match &vring.thread {
            Some(thread) if enable => thread.resume(),
            Some(thread) => thread.pause().map_err(gone)?,
            None => {}
        }
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut space = [0; CONFIG_SPACE_BYTES];
        space[..CONFIG_BYTES].copy_from_slice(&self.device.config());
        let start = usize::try_from(offset).map_err(|_| Error::InvalidParam)?;
        let size = usize::try_from(size).map_err(|_| Error::InvalidParam)?;
        let bytes =
            start.checked_add(size).and_then(|end| space.get(start..end)).ok_or(Error::InvalidParam)?;
        Ok(bytes.to_vec())
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device
            .write_config(offset.into(), bytes)
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let VhostUserInflight { num_queues, queue_size, .. } = *wanted;
        if num_queues > self.device.queues() || queue_size > MAX_QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        self.check_no_queue_works("the inflight memory changes while queues are started")?;
        let (region, file) = InflightRegion::create(num_queues, queue_size).map_err(failed)?;
        self.set_inflight(region)?;
        let len_bytes = InflightRegion::bytes(num_queues, queue_size) as u64;
        Ok((VhostUserInflight::new(len_bytes, 0, num_queues, queue_size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *inflight;
        let size = usize::try_from(mmap_size).map_err(|_| Error::InvalidParam)?;
        if num_queues > self.device.queues() || queue_size > MAX_QUEUE_SIZE {
            return Err(Error::InvalidParam);
        }
        self.check_no_queue_works("the inflight memory changes while queues are started")?;
        let region = InflightRegion::map(file, mmap_offset, size, num_queues, queue_size).map_err(failed)?;
        self.set_inflight(region)
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let VhostUserLog { mmap_size, mmap_offset } = *log;
        self.log = Some(Arc::new(DirtyLog::map(file, mmap_offset, mmap_size).map_err(failed)?));
        self.tell_log()
    }

    fn set_gpu_socket(&mut self, _channel: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("a block device has no display"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("shared objects are not offered"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("a block device has no state besides its rings"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("a block device has no state besides its rings"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory regions are not offered"))
    }
}
