//! Whatever the history, the image reads as the flat model, its audit finds nothing, and both directories say
//! the same.

use std::{ops::Range, sync::Arc};

use proptest::prelude::*;

use super::{CRAFT_DIRECTORY_SECTOR, CRAFT_REDUNDANT_SECTOR, Craft, Folder, raw_layer, read_all};
use crate::{
    format::{Layer, OpenMode, Repair},
    image::{
        Image,
        flat_model::{Histories, UnderTest, live_through},
    },
    storage::MemoryStorage,
};

const DISK_BYTES: u64 = (3 << 20) + 512 * 3;

const HISTORIES: Histories =
    Histories { disk_bytes: DISK_BYTES, unit_bytes: 1 << 12, grows_by_sectors: 0, crashes: false };

fn craft() -> impl Strategy<Value = Craft> {
    any::<[bool; 4]>().prop_map(|[with_tables, redundant, zeroed_grains, has_parent]| Craft {
        sectors: DISK_BYTES / 512,
        with_tables,
        redundant,
        zeroed_grains,
        has_parent,
    })
}

fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("small")
}

fn part(range: &Range<u64>) -> Range<usize> {
    usize_of(range.start)..usize_of(range.end)
}

/// The entries of all tables of a directory, table by table.
fn entries(file: &[u8], directory_sector: u64) -> Vec<Option<Vec<u8>>> {
    let directory = usize_of(directory_sector * 512);
    let tables = file[directory..directory + 7 * 4].chunks(4);
    tables
        .map(|entry| match u32::from_le_bytes(entry.try_into().expect("four bytes")) {
            0 => None,
            sector => Some(file[usize_of(u64::from(sector) * 512)..][..512].to_vec()),
        })
        .collect()
}

/// An image, over a raw one if it has a parent.
struct Chain {
    craft: Craft,
    folder: Folder,
    storage: Arc<MemoryStorage>,
    below: Vec<u8>,
}

impl UnderTest for Chain {
    fn open(&self) -> Image {
        let mut layers: Vec<Arc<dyn Layer>> =
            vec![self.folder.open("d.vmdk", OpenMode::Write).expect("opens")];
        if self.craft.has_parent {
            layers.push(raw_layer(&self.below));
        }
        Image::from_layers(layers).expect("layers")
    }

    fn closed(&self) {
        let layer = self.folder.open("d.vmdk", OpenMode::Check { repair: false }).expect("opens");
        assert_eq!(layer.check(Repair::Nothing, &mut |_| {}).expect("an audit").corruptions, 0);
        if self.craft.redundant {
            let file = self.storage.to_vec();
            assert_eq!(entries(&file, CRAFT_DIRECTORY_SECTOR), entries(&file, CRAFT_REDUNDANT_SECTOR));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn image_equals_flat_model(
        craft in craft(),
        below_bytes in prop_oneof![Just(0_usize), Just(1 << 20), Just(4 << 20)],
        steps in HISTORIES.steps(),
    ) {
        let folder = Folder::default();
        let storage = Arc::new(MemoryStorage::from_bytes("d.vmdk", &craft.bytes()));
        folder.put("d.vmdk", Arc::clone(&storage) as _);
        let below: Vec<u8> = (0..below_bytes).map(|at| (at >> 9).to_le_bytes()[0] | 1).collect();
        let mut model = if craft.has_parent { below.clone() } else { Vec::new() };
        model.resize(usize_of(DISK_BYTES), 0);
        live_through(&Chain { craft, folder, storage, below }, model, &steps);
    }

    /// The same for images that this build makes, of one file and of several.
    #[test]
    fn new_images_equal_the_flat_model(
        kind in 0..3_usize,
        zeroed in any::<bool>(),
        steps in proptest::collection::vec((HISTORIES.range(), 0..=255_u8), 1..20),
    ) {
        let folder = Folder::default();
        let kind = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse"][kind];
        let zeroed = zeroed && kind != "monolithicFlat";
        let options = [("subformat", kind), ("zeroed_grain", if zeroed { "on" } else { "off" })];
        folder.create(DISK_BYTES, &options, None).expect("made");
        let mut model = vec![0; usize_of(DISK_BYTES)];
        for (range, byte) in steps {
            let image = folder.image("d.vmdk", OpenMode::Write);
            model[part(&range)].fill(byte);
            if byte == 0 {
                image.write_zeroes(range.clone(), true).expect("zeroed");
            } else {
                image.write_at(&model[part(&range)], range.start).expect("written");
            }
            image.close().expect("closed");
            prop_assert!(read_all(&folder.image("d.vmdk", OpenMode::Read)) == model);
        }
    }
}

/// A write that did not happen leaves nothing behind, and its place goes to the next one.
#[test]
fn a_dropped_write_is_undone() {
    let folder = Folder::default();
    folder.create(10 << 20, &[], None).expect("made");
    let storage = folder.file("d.vmdk").expect("made");
    let len = storage.len_bytes().expect("a length");
    let layer = folder.open("d.vmdk", OpenMode::Write).expect("opens");
    let writer = layer.writer().expect("writable");
    let at = {
        let prepared = writer.prepare_write(100..200_000).expect("prepared");
        assert_eq!(prepared.step().fill_before_bytes, 100);
        assert_eq!(prepared.step().fill_after_bytes, 4 * 65536 - 200_000);
        prepared.step().at.0 - 100
    };
    let again = writer.prepare_write(65536..65537).expect("prepared");
    assert_eq!(again.step().at.0, at);
    drop(again);
    writer.close().expect("closed");
    assert_eq!(storage.len_bytes().expect("a length"), len);
}

/// The first change of an opening gives the disk another content id, and the last of the text stays as it was.
#[test]
fn the_content_id_changes_with_the_content_and_nothing_else_does() {
    let folder = Folder::default();
    folder.create(1 << 20, &[("subformat", "twoGbMaxExtentSparse")], None).expect("made");
    let storage = folder.file("d.vmdk").expect("made");
    let text = |storage: &dyn crate::storage::Storage| {
        let mut bytes = vec![0; usize_of(storage.len_bytes().expect("a length"))];
        storage.read_at(&mut bytes, 0).expect("readable");
        String::from_utf8(bytes).expect("text").trim_end_matches('\0').to_owned()
    };
    let mut known = text(&*storage) + "vendor.key = \"kept\"\n";
    storage.write_at(known.as_bytes(), 0).expect("written");

    let image = folder.image("d.vmdk", OpenMode::Write);
    let mut byte = [0];
    image.read_at(&mut byte, 0).expect("readable");
    image.flush().expect("flushed");
    assert_eq!(text(&*storage), known, "nothing was changed");
    for changes in [true, false, false] {
        image.write_at(&[1], 0).expect("written");
        let now = text(&*storage);
        assert_eq!(now != known, changes);
        let without_id = |text: &str| text.lines().filter(|line| !line.starts_with("CID=")).count();
        assert_eq!(without_id(&now), without_id(&known));
        let id = now.lines().find(|line| line.starts_with("CID=")).expect("a content id");
        assert_eq!(
            now,
            known
                .lines()
                .map(|line| if line.starts_with("CID=") { id } else { line })
                .map(|line| format!("{line}\n"))
                .collect::<String>()
        );
        known = now;
    }
}
