//! The front end of a vhost-user device, as a virtual machine monitor has it: it owns the memory and the rings, and
//! keeps the inflight memory over the death of the back end.

use std::{
    fs::File,
    os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use blk_backend::virtio::{Features, config::CONFIG_BYTES};
use vhost::{
    VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend as _,
        message::{
            VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
            VhostUserVirtioFeatures,
        },
    },
};
use vmm_sys_util::eventfd::EventFd;

use super::{GuestQueue, SharedRam};

/// Where a front end has guest memory mapped, for all that the back end knows.
pub const USER_OFFSET: u64 = 0x7100_0000_0000;

/// A connection with its queues started.
pub struct FrontEnd {
    /// To send more messages.
    pub frontend: Frontend,
    /// As negotiated.
    pub features: Features,
    /// As the back end offered them.
    pub protocol: VhostUserProtocolFeatures,
    /// Kept for the next back end.
    pub inflight: Option<Inflight>,
}

/// The memory in which a back end keeps what it has.
pub struct Inflight {
    description: VhostUserInflight,
    file: File,
}

/// How a front end connects.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    /// What to accept of what is offered.
    pub accept: fn(Features) -> Features,
    /// Whether memory is added slot by slot.
    pub slots: bool,
    /// Whether to ask for inflight memory, where it is offered.
    pub inflight: bool,
}

impl Default for Wishes {
    fn default() -> Self {
        Self { accept: |offered| offered, slots: false, inflight: true }
    }
}

/// An event descriptor as messages take it.
///
/// # Panics
/// When there are no more descriptors.
#[must_use]
pub fn event(fd: &OwnedFd) -> EventFd {
    let fd = fd.try_clone().expect("a descriptor").into_raw_fd();
    // SAFETY: the copy was made for this, and nobody else knows it.
    unsafe { EventFd::from_raw_fd(fd) }
}

/// `ram` as one region.
#[must_use]
pub fn region(ram: &SharedRam) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: ram.len_bytes,
        userspace_addr: USER_OFFSET,
        mmap_offset: 0,
        mmap_handle: ram.file.as_raw_fd(),
    }
}

/// The addresses of a queue, as messages name them.
#[must_use]
pub fn addresses(queue: &GuestQueue) -> VringConfigData {
    let rings = queue.layout();
    VringConfigData {
        queue_max_size: rings.size,
        queue_size: rings.size,
        flags: 0,
        desc_table_addr: rings.descriptors.0 + USER_OFFSET,
        used_ring_addr: rings.used.0 + USER_OFFSET,
        avail_ring_addr: rings.available.0 + USER_OFFSET,
        log_addr: None,
    }
}

impl FrontEnd {
    /// Connects to the back end at `path`, as soon as there is one, and starts `queues`. With `inflight` memory of
    /// an earlier back end it goes on where that one died.
    ///
    /// # Panics
    /// When the back end does not come or does not do its part.
    #[track_caller]
    #[must_use]
    pub fn start(
        path: &Path,
        ram: &SharedRam,
        queues: &[GuestQueue],
        inflight: Option<Inflight>,
        wishes: Wishes,
    ) -> Self {
        let mut front_end = Self::connect(path, queues.len(), inflight, wishes);
        front_end.share(ram, wishes.slots);
        for (index, queue) in queues.iter().enumerate() {
            front_end.start_queue(index, queue);
        }
        front_end
    }

    /// Connects and negotiates, and takes care of the inflight memory.
    ///
    /// # Panics
    /// When the back end does not come or does not do its part.
    #[track_caller]
    #[must_use]
    pub fn connect(path: &Path, queues: usize, inflight: Option<Inflight>, wishes: Wishes) -> Self {
        let until = Instant::now() + Duration::from_secs(60);
        let mut frontend = loop {
            match Frontend::connect(path, queues as u64) {
                Ok(frontend) => break frontend,
                Err(error) => assert!(Instant::now() < until, "{}: {error}", path.display()),
            }
            std::thread::yield_now();
        };
        frontend.set_owner().expect("an owner");
        let offered = Features(frontend.get_features().expect("features"));
        let protocol = frontend.get_protocol_features().expect("protocol features");
        frontend.set_protocol_features(protocol).expect("what was offered");
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let transport = Features(VhostUserVirtioFeatures::LOG_ALL.bits());
        let features = (wishes.accept)(offered.without(transport));
        frontend.set_features(features.0).expect("what was offered");
        let wants_inflight = wishes.inflight && protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        let inflight = inflight.or_else(|| {
            wants_inflight.then(|| {
                let wanted = VhostUserInflight::new(0, 0, u16::try_from(queues).expect("few"), 128);
                let (description, file) = frontend.get_inflight_fd(&wanted).expect("inflight memory");
                Inflight { description, file }
            })
        });
        if let Some(Inflight { description, file }) = &inflight {
            frontend.set_inflight_fd(description, file.as_raw_fd()).expect("its own memory");
        }
        Self { frontend, features, protocol, inflight }
    }

    /// Shares all guest memory.
    ///
    /// # Panics
    /// When the back end does not take it.
    pub fn share(&mut self, ram: &SharedRam, slots: bool) {
        if slots {
            assert!(self.frontend.get_max_mem_slots().expect("a number") > 0);
            self.frontend.add_mem_region(&region(ram)).expect("it is mapped");
        } else {
            self.frontend.set_mem_table(&[region(ram)]).expect("it is mapped");
        }
    }

    /// Starts and enables one queue where its driver is.
    ///
    /// # Panics
    /// When the back end does not take it.
    pub fn start_queue(&mut self, index: usize, queue: &GuestQueue) {
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.layout().size).expect("a size");
        // After the death of a back end this is all that a front end knows.
        frontend.set_vring_base(index, queue.used_idx()).expect("a base");
        frontend.set_vring_addr(index, &addresses(queue)).expect("addresses");
        frontend.set_vring_call(index, &event(&queue.call)).expect("a call descriptor");
        frontend.set_vring_kick(index, &event(&queue.kick)).expect("a kick descriptor");
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if self.features.has(Features(protocol)) {
            frontend.set_vring_enable(index, true).expect("enabled");
        }
    }

    /// The configuration space.
    ///
    /// # Panics
    /// When the back end does not give it.
    pub fn config(&mut self) -> Vec<u8> {
        let size = u32::try_from(CONFIG_BYTES).expect("60");
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) =
            self.frontend.get_config(0, size, flags, &[0; CONFIG_BYTES]).expect("the configuration");
        bytes
    }

    /// Writes the cache mode of the configuration space.
    ///
    /// # Panics
    /// When the back end does not take it.
    pub fn set_writeback(&mut self, on: bool) {
        let at = u32::try_from(blk_backend::virtio::config::WRITEBACK_AT_BYTES).expect("32");
        self.frontend.set_config(at, VhostUserConfigFlags::WRITABLE, &[u8::from(on)]).expect("a mode");
    }
}
