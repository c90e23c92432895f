//! The header's rules, one hostile image each, and round trips.

use std::sync::Arc;

use proptest::prelude::*;

use super::{
    extension::{BitmapsExtension, UnknownExtension, kind},
    feature::{autoclear, compatible, incompatible},
    geometry::Geometry,
    header::{CryptMethod, Header},
    snapshot_table::{NewSnapshot, Snapshot, encode_table, read_table},
};
use crate::{
    Error, Result,
    format::{Backing, Codec, OpenMode},
    storage::{
        MemoryStorage, Storage,
        testing::{FailAt, Operation},
    },
};

const GEOMETRY: Geometry =
    Geometry { version: 3, cluster_bits: 16, refcount_order: 4, extended_l2: false, external_data: false };

/// A sound header of a 1 GiB disk.
fn sound() -> Header {
    Header {
        l1_offset: 3 << 16,
        l1_entries: 2,
        refcount_table_offset: 1 << 16,
        refcount_table_clusters: 1,
        ..Header::new(GEOMETRY, 1 << 30)
    }
}

fn read_with(patches: &[(u64, &[u8])], mode: OpenMode) -> Result<Header> {
    let storage = MemoryStorage::from_bytes("hostile", &sound().encode().expect("it fits"));
    for (at, bytes) in patches {
        storage.write_at(bytes, *at).expect("memory");
    }
    Header::read(&storage, mode)
}

fn read(patches: &[(u64, &[u8])]) -> Result<Header> {
    read_with(patches, OpenMode::Read)
}

/// The patched header is refused as corrupt, naming that structure.
fn corrupt(patches: &[(u64, &[u8])], named: &str) {
    match read(patches) {
        Err(Error::Corrupt { structure, .. }) => assert_eq!(structure, named),
        other => panic!("{named}: {other:?}"),
    }
}

