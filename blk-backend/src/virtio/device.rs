//! What the queues of a block device share.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use zerocopy::IntoBytes;

use super::{
    command::DiskShape,
    config::{CONFIG_BYTES, ConfigValues, WRITEBACK_AT_BYTES},
    failure::{Action, Failure, OnError},
    features::Features,
};
use crate::{
    disk::{Disk, DiskEvent, Observation},
    engine::{EngineChoice, LaneOptions, Poll},
    request::Errno,
};

/// Bytes of the device's id (5.2.6).
pub const ID_BYTES: usize = 20;

/// Most queues of a device: as many as vhost-user front ends ask for.
pub const MAX_QUEUES: u16 = 256;

/// Block sizes that drivers take: Linux refuses more than a page.
const BLOCK_BYTES: std::ops::RangeInclusive<u32> = 512..=4096;

/// What is chosen for a device.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Request queues.
    pub queues: u16,
    /// What the guest sees as serial number: up to [`ID_BYTES`] printable ASCII characters.
    pub serial: String,
    /// The guest's block size; a power of two, 512 to 4096.
    pub block_bytes: u32,
    /// Refuse changes, also where the disk takes them.
    pub read_only: bool,
    /// How long a queue looks for new requests before it sleeps.
    pub poll: Poll,
    /// What its queues stand on.
    pub engine: EngineChoice,
    /// What becomes of reads that fail.
    pub on_read_error: OnError,
    /// What becomes of writes, discards, zeroes and flushes that fail. One that is [kept](Action::Stop) is lost when
    /// its queue is stopped: this is for devices whose queues belong to one process.
    pub on_write_error: OnError,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            queues: 1,
            serial: String::from("blk-backend"),
            block_bytes: 512,
            read_only: false,
            poll: Poll::Off,
            engine: EngineChoice::Auto,
            on_read_error: OnError::Report,
            on_write_error: OnError::Report,
        }
    }
}

/// What a device cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The number of queues.
    #[error("a device has 1 to {MAX_QUEUES} queues, not {0}")]
    Queues(u16),
    /// The serial number.
    #[error("a serial number is at most {ID_BYTES} printable ASCII characters, not '{0}'")]
    Serial(String),
    /// The block size.
    #[error("a block size is a power of two from 512 to 4096, not {0}")]
    BlockSize(u32),
    /// Features that were not offered.
    #[error("features {0:#x} were not offered")]
    NotOffered(Features),
    /// A write to what a driver may not write.
    #[error("{len_bytes} bytes at {offset} of the configuration are not writable")]
    Config {
        /// Where.
        offset: u64,
        /// How many.
        len_bytes: usize,
    },
}

/// What happened to a device, for its transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The configuration is different: the driver is told (5.2.5.1).
    Config,
    /// A queue broke: the driver must reset the device (2.1.2).
    Broken {
        /// Why, for people.
        why: String,
    },
    /// The host failed a request.
    Failed(Failure),
}

type Observer = Box<dyn Fn(&DeviceEvent) + Send + Sync>;

/// A block device over a [`Disk`]. Queues and transports share it.
pub struct Device {
    disk: Arc<Disk>,
    _watch: Observation,
    queues: u16,
    id: [u8; ID_BYTES],
    block_bytes: u32,
    read_only: bool,
    poll: Poll,
    engine: EngineChoice,
    /// As the disk told last; a request never waits for it.
    size_bytes: AtomicU64,
    negotiated: AtomicU64,
    /// `writeback` of the configuration.
    writeback: AtomicBool,
    on_read_error: OnError,
    on_write_error: OnError,
    needs_reset: AtomicBool,
    observers: Mutex<Vec<Observer>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("disk", &self.disk)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl Device {
    /// A device over `disk`.
    ///
    /// # Errors
    /// [`DeviceError`] names the option that cannot be.
    pub fn new(disk: &Arc<Disk>, options: &DeviceOptions) -> Result<Arc<Self>, DeviceError> {
        if options.queues == 0 || options.queues > MAX_QUEUES {
            return Err(DeviceError::Queues(options.queues));
        }
        if !options.block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&options.block_bytes) {
            return Err(DeviceError::BlockSize(options.block_bytes));
        }
        let serial = options.serial.as_bytes();
        if serial.len() > ID_BYTES || !serial.iter().all(|byte| (b' '..=b'~').contains(byte)) {
            return Err(DeviceError::Serial(options.serial.clone()));
        }
        let mut id = [0; ID_BYTES];
        id[..serial.len()].copy_from_slice(serial);
        let watched = |watcher: &Weak<Self>| {
            let watcher = Weak::clone(watcher);
            disk.observe(move |event| {
                if let (Some(device), DiskEvent::Resized { size_bytes }) = (watcher.upgrade(), event) {
                    device.resized(size_bytes);
                }
            })
        };
        let device = Arc::new_cyclic(|this| Self {
            queues: options.queues,
            id,
            block_bytes: options.block_bytes,
            read_only: options.read_only || disk.is_read_only(),
            poll: options.poll,
            on_read_error: options.on_read_error,
            on_write_error: options.on_write_error,
            engine: options.engine,
            size_bytes: AtomicU64::new(disk.size_bytes()),
            negotiated: AtomicU64::new(0),
            writeback: AtomicBool::new(!disk.writes_through()),
            needs_reset: AtomicBool::new(false),
            observers: Mutex::default(),
            disk: Arc::clone(disk),
            _watch: watched(this),
        });
        // A resize before there was a device to tell was not told to us.
        device.size_bytes.store(disk.size_bytes(), SeqCst);
        Ok(device)
    }

