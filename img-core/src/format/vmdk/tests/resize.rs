//! Growing and mending: against a flat model, over power cuts, with each operation failing once.

use std::sync::Arc;

use super::{
    super::{
        header::RawHeader,
        open::{content_id, described_text},
    },
    Craft, Folder, raw_layer, read_all,
};
use crate::{
    Result,
    format::{OpenMode, Repair},
    image::Image,
    storage::{
        MemoryStorage, Preallocation,
        testing::{CrashRecorder, FailAt, Operation},
    },
};

const CRAFT_BYTES: u64 = (1 << 20) + 3 * 512;

/// Kinds that grow, and the names of their files.
const KINDS: [(&str, &[&str]); 4] = [
    ("monolithicSparse", &["d.vmdk"]),
    ("monolithicFlat", &["d.vmdk", "d-flat.vmdk"]),
    ("twoGbMaxExtentSparse", &["d.vmdk", "d-s001.vmdk"]),
    ("twoGbMaxExtentFlat", &["d.vmdk", "d-f001.vmdk"]),
];

fn crafts() -> impl Iterator<Item = Craft> {
    [(true, true), (false, true), (true, false), (false, false)].into_iter().map(
        |(with_tables, redundant)| Craft {
            sectors: CRAFT_BYTES / 512,
            with_tables,
            redundant,
            zeroed_grains: true,
            has_parent: false,
        },
    )
}

/// The same as children of a longer disk, which stands on no table.
fn children() -> impl Iterator<Item = Craft> {
    let zeroed_grains = [true, false].into_iter();
    zeroed_grains.flat_map(|zeroed_grains| {
        crafts().map(move |craft| Craft { zeroed_grains, has_parent: true, ..craft })
    })
}

/// The bytes of a parent that ends inside a grain, behind the tables that its children have.
fn parent() -> Vec<u8> {
    (0..(5 << 20) / 2 + 512).map(|at: usize| (at / 300 % 250 + 1).to_le_bytes()[0]).collect()
}

/// The image over a parent of these bytes, or over none.
fn over(folder: &Folder, mode: OpenMode, parent: &[u8]) -> Image {
    let layer = folder.open("d.vmdk", mode).unwrap_or_else(|error| panic!("{error}"));
    let below = (!parent.is_empty()).then(|| raw_layer(parent));
    Image::from_layers([layer].into_iter().chain(below).collect()).expect("a layer")
}

fn of_craft(craft: Craft) -> Folder {
    let folder = Folder::default();
    folder.put("d.vmdk", Arc::new(MemoryStorage::from_bytes("d.vmdk", &craft.bytes())));
    folder
}

fn of_kind(kind: &str) -> Folder {
    let folder = Folder::default();
    folder.create(CRAFT_BYTES, &[("subformat", kind)], None).expect("made");
    folder
}

fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("small")
}

/// Writes a run of bytes to the image and to its model.
fn write(image: &Image, model: &mut [u8], at: u64, len: usize, byte: u8) {
    model[usize_of(at)..usize_of(at) + len].fill(byte);
    image.write_at(&vec![byte; len], at).expect("written");
}

fn check(folder: &Folder, repair: Repair) -> Result<(u64, Vec<String>)> {
    let mode = OpenMode::Check { repair: repair != Repair::Nothing };
    let mut texts = Vec::new();
    let layer = folder.open("d.vmdk", mode)?;
    let report = layer.check(repair, &mut |finding| texts.push(finding.text))?;
    Ok((report.corruptions_fixed, texts))
}

#[test]
fn a_grown_disk_reads_as_the_model() {
    let folders = crafts().map(of_craft).chain(KINDS.map(|(kind, _)| of_kind(kind)));
    for folder in folders {
        let mut model = vec![0; usize_of(CRAFT_BYTES)];
        let mut image = folder.image("d.vmdk", OpenMode::Write);
        for (round, size) in (1_u8..).zip([CRAFT_BYTES + 512, 2 << 20, 3 << 20, 100 << 20]) {
            let end = model.len() as u64;
            write(&image, &mut model, end - 700, 700, round);
            write(&image, &mut model, 5000 * u64::from(round), 9000, round);
            image.resize(size, Preallocation::Off).unwrap_or_else(|error| panic!("{error}"));
            model.resize(usize_of(size), 0);
            assert_eq!(image.virtual_size_bytes(), size);
            assert!(read_all(&image) == model, "{round}");
            write(&image, &mut model, size - 3000, 3000, round + 100);
            if round % 2 == 0 {
                image.close().expect("closed");
                assert!(read_all(&folder.image("d.vmdk", OpenMode::Read)) == model, "{round}: opened again");
                image = folder.image("d.vmdk", OpenMode::Write);
            }
        }
        image.close().expect("closed");
        assert!(read_all(&folder.image("d.vmdk", OpenMode::Read)) == model);
        assert_eq!(check(&folder, Repair::All).expect("an audit"), (0, Vec::new()), "all is in step");
    }
}

