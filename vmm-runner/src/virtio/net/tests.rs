//! A driver on one side, a socket that keeps packets apart on the other.

use std::os::fd::OwnedFd;

use blk_backend::virtio::{chain::GuestRange, driver::DriverQueue};
use rustix::{
    event::{PollFd, PollFlags, poll},
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair},
    time::Timespec,
};

use super::*;
use crate::machine::new_eventfd;

const SIZE: u16 = 16;
const BUFFERS: u64 = 64 << 10;
const RAM_BYTES: usize = 1 << 20;
/// Generous: the machine may be busy with other things.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// One queue of the driver.
struct Side {
    queue: DriverQueue,
    kick: EventFd,
    call: Arc<EventFd>,
    /// Where the next buffer goes.
    next: u64,
}

impl Side {
    fn new(memory: &Arc<GuestMemory>, index: u16, features: u64) -> (Self, QueueSetup) {
        let rings = RingLayout::packed_at(GuestAddress(u64::from(index) * 4096), SIZE);
        let queue = DriverQueue::new(Arc::clone(memory), rings, features & FEATURE_EVENT_IDX != 0);
        let (kick, call) = (new_eventfd().expect("an event"), Arc::new(new_eventfd().expect("an event")));
        let setup = QueueSetup {
            index,
            size: SIZE,
            descriptors: rings.descriptors.0,
            available: rings.available.0,
            used: rings.used.0,
            kick: kick.try_clone().expect("an event"),
            call: Arc::clone(&call),
        };
        (Self { queue, kick, call, next: BUFFERS + u64::from(index) * (256 << 10) }, setup)
    }

    fn place(&mut self, len_bytes: u32) -> GuestRange {
        let start = GuestAddress(self.next);
        self.next += u64::from(len_bytes);
        GuestRange { start, len_bytes }
    }

    fn publish(&mut self) {
        if self.queue.publish() {
            self.kick.write(1).expect("not full");
        }
    }

    /// The next chain that the device used, and how much it wrote.
    fn used(&mut self) -> (u16, u32) {
        loop {
            if let Some(used) = self.queue.pop() {
                return used;
            }
            if self.queue.enable_signal() {
                continue;
            }
            let mut fds = [PollFd::from_borrowed_fd(borrow(&self.call), PollFlags::IN)];
            assert_eq!(poll(&mut fds, Some(&PATIENCE)), Ok(1), "the device uses a chain");
            self.call.read().expect("it was signalled");
        }
    }
}

struct Bench {
    memory: Arc<GuestMemory>,
    wire: OwnedFd,
    /// What the device does with it.
    device: Net,
    receive: Side,
    transmit: Side,
}

impl Bench {
    fn new(features: u64) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).expect("memory");
        let memory = Arc::new(memory);
        let (wire, ours) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None)
                .expect("sockets");
        let mut device = Net::new(&Arc::new(Tap::over(ours)), None);
        let (receive, first) = Side::new(&memory, 0, features);
        let (transmit, second) = Side::new(&memory, 1, features);
        device.activate(&memory, features, vec![first, second]).expect("a working device");
        Self { memory, wire, device, receive, transmit }
    }

    /// A packet from the network.
    fn arrives(&self, packet: &[u8]) {
        assert_eq!(send(&self.wire, packet, SendFlags::empty()), Ok(packet.len()));
    }

    /// A packet to the network.
    fn leaves(&self) -> Vec<u8> {
        let mut fds = [PollFd::new(&self.wire, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&PATIENCE)), Ok(1), "a packet leaves");
        let mut packet = vec![0; PACKET_BYTES];
        let (length, _) = recv(&self.wire, &mut packet[..], RecvFlags::empty()).expect("a packet");
        packet.truncate(length);
        packet
    }

    fn buffer(&mut self, len_bytes: u32) -> GuestRange {
        let place = self.receive.place(len_bytes);
        self.receive.queue.add(&[], &[place]).expect("room in the table");
        place
    }

    fn read(&self, place: GuestRange, bytes: u32) -> Vec<u8> {
        let mut data = vec![0; bytes as usize];
        self.memory.read_slice(&mut data, place.start).expect("inside");
        data
    }
}

/// A header with these flags, and a body that no other length has.
fn packet(flags: u8, body_bytes: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER_BYTES];
    packet[FLAGS_AT_BYTES] = flags;
    packet.extend((0..body_bytes).map(|at| u8::try_from((at * 7 + body_bytes) % 251).expect("a byte")));
    packet
}

/// The packet as the driver must see it.
fn seen(mut packet: Vec<u8>, buffers: u16) -> Vec<u8> {
    packet[BUFFERS_AT_BYTES..HEADER_BYTES].copy_from_slice(&buffers.to_le_bytes());
    packet
}