fn u32be(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn u64be(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

/// An extension at the start of the area.
fn extension(kind: u32, length: u32, data: &[u8]) -> Vec<u8> {
    [&u32be(kind)[..], &u32be(length), data].concat()
}

#[test]
fn the_unpatched_header_is_sound() {
    assert_eq!(read(&[]).expect("sound").virtual_size_bytes, 1 << 30);
}

#[test]
fn other_bytes_are_another_format() {
    assert!(matches!(read(&[(3, &[0])]), Err(Error::WrongFormat { .. })));
    let empty = MemoryStorage::new("empty");
    assert!(matches!(Header::read(&empty, OpenMode::Read), Err(Error::WrongFormat { .. })));
}

#[test]
fn versions_are_2_and_3() {
    for version in [0, 1, 4, u32::MAX] {
        let error = read(&[(4, &u32be(version))]).expect_err("unknown");
        assert_eq!(error.to_string(), format!("Unsupported qcow2 version {version}"));
    }
}

#[test]
fn cluster_bits_are_9_to_21() {
    for bits in [0, 8, 22, 64, u32::MAX] {
        corrupt(&[(20, &u32be(bits))], "header.cluster_bits");
    }
    corrupt(&[(20, &u32be(13)), (72, &u64be(incompatible::EXTENDED_L2))], "header.cluster_bits");
}

#[test]
fn the_header_length_has_limits() {
    corrupt(&[(100, &u32be(103))], "header.header_length");
    corrupt(&[(100, &u32be(65537))], "header.header_length");
    corrupt(&[(100, &u32be(u32::MAX))], "header.header_length");
}

#[test]
fn the_backing_name_is_in_the_first_cluster_and_short() {
    corrupt(&[(8, &u64be(65537))], "header.backing_file_offset");
    corrupt(&[(8, &u64be(u64::MAX))], "header.backing_file_offset");
    corrupt(&[(8, &u64be(1024)), (16, &u32be(1024))], "header.backing_file_size");
    corrupt(&[(8, &u64be(65000)), (16, &u32be(537))], "header.backing_file_size");
}

#[test]
fn a_backing_name_of_any_bytes_is_kept() {
    let name = [0xff, b'a', 0xfe];
    let header = read(&[(8, &u64be(1024)), (16, &u32be(3)), (1024, &name)]).expect("a name is bytes");
    let text = header.backing.as_ref().expect("it has one").name.clone();
    assert_eq!(crate::text::to_bytes(&text).as_ref(), name);
    let again = header.encode().expect("it fits");
    let again = Header::read(&MemoryStorage::from_bytes("again", &again), OpenMode::Read).expect("sound");
    assert_eq!(again.backing.expect("it has one").name, text);
}

#[test]
fn refcounts_are_at_most_64_bits() {
    corrupt(&[(96, &u32be(7))], "header.refcount_order");
    corrupt(&[(96, &u32be(u32::MAX))], "header.refcount_order");
}

#[test]
fn the_refcount_table_is_at_least_a_cluster_and_at_most_8_mib() {
    corrupt(&[(56, &u32be(0))], "header.refcount_table_clusters");
    corrupt(&[(56, &u32be(129))], "header.refcount_table_clusters");
    corrupt(&[(48, &u64be(513))], "header.refcount_table_offset");
    corrupt(&[(48, &u64be(u64::MAX - 65535))], "header.refcount_table_offset");
    let repair = OpenMode::Check { repair: true };
    assert!(read_with(&[(56, &u32be(0))], repair).is_ok(), "a repair makes a new one");
}

#[test]
fn the_l1_table_covers_the_disk_and_is_at_most_32_mib() {
    corrupt(&[(36, &u32be(1))], "header.l1_size");
    corrupt(&[(36, &u32be((4 << 20) + 1))], "header.l1_size");
    corrupt(&[(40, &u64be(0x30001))], "header.l1_table_offset");
    corrupt(&[(40, &u64be(u64::MAX - 65535))], "header.l1_table_offset");
    corrupt(&[(24, &u64be(u64::MAX))], "header.size");
    corrupt(&[(24, &u64be(1 << 60))], "header.l1_size");
}

#[test]
fn snapshots_are_at_most_65536() {
    corrupt(&[(60, &u32be(65537))], "header.nb_snapshots");
    corrupt(&[(64, &u64be(77))], "header.snapshots_offset");
    assert!(read_with(&[(60, &u32be(u32::MAX))], OpenMode::Check { repair: false }).is_ok());
}

#[test]
fn extensions_stay_inside_the_header_cluster() {
    corrupt(&[(112, &extension(7, 65536, &[]))], "header extension length");
    corrupt(&[(112, &extension(7, u32::MAX, &[]))], "header extension length");
    // One that ends four bytes before the area does.
    corrupt(&[(8, &u64be(132)), (112, &extension(7, 8, &[0; 8])), (128, &[1; 4])], "header extension");
    corrupt(&[(112, &extension(kind::BACKING_FORMAT, 16, &[b'x'; 16]))], "backing format name");
}

#[test]
fn bitmaps_have_limits() {
    let vouch: (u64, &[u8]) = (88, &u64be(autoclear::BITMAPS));
    let with = |count: u32, reserved: u32, bytes: u64, offset: u64| {
        let data = [&u32be(count)[..], &u32be(reserved), &u64be(bytes), &u64be(offset)].concat();
        extension(kind::BITMAPS, 24, &data)
    };
    corrupt(&[vouch, (112, &extension(kind::BITMAPS, 23, &[0; 24]))], "bitmaps extension length");
    corrupt(&[vouch, (112, &with(0, 0, 32, 4 << 16))], "bitmaps extension, nb_bitmaps");
    corrupt(&[vouch, (112, &with(65536, 0, 32, 4 << 16))], "bitmaps extension, nb_bitmaps");
    corrupt(&[vouch, (112, &with(1, 1, 32, 4 << 16))], "bitmaps extension, reserved field");
    let too_long = 1024 * 65535 + 1;
    corrupt(&[vouch, (112, &with(1, 0, too_long, 4 << 16))], "bitmaps extension, bitmap_directory_size");
    for offset in [0, 100, u64::MAX - 65535] {
        corrupt(&[vouch, (112, &with(1, 0, 32, offset))], "bitmaps extension, bitmap_directory_offset");
    }
    // Without the autoclear bit nobody looks, and the first writer drops it.
    let mut stale = read(&[(112, &with(0, 1, u64::MAX, 1))]).expect("not looked at");
    assert!(stale.bitmaps.is_none() && stale.prepare_for_writing() && !stale.prepare_for_writing());
}

#[test]
fn encryption_pointers_belong_to_luks() {
    let pointer = |offset: u64| [u64be(offset), u64be(4096)].concat();
    corrupt(&[(112, &extension(kind::ENCRYPTION, 16, &pointer(4 << 16)))], "encryption header pointer");
    let luks: (u64, &[u8]) = (32, &u32be(2));
    corrupt(&[luks, (112, &extension(kind::ENCRYPTION, 15, &[0; 16]))], "encryption header pointer length");
    corrupt(&[luks, (112, &extension(kind::ENCRYPTION, 16, &pointer(9)))], "encryption header offset");
}

#[test]
fn encrypted_images_are_only_inspected() {
    for method in [1, 2] {
        let patches: [(u64, &[u8]); 1] = [(32, &u32be(method))];
        assert!(matches!(read(&patches), Err(Error::Unsupported { .. })));
        let header = read_with(&patches, OpenMode::Inspect).expect("inspected");
        assert_ne!(header.crypt_method, CryptMethod::None);
    }
    assert!(matches!(read_with(&[(32, &u32be(3))], OpenMode::Inspect), Err(Error::Unsupported { .. })));
}

#[test]
fn unknown_incompatible_bits_are_named() {
    let error = read(&[(72, &u64be(0x8000_0000_0000_0060))]).expect_err("unknown");
    let text = "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000060";
    assert_eq!(error.to_string(), text);
}

#[test]
fn corrupt_images_are_not_written() {
    let corrupt: [(u64, &[u8]); 1] = [(72, &u64be(incompatible::CORRUPT))];
    assert!(read(&corrupt).is_ok());
    assert!(read_with(&corrupt, OpenMode::Write).is_err());
    assert!(read_with(&corrupt, OpenMode::Check { repair: true }).is_ok());
}

#[test]
fn the_compression_type_agrees_with_its_bit() {
    corrupt(&[(104, &[1])], "header.compression_type");
    corrupt(&[(72, &u64be(incompatible::COMPRESSION))], "header.compression_type");
    let unknown = read(&[(72, &u64be(incompatible::COMPRESSION)), (104, &[2])]);
    assert!(matches!(unknown, Err(Error::Unsupported { .. })));
    // A short header has no such field, whatever stands there.
    assert!(read(&[(100, &u32be(104)), (104, &[0; 16])]).is_ok());
}

#[test]
fn a_raw_data_file_needs_a_data_file() {
    corrupt(&[(88, &u64be(autoclear::RAW_DATA))], "header.autoclear_features");
}

#[test]
fn unknown_autoclear_bits_go_when_written() {
    let mut header = read(&[(88, &u64be(0xff00))]).expect("ignored");
    assert_eq!(header.autoclear, 0xff00);
    assert!(header.prepare_for_writing());
    assert_eq!(header.autoclear, 0);
}

#[test]
fn unknown_fields_and_extensions_survive() {
    let mut patches = vec![(100_u64, u32be(128).to_vec()), (105, vec![7; 7]), (112, vec![9; 16])];
    patches.push((128, extension(0x1234, 5, b"first\0\0\0")));
    patches.push((144, extension(0x1233, 0, &[])));
    let patches: Vec<(u64, &[u8])> = patches.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
    let header = read(&patches).expect("sound");
    let again = MemoryStorage::from_bytes("again", &header.encode().expect("it fits"));
    let bytes = again.to_vec();
    assert_eq!(bytes[105..112], [7; 7]);
    assert_eq!(bytes[112..128], [9; 16]);
    let kinds: Vec<_> = header.unknown_extensions.iter().map(|extension| extension.kind).collect();
    assert_eq!(kinds, [0x1234, 0x1233]);
    let read_again = Header::read(&again, OpenMode::Read).expect("sound");
    assert_eq!(read_again.unknown_extensions, header.unknown_extensions);
}

#[test]
fn what_does_not_fit_is_refused() {
    let small = Geometry { cluster_bits: 9, ..GEOMETRY };
    let mut header = Header::new(small, 0);
    header.backing = Some(Backing { name: "n".repeat(400), format: None });
    assert!(matches!(header.encode(), Err(Error::Invalid(_))));
    header.backing = Some(Backing { name: "n".repeat(300), format: None });
    assert!(header.encode().is_ok());
}

fn header() -> impl Strategy<Value = Header> {
    let names = proptest::option::of("[a-z]{1,40}");
    let unknown =
        proptest::collection::vec((1_u32..1000, proptest::collection::vec(any::<u8>(), 0..40)), 0..4);
    let numbers = (0_u64..1 << 40, 9_u32..=21, 0_u32..=6, any::<bool>(), any::<bool>());
    let more = (names.clone(), proptest::option::of("[a-z0-9]{1,15}"), names, unknown);
    (numbers, more, any::<bool>(), any::<bool>()).prop_map(|(numbers, more, zstd, bitmaps)| {
        let (size, cluster_bits, refcount_order, extended_l2, external_data) = numbers;
        let (backing, format, data_file, unknown) = more;
        let cluster_bits = if extended_l2 { cluster_bits.max(14) } else { cluster_bits.max(11) };
        let geometry = Geometry { version: 3, cluster_bits, refcount_order, extended_l2, external_data };
        let size = size.min(geometry.l2_span_bytes() << 10);
        let mut header = Header {
            l1_offset: 3 << cluster_bits,
            l1_entries: u32::try_from(geometry.l1_entries_for(size)).expect("1024"),
            refcount_table_offset: 1 << cluster_bits,
            refcount_table_clusters: 1,
            ..Header::new(geometry, size)
        };
        header.backing = backing.map(|name| Backing { name, format });
        header.data_file = data_file.filter(|_| external_data);
        header.compatible = compatible::LAZY_REFCOUNTS | 1 << 40;
        if zstd {
            header.compression = Codec::Zstd;
            header.incompatible |= incompatible::COMPRESSION;
        }
        if bitmaps {
            let directory_offset = 5 << cluster_bits;
            header.bitmaps = Some(BitmapsExtension { count: 1, directory_bytes: 32, directory_offset });
            header.autoclear |= autoclear::BITMAPS;
        }
        header.unknown_extensions =
            unknown.into_iter().map(|(kind, data)| UnknownExtension { kind, data }).collect();
        header
    })
}

proptest! {
    /// What is encoded is read back, and encoded again to the same bytes.
    #[test]
    fn headers_come_back(header in header()) {
        let bytes = header.encode().expect("it fits");
        let storage = MemoryStorage::from_bytes("header", &bytes);
        let mut back = Header::read(&storage, OpenMode::Read).expect("sound");
        prop_assert_eq!(back.encode().expect("it fits"), bytes);
        back.feature_names.clear();
        prop_assert_eq!(back, header);
    }

    /// No header, whatever its bytes, makes reading panic.
    #[test]
    fn any_bytes_are_read_or_refused(patches in proptest::collection::vec((4_u64..600, any::<[u8; 4]>()), 0..12)) {
        let patches: Vec<(u64, &[u8])> = patches.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
        for mode in [OpenMode::Inspect, OpenMode::Read, OpenMode::Write, OpenMode::Check { repair: true }] {
            if let Ok(header) = read_with(&patches, mode) {
                let table = read_table(&MemoryStorage::new("empty"), &header);
                prop_assert!(header.snapshot_count == 0 || table.is_err());
            }
        }
    }

    /// Snapshot tables come back, names and dates included, and mixed with bytes of others.
    #[test]
    fn snapshot_tables_come_back(names in proptest::collection::vec("[a-zé]{0,300}", 0..20), date in any::<(u32, u32)>()) {
        let snapshots: Vec<Snapshot> = (1..)
            .zip(&names)
            .map(|(id, name)| {
                let l1_offset = id << 16;
                let new = NewSnapshot { id, name, date, virtual_size_bytes: id << 20, l1_offset, l1_entries: 1 };
                Snapshot::new(&new)
            })
            .collect();
        let storage = MemoryStorage::new("table");
        storage.write_at(&encode_table(&snapshots), 1 << 16).expect("memory");
        let mut header = sound();
        header.snapshots_offset = 1 << 16;
        header.snapshot_count = u32::try_from(snapshots.len()).expect("few");
        prop_assert_eq!(read_table(&storage, &header).expect("sound"), snapshots);
    }
}

#[test]
fn snapshot_entries_have_limits() {
    let new = NewSnapshot {
        id: 1,
        name: "n",
        date: (0, 0),
        virtual_size_bytes: 1 << 20,
        l1_offset: 0,
        l1_entries: 1,
    };
    let table = encode_table(&[Snapshot::new(&new)]);
    let mut header = sound();
    (header.snapshots_offset, header.snapshot_count) = (1 << 16, 1);
    let patched = |at: u64, bytes: &[u8]| {
        let storage = MemoryStorage::new("table");
        storage.write_at(&table, 1 << 16).expect("memory");
        storage.write_at(bytes, (1 << 16) + at).expect("memory");
        read_table(&storage, &header)
    };
    assert!(patched(0, &[]).is_ok());
    for (at, bytes, named) in [
        (36, &u32be(1025)[..], "snapshot, extra data"),
        (36, &u32be(u32::MAX), "snapshot, extra data"),
        (14, &[0xff, 0xff], "snapshot table"),
    ] {
        match patched(at, bytes) {
            Err(Error::Corrupt { structure, .. }) => assert_eq!(structure, named),
            other => panic!("{named}: {other:?}"),
        }
    }
}

/// An entry whose L1 table or size cannot be is listed, and refused when it is used.
#[test]
fn snapshots_that_cannot_be_used_are_listed() {
    let (l1_offset, l1_entries, virtual_size_bytes) = (1 << 16, 1, 1 << 20);
    let sound = NewSnapshot { id: 1, name: "n", date: (0, 0), virtual_size_bytes, l1_offset, l1_entries };
    for (new, refusal) in [
        (sound.clone(), None),
        (NewSnapshot { l1_entries: (4 << 20) + 1, ..sound.clone() }, Some("Snapshot L1 table too large")),
        (NewSnapshot { l1_offset: 12, ..sound.clone() }, Some("Snapshot L1 table offset invalid")),
        (
            NewSnapshot { l1_offset: u64::MAX << 16, ..sound.clone() },
            Some("Snapshot L1 table offset invalid"),
        ),
        (
            NewSnapshot { virtual_size_bytes: u64::MAX, ..sound.clone() },
            Some("Image size cannot be negative"),
        ),
        (
            NewSnapshot { virtual_size_bytes: i64::MAX as u64, ..sound.clone() },
            Some("Failed to grow the L1 table: File too large"),
        ),
    ] {
        let mut header = self::sound();
        (header.snapshots_offset, header.snapshot_count) = (1 << 16, 1);
        let storage = MemoryStorage::new("table");
        storage.write_at(&encode_table(&[Snapshot::new(&new)]), 1 << 16).expect("memory");
        let [listed] =
            <[Snapshot; 1]>::try_from(read_table(&storage, &header).expect("listed")).expect("one");
        let checked = listed.check_l1(GEOMETRY).and_then(|()| listed.check_size(GEOMETRY));
        assert_eq!(checked.err().map(|error| error.to_string()).as_deref(), refusal, "{new:?}");
    }
}

/// Of the header cluster no more is read than its extensions take: one read of 4 KiB for nearly every image.
#[test]
fn the_header_is_read_as_far_as_it_goes() {
    for (length_bytes, reads) in [(8, 1), (9_000, 2), (60_000, 2)] {
        let unknown = UnknownExtension { kind: 0x7e57_ab1e, data: vec![0xab; length_bytes] };
        let header = Header { unknown_extensions: vec![unknown], ..sound() };
        let memory = MemoryStorage::from_bytes("long", &header.encode().expect("it fits"));
        let counting = FailAt::once(Arc::new(memory), |operation| operation == Operation::Read, u64::MAX);
        let found = Header::read(&counting, OpenMode::Read).expect("sound");
        assert_eq!(found.unknown_extensions, header.unknown_extensions);
        assert_eq!(counting.seen(), reads, "reads with {length_bytes} bytes in an extension");
    }
}
