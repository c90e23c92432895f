//! Chains of every framing and every fault, understood.

use std::sync::Arc;

use proptest::{collection::vec, prelude::*};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{
    GuestRam,
    chain::{Chain, DescriptorTable, GuestRange, MAX_INDIRECT_DESCRIPTORS, RingError, total_bytes},
    command::{Command, DiskRange, DiskShape, Parsed, Status, parse},
    config::{MAX_RANGE_SECTORS, MAX_RANGES},
    driver::{DriverQueue, F_INDIRECT, F_NEXT, F_WRITE},
    ring::RingLayout,
};

const RAM_BYTES: usize = 1 << 20;
/// Behind the rings.
const DATA: GuestAddress = GuestAddress(0x10000);
const DISK: DiskShape = DiskShape { size_bytes: 1 << 30, block_bytes: 512, read_only: false };
const SIZE: u16 = 64;

/// Guest memory in two regions with a hole between them.
fn ram() -> Arc<GuestRam> {
    let ranges = [(GuestAddress(0), RAM_BYTES), (GuestAddress(2 << 20), RAM_BYTES)];
    Arc::new(GuestRam::from_ranges(&ranges).expect("anonymous memory"))
}

fn queue(ram: &Arc<GuestRam>) -> DriverQueue {
    DriverQueue::new(Arc::clone(ram), RingLayout::packed_at(GuestAddress(0x1000), SIZE), true)
}

fn table(queue: &DriverQueue) -> DescriptorTable {
    DescriptorTable { at: queue.layout().descriptors, size: SIZE, indirect: true }
}