#[test]
fn what_the_driver_sends_leaves_in_order_and_what_is_broken_is_lost() {
    for features in [FEATURE_VERSION_1, FEATURE_VERSION_1 | FEATURE_EVENT_IDX] {
        let mut bench = Bench::new(features);
        for (number, length) in [60, 1514, 60000, 1].into_iter().enumerate() {
            let sent = packet(1, length);
            let place = bench.transmit.place(u32::try_from(sent.len()).expect("short"));
            bench.memory.write_slice(&sent, place.start).expect("inside");
            // In pieces that have nothing to do with the header.
            let piece = |from: u32, to: u32| GuestRange {
                start: GuestAddress(place.start.0 + u64::from(from)),
                len_bytes: to - from,
            };
            let pieces = [piece(0, 5), piece(5, 13), piece(13, place.len_bytes)];
            bench.transmit.queue.add(&pieces[..2 + usize::from(place.len_bytes > 13)], &[]).expect("room");
            if number == 1 {
                let outside = GuestRange { start: GuestAddress(RAM_BYTES as u64 - 4), len_bytes: 100 };
                bench.transmit.queue.add(&[outside], &[]).expect("room");
                bench.transmit.queue.add(&[], &[place]).expect("room");
            }
            bench.transmit.publish();
            assert_eq!(bench.leaves(), sent);
        }
        for _ in 0..6 {
            assert_eq!(bench.transmit.used().1, 0);
        }
        bench.device.reset();
    }
}

#[test]
fn a_packet_is_spread_over_buffers_that_the_driver_sees_at_once() {
    let features = FEATURE_VERSION_1 | FEATURE_EVENT_IDX | MRG_RXBUF | GUEST_CSUM;
    let mut bench = Bench::new(features);
    let places: Vec<_> = (0..6).map(|_| bench.buffer(1536)).collect();
    bench.receive.publish();
    let (small, large) = (packet(2, 60), packet(1, 5000));
    bench.arrives(&small);
    let (_, written) = bench.receive.used();
    assert_eq!(bench.read(places[0], written), seen(small, 1));
    bench.arrives(&large);
    let mut found = Vec::new();
    for place in &places[1..5] {
        // After the first the others are there.
        let (_, written) =
            if found.is_empty() { bench.receive.used() } else { bench.receive.queue.pop().expect("at once") };
        found.extend(bench.read(*place, written));
    }
    assert_eq!(found, seen(large, 4));
    assert_eq!(bench.receive.queue.pop(), None);
}

#[test]
fn a_packet_waits_for_room() {
    for features in [MRG_RXBUF, MRG_RXBUF | FEATURE_EVENT_IDX] {
        let mut bench = Bench::new(FEATURE_VERSION_1 | features);
        let first = bench.buffer(1000);
        bench.receive.publish();
        let (large, next) = (packet(1, 2500), packet(0, 100));
        bench.arrives(&large);
        bench.arrives(&next);
        let places = [first, bench.buffer(1000), bench.buffer(1000), bench.buffer(1000)];
        bench.receive.publish();
        let mut found = Vec::new();
        for place in places {
            let (_, written) = bench.receive.used();
            found.push(bench.read(place, written));
        }
        let last = found.pop().expect("four");
        // Without GUEST_CSUM nothing is said of checksums.
        let mut large = seen(large, 3);
        large[FLAGS_AT_BYTES] = 0;
        assert_eq!((found.concat(), last), (large, seen(next, 1)));
    }
}

#[test]
fn what_never_fits_is_lost_and_the_next_packet_comes() {
    for features in [0, MRG_RXBUF] {
        let mut bench = Bench::new(FEATURE_VERSION_1 | features);
        let tiny = if features == 0 { 1 } else { SIZE };
        // Not large enough, all of them together; outside of memory; to be read; and one that is right.
        for _ in 0..tiny {
            bench.buffer(40);
        }
        bench.receive.publish();
        bench.arrives(&packet(0, 2000));
        for _ in 0..tiny {
            assert_eq!(bench.receive.used().1, 0);
        }
        let outside = GuestRange { start: GuestAddress(RAM_BYTES as u64 - 4), len_bytes: 2000 };
        bench.receive.queue.add(&[], &[outside]).expect("room");
        let place = bench.receive.place(2000);
        bench.receive.queue.add(&[place], &[]).expect("room");
        let place = bench.buffer(2000);
        bench.receive.publish();
        for _ in 0..2 {
            bench.arrives(&packet(0, 100));
            assert_eq!(bench.receive.used().1, 0);
        }
        bench.arrives(&[1, 2, 3]);
        bench.arrives(&packet(0, 100));
        let (_, written) = bench.receive.used();
        assert_eq!(bench.read(place, written), seen(packet(0, 100), 1));
    }
}

#[test]
fn a_card_tells_its_address_and_what_the_interface_can_do() {
    let (_wire, ours) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).expect("sockets");
    let tap = Arc::new(Tap::over(ours));
    let mac = [0x52, 0x54, 0, 1, 2, 3];
    let net = Net::new(&tap, Some(mac));
    let mut found = [0xEE; 8];
    net.read_config(0, &mut found);
    assert_eq!(found[..6], mac);
    net.read_config(u64::MAX, &mut found);
    assert_ne!(net.features() & GUEST_TSO4, 0);
    let usual = usual_mac("tap0");
    assert_eq!((usual[0], usual == usual_mac("tap0"), usual == usual_mac("tap1")), (2, true, false));
}