    fn resized(&self, size_bytes: u64) {
        self.size_bytes.store(size_bytes, SeqCst);
        self.tell(&DeviceEvent::Config);
    }

    /// Keeps new clusters off the part of the image's file that there is, or no longer; where the device writes at all.
    pub(crate) fn keep_off_what_is_there(&self, keeps_off: bool) -> img_core::Result<()> {
        if self.read_only { Ok(()) } else { self.disk.image().keep_off_what_is_there(keeps_off) }
    }

    /// Calls `observer` with what happens, on the thread where it happens.
    pub fn observe(&self, observer: impl Fn(&DeviceEvent) + Send + Sync + 'static) {
        self.observers.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(observer));
    }

    fn tell(&self, event: &DeviceEvent) {
        let observers = self.observers.lock().unwrap_or_else(PoisonError::into_inner);
        observers.iter().for_each(|observer| observer(event));
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Whether changes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Request queues.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// How the lanes of its queues are made: for so many requests at once.
    pub(crate) fn lane_options(&self, depth: u32) -> LaneOptions {
        LaneOptions { depth, poll: self.poll, engine: self.engine }
    }

    /// What is offered to drivers.
    #[must_use]
    pub fn offered(&self) -> Features {
        let mut offered = Features::BLOCK_DEVICE;
        if self.queues > 1 {
            offered = offered.with(Features::MQ);
        }
        if self.read_only {
            // Nothing is cached, and nothing can be changed.
            let changes = Features::DISCARD.with(Features::WRITE_ZEROES).with(Features::CONFIG_WCE);
            offered = offered.with(Features::RO).without(changes);
        }
        offered
    }

    /// Takes what the driver accepted.
    ///
    /// # Errors
    /// [`DeviceError::NotOffered`].
    pub fn negotiate(&self, accepted: Features) -> Result<(), DeviceError> {
        let unknown = accepted.without(self.offered());
        if unknown != Features::default() {
            return Err(DeviceError::NotOffered(unknown));
        }
        self.negotiated.store(accepted.0, SeqCst);
        if accepted.has(Features::CONFIG_WCE) && !accepted.has(Features::FLUSH) {
            self.writeback.store(false, SeqCst); // 5.2.5.2
        }
        Ok(())
    }

    /// What the driver accepted.
    #[must_use]
    pub fn negotiated(&self) -> Features {
        Features(self.negotiated.load(SeqCst))
    }

    /// The state after a reset: nothing negotiated, the cache as the disk has it.
    pub fn reset(&self) {
        self.negotiated.store(0, SeqCst);
        self.writeback.store(!self.disk.writes_through(), SeqCst);
        self.needs_reset.store(false, SeqCst);
    }

    /// A queue is broken and only a reset helps: `DEVICE_NEEDS_RESET` (2.1.2).
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(SeqCst)
    }

    pub(crate) fn break_down(&self, why: &dyn fmt::Display) {
        self.needs_reset.store(true, SeqCst);
        self.tell(&DeviceEvent::Broken { why: why.to_string() });
    }

    /// Decides what becomes of a request that the host failed, and tells it.
    pub(crate) fn failed(&self, is_read: bool, errno: Errno) -> Action {
        let action = if is_read { self.on_read_error } else { self.on_write_error }.action(errno);
        self.tell(&DeviceEvent::Failed(Failure { is_read, errno, action }));
        action
    }

    /// The configuration space as it is now.
    #[must_use]
    pub fn config(&self) -> [u8; CONFIG_BYTES] {
        let top = self.disk.image();
        let discard_bytes = top.layers()[0].cluster_size_bytes().map_or(0, u64::from);
        let values = ConfigValues {
            size_bytes: self.size_bytes.load(SeqCst),
            block_bytes: self.block_bytes,
            discard_bytes: discard_bytes.max(self.block_bytes.into()),
            queues: self.queues,
            writeback: self.writeback.load(SeqCst),
        };
        let mut bytes = [0; CONFIG_BYTES];
        bytes.copy_from_slice(values.encode().as_bytes());
        bytes
    }

    /// A driver's write to the configuration space: the cache mode, and nothing else.
    ///
    /// # Errors
    /// [`DeviceError::Config`].
    pub fn write_config(&self, offset: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        match bytes {
            [mode @ (0 | 1)] if offset == WRITEBACK_AT_BYTES as u64 && !self.read_only => {
                self.writeback.store(*mode == 1, SeqCst);
                Ok(())
            }
            _ => Err(DeviceError::Config { offset, len_bytes: bytes.len() }),
        }
    }

    /// Whether a write must be durable before it is answered (5.2.6.2): the driver chose so, or cannot flush.
    #[must_use]
    pub fn writes_through(&self) -> bool {
        !self.writeback.load(SeqCst) || !self.negotiated().has(Features::FLUSH)
    }

    /// What requests are checked against.
    #[must_use]
    pub fn shape(&self) -> DiskShape {
        DiskShape {
            size_bytes: self.size_bytes.load(SeqCst),
            block_bytes: self.block_bytes,
            read_only: self.read_only,
        }
    }

    /// What `GET_ID` gives.
    #[must_use]
    pub fn id(&self) -> &[u8; ID_BYTES] {
        &self.id
    }
}
