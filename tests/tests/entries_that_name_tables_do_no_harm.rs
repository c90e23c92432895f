//! An image whose entries name its own tables as guest data is refused when it is written to, and no table is
//! harmed: not by giving the "data" up, nor by a snapshot that counts it.

use std::sync::Arc;

use img_core::{
    Error, Result,
    format::{OpenMode, Repair},
    image::Image,
    storage::{MemoryStorage, Storage},
};
use img_tests::{
    memory::{self, set_word, word},
    scenario::{Layout, Op, Qcow2, apply},
};

const LAYOUT: Layout = Layout::Qcow2(Qcow2::PLAIN);
const CLUSTER: u64 = 1 << 12;
const COPIED: u64 = 1 << 63;

/// An image with three clusters of data, and where its tables are: L1, L2, refcount table and block.
fn image() -> (Arc<dyn Storage>, [u64; 4]) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("hostile.qcow2"));
    memory::create(&storage, &LAYOUT, 1 << 20).expect("created");
    let image = memory::open(Arc::clone(&storage), OpenMode::Write).expect("it opens");
    image.write_at(&[1; 3 << 12], 0).expect("written");
    image.close().expect("closed");
    let (l1, table) = (word(&*storage, 40), word(&*storage, 48));
    let tables = [l1, word(&*storage, l1) & !COPIED, table, word(&*storage, table)];
    (storage, tables)
}

type Attack = fn(&Image) -> Result<()>;

#[test]
fn entries_that_name_tables_do_no_harm() {
    let attacks: [(&str, Attack); 8] = [
        ("discard", |image| image.discard(CLUSTER..2 * CLUSTER)),
        ("zeroes", |image| image.write_zeroes(CLUSTER..2 * CLUSTER, true)),
        ("a write", |image| image.write_at(&[7; 100], CLUSTER + 100)),
        ("a compressed write", |image| {
            apply(image, &Op::Compress { at: CLUSTER, len: CLUSTER, byte: 7 }, &LAYOUT)
        }),
        ("a smaller disk", |image| image.resize(CLUSTER, img_core::storage::Preallocation::Off)),
        ("a snapshot", |image| image.snapshot_create("s", (1, 2))),
        ("a snapshot and its end", |image| {
            image.snapshot_create("s", (1, 2))?;
            image.snapshot_delete("s")
        }),
        ("a snapshot, a write and going back", |image| {
            image.snapshot_create("s", (1, 2))?;
            image.write_at(&[7; 100], CLUSTER + 100)?;
            image.snapshot_apply("s")
        }),
    ];
    for which in 0..4 {
        for flag in [0, COPIED] {
            for (name, attack) in attacks {
                let (storage, tables) = image();
                let target = tables[which];
                set_word(&*storage, tables[1] + 8, target | flag);
                let before = tables.map(|table| {
                    let mut bytes = vec![0; 1 << 12];
                    storage.read_at(&mut bytes, table).expect("readable");
                    bytes
                });
                let image = memory::open(Arc::clone(&storage), OpenMode::Write).expect("it opens");
                let result = attack(&image).and_then(|()| image.flush());
                let what = format!("{name}, table {which}, flag {flag:#x}");
                assert!(matches!(result, Err(Error::Overlap { .. })), "{what}: {result:?}");
                assert!(image.flush().is_err(), "{what}: nothing is written any more");
                drop(image);
                for (index, (table, before)) in tables.iter().zip(&before).enumerate() {
                    let mut bytes = vec![0; 1 << 12];
                    storage.read_at(&mut bytes, *table).expect("readable");
                    // Counts of what was allocated meanwhile, and flags that a snapshot cleared, may differ.
                    let differ = bytes.iter().zip(before).filter(|(now, then)| now != then).count();
                    assert!(differ <= 8, "{what}: {differ} bytes of table {index} changed");
                }
                let context = memory::open(Arc::clone(&storage), OpenMode::Write);
                assert!(context.is_err(), "{what}: it is marked");
            }
        }
    }
}

/// A table that two L1 entries name is not given up with one of them.
#[test]
fn a_table_named_twice_is_not_given_up() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("twice.qcow2"));
    memory::create(&storage, &LAYOUT, 8 << 20).expect("created");
    let image = memory::open(Arc::clone(&storage), OpenMode::Write).expect("it opens");
    image.write_at(&[1; 1 << 12], 0).expect("written");
    image.write_at(&[2; 1 << 12], 4 << 20).expect("written");
    image.close().expect("closed");
    let l1 = word(&*storage, 40);
    let first = word(&*storage, l1);
    set_word(&*storage, l1 + 16, first);
    let image = memory::open(Arc::clone(&storage), OpenMode::Write).expect("it opens");
    let result = image.resize(2 << 20, img_core::storage::Preallocation::Off);
    assert!(matches!(result, Err(Error::Corrupt { structure: "L1 entry", .. })), "{result:?}");
    let mut guest = [0; 1 << 12];
    image.read_at(&mut guest, 0).expect("readable");
    assert!(guest.iter().all(|&byte| byte == 1));
}

