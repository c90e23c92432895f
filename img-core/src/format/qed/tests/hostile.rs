//! Tables that break the rules: nothing but an error comes of them, and nothing is written over a table.

use std::sync::Arc;

use super::{
    super::{geometry::Geometry, header::feature},
    audit, create, header, open,
};
use crate::{
    Error, Result,
    format::{Driver as _, Layer as _, LayerWriter as _, OpenMode, Repair},
    image::Image,
    storage::{MemoryStorage, Storage},
};

const CLUSTER: u64 = 4096;
const L1: u64 = CLUSTER;
/// The first data cluster and the first L2 table of an image that was written once.
const DATA: u64 = 2 * CLUSTER;
const L2: u64 = 3 * CLUSTER;

/// Two data clusters at guest offset 0 and a table behind the first.
fn image() -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("hostile.qed"));
    create(&storage, Geometry { cluster_bits: 12, table_bits: 0 }, 1 << 30);
    let layer = open(&storage, OpenMode::Write).expect("opens");
    let image = Image::from_layers(vec![Arc::new(layer)]).expect("a layer");
    image.write_at(&[1; 4096], 0).expect("written");
    image.write_at(&[2; 4096], CLUSTER).expect("written");
    image.close().expect("closed");
    assert_eq!(word(&storage, L1), L2);
    assert_eq!(word(&storage, L2), DATA);
    storage
}

fn word(storage: &Arc<dyn Storage>, at: u64) -> u64 {
    let mut bytes = [0; 8];
    storage.read_at(&mut bytes, at).expect("readable");
    u64::from_le_bytes(bytes)
}

fn broken(at: u64, entry: u64) -> Arc<dyn Storage> {
    let storage = image();
    storage.write_at(&entry.to_le_bytes(), at).expect("written");
    storage
}

fn read(storage: &Arc<dyn Storage>) -> Result<()> {
    let layer = open(storage, OpenMode::Read)?;
    Image::from_layers(vec![Arc::new(layer)])?.read_at(&mut [0; 100], 0)
}

#[test]
fn entries_that_lead_nowhere_are_refused_and_repaired() {
    let lost = [1 << 62, u64::MAX, u64::MAX - 4095, 100 * CLUSTER, DATA + 512, CLUSTER - 8, 2, 3];
    for (at, name) in [(L1, "L1 entry"), (L2, "L2 entry")] {
        for entry in lost {
            if at == L1 && entry == CLUSTER - 8 {
                continue;
            }
            let storage = broken(at, entry);
            let error = read(&storage).expect_err("refused").to_string();
            assert!(error.contains(name), "{entry:#x}: {error}");
            assert_eq!(audit(&storage, Repair::Nothing).corruptions, 1, "{name} {entry:#x}");
            let repaired = audit(&storage, Repair::All);
            assert_eq!((repaired.corruptions, repaired.corruptions_fixed), (0, 1), "{name} {entry:#x}");
            assert_eq!(word(&storage, at), 0);
            read(&storage).expect("repaired");
        }
    }
}

/// A guest that could write to a table would have its host's other files.
#[test]
fn nothing_is_written_over_a_table() {
    for place in [L1, L2] {
        let storage = broken(L2, place);
        let layer = open(&storage, OpenMode::Write).expect("opens");
        assert!(matches!(layer.prepare_write(0..512), Err(Error::Corrupt { .. })), "{place:#x}");
        assert!(layer.write_zeroes(0..CLUSTER, true).is_err(), "{place:#x}");
        assert!(layer.discard(0..CLUSTER).is_err(), "{place:#x}");
        assert_eq!(audit(&storage, Repair::Nothing).corruptions, 1, "{place:#x}");
    }
}

#[test]
fn tables_that_share_clusters_are_not_written() {
    for second in [L1, L2] {
        let storage = broken(L1 + 8, second);
        let layer = open(&storage, OpenMode::Write).expect("opens");
        let error = layer.prepare_write(0..512).expect_err("refused").to_string();
        assert!(error.contains("L1 entry"), "{error}");
        assert!(audit(&storage, Repair::All).corruptions > 0);
    }
}

