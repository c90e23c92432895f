//! Virtio over PCI (section 4.1): one 32-bit BAR with all structures, MSI-X, a doorbell and a vector each queue.
//!
//! A doorbell is an ioeventfd and a vector an irqfd: neither leaves the kernel for the runner.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use vmm_sys_util::eventfd::EventFd;

use super::{ConfigNotifier, FEATURE_RING_RESET, FEATURE_VERSION_1, QueueSetup, VirtioDevice};
use crate::{
    Error, Result,
    machine::{GuestMemory, Hypervisor, Interrupts, new_eventfd},
    pci::{Bar, ConfigSpace, Identity, MSIX_ENABLE, MSIX_MASK_ALL, MsixTable, PciFunction, msix_table_bytes},
};

/// Red Hat, for virtio.
const VENDOR: u16 = 0x1AF4;
/// Device ids of version 1 devices are this plus the device's number.
const DEVICE_BASE: u16 = 0x1040;
/// The only BAR.
const BAR: usize = 0;
/// Its size.
const BAR_BYTES: u32 = 0x1_0000;
const COMMON: Range<u64> = 0..0x1000;
const ISR: Range<u64> = 0x1000..0x2000;
const DEVICE: Range<u64> = 0x2000..0x3000;
const NOTIFY: Range<u64> = 0x3000..0x4000;
const MSIX_TABLE: Range<u64> = 0x8000..0x9000;
const MSIX_PENDING: Range<u64> = 0x9000..0xA000;
/// Doorbells are so far apart.
const NOTIFY_MULTIPLIER: u32 = 4;
/// More doorbells and table entries do not fit.
const MAX_QUEUES: usize = 254;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// No vector.
const NO_VECTOR: u16 = 0xFFFF;

const STATUS_DRIVER_OK: u8 = 4;
const STATUS_FEATURES_OK: u8 = 8;
const STATUS_NEEDS_RESET: u8 = 0x40;

/// ISR: the configuration changed.
const ISR_CONFIG: u8 = 2;

/// What a transport needs of the machine.
#[derive(Clone)]
pub struct TransportSlot {
    /// The virtual machine, for doorbells.
    pub vm: Arc<dyn Hypervisor>,
    /// Interrupt routes.
    pub interrupts: Arc<Interrupts>,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Where the BAR is at first.
    pub bar_address: u32,
}

impl fmt::Debug for TransportSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportSlot").field("bar_address", &self.bar_address).finish_non_exhaustive()
    }
}

/// What the driver said of one queue.
#[derive(Debug)]
struct Queue {
    max_size: u16,
    size: u16,
    is_enabled: bool,
    /// It was reset while the driver runs, and may be set up anew.
    was_reset: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    vector: u16,
    /// The doorbell.
    kick: EventFd,
    /// What the device signals where the driver gave the queue no vector.
    unheard: Arc<EventFd>,
}

impl Queue {
    fn new(max_size: u16) -> Result<Self> {
        Ok(Self {
            max_size,
            size: max_size,
            is_enabled: false,
            was_reset: false,
            descriptors: 0,
            available: 0,
            used: 0,
            vector: NO_VECTOR,
            kick: new_eventfd()?,
            unheard: Arc::new(new_eventfd()?),
        })
    }

    fn reset(&mut self) {
        (self.size, self.is_enabled, self.vector) = (self.max_size, false, NO_VECTOR);
        (self.descriptors, self.available, self.used) = (0, 0, 0);
        self.was_reset = false;
    }
}

struct State {
    space: ConfigSpace,
    device: Box<dyn VirtioDevice>,
    msix: MsixTable,
    msix_control_at: usize,
    /// Where the window into the BAR stands in configuration space (section 4.1.4.9).
    window_at: usize,
    queues: Vec<Queue>,
    queue_select: u16,
    features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    status: u8,
    config_vector: u16,
    /// Where doorbells are registered.
    doorbells_at: Option<u64>,
}

impl State {
    /// A queue as the driver has set it up; `None` for one that it left out.
    fn setup(&self, index: u16) -> Result<Option<QueueSetup>> {
        let Some(queue) = self.queues.get(usize::from(index)).filter(|queue| queue.is_enabled) else {
            return Ok(None);
        };
        let call = self.msix.vector(queue.vector).map_or(&queue.unheard, |vector| vector.event());
        Ok(Some(QueueSetup {
            index,
            size: queue.size,
            descriptors: queue.descriptors,
            available: queue.available,
            used: queue.used,
            kick: queue.kick.try_clone().map_err(Error::host("an event for a queue"))?,
            call: Arc::clone(call),
        }))
    }
}