/// Two entries name one table, or one cluster of data, without the copied flag, and its count is one: a copy made
/// through one of them does not give away what the other still needs.
#[test]
fn what_two_entries_share_is_not_given_away_by_one() {
    const SPAN: u64 = 2 << 20;
    for shared in ["table", "data"] {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("shared.qcow2"));
        memory::create(&storage, &LAYOUT, 8 << 20).expect("created");
        let image = memory::open(Arc::clone(&storage), OpenMode::Write).expect("it opens");
        image.write_at(&[1; 1 << 12], 0).expect("written");
        image.close().expect("closed");
        let l1 = word(&*storage, 40);
        let table = word(&*storage, l1) & !COPIED;
        let (first, second, other) = match shared {
            "table" => (l1, l1 + 8, SPAN),
            _ => (table, table + 8, CLUSTER),
        };
        let plain = word(&*storage, first) & !COPIED;
        for at in [first, second] {
            set_word(&*storage, at, plain);
        }
        let image = memory::open(Arc::clone(&storage), OpenMode::Write).expect("it opens");
        image.write_at(&[2; 100], 0).expect("written");
        image.flush().expect("flushed");
        // Whatever was given up is taken again.
        image.write_at(&vec![3; 2 << 20], 3 * SPAN).expect("written");
        image.flush().expect("flushed");
        let mut guest = [0; 1 << 12];
        image.read_at(&mut guest, other).expect("readable");
        assert!(guest.iter().all(|&byte| byte == 1), "{shared}: it reads as before");
        image.write_at(&[4; 100], other).expect("written");
        image.close().expect("closed");
        let image = memory::open(storage, OpenMode::Check { repair: false }).expect("it opens");
        let mut texts = Vec::new();
        let report = image.check(Repair::Nothing, &mut |finding| texts.push(finding.text)).expect("checked");
        assert_eq!(report.corruptions, 0, "{shared}: {texts:#?}");
    }
}

/// Two entries that both claim a cluster of data for themselves write over each other, as no look at one of them can
/// tell; an audit does. When one of them gives the cluster up and it becomes a table, the other is not written any
/// more.
#[test]
fn a_cluster_that_two_entries_own_does_not_take_a_table_with_it() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("owned.qcow2"));
    memory::create(&storage, &LAYOUT, 8 << 20).expect("created");
    let image = memory::open(Arc::clone(&storage), OpenMode::Write).expect("it opens");
    image.write_at(&[1; 3 << 12], 0).expect("written");
    image.close().expect("closed");
    let table = word(&*storage, word(&*storage, 40)) & !COPIED;
    let shared = word(&*storage, table);
    assert_ne!(shared & COPIED, 0);
    set_word(&*storage, table + 8, shared);

    let image = memory::open(Arc::clone(&storage), OpenMode::Check { repair: false }).expect("it opens");
    let report = image.check(Repair::Nothing, &mut |_| {}).expect("checked");
    assert!(report.corruptions > 0, "{report:?}");

    let image = memory::open(Arc::clone(&storage), OpenMode::Write).expect("it opens");
    image.discard(0..CLUSTER).expect("discarded");
    image.flush().expect("flushed");
    image.write_at(&[5; 1 << 12], 4 << 20).expect("written");
    image.flush().expect("flushed");
    let new_table = word(&*storage, word(&*storage, 40) + 16);
    assert_eq!(new_table, shared, "the cluster that was given up is a table now");
    let result = image.write_at(&[7; 100], CLUSTER);
    assert!(matches!(result, Err(Error::Overlap { .. })), "{result:?}");
    let mut guest = [0; 1 << 12];
    image.read_at(&mut guest, 4 << 20).expect("readable");
    assert_eq!(guest, [5; 1 << 12], "the table is unharmed");
}

/// The same for tables that are named as L2 tables.
#[test]
fn tables_named_as_l2_tables_do_no_harm() {
    for which in [0, 2, 3] {
        for flag in [0, COPIED] {
            let (storage, tables) = image();
            set_word(&*storage, tables[0], tables[which] | flag);
            let before = word(&*storage, tables[2]);
            for attack in [
                (|image| image.snapshot_create("s", (1, 2))) as Attack,
                |image| image.write_at(&[7; 100], 0),
                |image| image.discard(0..1 << 20),
            ] {
                let copy: Arc<dyn Storage> = {
                    let len = usize::try_from(storage.len_bytes().expect("known")).expect("small");
                    let mut bytes = vec![0; len];
                    storage.read_at(&mut bytes, 0).expect("readable");
                    Arc::new(MemoryStorage::from_bytes("copy.qcow2", &bytes))
                };
                let image = memory::open(Arc::clone(&copy), OpenMode::Write).expect("it opens");
                let result = attack(&image).and_then(|()| image.flush());
                assert!(
                    matches!(result, Err(Error::Overlap { .. } | Error::Corrupt { .. })),
                    "table {which}, flag {flag:#x}: {result:?}"
                );
                assert_eq!(word(&*copy, tables[2]), before, "table {which}, flag {flag:#x}");
            }
        }
    }
}
