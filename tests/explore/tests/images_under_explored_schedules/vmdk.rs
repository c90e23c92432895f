//! What VMDK alone has: tables that are made while others write.

use std::{ops::Range, sync::Arc};

use img_core_explored::storage::MemoryStorage;

use super::harness::{self, close, explore, join, spawn, usize_of, write};

const GRAIN: u64 = 64 << 10;
/// Two tables.
const DISK_BYTES: u64 = 600 * GRAIN;
/// The first grain of the second one.
const FAR: u64 = 512 * GRAIN;

/// The little-endian word of so many bytes at `at`.
fn word(bytes: &[u8], at: Range<usize>) -> usize {
    usize_of(bytes[at].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)))
}

/// An image whose second table is to be made, and whose first one says of a grain that it stands where that will be.
fn hostile_image() -> Vec<u8> {
    let bytes = harness::create("vmdk", DISK_BYTES, &[], None);
    let first = std::slice::from_ref(&(0..GRAIN));
    let mut bytes = harness::filled("vmdk", bytes, first, 1).to_vec();
    let next_place = u32::try_from(bytes.len() / 512).expect("small");
    for directory in [48..56, 56..64] {
        let directory = word(&bytes, directory) * 512;
        let table = word(&bytes, directory..directory + 4) * 512;
        bytes[directory + 4..directory + 8].fill(0);
        bytes[table + 4..table + 8].copy_from_slice(&next_place.to_le_bytes());
    }
    bytes
}

/// Whoever learns where tables stand while one is made learns of that one too, before the guest can be let at it: an
/// entry that names the table as a grain is refused, or overwritten by the table.
#[test]
fn a_table_that_is_being_made_is_nobody_s_grain() {
    explore(300, || {
        let memory = Arc::new(MemoryStorage::from_bytes("hostile.vmdk", &hostile_image()));
        let image = harness::open("vmdk", &[], Arc::clone(&memory) as _, None);
        let threads = [
            spawn(&image, |image| write(image, 0..512, 2)),
            spawn(&image, |image| write(image, FAR..FAR + 512, 3)),
            spawn(&image, |image| {
                // Outside the file until the table is there, and the guest's at no time.
                image.write_at(&[0xee; 512], GRAIN).expect_err("no grain of the guest's");
            }),
        ];
        join(threads);
        image.write_at(&[0xee; 512], GRAIN).expect_err("a table stands there");
        close(image);
    });
}
