//! An entry with the copied flag is overwritten in place only where the count of what it names is one: a cluster that
//! is free, and may become a table, is not written, and one that a snapshot uses too is copied first.

use std::sync::Arc;

use img_core::{
    Error,
    format::{Attempt, OpenMode, Repair},
    image::Image,
    storage::{MemoryStorage, Storage},
};
use img_tests::{
    memory::{self, set_word, word},
    scenario::{Layout, Qcow2},
};

const CLUSTER: u64 = 1 << 12;
const COPIED: u64 = 1 << 63;
const ZERO: u64 = 1;

const LAYOUT: Layout = Layout::Qcow2(Qcow2::PLAIN);

fn open(storage: &Arc<dyn Storage>) -> Arc<Image> {
    Arc::new(memory::open(Arc::clone(storage), OpenMode::Write).expect("it opens"))
}

fn close(image: Arc<Image>) {
    Arc::into_inner(image).expect("nobody else holds it").close().expect("closed");
}

/// An image with four clusters of data, of which the third was given up again.
fn image() -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("hostile.qcow2"));
    memory::create(&storage, &LAYOUT, 8 << 20).expect("created");
    let image = open(&storage);
    image.write_at(&[1; 4 << 12], 0).expect("written");
    image.discard(2 * CLUSTER..3 * CLUSTER).expect("discarded");
    close(image);
    storage
}

/// Host offsets of L1 and of the first L2 table.
fn tables(storage: &dyn Storage) -> (u64, u64) {
    let l1 = word(storage, 40);
    (l1, word(storage, l1) & !COPIED)
}

fn tries(image: &Arc<Image>, at: u64) -> bool {
    let attempt = image.try_prepare_write(at..at + 100, &mut Vec::new()).expect("inside");
    matches!(attempt, Attempt::Done(_))
}

#[test]
fn a_free_cluster_is_not_written() {
    let len = image().len_bytes().expect("known");
    let (_, table) = tables(&*image());
    // Where data was given up, what is allocated next, and far behind the end.
    let given_up = (word(&*image(), table) & !COPIED) + 2 * CLUSTER;
    for free in [given_up, len, len + (1 << 30)] {
        for flags in [COPIED, COPIED | ZERO] {
            let storage = image();
            let what = format!("{free:#x} of {len:#x}, flags {flags:#x}");
            set_word(&*storage, table + 8, free | flags);
            let image = open(&storage);
            // So that queues write it from memory, if they may.
            image.read_at(&mut [0; 512], 0).expect("read");
            assert!(!tries(&image, CLUSTER), "{what}");
            let refused = image.write_at(&[7; 100], CLUSTER);
            assert!(
                matches!(refused, Err(Error::Corrupt { structure: "L2 entry", .. })),
                "{what}: {refused:?}"
            );
            image.write_at(&[8; 100], 4 << 20).expect_err("nothing is written any more");
            drop(image);
            assert_eq!(storage.len_bytes().expect("known"), len, "{what}");
            let mut bytes = [0; 100];
            storage.read_at(&mut bytes, free).expect("readable");
            assert_eq!(bytes, [0; 100], "{what}");
            assert!(memory::open(storage, OpenMode::Write).is_err(), "{what}: it is marked");
        }
    }
}

/// A cluster that is counted when its entry is first written through, and is given up through another entry then, is
/// not written any more.
#[test]
fn what_is_given_up_elsewhere_is_not_written_any_more() {
    let storage = image();
    let (_, table) = tables(&*storage);
    set_word(&*storage, table + 8, word(&*storage, table));
    let image = open(&storage);
    image.write_at(&[7; 100], CLUSTER).expect("no look at one entry tells of the other");
    assert!(tries(&image, CLUSTER));
    image.discard(0..CLUSTER).expect("discarded");
    image.flush().expect("flushed");
    assert!(!tries(&image, CLUSTER));
    let refused = image.write_at(&[7; 100], CLUSTER);
    assert!(matches!(refused, Err(Error::Corrupt { structure: "L2 entry", .. })), "{refused:?}");
}

#[test]
fn what_a_snapshot_uses_is_copied_whatever_the_flags_say() {
    // With a table that it shares with the snapshot, or with one of its own.
    for shares_table in [true, false] {
        for through_queue in [true, false] {
            let storage = image();
            let image = open(&storage);
            image.snapshot_create("s", (1, 2)).expect("taken");
            if !shares_table {
                image.write_at(&[5; 100], 3 * CLUSTER).expect("written");
            }
            close(image);
            let (l1, table) = tables(&*storage);
            assert_eq!(word(&*storage, l1) & COPIED == 0, shares_table);
            assert_eq!(word(&*storage, table) & COPIED, 0);
            set_word(&*storage, l1, table | COPIED);
            set_word(&*storage, table, word(&*storage, table) | COPIED);

            let image = open(&storage);
            if through_queue {
                image.read_at(&mut [0; 512], 0).expect("read");
                assert!(!tries(&image, 0));
            }
            image.write_at(&[7; 100], 0).expect("written");
            assert!(tries(&image, 0), "its new cluster is its own");
            let mut bytes = [0; 200];
            image.read_at(&mut bytes, 0).expect("read");
            assert_eq!((bytes[..100].to_vec(), bytes[100..].to_vec()), (vec![7; 100], vec![1; 100]));
            close(image);
            let audited =
                memory::open(Arc::clone(&storage), OpenMode::Check { repair: false }).expect("it opens");
            let mut texts = Vec::new();
            let report =
                audited.check(Repair::Nothing, &mut |finding| texts.push(finding.text)).expect("checked");
            assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{texts:#?}");
            drop(audited);
            let image = open(&storage);
            image.snapshot_apply("s").expect("applied");
            let mut bytes = [0; 200];
            image.read_at(&mut bytes, 0).expect("read");
            assert_eq!(bytes, [1; 200], "the snapshot is as it was");
        }
    }
}