/// Where data and a table share a cluster, an entry that leads nowhere may be data.
#[test]
fn nothing_is_repaired_in_a_table_that_is_data_as_well() {
    let storage = broken(L2 + 8, L2);
    storage.write_at(&(1_u64 << 40).to_le_bytes(), L2 + 16).expect("written");
    let mut before = [0; 4096];
    storage.read_at(&mut before, L2).expect("readable");
    let report = audit(&storage, Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed), (2, 0));
    let mut after = [0; 4096];
    storage.read_at(&mut after, L2).expect("readable");
    assert!(before == after);
}

/// A dirty image is repaired before anything is written, or not opened for writing.
#[test]
fn dirty_images_are_repaired_or_refused() {
    let mark = |storage: &Arc<dyn Storage>| {
        let mut dirty = header(storage);
        dirty.features |= feature::NEED_CHECK;
        dirty.write(&**storage).expect("written");
    };
    let storage = broken(L2, 1 << 40);
    mark(&storage);
    read(&storage).expect_err("still as it is");
    assert!(open(&storage, OpenMode::Read).expect("opens").is_dirty());
    open(&storage, OpenMode::Write).expect("repaired").close().expect("closed");
    assert_eq!(header(&storage).features & feature::NEED_CHECK, 0);
    read(&storage).expect("repaired");

    let storage = broken(L2, DATA + 2 * CLUSTER); // the second guest cluster's place
    mark(&storage);
    let error = open(&storage, OpenMode::Write).expect_err("refused").to_string();
    assert_eq!(error, "Could not repair dirty image");
    assert_eq!(header(&storage).features & feature::NEED_CHECK, feature::NEED_CHECK);
}

/// "Header": unknown autoclear bits go when someone writes, unknown compatible ones stay.
#[test]
fn unknown_autoclear_bits_are_cleared_by_a_writer() {
    let storage = image();
    let mut extra = header(&storage);
    (extra.autoclear_features, extra.compat_features) = (5, 6);
    extra.write(&*storage).expect("written");
    open(&storage, OpenMode::Read).expect("opens");
    assert_eq!(header(&storage).autoclear_features, 5);
    open(&storage, OpenMode::Write).expect("opens").close().expect("closed");
    assert_eq!((header(&storage).autoclear_features, header(&storage).compat_features), (0, 6));
}

/// A file that ends inside a cluster: what is behind the last whole one is overwritten ("Specification").
#[test]
fn bytes_behind_the_last_cluster_are_not_seen() {
    let storage = image();
    let end = storage.len_bytes().expect("a length");
    storage.write_at(&[0xaa; 1000], end).expect("written");
    let layer = open(&storage, OpenMode::Write).expect("opens");
    let image = Image::from_layers(vec![Arc::new(layer)]).expect("a layer");
    image.write_at(&[5], 10 * CLUSTER + 2000).expect("written");
    let mut cluster = [0xee; 4096];
    image.read_at(&mut cluster, 10 * CLUSTER).expect("readable");
    assert!(cluster.iter().enumerate().all(|(index, byte)| *byte == if index == 2000 { 5 } else { 0 }));
    image.close().expect("closed");
    assert_eq!(audit(&storage, Repair::Nothing).leaks, 0);
}

#[test]
fn options_are_refused_by_name() {
    let mut options = crate::format::OptionSet::new();
    options.set("l2-cache-size", "1M");
    let context = crate::format::OpenContext {
        mode: OpenMode::Read,
        options: &options,
        open_file: &|name, _| panic!("no file '{name}' to open"),
    };
    let error = super::super::Qed.open(image(), &context).expect_err("refused").to_string();
    assert_eq!(error, "Block format 'qed' does not support the option 'l2-cache-size'");
}