#[test]
fn the_descriptor_says_the_new_size() {
    for (kind, _) in KINDS.into_iter().skip(1) {
        let folder = of_kind(kind);
        let image = folder.image("d.vmdk", OpenMode::Write);
        image.resize(50 << 20, Preallocation::Off).expect("grown");
        image.close().expect("closed");
        let (text, _) = described_text(&*folder.file("d.vmdk").expect("there")).expect("a descriptor");
        let text = String::from_utf8(text).expect("text");
        assert!(text.contains(&format!("RW {} ", (50 << 20) / 512)), "{kind}: {text}");
    }
}

/// What other programs left behind the end: bytes of the last grain, entries of the last table, bytes of the file.
#[test]
fn nothing_from_behind_the_old_end_shows() {
    let craft = crafts().next().expect("the first");
    let mut bytes = craft.bytes();
    let at_table = |index: usize| 8 * 512 + 2 * 512 + index * 4; // the third table, of the last 3 sectors
    let grain_at = bytes.len();
    bytes.extend([0xdd; 4096]);
    let sector = u32::try_from(grain_at / 512).expect("small");
    for index in 0..128 {
        bytes[at_table(index)..at_table(index) + 4].copy_from_slice(&sector.to_le_bytes());
    }
    let folder = Folder::default();
    folder.put("d.vmdk", Arc::new(MemoryStorage::from_bytes("d.vmdk", &bytes)));
    let image = folder.image("d.vmdk", OpenMode::Write);
    let mut model = read_all(&image);
    assert_eq!(model[model.len() - 1], 0xdd, "the last grain is there");
    image.resize(2 << 20, Preallocation::Off).expect("grown");
    model.resize(2 << 20, 0);
    assert!(read_all(&image) == model);

    let folder = of_kind("monolithicFlat");
    folder.file("d-flat.vmdk").expect("there").write_at(&[0xdd; 9000], CRAFT_BYTES).expect("written");
    let image = folder.image("d.vmdk", OpenMode::Write);
    image.resize(CRAFT_BYTES + 4096, Preallocation::Off).expect("grown");
    assert!(read_all(&image).iter().all(|byte| *byte == 0));
}

#[test]
fn what_cannot_grow_is_refused_by_name() {
    let refusal = |folder: &Folder, bytes: u64, preallocation| {
        let image = folder.image("d.vmdk", OpenMode::Write);
        image.resize(bytes, preallocation).expect_err("refused").to_string()
    };
    let folder = of_kind("streamOptimized");
    assert!(refusal(&folder, 2 << 20, Preallocation::Off).contains("resizing a streamOptimized VMDK"));
    let folder = of_kind("twoGbMaxExtentSparse");
    assert!(refusal(&folder, (2 << 30) + 512, Preallocation::Off).contains("past the 2 GiB"));
    assert!(refusal(&folder, 2 << 20, Preallocation::Full).contains("preallocation in a sparse VMDK"));
    let folder = of_kind("monolithicSparse");
    assert!(refusal(&folder, 1 << 20, Preallocation::Off).contains("shrinking a VMDK"));
    assert!(refusal(&folder, i64::MAX as u64 - 511, Preallocation::Off).contains("at most"));
    assert_eq!(check(&folder, Repair::All).expect("an audit").0, 0);
}

/// What a child shows of a parent that is longer than itself ends where the child does, also when it grows, over
/// another grain, a missing table and the directory's end; what it holds stays as it was.
#[test]
fn a_grown_child_shows_no_more_of_its_parent() {
    let parent = parent();
    for craft in children() {
        let folder = of_craft(craft);
        let id = || content_id(&*folder.file("d.vmdk").expect("there")).expect("one");
        let mut model = parent[..usize_of(CRAFT_BYTES)].to_vec();
        let mut image = over(&folder, OpenMode::Write, &parent);
        for (round, size) in (1_u8..).zip([CRAFT_BYTES + 512, (2 << 20) - 1024, 3 << 20, 100 << 20]) {
            let before = id();
            image.resize(size, Preallocation::Off).unwrap_or_else(|error| panic!("{error}"));
            model.resize(usize_of(size), 0);
            assert!(read_all(&image) == model, "{craft:?}, {round}");
            image.close().expect("closed");
            assert_eq!(id(), before, "{craft:?}, {round}: children stay children");
            image = over(&folder, OpenMode::Write, &parent);
            assert!(read_all(&image) == model, "{craft:?}, {round}: opened again");
            write(&image, &mut model, size - 3000, 3000, round + 100);
            write(&image, &mut model, 5000 * u64::from(round), 9000, round);
        }
        image.close().expect("closed");
        assert!(read_all(&over(&folder, OpenMode::Read, &parent)) == model, "{craft:?}");
        assert_eq!(check(&folder, Repair::All).expect("an audit"), (0, Vec::new()), "all is in step");
    }
}

