//! Broken QED images, one for each limit and rule of the format that a file can break alone.

use super::{Fate, Hostile};
use crate::craft::{
    CLUSTER, Crafted, DISK,
    qed::{DATA, END, L1, L2, header},
};

/// All of them.
pub(super) fn images() -> Vec<Hostile> {
    let mut all = Vec::new();
    let mut add = |name, fate, image| all.push(Hostile { format: "qed", name, image, fate });
    headers(&mut add);
    tables(&mut add);
    all
}

type Add<'a> = dyn FnMut(&'static str, Fate, Crafted) + 'a;

/// "Header": sizes, offsets, feature bits.
fn headers(add: &mut Add<'_>) {
    use Fate::{Harmless, Refused};
    use header::*;
    let new = Crafted::new_qed;

    for size in [0, 1, 2048, 4097, 6144, 128 << 20, u64::MAX] {
        add("cluster_size", Refused("cluster_size"), new().le32(CLUSTER_SIZE, size));
    }
    for size in [0, 3, 32, u64::MAX] {
        add("table_size", Refused("table_size"), new().le32(TABLE_SIZE, size));
    }
    add("tables of 64 KiB behind the end", Refused("l1_table_offset"), new().le32(TABLE_SIZE, 16));
    for size in [1 << 20, u64::MAX] {
        add("header_size", Refused("header_size"), new().le32(HEADER_SIZE, size));
    }
    add("no header at all", Refused("header_size"), new().le32(HEADER_SIZE, 0));
    add("L1 inside the header", Refused("l1_table_offset"), new().le32(HEADER_SIZE, 3));
    for offset in [0, 1, L1 as u64 + 512, 5 * CLUSTER as u64, 1 << 40, 1 << 63, u64::MAX - 4095] {
        add("l1_table_offset", Refused("l1_table_offset"), new().le64(L1_OFFSET, offset));
    }
    for size in [1, DISK as u64 + 256, (1024 * 1024 * CLUSTER as u64) + 512, 1 << 63, u64::MAX - 511] {
        add("image_size", Refused("image_size"), new().le64(IMAGE_SIZE, size));
    }
    add("the largest disk", Harmless, new().le64(IMAGE_SIZE, 1024 * 1024 * CLUSTER as u64));
    for bit in [3, 31, 63] {
        add("unknown feature", Refused("feature"), new().le64(FEATURES, 1 << bit));
    }
    add(
        "unknown compatible and autoclear bits",
        Harmless,
        new().le64(COMPAT_FEATURES, u64::MAX).le64(AUTOCLEAR_FEATURES, u64::MAX),
    );
    add("bits for a backing file that is not there", Harmless, new().le64(FEATURES, 1 | 4));
    let backing = |offset: u64, size: u64| {
        new().le64(FEATURES, 1).le32(BACKING_OFFSET, offset).le32(BACKING_SIZE, size)
    };
    for (offset, size) in [(4090, 7), (64, 4033), (u64::MAX, 1), (64, u64::MAX), (u64::MAX, u64::MAX)] {
        add("backing file name leaves the header", Refused("backing_filename"), backing(offset, size));
    }
    add("backing file name that is not text", Refused(""), backing(64, 4).put(64, b"\xff\x01\x1b["));
    add("dirty, and nothing is wrong", Harmless, new().le64(FEATURES, 2));
}

/// "Tables": entries that lead nowhere, into the header, into tables, to each other's clusters.
fn tables(add: &mut Add<'_>) {
    use Fate::{Corrupt, Unreadable};
    let new = Crafted::new_qed;
    for entry in [2, 512, L2 as u64 + 512, 4 * CLUSTER as u64 + END as u64, 1 << 50, 1 << 63, u64::MAX] {
        add("L1 entry leads nowhere", Unreadable("L1 entry"), new().le64(L1, entry));
        add("L2 entry leads nowhere", Unreadable("L2 entry"), new().le64(L2, entry));
    }
    add("L2 table ends behind the end", Unreadable("L1 entry"), new().le64(L1, DATA as u64));
    add("L1 entry names L1", Corrupt, new().le64(L1, L1 as u64));
    add("two L1 entries name one table", Corrupt, new().le64(L1 + 8, L2 as u64));
    add("two L2 tables overlap", Corrupt, new().le64(L1 + 8, 4 * CLUSTER as u64));
    add("L2 entry names L1", Corrupt, new().le64(L2, L1 as u64));
    add("L2 entry names its own table", Corrupt, new().le64(L2, L2 as u64 + CLUSTER as u64));
    add("two L2 entries name one cluster", Corrupt, new().le64(L2 + 16, DATA as u64));
    add("L2 entry behind the disk leads nowhere", Corrupt, new().le64(L2 + 8 * 500, 1 << 40));
    add("L1 entry behind the disk leads nowhere", Corrupt, new().le64(L1 + 8 * 500, 1 << 40));
    add("every table full of ones", Unreadable("L1 entry"), new().put(L1, &[0xff; 4 * CLUSTER]));
    add(
        "dirty, and a cluster has two names",
        Corrupt,
        new().le64(header::FEATURES, 2).le64(L2 + 16, DATA as u64),
    );
    add(
        "dirty, and an entry leads nowhere",
        Unreadable("L2 entry"),
        new().le64(header::FEATURES, 2).le64(L2, 1 << 40),
    );
}