/// A device in a PCI slot.
pub struct VirtioPci {
    slot: TransportSlot,
    state: Mutex<State>,
    news: Arc<News>,
}

/// What a device tells from its own threads. It takes no lock that a processor holds while it waits for the device.
#[derive(Debug, Default)]
struct News {
    isr: AtomicU8,
    needs_reset: AtomicBool,
    /// Counts changes of the configuration, so that a driver can tell a torn read.
    generation: AtomicU8,
    /// What is signalled, while a driver runs that gave a vector.
    event: Mutex<Option<Arc<EventFd>>>,
}

impl News {
    fn raise(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        if let Some(event) = &*self.event.lock().unwrap_or_else(PoisonError::into_inner) {
            // An eventfd's counter that is full is an interrupt that is pending already.
            drop(event.write(1));
        }
    }

    fn set_event(&self, event: Option<Arc<EventFd>>) {
        *self.event.lock().unwrap_or_else(PoisonError::into_inner) = event;
    }

    /// What a call that failed means to the guest: the device needs a reset.
    fn told(&self, result: Result<()>) {
        if result.is_err() {
            self.needs_reset();
        }
    }
}

impl ConfigNotifier for News {
    fn config_changed(&self) {
        self.raise();
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise();
    }
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPci").field("slot", &self.slot).finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// Puts a device behind the transport.
    ///
    /// # Errors
    /// When the host or the machine has no descriptors or interrupts left.
    pub fn new(slot: TransportSlot, device: Box<dyn VirtioDevice>) -> Result<Arc<Self>> {
        let queues: Vec<Queue> = device.queue_sizes().into_iter().map(Queue::new).collect::<Result<_>>()?;
        if queues.len() > MAX_QUEUES {
            return Err(Error::Invalid(format!("a device has at most {MAX_QUEUES} queues")));
        }
        let vectors = (0..=queues.len()).map(|_| slot.interrupts.message()).collect::<Result<Vec<_>>>()?;
        let msix = MsixTable::new(vectors);
        let mut space = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + device.device_type(),
            revision: 1,
            class: device.pci_class(),
            subsystem: (VENDOR, DEVICE_BASE + device.device_type()),
            is_multifunction: false,
        });
        space.add_bar(Bar { index: BAR, size_bytes: BAR_BYTES, address: slot.bar_address });
        for (kind, range) in [(1, COMMON), (3, ISR), (4, DEVICE)] {
            space.add_capability(CAPABILITY_VENDOR, &structure(kind, &range, &[]), &[])?;
        }
        space.add_capability(
            CAPABILITY_VENDOR,
            &structure(2, &NOTIFY, &NOTIFY_MULTIPLIER.to_le_bytes()),
            &[],
        )?;
        // A window for drivers that cannot reach memory: BAR, offset and length are theirs to say.
        let mut window_mask = [0; 18];
        window_mask[2] = 0xFF;
        window_mask[6..14].fill(0xFF);
        let window_at =
            space.add_capability(CAPABILITY_VENDOR, &structure(5, &(0..0), &[0; 4]), &window_mask)?;
        let last = u16::try_from(msix.len() - 1).expect("few entries");
        // The lowest bits of the table's places name the BAR, which is 0.
        let mut table = last.to_le_bytes().to_vec();
        table.extend(low(MSIX_TABLE.start).to_le_bytes());
        table.extend(low(MSIX_PENDING.start).to_le_bytes());
        let [_, control_mask] = (MSIX_ENABLE | MSIX_MASK_ALL).to_le_bytes();
        let msix_at = space.add_capability(CAPABILITY_MSIX, &table, &[0, control_mask])?;
        debug_assert!(msix_table_bytes(msix.len()) as u64 <= MSIX_TABLE.end - MSIX_TABLE.start);
        let state = State {
            space,
            device,
            msix,
            msix_control_at: msix_at + 2,
            window_at,
            queues,
            queue_select: 0,
            features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            status: 0,
            config_vector: NO_VECTOR,
            doorbells_at: None,
        };
        let news = Arc::<News>::default();
        let transport = Arc::new(Self { slot, state: Mutex::new(state), news: Arc::clone(&news) });
        let mut state = transport.lock();
        state.device.set_config_notifier(news);
        transport.place_doorbells(&mut state)?;
        drop(state);
        Ok(transport)
    }

    /// Returns when the device touches nothing of the guest any more. Processors are held.
    pub(crate) fn pause(&self) {
        self.lock().device.pause();
    }

    /// Lets the device go on.
    pub(crate) fn resume(&self) {
        self.lock().device.resume();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers doorbells where the BAR is now.
    fn place_doorbells(&self, state: &mut State) -> Result<()> {
        let at = state.space.decoded().first().map(|(_, range)| range.start + NOTIFY.start);
        if at == state.doorbells_at {
            return Ok(());
        }
        let address = |base: u64, index: usize| base + index as u64 * u64::from(NOTIFY_MULTIPLIER);
        if let Some(old) = state.doorbells_at.take() {
            for (index, queue) in state.queues.iter().enumerate() {
                self.slot.vm.remove_doorbell(&queue.kick, address(old, index))?;
            }
        }
        if let Some(new) = at {
            for (index, queue) in state.queues.iter().enumerate() {
                self.slot.vm.place_doorbell(&queue.kick, address(new, index))?;
            }
            state.doorbells_at = Some(new);
        }
        Ok(())
    }

    fn read_common(&self, state: &State, offset: u64, data: &mut [u8]) {
        let queue = state.queues.get(usize::from(state.queue_select));
        let half = |value: u64, select: u32| match select {
            0 => value & 0xFFFF_FFFF,
            1 => value >> 32,
            _ => 0,
        };
        let of_queue = |field: fn(&Queue) -> u64| queue.map_or(0, field);
        let value = match offset {
            0 => u64::from(state.features_select),
            4 => half(state.device.features(), state.features_select),
            8 => u64::from(state.driver_features_select),
            12 => half(state.driver_features, state.driver_features_select),
            16 => u64::from(state.config_vector),
            18 => state.queues.len() as u64,
            20 if self.news.needs_reset.load(Ordering::SeqCst) => {
                u64::from(state.status | STATUS_NEEDS_RESET)
            }
            20 => u64::from(state.status),
            21 => u64::from(self.news.generation.load(Ordering::SeqCst)),
            22 => u64::from(state.queue_select),
            24 => of_queue(|queue| u64::from(queue.size)),
            26 => queue.map_or(u64::from(NO_VECTOR), |queue| u64::from(queue.vector)),
            28 => of_queue(|queue| u64::from(queue.is_enabled)),
            30 => u64::from(state.queue_select),
            32 => of_queue(|queue| queue.descriptors),
            36 => of_queue(|queue| queue.descriptors >> 32),
            40 => of_queue(|queue| queue.available),
            44 => of_queue(|queue| queue.available >> 32),
            48 => of_queue(|queue| queue.used),
            52 => of_queue(|queue| queue.used >> 32),
            56 => u64::from(state.queue_select),
            _ => 0,
        };
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        let length = data.len().min(8);
        bytes[..length].copy_from_slice(&data[..length]);
        let value = u64::from_le_bytes(bytes);
        let [byte, second, third, fourth, ..] = bytes;
        let (word, short) =
            (u32::from_le_bytes([byte, second, third, fourth]), u16::from_le_bytes([byte, second]));
        match (offset, data.len()) {
            (0, 4) => state.features_select = word,
            (8, 4) => state.driver_features_select = word,
            (12, 4) if state.status & STATUS_FEATURES_OK == 0 => {
                put_half(&mut state.driver_features, state.driver_features_select, word);
            }
            (16, 2) => {
                state.config_vector = known_vector(state, short);
                self.choose_event(state);
            }
            (20, 1) => self.write_status(state, byte),
            (22, 2) => state.queue_select = short,
            (58, 2) if short == 1 => Self::reset_queue(state),
            (24.., _) => self.write_queue(state, offset, data.len(), (short, word, value)),
            _ => {}
        }
    }

    /// `values` are what was written, as two, four and eight bytes.
    fn write_queue(&self, state: &mut State, offset: u64, length: usize, values: (u16, u32, u64)) {
        let (short, word, value) = values;
        if (offset, length) == (26, 2) {
            let vector = known_vector(state, short);
            if let Some(queue) = state.queues.get_mut(usize::from(state.queue_select)) {
                queue.vector = vector;
            }
            return;
        }
        // What was said of a queue holds once it is enabled, and behind the driver's start.
        let is_running = state.status & STATUS_DRIVER_OK != 0;
        let Some(queue) = state.queues.get_mut(usize::from(state.queue_select)) else { return };
        if queue.is_enabled || is_running && !queue.was_reset {
            return;
        }
        match (offset, length) {
            (24, 2) if short.is_power_of_two() && short <= queue.max_size => queue.size = short,
            (28, 2) if short == 1 => {
                (queue.is_enabled, queue.was_reset) = (true, false);
                if is_running {
                    self.news.told(self.restart_queue(state));
                }
            }
            (32, 4) => put_half(&mut queue.descriptors, 0, word),
            (36, 4) => put_half(&mut queue.descriptors, 1, word),
            (40, 4) => put_half(&mut queue.available, 0, word),
            (44, 4) => put_half(&mut queue.available, 1, word),
            (48, 4) => put_half(&mut queue.used, 0, word),
            (52, 4) => put_half(&mut queue.used, 1, word),
            (32, 8) => queue.descriptors = value,
            (40, 8) => queue.available = value,
            (48, 8) => queue.used = value,
            _ => {}
        }
    }

    /// Resets the selected queue where the driver may ask for that (section 2.6.1); it is done before this returns.
    fn reset_queue(state: &mut State) {
        let needed = STATUS_DRIVER_OK | STATUS_FEATURES_OK;
        let may = state.status & needed == needed && state.driver_features & FEATURE_RING_RESET != 0;
        let queue = state.queues.get_mut(usize::from(state.queue_select)).filter(|queue| queue.is_enabled);
        if let (true, Some(queue), Some(device)) = (may, queue, state.device.queue_reset()) {
            device.stop_queue(state.queue_select);
            queue.reset();
            queue.was_reset = true;
        }
    }

    /// Starts the selected queue, which was reset.
    fn restart_queue(&self, state: &mut State) -> Result<()> {
        let setup = state.setup(state.queue_select)?;
        match (state.device.queue_reset(), setup) {
            (Some(device), Some(setup)) => {
                device.start_queue(&self.slot.memory, state.driver_features, setup)
            }
            _ => Ok(()),
        }
    }

    /// A driver that runs is told of changes by the vector that it gave.
    fn choose_event(&self, state: &State) {
        let vector = state.msix.vector(state.config_vector).filter(|_| state.status & STATUS_DRIVER_OK != 0);
        self.news.set_event(vector.map(|vector| Arc::clone(vector.event())));
    }

    fn write_status(&self, state: &mut State, status: u8) {
        if status == 0 {
            self.news.set_event(None);
            state.device.reset();
            state.queues.iter_mut().for_each(Queue::reset);
            state.status = 0;
            state.driver_features = 0;
            state.config_vector = NO_VECTOR;
            self.news.needs_reset.store(false, Ordering::SeqCst);
            self.news.isr.store(0, Ordering::SeqCst);
            return;
        }
        let news = status & !state.status;
        state.status |= status & !STATUS_NEEDS_RESET;
        if news & STATUS_FEATURES_OK != 0 {
            let unknown = state.driver_features & !state.device.features();
            if unknown != 0 || state.driver_features & FEATURE_VERSION_1 == 0 {
                state.status &= !STATUS_FEATURES_OK;
            }
        }
        if news & STATUS_DRIVER_OK != 0 {
            self.choose_event(state);
        }
        if news & STATUS_DRIVER_OK != 0 && state.status & STATUS_FEATURES_OK != 0 {
            self.news.told(self.activate(state));
        }
    }

    fn activate(&self, state: &mut State) -> Result<()> {
        let mut setups = Vec::new();
        for index in (0u16..).take(state.queues.len()) {
            setups.extend(state.setup(index)?);
        }
        state.device.activate(&self.slot.memory, state.driver_features, setups)
    }

    fn access(&self, state: &mut State, offset: u64, access: Access<'_>) {
        let inside = |range: &Range<u64>| range.contains(&offset);
        match access {
            Access::Read(data) => {
                data.fill(0);
                if inside(&COMMON) {
                    self.read_common(state, offset, data);
                } else if inside(&ISR) {
                    // Reading clears it.
                    data[0] = self.news.isr.swap(0, Ordering::SeqCst);
                } else if inside(&DEVICE) {
                    state.device.read_config(offset - DEVICE.start, data);
                } else if inside(&MSIX_TABLE) {
                    state.msix.read(offset - MSIX_TABLE.start, data);
                } else if inside(&MSIX_PENDING) {
                    state.msix.read_pending(offset - MSIX_PENDING.start, data);
                }
            }
            Access::Write(data) => {
                if inside(&COMMON) {
                    self.write_common(state, offset, data);
                } else if inside(&DEVICE) {
                    state.device.write_config(offset - DEVICE.start, data);
                } else if inside(&NOTIFY) {
                    // Only where the kernel's doorbell did not take it: through the window.
                    let index = (offset - NOTIFY.start) / u64::from(NOTIFY_MULTIPLIER);
                    let queue = usize::try_from(index).ok().and_then(|index| state.queues.get(index));
                    if let Some(queue) = queue {
                        // An eventfd's counter that is full is a doorbell that rings already.
                        drop(queue.kick.write(1));
                    }
                } else if inside(&MSIX_TABLE) {
                    self.news.told(state.msix.write(offset - MSIX_TABLE.start, data));
                }
            }
        }
    }

    /// An access through the window of the configuration space.
    fn window(&self, state: &mut State, access: Access<'_>) {
        let at = state.window_at;
        let word = |state: &State, at: usize| {
            u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|byte| state.space.byte(at + byte))))
        };
        let (bar, offset, length) = (state.space.byte(at + 4), word(state, at + 8), word(state, at + 12));
        let is_sound = usize::from(bar) == BAR
            && matches!(length, 1 | 2 | 4)
            && offset % length == 0
            && offset < u64::from(BAR_BYTES);
        if !is_sound {
            return;
        }
        let length = usize::try_from(length).unwrap_or(0);
        match access {
            Access::Read(data) => self.access(state, offset, Access::Read(&mut data[..length])),
            Access::Write(data) => {
                let length = length.min(data.len());
                self.access(state, offset, Access::Write(&data[..length]));
            }
        }
    }
}