/// A disk that grows.
struct Growing {
    folder: Folder,
    files: &'static [&'static str],
    /// What its parent holds; nothing for none.
    parent: Vec<u8>,
    new_bytes: u64,
}

/// Every kind, and children of a longer parent.
fn all_that_grows() -> impl Iterator<Item = Growing> {
    let grown = |folder, files, new_bytes| Growing { folder, files, parent: Vec::new(), new_bytes };
    let child = move |craft| Growing { parent: parent(), ..grown(of_craft(craft), &["d.vmdk"], 6 << 20) };
    let crafted = crafts().map(move |craft| grown(of_craft(craft), &["d.vmdk"], 6 << 20));
    let kinds = KINDS.map(move |(kind, files)| grown(of_kind(kind), files, 40 << 20));
    crafted.chain(kinds).chain(children().map(child))
}

/// Crash order of `resize`, 1 to 6: the old disk or the new one.
#[test]
fn a_power_cut_leaves_the_old_disk_or_the_new_one() {
    for Growing { folder, files, parent, new_bytes } in all_that_grows() {
        let recorder = CrashRecorder::new();
        for name in files {
            folder.put(name, recorder.record(folder.file(name).expect("there")).expect("recorded"));
        }
        let image = over(&folder, OpenMode::Write, &parent);
        let mut old = read_all(&image);
        write(&image, &mut old, CRAFT_BYTES - 9000, 9000, 7);
        image.flush().expect("flushed");
        recorder.mark(1);
        image.resize(new_bytes, Preallocation::Off).expect("grown");
        recorder.mark(2);
        let mut new = old.clone();
        new.resize(usize_of(new_bytes), 0);
        let mut sizes = [0, 0];
        for state in recorder.states(5, 300).filter(|state| state.mark.is_some()) {
            let folder = Folder::default();
            for (name, file) in files.iter().zip(&state.files) {
                folder.put(name, Arc::new(file.snapshot()));
            }
            check(&folder, Repair::Nothing).unwrap_or_else(|error| panic!("{state:?}: {error}"));
            let now = read_all(&over(&folder, OpenMode::Read, &parent));
            assert!(now == new || now == old && state.mark == Some(1), "{files:?}, {state:?}: {}", now.len());
            sizes[usize::from(now == new)] += 1;
            // Mending brings what is left behind in step.
            check(&folder, Repair::All).expect("mended");
            assert_eq!(check(&folder, Repair::All).expect("an audit"), (0, Vec::new()));
            assert!(read_all(&over(&folder, OpenMode::Read, &parent)) == now);
            if now == old {
                // A second try shows nothing of the first.
                let image = over(&folder, OpenMode::Write, &parent);
                image.resize(new_bytes, Preallocation::Off).expect("grown");
                assert!(read_all(&image) == new, "{files:?}, {state:?}");
            }
        }
        assert!(sizes.iter().all(|count| *count > 0), "{files:?}: both sizes were met: {sizes:?}");
    }
}

/// Growing fails at each of its changes: the image that is open takes no harm to the file, and what is opened next is
/// the old disk or the new one.
#[test]
fn a_failure_leaves_the_old_disk_or_the_new_one() {
    for number in 0..all_that_grows().count() {
        for nth in 0.. {
            let growing = all_that_grows().nth(number).expect("counted");
            let Growing { folder, files, parent, new_bytes } = growing;
            let failing = files.last().expect("one");
            let plain = folder.file(failing).expect("there");
            let changes = |operation| !matches!(operation, Operation::Read);
            let storage = Arc::new(FailAt::once(Arc::clone(&plain), changes, nth));
            folder.put(failing, Arc::clone(&storage) as _);
            let image = over(&folder, OpenMode::Write, &parent);
            let mut old = read_all(&image);
            let grown = image.resize(new_bytes, Preallocation::Off);
            // What is written after a failure is there, or was refused.
            let written = image.write_at(&[9; 512], 0).and_then(|()| image.flush());
            drop(image);
            folder.put(failing, plain);
            check(&folder, Repair::Nothing).unwrap_or_else(|error| panic!("{number}, {nth}: {error}"));
            let now = read_all(&over(&folder, OpenMode::Read, &parent));
            assert!(
                now.len() == usize_of(new_bytes) || now.len() == old.len() && grown.is_err(),
                "{number}, {nth}"
            );
            old.resize(now.len(), 0);
            assert!(now[512..] == old[512..], "{number}, {nth}");
            if written.is_ok() {
                assert_eq!(now[..512], [9; 512], "{number}, {nth}");
            }
            if storage.seen() <= nth {
                assert!(grown.is_ok() && written.is_ok());
                break;
            }
        }
    }
}

