//! Broken images, one for each limit and rule of their format that a file can break alone: qcow2 here, others
//! in rooms of their own.

mod qed;

use crate::craft::{
    CLUSTER, COMPRESSED, COPIED, Crafted, DATA, DISK, L1, L2, REFCOUNT_TABLE, header, snapshot_entry,
};

const CLUSTER_U32: u32 = 4096;
const _: () = assert!(CLUSTER_U32 as usize == CLUSTER);

/// What must come of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Opening for reading is refused with a message that holds these words.
    Refused(&'static str),
    /// It opens, and reading guest cluster 0 is refused with a message that holds these words.
    Unreadable(&'static str),
    /// It reads; its audit finds corruption.
    Corrupt,
    /// It reads and nothing more is promised, but that nothing breaks.
    Harmless,
}

/// Images that the reference opens and this build refuses, or the other way round, on purpose; the reasons are
/// in `docs/DIFFERENCES.md`.
pub const ANSWERED_DIFFERENTLY: &[&str] = &[
    "backing format is not text",
    "L1 entry behind the end",
    "snapshot L1 too big",
    "snapshot L1 offset",
    "65536 snapshots in a hole",
    "no header at all",
    "dirty, and a cluster has two names",
    "L1 entry names L1",
    "two L1 entries name one table",
    "two L2 tables overlap",
];

/// A broken image.
#[derive(Clone, Debug)]
pub struct Hostile {
    /// The format that it claims to have.
    pub format: &'static str,
    /// What is wrong with it, short.
    pub name: &'static str,
    /// The file.
    pub image: Crafted,
    /// What must come of it.
    pub fate: Fate,
}

/// All of them.
#[must_use]
pub fn images() -> Vec<Hostile> {
    let mut all = Vec::new();
    let mut add = |name, fate, image| all.push(Hostile { format: "qcow2", name, image, fate });
    headers(&mut add);
    extensions(&mut add);
    snapshots(&mut add);
    tables(&mut add);
    clusters(&mut add);
    all.extend(qed::images());
    all
}

type Add<'a> = dyn FnMut(&'static str, Fate, Crafted) + 'a;

/// "Header": versions, sizes, offsets.
fn headers(add: &mut Add<'_>) {
    use Fate::{Harmless, Refused};
    use header::*;
    let new = Crafted::new;
    let end = 6 * CLUSTER as u64;

    for version in [0, 1, 4, u32::MAX] {
        add("version", Refused("version"), new().u32(VERSION, version));
    }
    for bits in [0, 8, 22, 31, 32, 63, 64, u32::MAX] {
        add("cluster_bits", Refused("cluster_bits"), new().u32(CLUSTER_BITS, bits));
    }
    add("extended L2 with 4 KiB clusters", Refused("cluster"), new().u64(INCOMPATIBLE, 1 << 4));
    for length in [0, 72, 103, CLUSTER_U32 + 8, u32::MAX] {
        add("header_length", Refused("header_length"), new().u32(HEADER_LENGTH, length));
    }
    for order in [7, 32, 64, u32::MAX] {
        add("refcount_order", Refused("refcount_order"), new().u32(REFCOUNT_ORDER, order));
    }
    add("encryption method unknown", Refused("encrypt"), new().u32(CRYPT_METHOD, 3));

    add(
        "backing_file_offset",
        Refused("backing_file"),
        new().u64(BACKING_OFFSET, CLUSTER as u64 + 1).u32(BACKING_SIZE, 4),
    );
    add(
        "backing_file_offset overflows",
        Refused("backing_file"),
        new().u64(BACKING_OFFSET, u64::MAX).u32(BACKING_SIZE, 4),
    );
    for size in [1024, u32::MAX] {
        add(
            "backing_file_size",
            Refused("backing_file_size"),
            new().u64(BACKING_OFFSET, 1024).u32(BACKING_SIZE, size),
        );
    }
    add(
        "backing file name leaves the header cluster",
        Refused("backing_file_size"),
        new().u64(BACKING_OFFSET, CLUSTER as u64 - 8).u32(BACKING_SIZE, 9),
    );

    add("refcount table missing", Refused("refcount_table"), new().u32(REFCOUNT_TABLE_CLUSTERS, 0));
    for clusters in [(8 << 20) / CLUSTER_U32 + 1, u32::MAX] {
        add(
            "refcount table too big",
            Refused("refcount_table_clusters"),
            new().u32(REFCOUNT_TABLE_CLUSTERS, clusters),
        );
    }
    for offset in [REFCOUNT_TABLE as u64 + 512, u64::MAX, 1 << 63] {
        add(
            "refcount table offset",
            Refused("refcount_table_offset"),
            new().u64(REFCOUNT_TABLE_OFFSET, offset),
        );
    }
    for entries in [0, (32 << 20) / 8 + 1, u32::MAX] {
        add("l1_size", Refused("l1_size"), new().u32(L1_SIZE, entries));
    }
    for offset in [L1 as u64 + 8, u64::MAX, 1 << 63] {
        add("l1_table_offset", Refused("l1_table_offset"), new().u64(L1_OFFSET, offset));
    }
    add("the disk is bigger than its L1 table", Refused("l1_size"), new().u64(SIZE, 1 << 40));
    for size in [1 << 63, u64::MAX] {
        add("size", Refused("size"), new().u64(SIZE, size));
    }
    add(
        "a table of the largest size behind the end",
        Harmless,
        new().u32(L1_SIZE, (32 << 20) / 8).u64(L1_OFFSET, end),
    );

    add("unknown incompatible bit", Refused("feature"), new().u64(INCOMPATIBLE, 1 << 63));
    add("all incompatible bits", Refused(""), new().u64(INCOMPATIBLE, u64::MAX));
    add("compression bit without type", Refused("compression"), new().u64(INCOMPATIBLE, 1 << 3));
    add("compression type without bit", Refused("compression"), new().put(COMPRESSION_TYPE, &[1]));
    add(
        "unknown compression type",
        Refused("compression"),
        new().u64(INCOMPATIBLE, 1 << 3).put(COMPRESSION_TYPE, &[2]),
    );
    add(
        "unknown compatible and autoclear bits",
        Harmless,
        new().u64(COMPATIBLE, u64::MAX).u64(AUTOCLEAR, u64::MAX << 8),
    );
    add("data file without a name", Refused("data-file"), new().u64(INCOMPATIBLE, 1 << 2));
}