enum Access<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl PciFunction for VirtioPci {
    fn read_config(&self, register: u8) -> u32 {
        let mut state = self.lock();
        if usize::from(register) == state.window_at + 16 {
            let mut data = [0; 4];
            self.window(&mut state, Access::Read(&mut data));
            return u32::from_le_bytes(data);
        }
        state.space.read(register)
    }

    fn write_config(&self, offset: u8, data: &[u8]) {
        let mut state = self.lock();
        if usize::from(offset) == state.window_at + 16 {
            self.window(&mut state, Access::Write(data));
            return;
        }
        state.space.write(offset, data);
        let at = state.msix_control_at;
        let control = u16::from_le_bytes([state.space.byte(at), state.space.byte(at + 1)]);
        let bits = control & (MSIX_ENABLE | MSIX_MASK_ALL);
        if bits != state.msix.control() {
            self.news.told(state.msix.set_control(bits));
        }
        self.news.told(self.place_doorbells(&mut state));
    }

    fn decoded(&self) -> Vec<(usize, Range<u64>)> {
        self.lock().space.decoded()
    }

    fn read_bar(&self, _: usize, offset: u64, data: &mut [u8]) {
        self.access(&mut self.lock(), offset, Access::Read(data));
    }

    fn write_bar(&self, _: usize, offset: u64, data: &[u8]) {
        self.access(&mut self.lock(), offset, Access::Write(data));
    }
}

/// Stops the device's work before the memory it works on goes.
impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.lock().device.reset();
    }
}

/// A vector that exists, or none.
fn known_vector(state: &State, vector: u16) -> u16 {
    if state.msix.vector(vector).is_some() { vector } else { NO_VECTOR }
}

fn put_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xFFFF_FFFF | u64::from(half),
        1 => *value = *value & 0xFFFF_FFFF | u64::from(half) << 32,
        _ => {}
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value).expect("inside the BAR")
}

/// A virtio structure capability behind its id and link (section 4.1.4): length, kind, BAR, offset, length, and
/// what its kind adds.
fn structure(kind: u8, range: &Range<u64>, more: &[u8]) -> Vec<u8> {
    let bar = u8::try_from(BAR).expect("one of six");
    let length = u8::try_from(16 + more.len()).expect("short");
    let mut body = vec![length, kind, bar, 0, 0, 0];
    body.extend(low(range.start).to_le_bytes());
    body.extend(low(range.end - range.start).to_le_bytes());
    body.extend(more);
    body
}