/// Each table of the redundant directory broken in turn, and then the first one's.
#[test]
fn directories_are_brought_in_step() {
    let craft = crafts().next().expect("with both directories");
    let healthy = of_craft(craft);
    let mut model = vec![0; usize_of(CRAFT_BYTES)];
    let image = healthy.image("d.vmdk", OpenMode::Write);
    for at in (0..CRAFT_BYTES - 5000).step_by(100_000) {
        write(&image, &mut model, at, 5000, 3);
    }
    image.close().expect("closed");
    let mut bytes = vec![0; usize_of(healthy.file("d.vmdk").expect("there").len_bytes().expect("a length"))];
    healthy.file("d.vmdk").expect("there").read_at(&mut bytes, 0).expect("read");
    for (directory_sector, which) in [(5, "redundant grain table"), (4, "grain table")] {
        for table in 0..3 {
            // An entry far behind the end of the file.
            let mut broken = bytes.clone();
            broken[directory_sector * 512 + table * 4..][..4].copy_from_slice(&[0xff, 0xff, 0xff, 0]);
            let folder = Folder::default();
            folder.put("d.vmdk", Arc::new(MemoryStorage::from_bytes("d.vmdk", &broken)));
            let (fixed, texts) = check(&folder, Repair::All).expect("mended");
            assert_eq!((fixed, texts.len()), (1, 1), "{texts:?}");
            assert_eq!(texts[0], format!("Repairing {which} {table} of 'd.vmdk'"));
            assert!(read_all(&folder.image("d.vmdk", OpenMode::Read)) == model, "{which} {table}");
            assert_eq!(check(&folder, Repair::All).expect("an audit"), (0, Vec::new()));
        }
    }
    // Both broken: nothing is mended, and the audit says what it said before.
    let mut broken = bytes.clone();
    for sector in [4, 5] {
        broken[sector * 512..][..4].copy_from_slice(&[0xff, 0xff, 0xff, 0]);
    }
    let folder = Folder::default();
    let storage = Arc::new(MemoryStorage::from_bytes("d.vmdk", &broken));
    folder.put("d.vmdk", Arc::clone(&storage) as _);
    assert!(check(&folder, Repair::All).is_err());
    assert!(storage.to_vec() == broken, "nothing was changed");
    // Directories over each other are left alone.
    let mut broken = bytes;
    broken[48..56].copy_from_slice(&4_u64.to_le_bytes());
    let shifted = usize_of(4 * 512);
    broken[shifted + 4..shifted + 8].copy_from_slice(&[0; 4]);
    let at = u64::from_le_bytes(broken[56..64].try_into().expect("eight bytes"));
    assert_eq!(at, 4, "both at one place: there is nothing to mend");
    let folder = Folder::default();
    folder.put("d.vmdk", Arc::new(MemoryStorage::from_bytes("d.vmdk", &broken)));
    assert_eq!(check(&folder, Repair::All).expect("an audit").0, 0);
}

#[test]
fn the_mark_of_an_unclean_shutdown_is_taken_away() {
    let folder = of_kind("monolithicSparse");
    let storage = folder.file("d.vmdk").expect("there");
    storage.write_at(&[1], 72).expect("written");
    assert_eq!(check(&folder, Repair::Nothing).expect("an audit"), (0, Vec::new()));
    let (fixed, texts) = check(&folder, Repair::All).expect("mended");
    assert_eq!((fixed, texts), (1, vec!["Repairing mark of an unclean shutdown of 'd.vmdk'".to_owned()]));
    assert_eq!(RawHeader::read(&*storage, 0).expect("read").unclean_shutdown, 0);
    assert_eq!(check(&folder, Repair::All).expect("an audit"), (0, Vec::new()));
}