/// "Header extensions": lengths that lie.
fn extensions(add: &mut Add<'_>) {
    use Fate::{Harmless, Refused};
    let new = Crafted::new;
    for len in [CLUSTER_U32, u32::MAX, u32::MAX - 7] {
        add(
            "unknown extension leaves the header cluster",
            Refused("extension"),
            new().extension(0x1234_5678, len, b""),
        );
    }
    add("unknown extension", Harmless, new().extension(0x1234_5678, 8, b"whatever"));
    add("backing format name too long", Refused("format"), new().extension(0xe279_2aca, 2000, b"raw"));
    add("backing format is not text", Refused("format"), new().extension(0xe279_2aca, 3, b"\xff\xfe\xfd"));
    add("encryption extension size", Refused(""), new().extension(0x0537_be77, 15, &[0; 16]));
    add("feature table cut short", Harmless, new().extension(0x6803_f857, 47, &[0; 48]));

    let bitmaps = |count: u32, directory_bytes: u64, offset: u64| {
        let data = [&count.to_be_bytes()[..], &[0; 4], &directory_bytes.to_be_bytes(), &offset.to_be_bytes()]
            .concat();
        new().extension(0x2385_2875, 24, &data).u64(header::AUTOCLEAR, 1)
    };
    add(
        "bitmap extension size",
        Refused("bitmap"),
        new().extension(0x2385_2875, 23, &[0; 24]).u64(header::AUTOCLEAR, 1),
    );
    add("no bitmaps", Refused("bitmap"), bitmaps(0, 32, DATA as u64));
    add("too many bitmaps", Refused("bitmap"), bitmaps(65536, 32, DATA as u64));
    add("bitmap directory too big", Refused("bitmap"), bitmaps(1, 1024 * 65535 + 1, DATA as u64));
    add("bitmap directory overflows", Refused("bitmap"), bitmaps(1, u64::MAX, DATA as u64));
    add("bitmap directory offset", Refused("bitmap"), bitmaps(1, 32, DATA as u64 + 1));
    add("bitmap directory is noise", Refused("bitmap"), bitmaps(1, 4096, DATA as u64));
    add("bitmap directory behind the end", Refused("bitmap"), bitmaps(65535, 1 << 20, 1 << 40));
}

/// "Snapshots": counts, lengths, tables.
fn snapshots(add: &mut Add<'_>) {
    use Fate::{Harmless, Refused};
    use header::{SNAPSHOT_COUNT, SNAPSHOTS_OFFSET};
    let new = Crafted::new;
    let table = 6 * CLUSTER;
    let with =
        |entry: &[u8]| new().put(table, entry).u32(SNAPSHOT_COUNT, 1).u64(SNAPSHOTS_OFFSET, table as u64);

    for count in [65537, u32::MAX] {
        add(
            "too many snapshots",
            Refused("snapshot"),
            new().u32(SNAPSHOT_COUNT, count).u64(SNAPSHOTS_OFFSET, DATA as u64),
        );
    }
    for offset in [DATA as u64 + 1, u64::MAX, 1 << 63] {
        add(
            "snapshots_offset",
            Refused("snapshots_offset"),
            new().u32(SNAPSHOT_COUNT, 1).u64(SNAPSHOTS_OFFSET, offset),
        );
    }
    add("extra data too long", Refused("extra data"), with(&snapshot_entry(L1 as u64, 1, 1025, b"1", b"a")));
    add(
        "extra data of 4 GiB",
        Refused("extra data"),
        with(&snapshot_entry(L1 as u64, 1, u32::MAX, b"1", b"a")),
    );
    add(
        "snapshot L1 too big",
        Harmless,
        with(&snapshot_entry(L1 as u64, (32 << 20) / 8 + 1, 16, b"1", b"a")),
    );
    add("snapshot L1 offset", Harmless, with(&snapshot_entry(L1 as u64 + 8, 1, 16, b"1", b"a")));
    add("snapshot L1 behind the end", Harmless, with(&snapshot_entry(1 << 50, 1 << 22, 16, b"1", b"a")));
    add("snapshot table is all ones", Refused("extra data"), with(&[0xff; 4096]));
    add(
        "65536 snapshots in a hole",
        Refused("snapshot table"),
        new().u32(SNAPSHOT_COUNT, 65536).u64(SNAPSHOTS_OFFSET, 1 << 20),
    );
    add("snapshot without name or id", Harmless, with(&snapshot_entry(L1 as u64, 1, 16, b"", b"")));
    add(
        "snapshot name is not text",
        Harmless,
        with(&snapshot_entry(L1 as u64, 1, 16, b"1", b"\xff\0\n\x1b[31m")),
    );
}

