//! Whatever the history, the image reads as the flat model, its audit finds nothing, and both directories say
//! the same.

use std::{ops::Range, sync::Arc};

use proptest::prelude::*;

use super::{CRAFT_DIRECTORY_SECTOR, CRAFT_REDUNDANT_SECTOR, Craft, Folder, raw_layer, read_all};
use crate::{
    format::{Layer, OpenMode, Repair},
    image::Image,
    storage::MemoryStorage,
};

const DISK_BYTES: u64 = (3 << 20) + 512 * 3;

#[derive(Clone, Debug)]
enum Step {
    Write(Range<u64>, u8),
    Zero(Range<u64>, bool),
    Discard(Range<u64>),
    Prepare(Range<u64>),
    Flush,
    Reopen,
}

fn range() -> impl Strategy<Value = Range<u64>> {
    let start = prop_oneof![0..DISK_BYTES, (0..DISK_BYTES >> 12).prop_map(|grain| grain << 12)];
    let len = prop_oneof![1..30_000_u64, (1..300_u64).prop_map(|grains| grains << 12)];
    (start, len).prop_map(|(start, len)| start..(start + len).min(DISK_BYTES))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (range(), 1..=255_u8).prop_map(|(range, byte)| Step::Write(range, byte)),
        3 => (range(), any::<bool>()).prop_map(|(range, unmap)| Step::Zero(range, unmap)),
        1 => range().prop_map(Step::Discard),
        1 => range().prop_map(Step::Prepare),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

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

fn check_one(craft: Craft, below_bytes: usize, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let folder = Folder::default();
    let storage = Arc::new(MemoryStorage::from_bytes("d.vmdk", &craft.bytes()));
    folder.put("d.vmdk", Arc::clone(&storage) as _);
    let below: Vec<u8> = (0..below_bytes).map(|at| (at >> 9).to_le_bytes()[0] | 1).collect();
    let open = || {
        let mut layers: Vec<Arc<dyn Layer>> = vec![folder.open("d.vmdk", OpenMode::Write).expect("opens")];
        if craft.has_parent {
            layers.push(raw_layer(&below));
        }
        Image::from_layers(layers).expect("layers")
    };
    let mut model = if craft.has_parent { below.clone() } else { Vec::new() };
    model.resize(usize_of(DISK_BYTES), 0);
    let mut image = open();
    for step in steps {
        match &step {
            Step::Write(range, byte) => {
                model[part(range)].fill(*byte);
                image.write_at(&model[part(range)], range.start).expect("written");
            }
            Step::Zero(range, unmap) => {
                model[part(range)].fill(0);
                image.write_zeroes(range.clone(), *unmap).expect("zeroed");
            }
            Step::Discard(range) => {
                // What is there becomes zeroes; what is not stays.
                image.discard(range.clone()).expect("discarded");
                let now = read_all(&image);
                for at in part(range) {
                    prop_assert!(now[at] == 0 || now[at] == model[at], "{at:#x}");
                    model[at] = now[at];
                }
            }
            Step::Prepare(range) => {
                let layer = &image.layers()[0];
                drop(layer.writer().expect("writable").prepare_write(range.clone()).expect("prepared"));
            }
            Step::Flush => image.flush().expect("flushed"),
            Step::Reopen => {
                image.close().expect("closed");
                image = open();
            }
        }
        prop_assert!(read_all(&image) == model, "after {step:?}");
    }
    image.close().expect("closed");
    let layer = folder.open("d.vmdk", OpenMode::Check { repair: false }).expect("opens");
    prop_assert_eq!(layer.check(Repair::Nothing, &mut |_| {}).expect("an audit").corruptions, 0);
    if craft.redundant {
        let file = storage.to_vec();
        prop_assert_eq!(entries(&file, CRAFT_DIRECTORY_SECTOR), entries(&file, CRAFT_REDUNDANT_SECTOR));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn image_equals_flat_model(
        craft in craft(),
        below_bytes in prop_oneof![Just(0_usize), Just(1 << 20), Just(4 << 20)],
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        check_one(craft, below_bytes, steps)?;
    }

    /// The same for images that this build makes, of one file and of several.
    #[test]
    fn new_images_equal_the_flat_model(
        kind in 0..3_usize,
        zeroed in any::<bool>(),
        steps in proptest::collection::vec((range(), 0..=255_u8), 1..20),
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
