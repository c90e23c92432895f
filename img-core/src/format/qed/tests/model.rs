//! Whatever the history, the image reads as the flat model and its audit finds nothing.

use std::sync::Arc;

use proptest::prelude::*;

use super::{super::geometry::Geometry, audit, create, header, open};
use crate::{
    format::{
        Driver as _, Layer, LayerWriter as _, OpenContext, OpenMode, OptionSet, Repair, qed::header::feature,
        raw::Raw,
    },
    image::{
        Image,
        flat_model::{Histories, UnderTest, live_through},
    },
    storage::{MemoryStorage, Preallocation, Storage},
};

/// L1 of the smallest image has entries for many tables of this span.
const SMALL: Geometry = Geometry { cluster_bits: 12, table_bits: 0 };
const DISK_BYTES: u64 = 5 << 20;

const HISTORIES: Histories =
    Histories { disk_bytes: DISK_BYTES, unit_bytes: 1 << 12, grows_by_sectors: 3, crashes: true };

/// The image over a raw one.
fn open_image(storage: &Arc<dyn Storage>, below: &Arc<dyn Storage>) -> Image {
    let context = OpenContext {
        mode: OpenMode::Read,
        options: &OptionSet::new(),
        open_file: &|name, _| panic!("no file '{name}' to open"),
    };
    let below = Raw.open(Arc::clone(below), &context).expect("raw");
    let top: Arc<dyn Layer> = Arc::new(open(storage, OpenMode::Write).expect("opens"));
    Image::from_layers(vec![top, below]).expect("two layers")
}

/// An image over a raw one.
struct Chain {
    storage: Arc<dyn Storage>,
    below: Arc<dyn Storage>,
}

impl UnderTest for Chain {
    fn open(&self) -> Image {
        open_image(&self.storage, &self.below)
    }

    fn closed(&self) {
        let report = audit(&self.storage, Repair::Nothing);
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        assert_eq!(header(&self.storage).features & feature::NEED_CHECK, 0);
    }

    fn crashed(&self) {
        assert_eq!(audit(&self.storage, Repair::Nothing).corruptions, 0);
    }

    fn opened_after_crash(&self) {
        assert_eq!(header(&self.storage).features & feature::NEED_CHECK, 0, "repaired at open");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn image_equals_flat_model(
        table_bits in 0..3_u32,
        below_bytes in prop_oneof![Just(0_usize), Just(3 << 20), Just(6 << 20)],
        steps in HISTORIES.steps(),
    ) {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("model.qed"));
        let below_content: Vec<u8> = (0..below_bytes).map(|at| (at >> 9).to_le_bytes()[0] | 1).collect();
        let below: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("below.raw", &below_content));
        create(&storage, Geometry { table_bits, ..SMALL }, DISK_BYTES);
        let mut model = below_content;
        model.resize(usize::try_from(DISK_BYTES).expect("small"), 0);
        live_through(&Chain { storage, below }, model, &steps);
    }
}

/// A write that did not happen leaves nothing behind: neither a leak nor a longer file.
#[test]
fn a_dropped_write_is_undone() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("dropped.qed"));
    create(&storage, SMALL, DISK_BYTES);
    let layer = open(&storage, OpenMode::Write).expect("opens");
    let len = storage.len_bytes().expect("a length");
    {
        let prepared = layer.prepare_write(0..9000).expect("prepared");
        assert_eq!(prepared.step().fill_after_bytes, 3 * 4096 - 9000);
        storage.write_at(&[7; 9000], prepared.step().at.0).expect("written");
    }
    layer.close().expect("closed");
    assert_eq!(storage.len_bytes().expect("a length"), len);
    let report = audit(&storage, Repair::Nothing);
    assert_eq!((report.leaks, report.allocated_clusters), (0, 0));
}

/// Clusters that a dropped write had set aside go to the next one, with nothing of what was written there.
#[test]
fn what_a_dropped_write_left_is_never_seen() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("dropped.qed"));
    create(&storage, SMALL, DISK_BYTES);
    let layer: Arc<dyn Layer> = Arc::new(open(&storage, OpenMode::Write).expect("opens"));
    let at = {
        let prepared = layer.writer().expect("writable").prepare_write(0..4096).expect("prepared");
        storage.write_at(&[7; 4096], prepared.step().at.0).expect("written");
        prepared.step().at
    };
    let image = Image::from_layers(vec![Arc::clone(&layer)]).expect("one layer");
    image.write_at(&[1], 8192 + 100).expect("written");
    let mut extents = Vec::new();
    layer.map_range(8192..8193, &mut extents).expect("a map");
    assert!(
        matches!(extents[0].place, crate::format::Place::Data { at: here, .. } if here == at),
        "{extents:?}"
    );
    let mut cluster = [0xee; 4096];
    image.read_at(&mut cluster, 8192).expect("readable");
    assert!(cluster.iter().enumerate().all(|(index, byte)| *byte == u8::from(index == 100)));
}

/// Tables of 1 GiB, of which the host stores what is used.
#[test]
fn the_largest_tables_take_no_memory() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("huge.qed"));
    let geometry = Geometry { cluster_bits: 26, table_bits: 4 };
    let fresh = super::Header::new(geometry, 1 << 62, None).expect("a header");
    storage.resize(fresh.l1_offset + geometry.table_bytes(), Preallocation::Off).expect("resized");
    fresh.write(&*storage).expect("written");
    let image =
        Image::from_layers(vec![Arc::new(open(&storage, OpenMode::Write).expect("opens"))]).expect("a layer");
    for at in [0, (1 << 53) - 1, (1 << 62) - 2] {
        image.write_at(&[1, 2], at).expect("written");
    }
    image.close().expect("closed");
    assert!(storage.allocated_bytes().expect("counted") < 1 << 20);
    let image =
        Image::from_layers(vec![Arc::new(open(&storage, OpenMode::Read).expect("opens"))]).expect("a layer");
    let mut bytes = [0; 2];
    image.read_at(&mut bytes, (1 << 53) - 1).expect("readable");
    assert_eq!(bytes, [1, 2]);
    let mut extents = Vec::new();
    image.map_range(0..1 << 62, &mut extents).expect("a map");
    assert_eq!(extents.len(), 5, "{extents:?}");
    let report = audit(&storage, Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks, report.allocated_clusters), (0, 0, 4));
}