fn at(start: u64, len_bytes: u32) -> GuestRange {
    GuestRange { start: GuestAddress(start), len_bytes }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

struct Understood {
    chain: Chain,
    parsed: Result<Parsed, RingError>,
    ranges: Vec<DiskRange>,
}

fn understand(ram: &GuestRam, table: DescriptorTable, head: u16, disk: DiskShape) -> Understood {
    let (mut chain, mut ranges) = (Chain::default(), Vec::new());
    let parsed = chain.walk(ram, table, head).and_then(|()| parse(ram, &mut chain, disk, &mut ranges));
    Understood { chain, parsed, ranges }
}

/// A request with its readable bytes at [`DATA`] and its writable ones behind.
fn request(readable: &[u8], writable_bytes: u32, disk: DiskShape) -> Understood {
    let ram = ram();
    let mut queue = queue(&ram);
    ram.write_slice(readable, DATA).expect("inside");
    let readable_bytes = u32::try_from(readable.len()).expect("short");
    let writable = at(DATA.0 + 0x8000, writable_bytes);
    let head = queue.add(&[at(DATA.0, readable_bytes)], &[writable]).expect("an empty queue");
    understand(&ram, table(&queue), head, disk)
}

fn command(readable: &[u8], writable_bytes: u32) -> Result<Command, Status> {
    request(readable, writable_bytes, DISK).parsed.expect("a status byte").command
}

#[test]
fn every_command_is_understood() {
    assert_eq!(command(&header(0, 8), 4096 + 1), Ok(Command::In { at_bytes: 4096, len_bytes: 4096 }));
    let write = [&header(1, 2)[..], &[7; 512]].concat();
    assert_eq!(command(&write, 1), Ok(Command::Out { at_bytes: 1024, len_bytes: 512 }));
    assert_eq!(command(&header(4, 0), 1), Ok(Command::Flush));
    assert_eq!(command(&header(8, 0), 21), Ok(Command::GetId));
    assert_eq!(command(&header(99, 0), 1), Err(Status::Unsupported));
    // Secure erase and lifetime are not offered.
    assert_eq!(command(&header(14, 0), 1), Err(Status::Unsupported));
    assert_eq!(command(&header(10, 0), 7), Err(Status::Unsupported));
}

#[test]
fn many_ranges_are_discarded_or_zeroed_at_once() {
    let two = [&header(13, 0)[..], &range(8, 16, 1), &range(64, 8, 0)].concat();
    let understood = request(&two, 1, DISK);
    assert_eq!(understood.parsed.expect("a status byte").command, Ok(Command::WriteZeroes));
    assert_eq!(
        understood.ranges,
        [
            DiskRange { at_bytes: 4096, len_bytes: 8192, may_unmap: true },
            DiskRange { at_bytes: 32768, len_bytes: 4096, may_unmap: false },
        ]
    );
    let discard = [&header(11, 0)[..], &range(8, 16, 0)].concat();
    let understood = request(&discard, 1, DISK);
    assert_eq!(understood.parsed.expect("a status byte").command, Ok(Command::Discard));
    assert_eq!(understood.ranges, [DiskRange { at_bytes: 4096, len_bytes: 8192, may_unmap: true }]);
}

/// 5.2.6.2.
#[test]
fn flags_that_are_not_known_are_not_supported() {
    let discard = |flags| command(&[&header(11, 0)[..], &range(0, 1, flags)].concat(), 1);
    assert_eq!(discard(0), Ok(Command::Discard));
    assert_eq!(discard(1), Err(Status::Unsupported));
    assert_eq!(discard(2), Err(Status::Unsupported));
    let zeroes = |flags| command(&[&header(13, 0)[..], &range(0, 1, flags)].concat(), 1);
    assert_eq!(zeroes(1), Ok(Command::WriteZeroes));
    assert_eq!(zeroes(1 << 31), Err(Status::Unsupported));
}

#[test]
fn ranges_beyond_the_limits_fail_as_a_whole() {
    let zeroes = |ranges: &[[u8; 16]]| command(&[&header(13, 0)[..], &ranges.concat()].concat(), 1);
    assert_eq!(zeroes(&[]), Err(Status::IoError));
    assert_eq!(zeroes(&[range(0, MAX_RANGE_SECTORS, 0)]), Ok(Command::WriteZeroes));
    assert_eq!(zeroes(&[range(0, MAX_RANGE_SECTORS + 1, 0)]), Err(Status::IoError));
    assert_eq!(zeroes(&[range(0, 1, 0), range((1 << 21) - 1, 2, 0)]), Err(Status::IoError));
    assert_eq!(zeroes(&[range(u64::MAX, 1, 0)]), Err(Status::IoError));
    let most = usize::try_from(MAX_RANGES).expect("small");
    assert_eq!(zeroes(&vec![range(0, 1, 0); most]), Ok(Command::WriteZeroes));
    assert_eq!(zeroes(&vec![range(0, 1, 0); most + 1]), Err(Status::IoError));
    let cut = [&header(13, 0)[..], &range(0, 1, 0)[..15]].concat();
    assert_eq!(command(&cut, 1), Err(Status::IoError));
}

#[test]
fn sectors_outside_the_disk_and_parts_of_sectors_fail() {
    let last = DISK.size_bytes / 512 - 1;
    assert!(command(&header(0, last), 513).is_ok());
    assert_eq!(command(&header(0, last), 1025), Err(Status::IoError));
    assert_eq!(command(&header(0, last + 1), 513), Err(Status::IoError));
    assert_eq!(command(&header(0, u64::MAX), 513), Err(Status::IoError));
    assert_eq!(command(&header(0, u64::MAX / 512), 513), Err(Status::IoError));
    assert_eq!(command(&header(0, 0), 512), Err(Status::IoError), "511 bytes of data");
    // A disk of 1.5 sectors has one.
    let odd = DiskShape { size_bytes: 768, ..DISK };
    assert!(request(&header(0, 0), 513, odd).parsed.expect("a status byte").command.is_ok());
    assert!(request(&header(0, 0), 1025, odd).parsed.expect("a status byte").command.is_err());
    // Blocks of 4 KiB.
    let large = DiskShape { block_bytes: 4096, ..DISK };
    assert!(request(&header(0, 8), 4097, large).parsed.expect("a status byte").command.is_ok());
    assert!(request(&header(0, 1), 4097, large).parsed.expect("a status byte").command.is_err());
    assert!(request(&header(0, 8), 513, large).parsed.expect("a status byte").command.is_err());
}

/// 5.2.6.2: a write to a read-only device fails.
#[test]
fn nothing_is_written_to_a_read_only_disk() {
    let read_only = DiskShape { read_only: true, ..DISK };
    let write = [&header(1, 0)[..], &[1; 512]].concat();
    let zeroes = [&header(13, 0)[..], &range(0, 1, 0)].concat();
    let discard = [&header(11, 0)[..], &range(0, 1, 0)].concat();
    for bytes in [write, zeroes, discard] {
        let parsed = request(&bytes, 1, read_only).parsed.expect("a status byte");
        assert_eq!(parsed.command, Err(Status::IoError));
    }
    assert!(request(&header(0, 0), 513, read_only).parsed.expect("a status byte").command.is_ok());
}

#[test]
fn memory_of_the_wrong_direction_fails() {
    // Data of a read that the device may only read.
    let read = [&header(0, 0)[..], &[0; 512]].concat();
    assert_eq!(command(&read, 1), Err(Status::IoError));
    // Data of a write that the device may only write.
    assert_eq!(command(&header(1, 0), 513), Err(Status::IoError));
    // A header of less than its size.
    assert_eq!(command(&header(0, 0)[..15], 513), Err(Status::IoError));
    // Readable memory behind writable memory (2.7.4.2).
    let ram = ram();
    let queue = queue(&ram);
    ram.write_slice(&header(0, 0), DATA).expect("inside");
    queue.write_descriptor(0, Descriptor::new(DATA.0 + 64, 513, F_NEXT | F_WRITE, 1));
    queue.write_descriptor(1, Descriptor::new(DATA.0, 16, 0, 0));
    let parsed = understand(&ram, table(&queue), 0, DISK).parsed.expect("a status byte");
    assert_eq!(parsed, Parsed { status_at: GuestAddress(DATA.0 + 64 + 512), command: Err(Status::IoError) });
}

#[test]
fn a_request_without_a_place_for_its_answer_breaks_the_queue() {
    let ram = ram();
    let mut queue = queue(&ram);
    let no_writable = queue.add(&[at(DATA.0, 16)], &[]).expect("room");
    let outside = queue.add(&[at(DATA.0, 16)], &[at(0x18_0000, 1)]).expect("room");
    let across = queue.add(&[at(DATA.0, 16)], &[at(RAM_BYTES as u64 - 16, 513)]).expect("room");
    let wrapping = queue.add(&[at(DATA.0, 16)], &[at(u64::MAX, 513)]).expect("room");
    for head in [no_writable, outside, across, wrapping] {
        assert_eq!(understand(&ram, table(&queue), head, DISK).parsed, Err(RingError::NoStatus), "{head}");
    }
}

#[test]
fn a_header_outside_memory_is_answered() {
    let ram = ram();
    let mut queue = queue(&ram);
    let head = queue.add(&[at(RAM_BYTES as u64 - 8, 16)], &[at(DATA.0, 513)]).expect("room");
    let parsed = understand(&ram, table(&queue), head, DISK).parsed.expect("a status byte");
    assert_eq!(parsed.command, Err(Status::IoError));
}

#[test]
fn chains_that_go_astray_break_the_queue() {
    let ram = ram();
    let queue = queue(&ram);
    let walk = |head| Chain::default().walk(&ram, table(&queue), head);
    assert_eq!(walk(SIZE), Err(RingError::Head { head: SIZE, size: SIZE }));
    assert_eq!(walk(u16::MAX), Err(RingError::Head { head: u16::MAX, size: SIZE }));
    queue.write_descriptor(0, Descriptor::new(DATA.0, 16, F_NEXT, 0));
    assert_eq!(walk(0), Err(RingError::Loop), "a descriptor that is its own next");
    queue.write_descriptor(0, Descriptor::new(DATA.0, 16, F_NEXT, 1));
    queue.write_descriptor(1, Descriptor::new(DATA.0, 0, F_NEXT, 0));
    assert_eq!(walk(0), Err(RingError::Loop), "empty descriptors count");
    queue.write_descriptor(1, Descriptor::new(DATA.0, 1, F_NEXT | F_WRITE, SIZE));
    assert_eq!(walk(0), Err(RingError::Next(SIZE)));
    let indirect = |len, flags| queue.write_descriptor(0, Descriptor::new(DATA.0, len, flags, 1));
    indirect(32, F_INDIRECT | F_NEXT);
    assert_eq!(walk(0), Err(RingError::Indirect));
    for len in [0, 8, 24, 16 * (MAX_INDIRECT_DESCRIPTORS + 1), u32::MAX] {
        indirect(len, F_INDIRECT);
        assert_eq!(walk(0), Err(RingError::IndirectSize(len)));
    }
    indirect(32, F_INDIRECT);
    ram.write_obj(Descriptor::new(DATA.0, 32, F_INDIRECT, 0), DATA).expect("inside");
    assert_eq!(walk(0), Err(RingError::Indirect), "a table within a table");
    let without = DescriptorTable { indirect: false, ..table(&queue) };
    assert_eq!(Chain::default().walk(&ram, without, 0), Err(RingError::Indirect), "not negotiated");
    queue.write_descriptor(0, Descriptor::new(u64::MAX - 15, 16, F_INDIRECT, 0));
    assert_eq!(walk(0), Err(RingError::TableOutside(u64::MAX - 15)));
    queue.write_descriptor(0, Descriptor::new(RAM_BYTES as u64 - 8, 32, F_INDIRECT, 0));
    assert_eq!(walk(0), Err(RingError::TableOutside(RAM_BYTES as u64 - 8)));
}

/// Lengths that add up to 2^32 and more are numbers like others: past the end of this disk.
#[test]
fn lengths_beyond_32_bits_do_not_wrap() {
    let ram = ram();
    let mut queue = queue(&ram);
    ram.write_slice(&header(0, 0), DATA).expect("inside");
    let whole = u32::MAX - 511;
    let writable = [at(DATA.0, whole), at(DATA.0, whole), at(DATA.0, 1024), at(DATA.0, 1)];
    let head = queue.add(&[at(DATA.0, 16)], &writable).expect("room");
    let understood = understand(&ram, table(&queue), head, DISK);
    assert_eq!(understood.parsed.expect("a status byte").command, Err(Status::IoError));
    assert_eq!(total_bytes(&understood.chain.writable), 2 * u64::from(whole) + 1024);
}

/// Cuts `total` bytes at `cuts`, each piece a range somewhere in memory.
fn pieces(start: u64, total: u32, cuts: &[u32]) -> Vec<GuestRange> {
    let mut ends: Vec<u32> = cuts.iter().map(|cut| cut % (total + 1)).chain([total]).collect();
    ends.sort_unstable();
    let mut from = 0;
    let mut pieces = Vec::new();
    for end in ends {
        if end > from {
            pieces.push(at(start + u64::from(from), end - from));
            from = end;
        }
    }
    pieces
}

proptest! {
    /// 2.7.4: wherever a driver cuts a request, it is the same request.
    #[test]
    fn framing_does_not_matter(
        readable_cuts in vec(any::<u32>(), 0..8),
        writable_cuts in vec(any::<u32>(), 0..8),
        kind in prop_oneof![Just(0u32), Just(1), Just(13)],
        indirect: bool,
    ) {
        let ram = ram();
        let mut queue = queue(&ram);
        let (readable, writable_bytes) = match kind {
            0 => (header(0, 5).to_vec(), 2048 + 1),
            1 => ([&header(1, 5)[..], &[3; 2048]].concat(), 1),
            _ => ([&header(13, 0)[..], &range(9, 3, 1), &range(1, 2, 0)].concat(), 1),
        };
        ram.write_slice(&readable, DATA).expect("inside");
        let readable_bytes = u32::try_from(readable.len()).expect("short");
        let readable_pieces = pieces(DATA.0, readable_bytes, &readable_cuts);
        let writable_pieces = pieces(DATA.0 + 0x8000, writable_bytes, &writable_cuts);
        let head = if indirect {
            queue.add_indirect(GuestAddress(0x8000), &readable_pieces, &writable_pieces)
        } else {
            queue.add(&readable_pieces, &writable_pieces)
        };
        let understood = understand(&ram, table(&queue), head.expect("room"), DISK);
        let parsed = understood.parsed.expect("a status byte");
        prop_assert_eq!(parsed.status_at, GuestAddress(DATA.0 + 0x8000 + u64::from(writable_bytes) - 1));
        match kind {
            0 => {
                prop_assert_eq!(parsed.command, Ok(Command::In { at_bytes: 2560, len_bytes: 2048 }));
                prop_assert_eq!(understood.chain.writable[0].start.0, DATA.0 + 0x8000);
            }
            1 => {
                prop_assert_eq!(parsed.command, Ok(Command::Out { at_bytes: 2560, len_bytes: 2048 }));
                prop_assert_eq!(understood.chain.readable[0].start.0, DATA.0 + 16);
            }
            _ => {
                prop_assert_eq!(parsed.command, Ok(Command::WriteZeroes));
                prop_assert_eq!(understood.ranges.len(), 2);
            }
        }
    }

    /// Whatever the memory holds, walking it ends, and what a command would move is inside the disk.
    #[test]
    fn hostile_memory_is_understood_or_refused(
        bytes in vec(any::<u8>(), 0..4096),
        small in vec((0u64..0x2000, 0u32..2048, 0u16..8, 0u16..SIZE), 0..64),
        head in any::<u16>(),
    ) {
        let ram = ram();
        let queue = queue(&ram);
        ram.write_slice(&bytes, queue.layout().descriptors).expect("inside");
        for (index, (start, len_bytes, flags, next)) in (0u16..).zip(small) {
            queue.write_descriptor(index, Descriptor::new(start, len_bytes, flags, next));
        }
        for head in [head % SIZE, head, 0, 1] {
            let understood = understand(&ram, table(&queue), head, DISK);
            let Ok(Parsed { status_at, command }) = understood.parsed else { continue };
            prop_assert!(ram.address_in_range(status_at));
            let places: Vec<(u64, u64)> = match command {
                Ok(Command::In { at_bytes, len_bytes } | Command::Out { at_bytes, len_bytes }) => {
                    vec![(at_bytes, len_bytes)]
                }
                Ok(Command::Discard | Command::WriteZeroes) => {
                    understood.ranges.iter().map(|range| (range.at_bytes, range.len_bytes)).collect()
                }
                _ => Vec::new(),
            };
            for (at_bytes, len_bytes) in places {
                prop_assert!(at_bytes.checked_add(len_bytes).is_some_and(|end| end <= DISK.size_bytes));
                prop_assert_eq!((at_bytes | len_bytes) % 512, 0);
            }
        }
    }
}
