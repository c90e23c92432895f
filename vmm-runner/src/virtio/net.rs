//! The network device (section 5.1) on a TAP interface: a queue and a thread each way.
//!
//! What the driver sends goes to the interface straight from its memory. What arrives is read into one buffer of this
//! process and copied from there, as nobody knows how long a packet is before it is read: when the driver has no
//! room, it waits there. Nothing is allocated for a packet.

use std::{io, os::fd::AsFd, sync::Arc};

use blk_backend::virtio::ring::{RingLayout, UsedRing};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::{
    FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, QueueSetup, QueueThread, VirtioDevice,
    queue::{Work, borrow, rings, wait},
};
use crate::{
    Error, Result,
    machine::GuestMemory,
    tap::{HEADER_BYTES, Mac, Tap},
};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;

/// The longest packet with its header: 64 KiB, and the Ethernet header with a tag.
const PACKET_BYTES: usize = HEADER_BYTES + 18 + 65535;

/// Packets that are received before the driver is told, and before it is asked whether to stop.
const BATCH: usize = 64;

/// Where the header says what is known of the checksum.
const FLAGS_AT_BYTES: usize = 0;

/// Where the header says over how many buffers a packet is spread.
const BUFFERS_AT_BYTES: usize = 10;

// Feature bits (section 5.1.3).
const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const MRG_RXBUF: u64 = 1 << 15;

/// What the guest may leave to the host: a TAP interface takes all of it.
const FROM_GUEST: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN;