/// Reserved bits and foreign places in L1, L2 and refcount tables.
fn tables(add: &mut Add<'_>) {
    use Fate::{Corrupt, Harmless, Unreadable};
    let new = Crafted::new;
    add("L1 entry reserved bits", Harmless, new().u64(L1, COPIED | L2 as u64 | 1));
    add("L1 entry not at a cluster", Unreadable("L1"), new().u64(L1, COPIED | (L2 as u64 + 512)));
    add("L1 entry behind the end", Harmless, new().u64(L1, COPIED | 1 << 50));
    add("L1 entry points at the header", Harmless, new().u64(L1, COPIED));
    add("L1 entry points at the L1 table", Harmless, new().u64(L1, COPIED | L1 as u64));
    add("L2 entry reserved bits", Corrupt, new().u64(L2, COPIED | DATA as u64 | 1 << 1));
    add("L2 entry not at a cluster", Unreadable("L2"), new().u64(L2, COPIED | (DATA as u64 + 512)));
    add("L2 entry behind the end", Corrupt, new().u64(L2, COPIED | 1 << 50));
    add("L2 entry points at the L2 table", Corrupt, new().u64(L2, COPIED | L2 as u64));
    add("L2 entry points at the refcounts", Corrupt, new().u64(L2, COPIED | REFCOUNT_TABLE as u64));
    add("refcount table reserved bits", Harmless, new().u64(REFCOUNT_TABLE, (2 * CLUSTER as u64) | 1));
    add("refcount block behind the end", Harmless, new().u64(REFCOUNT_TABLE, 1 << 50));
    add("refcount block not at a cluster", Corrupt, new().u64(REFCOUNT_TABLE, 2 * CLUSTER as u64 + 512));
    add("refcount block is the header", Harmless, new().u64(REFCOUNT_TABLE, 0));
    add("refcount of a used cluster is 0", Corrupt, new().refcount(5, 0));
    add("refcount of the header is 0", Corrupt, new().refcount(0, 0));
    add("refcount too high", Harmless, new().refcount(5, 7));
    add(
        "every table full of ones",
        Harmless,
        new().put(L1, &[0xff; 3 * CLUSTER]).put(REFCOUNT_TABLE, &[0xff; 2 * CLUSTER]),
    );
}

/// Compressed clusters that are not.
fn clusters(add: &mut Add<'_>) {
    use Fate::{Harmless, Unreadable};
    let new = Crafted::new;
    // 4 KiB clusters: bits 0 to 57 are the offset, 58 to 61 count 512-byte sectors beyond the first.
    let entry = |offset: u64, more_sectors: u64| COMPRESSED | more_sectors << 58 | offset;
    add("compressed noise", Unreadable(""), new().u64(L2, entry(DATA as u64, 7)));
    add("compressed cluster behind the end", Unreadable(""), new().u64(L2, entry(1 << 40, 7)));
    add(
        "compressed cluster at the last byte",
        Unreadable(""),
        new().u64(L2, entry(6 * CLUSTER as u64 - 1, 15)),
    );
    add("compressed and copied", Harmless, new().u64(L2, COPIED | entry(DATA as u64, 0)));

    // A stream that ends early, and one that never would: exactly one cluster may come out.
    let stream = |guest: &[u8]| {
        let mut stored = vec![0; 2 * CLUSTER];
        let level = libdeflater::CompressionLvl::default();
        let len = libdeflater::Compressor::new(level).deflate_compress(guest, &mut stored).expect("fits");
        stored.truncate(len);
        stored
    };
    let short = new().put(DATA, &stream(&[1; 100])).u64(L2, entry(DATA as u64, 0));
    add("compressed cluster too short", Unreadable(""), short);
    let bomb = new().put(DATA, &stream(&vec![0; 1 << 20])).u64(L2, entry(DATA as u64, 7));
    add("compressed cluster that grows to 1 MiB", Harmless, bomb);
    let sixteen = (0..16).fold(new(), |image, guest| image.u64(L2 + 8 * guest, entry(DATA as u64, 7)));
    add("every guest cluster is the same noise", Unreadable(""), sixteen);
    let huge = u64::try_from(DISK).expect("small");
    add("disk ends inside a sector", Harmless, new().u64(header::SIZE, huge - 7));
}
