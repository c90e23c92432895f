//! Numbers and names that no honest writer makes.

use std::sync::Arc;

use super::{CRAFT_DIRECTORY_SECTOR, CRAFT_TABLES_SECTOR, Craft, Folder};
use crate::{
    format::{OpenMode, OptionSet, Repair},
    storage::{MemoryStorage, Preallocation, Storage},
};

const CRAFT: Craft =
    Craft { sectors: 4096, with_tables: true, redundant: false, zeroed_grains: false, has_parent: false };

/// A crafted image with one 32-bit word changed.
fn with_word(at: u64, word: u32) -> Folder {
    let mut bytes = CRAFT.bytes();
    let at = usize::try_from(at).expect("small");
    bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    let folder = Folder::default();
    folder.put("d.vmdk", Arc::new(MemoryStorage::from_bytes("d.vmdk", &bytes)));
    folder
}

fn describe(create_type: &str, lines: &str) -> Folder {
    let folder = Folder::default();
    let text = format!("# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"{create_type}\"\n{lines}");
    folder.put("d.vmdk", Arc::new(MemoryStorage::from_bytes("d.vmdk", text.as_bytes())));
    for name in ["a", "b", "/etc/secret", "../secret", "sub/../../secret", "sub/a", "./x:y"] {
        let storage = MemoryStorage::new(name);
        storage.resize(1 << 20, Preallocation::Off).expect("resized");
        folder.put(name, Arc::new(storage));
    }
    folder
}