/// What the host may leave to the guest, and what says so to the interface.
const TO_GUEST: [(u64, u32); 4] = [
    (GUEST_CSUM, libc::TUN_F_CSUM),
    (GUEST_TSO4, libc::TUN_F_TSO4),
    (GUEST_TSO6, libc::TUN_F_TSO6),
    (GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// A network card.
pub struct Net {
    tap: Arc<Tap>,
    mac: Mac,
    /// Features that the interface can do.
    offloads: u64,
    receiver: Option<QueueThread>,
    sender: Option<QueueThread>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net").field("tap", &self.tap).field("mac", &self.mac).finish_non_exhaustive()
    }
}

impl Net {
    /// A card on an interface. Without an address it gets one that the interface's name makes.
    #[must_use]
    pub fn new(tap: &Arc<Tap>, mac: Option<Mac>) -> Self {
        let mut offloads = FROM_GUEST;
        let all = TO_GUEST.iter().fold(0, |flags, (_, flag)| flags | flag);
        if tap.set_offloads(all).is_ok() {
            offloads |= TO_GUEST.iter().fold(0, |features, (feature, _)| features | feature);
        }
        let mac = mac.unwrap_or_else(|| usual_mac(tap.name()));
        Self { tap: Arc::clone(tap), mac, offloads, receiver: None, sender: None }
    }
}

/// An address of the locally administered kind, the same in each run.
fn usual_mac(name: &str) -> Mac {
    // FNV-1a, 64 bits.
    let hash = name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    [0x02, a, b, c, d, e]
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        1
    }

    fn pci_class(&self) -> u32 {
        // An Ethernet controller.
        0x02_0000
    }

    fn features(&self) -> u64 {
        FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT | MAC | MRG_RXBUF | self.offloads
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(self.mac.get(from..).unwrap_or_default()) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn activate(&mut self, memory: &Arc<GuestMemory>, features: u64, queues: Vec<QueueSetup>) -> Result<()> {
        let wanted = TO_GUEST.iter().filter(|(feature, _)| features & feature != 0);
        let offloads = wanted.fold(0, |flags, (_, flag)| flags | flag);
        // One that wants large packets but no unfinished checksums is refused here (section 5.1.3.1).
        self.tap.set_offloads(offloads).map_err(Error::host("the offloads of a TAP interface"))?;
        for setup in queues {
            if setup.index == RECEIVE {
                let receiver = Receiver::new(&self.tap, memory, setup, features)?;
                self.receiver = Some(QueueThread::work("virtio-net-rx", receiver)?);
            } else {
                let tap = Arc::clone(&self.tap);
                let serve = move |chain: DescriptorChain<&GuestMemory>| {
                    send(&tap, &chain);
                    0
                };
                self.sender =
                    Some(QueueThread::start("virtio-net-tx", memory, setup, features, Box::new(serve))?);
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        (self.receiver, self.sender) = (None, None);
    }

    fn pause(&self) {
        [&self.receiver, &self.sender].into_iter().flatten().for_each(QueueThread::pause);
    }

    fn resume(&self) {
        [&self.receiver, &self.sender].into_iter().flatten().for_each(QueueThread::resume);
    }
}

/// Sends what a chain has. What is broken, or what the host does not take, is lost, as on any network.
fn send(tap: &Tap, chain: &DescriptorChain<&GuestMemory>) {
    let memory = chain.memory();
    let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; QUEUE_SIZE as usize];
    let mut count = 0;
    for descriptor in chain.clone().readable() {
        let piece = memory.get_slice(descriptor.addr(), descriptor.len() as usize);
        let (Ok(piece), Some(place)) = (piece, pieces.get_mut(count)) else { return };
        *place = libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() };
        count += 1;
    }
    // SAFETY: each piece lies in the guest's memory, which outlives the call; that the guest may write to it
    // meanwhile changes what is sent and nothing else.
    let sent = unsafe { tap.write(&pieces[..count]) };
    drop(sent);
}

/// What came of giving a packet to the driver.
enum Delivery {
    Done,
    /// There is no room for it now.
    NoRoom,
    /// The rings cannot be used.
    Broken,
}

/// The receive queue.
struct Receiver {
    tap: Arc<Tap>,
    memory: Arc<GuestMemory>,
    setup: QueueSetup,
    queue: Queue,
    used: UsedRing,
    /// A packet may be spread over several buffers.
    is_mergeable: bool,
    packet: Box<[u8; PACKET_BYTES]>,
    /// The driver takes packets whose checksum was not looked at, or is not there yet.
    takes_checksums: bool,
    /// Bytes of a packet that waits for room.
    waiting_bytes: Option<usize>,
    /// Buffers of the packet at hand, and what was written into each. Never more than the queue has.
    heads: Vec<(u16, u32)>,
}

impl Receiver {
    fn new(tap: &Arc<Tap>, memory: &Arc<GuestMemory>, setup: QueueSetup, features: u64) -> Result<Self> {
        let queue = rings(memory, &setup, features)?;
        let size = setup.size;
        let layout = RingLayout {
            size,
            descriptors: GuestAddress(setup.descriptors),
            available: GuestAddress(setup.available),
            used: GuestAddress(setup.used),
        };
        Ok(Self {
            tap: Arc::clone(tap),
            memory: Arc::clone(memory),
            setup,
            queue,
            used: UsedRing::new(layout, features & FEATURE_EVENT_IDX != 0, 0),
            is_mergeable: features & MRG_RXBUF != 0,
            packet: Box::new([0; PACKET_BYTES]),
            takes_checksums: features & GUEST_CSUM != 0,
            waiting_bytes: None,
            heads: Vec::with_capacity(usize::from(size)),
        })
    }

    /// Copies the packet into buffers of the driver, all of which it sees at once.
    fn deliver(&mut self, memory: &GuestMemory, bytes: usize) -> Delivery {
        if bytes < HEADER_BYTES {
            return Delivery::Done;
        }
        if !self.takes_checksums {
            self.packet[FLAGS_AT_BYTES] = 0;
        }
        self.heads.clear();
        let mut at = 0;
        let mut count_at = [GuestAddress(0); 2];
        while at < bytes {
            let Some(chain) = self.queue.pop_descriptor_chain(memory) else {
                self.heads.iter().for_each(|_| self.queue.go_to_previous_position());
                return Delivery::NoRoom;
            };
            let (head, before) = (chain.head_index(), at);
            let mut is_sound = true;
            for descriptor in chain.writable() {
                let (place, length) = (descriptor.addr(), (descriptor.len() as usize).min(bytes - at));
                is_sound &= memory.write_slice(&self.packet[at..at + length], place).is_ok();
                for (byte, count_at) in (BUFFERS_AT_BYTES..).zip(&mut count_at) {
                    if (at..at + length).contains(&byte) {
                        *count_at = GuestAddress(place.0.wrapping_add((byte - at) as u64));
                    }
                }
                at += length;
            }
            let written = u32::try_from(at - before).expect("at most 64 KiB");
            self.heads.push((head, written));
            // It is lost where it will never fit, as where a buffer lies outside of memory.
            let may_go_on =
                self.is_mergeable && written > 0 && self.heads.len() < usize::from(self.setup.size);
            if !is_sound || (at < bytes && !may_go_on) {
                self.heads.iter_mut().for_each(|(_, written)| *written = 0);
                return self.show(memory);
            }
        }
        let buffers = u16::try_from(self.heads.len()).expect("at most the size of the queue");
        for (at, byte) in count_at.into_iter().zip(buffers.to_le_bytes()) {
            if memory.write_obj(byte, at).is_err() {
                return Delivery::Broken;
            }
        }
        self.show(memory)
    }

    /// Gives the buffers that were taken back to the driver.
    fn show(&mut self, memory: &GuestMemory) -> Delivery {
        for (head, written) in &self.heads {
            if self.used.push(memory, *head, *written).is_err() {
                return Delivery::Broken;
            }
        }
        if self.used.show(memory).is_err() { Delivery::Broken } else { Delivery::Done }
    }
}

impl Work for Receiver {
    /// Waits for a packet, or for room for the one that waits.
    fn wait(&self, stop: &EventFd) -> bool {
        match self.waiting_bytes {
            None => wait(self.tap.as_fd(), stop),
            Some(_) => wait(borrow(&self.setup.kick), stop),
        }
    }

    /// Gives the driver what arrived. No more can be done when the rings are broken or the interface is gone.
    fn run(&mut self) -> bool {
        let memory = Arc::clone(&self.memory);
        if self.waiting_bytes.is_some() {
            // It has come. More are not of interest while there is room.
            drop(self.setup.kick.read());
            if self.queue.disable_notification(&*memory).is_err() {
                return false;
            }
        }
        for _ in 0..BATCH {
            let bytes = match self.waiting_bytes {
                Some(bytes) => bytes,
                None => match self.tap.read(&mut self.packet[..]) {
                    Ok(bytes) => bytes,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => return false,
                },
            };
            self.waiting_bytes = None;
            match self.deliver(&memory, bytes) {
                Delivery::Done => {}
                Delivery::Broken => return false,
                Delivery::NoRoom => {
                    self.waiting_bytes = Some(bytes);
                    match self.queue.enable_notification(&*memory) {
                        // Some came meanwhile.
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(_) => return false,
                    }
                }
            }
        }
        match self.used.wants_signal(&memory) {
            // A counter that is full is an interrupt that is pending already.
            Ok(true) => drop(self.setup.call.write(1)),
            Ok(false) => {}
            Err(_) => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests;