#[test]
fn entries_that_lead_out_of_the_file_are_named() {
    for (at, word, expected) in [
        (CRAFT_DIRECTORY_SECTOR * 512, 0xffff_ffff, "grain directory entry at byte 0x800"),
        (CRAFT_TABLES_SECTOR * 512, 0xffff_ffff, "grain table entry at byte 0x1000"),
    ] {
        let folder = with_word(at, word);
        let image = folder.image("d.vmdk", OpenMode::Write);
        for error in [image.read_at(&mut [0; 512], 0), image.write_at(&[1], 0)] {
            let error = error.expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
        let layer = folder.open("d.vmdk", OpenMode::Check { repair: false }).expect("opens");
        let mut found = Vec::new();
        let error = layer.check(Repair::Nothing, &mut |finding| found.push(finding.text));
        let error = error.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(found.len(), 1, "{found:?}");
    }
}

/// Guest bytes never overwrite header, descriptor, directories or tables.
#[test]
fn grains_that_hold_metadata_are_read_and_not_written() {
    for sector in [1, CRAFT_DIRECTORY_SECTOR, CRAFT_TABLES_SECTOR] {
        let folder = with_word(CRAFT_TABLES_SECTOR * 512, u32::try_from(sector).expect("small"));
        let before = folder.file("d.vmdk").expect("there");
        let len = usize::try_from(before.len_bytes().expect("a length")).expect("small");
        let mut old = vec![0; len - 2048];
        let image = folder.image("d.vmdk", OpenMode::Write);
        image.read_at(&mut [0; 4096], 0).expect("readable");
        before.read_at(&mut old, 2048).expect("readable");
        let error = image.write_at(&[0xff; 4096], 0).expect_err("metadata").to_string();
        assert!(error.contains("a grain that holds no metadata"), "{error}");
        assert!(image.write_zeroes(0..4096, false).is_err());
        let mut new = vec![0; len - 2048];
        before.read_at(&mut new, 2048).expect("readable");
        assert!(old == new, "sector {sector}");
    }
}

#[test]
fn a_directory_for_a_petabyte_takes_no_memory_and_must_be_there() {
    let folder = Folder::default();
    let mut bytes = CRAFT.bytes();
    bytes[12..20].copy_from_slice(&(1_u64 << 34).to_le_bytes()); // capacity: 2^24 tables
    folder.put("d.vmdk", Arc::new(MemoryStorage::from_bytes("d.vmdk", &bytes)));
    let error = folder.open("d.vmdk", OpenMode::Read).expect_err("not there").to_string();
    assert!(
        error.contains("grain directory at byte 0x800: expected 16777216 entries inside the file"),
        "{error}"
    );
    // With a file that long it is there, and nobody reads all of it.
    let storage = folder.file("d.vmdk").expect("there");
    storage.resize(1 << 30, Preallocation::Off).expect("a hole");
    let image = folder.image("d.vmdk", OpenMode::Read);
    image.read_at(&mut [0; 512], (1 << 43) - 512).expect("readable");
}

#[test]
fn extents_stay_in_the_folder_of_their_descriptor() {
    for name in ["/etc/secret", "../secret", "sub/../../secret", ".."] {
        let folder = describe("monolithicFlat", &format!("RW 8 FLAT \"{name}\" 0\n"));
        for mode in [OpenMode::Inspect, OpenMode::Read, OpenMode::Write] {
            let error = folder.open("d.vmdk", mode).expect_err(name).to_string();
            assert!(error.contains("is not in the folder") && error.contains("extent-names=any"), "{error}");
        }
        if name != ".." {
            let mut options = OptionSet::new();
            options.set("extent-names", "any");
            folder.open_with("d.vmdk", OpenMode::Read, &options).expect("allowed");
        }
    }
    for name in ["a", "sub/a", "x:y"] {
        let folder = describe("monolithicFlat", &format!("RW 8 FLAT \"{name}\" 0\n"));
        folder.open("d.vmdk", OpenMode::Read).expect("in the folder");
    }
}

#[test]
fn descriptors_that_make_no_disk_are_refused() {
    for (kind, lines, expected) in [
        ("monolithicFlat", "RW 8 FLAT \"a\" 0\nRW 8 FLAT \"a\" 7\n", "share no bytes"),
        ("twoGbMaxExtentSparse", "RW 8 SPARSE \"a\"\n", "not a vmdk image"),
        ("twoGbMaxExtentSparse", "RW 8 SPARSE \"d.vmdk\"\n", "not a vmdk image"),
        ("vmfsSparse", "RW 8 VMFSSPARSE \"a\"\n", "not a COWD image"),
        ("seSparse", "RW 8 SESPARSE \"a\"\n", "not a seSparse image"),
        ("monolithicFlat", "RW 8 FLAT \"missing\" 0\n", "no file 'missing'"),
        ("monolithicSparse", "RW 8 SPARSE \"a\"\n", "Unsupported image type 'monolithicSparse'"),
        ("fullDevice", "RW 8 FLAT \"a\" 0\n", "Unsupported image type 'fullDevice'"),
        (
            "monolithicFlat",
            "RW 18014398509481983 FLAT \"a\" 0\nRW 18014398509481983 FLAT \"b\" 0\n",
            "less than 2^63 bytes",
        ),
    ] {
        let error = describe(kind, lines).open("d.vmdk", OpenMode::Read).expect_err(expected).to_string();
        assert!(error.contains(expected), "{lines}: {error}");
    }
    describe("monolithicFlat", "RW 8 FLAT \"a\" 0\nRW 8 FLAT \"a\" 8\n")
        .open("d.vmdk", OpenMode::Read)
        .expect("two parts of a file");
}

/// No NUL and no end: a descriptor is text up to a limit, and a whole file of one character is none.
#[test]
fn endless_text_is_no_descriptor() {
    let folder = Folder::default();
    let text = b"#".repeat(3 << 20);
    folder.put("d.vmdk", Arc::new(MemoryStorage::from_bytes("d.vmdk", &text)));
    let error = folder.open("d.vmdk", OpenMode::Read).expect_err("no descriptor").to_string();
    assert!(error.contains("not a vmdk image"), "{error}");
}

#[test]
fn read_only_and_zero_extents_are_the_descriptors_word() {
    let folder = describe("monolithicFlat", "RW 8 FLAT \"a\" 0\nRDONLY 8 FLAT \"b\" 0\nRW 8 ZERO\n");
    let image = folder.image("d.vmdk", OpenMode::Write);
    assert_eq!(image.virtual_size_bytes(), 24 * 512);
    image.write_at(&[1; 512], 0).expect("written");
    for (at, expected) in [(8 * 512, "RDONLY"), (16 * 512, "ZERO")] {
        let error = image.write_at(&[1; 512], at).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
    let mut bytes = [9; 512];
    image.read_at(&mut bytes, 16 * 512).expect("readable");
    assert_eq!(bytes, [0; 512]);
}

/// A disk of no bytes has no extent to look in, and at the end of any other there is none either.
#[test]
fn compressed_grains_behind_the_end_of_the_disk_are_refused() {
    let stream = Folder::default();
    stream.create(1 << 20, &[("subformat", "streamOptimized")], None).expect("made");
    for (folder, size) in [
        (describe("monolithicFlat", ""), 0),
        (describe("monolithicFlat", "RW 128 FLAT \"a\" 0\n"), 65536),
        (with_word(12, 128), 65536), // header.capacity, the low half
        (stream, 1 << 20),
    ] {
        let image = folder.image("d.vmdk", OpenMode::Write);
        assert_eq!(image.virtual_size_bytes(), size);
        let storage = folder.file("d.vmdk").expect("there");
        let content = || {
            let mut bytes = vec![0; usize::try_from(storage.len_bytes().expect("a length")).expect("small")];
            storage.read_at(&mut bytes, 0).expect("readable");
            bytes
        };
        let before = content();
        for at in [size, size + 65536, !0xffff] {
            let error = image.write_compressed(&[1; 100], at).expect_err("outside").to_string();
            assert!(error.contains(&format!("not inside the disk of {size} bytes")), "{at:#x}: {error}");
        }
        image.close().expect("closed");
        assert!(content() == before, "a refused grain changed the image of {size} bytes");
    }
}
