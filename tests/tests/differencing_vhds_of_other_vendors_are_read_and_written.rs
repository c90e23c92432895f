//! Differencing VHDs as several vendors lay them out, over a fixed parent.

use std::{fs, path::Path};

use img_core::{
    Result,
    format::{OpenMode, Repair},
    image::{Image, ImageName},
};
use img_tests::{
    command::img,
    craft::vhd::{self, BLOCK, Child, SECTOR},
    open, open_options,
    pattern::assert_same,
    read_all,
};

/// A disk of somewhat more than three blocks.
const CYLINDERS: u16 = 200;

/// Bytes that tell where they stand.
fn parent_bytes() -> Vec<u8> {
    let sectors = u32::from(CYLINDERS) * 4 * 17;
    (0..sectors).flat_map(|sector| [(sector % 97 + 1).to_le_bytes()[0]; SECTOR]).collect()
}

/// What the guest of a child reads.
fn guest_bytes(child: &Child) -> Vec<u8> {
    let mut guest = parent_bytes();
    for (block, sectors) in &child.blocks {
        for &(sector, byte) in sectors {
            guest[*block as usize * BLOCK + sector as usize * SECTOR..][..SECTOR].fill(byte);
        }
    }
    guest
}

/// A folder with the parent and the child.
fn folder(child: &Child) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let parent = vhd::fixed(&parent_bytes(), (CYLINDERS, 4, 17), *b"vpc ");
    fs::write(folder.path().join("parent.vhd"), parent).expect("written");
    fs::write(folder.path().join("child.vhd"), child.bytes()).expect("written");
    folder
}

fn audit(path: &Path) -> Result<(u64, u64)> {
    let image = open(path, Some("vpc"), OpenMode::Check { repair: false })?;
    let report = image.check(Repair::Nothing, &mut |_| {})?;
    Ok((report.corruptions, report.leaks))
}

#[test]
fn the_guest_reads_its_own_sectors_and_the_parent_s() {
    for (vendor, child) in vhd::vendors(CYLINDERS) {
        let folder = folder(&child);
        let path = folder.path().join("child.vhd");
        for format in [None, Some("vpc")] {
            let image =
                open(&path, format, OpenMode::Read).unwrap_or_else(|error| panic!("{vendor}: {error}"));
            assert_eq!(image.layers().len(), 2, "{vendor}");
            assert!(image.warnings().is_empty(), "{vendor}: {:?}", image.warnings());
            assert_same(&read_all(&image).expect("readable"), &guest_bytes(&child), vendor);
        }
        assert_eq!(audit(&path).expect("audited"), (0, 0), "{vendor}");
    }
}

#[test]
fn what_is_written_stays_in_the_child() {
    for (vendor, child) in vhd::vendors(CYLINDERS) {
        let folder = folder(&child);
        let path = folder.path().join("child.vhd");
        let parent = fs::read(folder.path().join("parent.vhd")).expect("readable");
        let mut guest = guest_bytes(&child);
        let image = open(&path, None, OpenMode::Write).unwrap_or_else(|error| panic!("{vendor}: {error}"));
        // Inside a sector that is there, across one that is not, into a block that is not, and as zeroes.
        for (at, len, byte) in [(10, 100, 1), (5000, 700, 2), (BLOCK + 77, 1000, 3), (2 * BLOCK - 50, 100, 4)]
        {
            image.write_at(&vec![byte; len], at as u64).expect("written");
            guest[at..at + len].fill(byte);
        }
        let zeroes = 3 * BLOCK..3 * BLOCK + 5 * SECTOR;
        image.write_zeroes(zeroes.start as u64..zeroes.end as u64, true).expect("zeroed");
        guest[zeroes].fill(0);
        assert_same(&read_all(&image).expect("readable"), &guest, vendor);
        image.close().expect("closed");
        assert_eq!(audit(&path).expect("audited"), (0, 0), "{vendor}");
        let image = open(&path, None, OpenMode::Read).expect("opened again");
        assert_same(&read_all(&image).expect("readable"), &guest, vendor);
        assert!(fs::read(folder.path().join("parent.vhd")).expect("readable") == parent, "{vendor}");
    }
}

#[test]
fn what_stands_behind_the_table_is_kept() {
    let vendors = vhd::vendors(CYLINDERS);
    let (_, child) = vendors.iter().find(|(_, child)| child.has_batmap).expect("XenServer's");
    // Without blocks the file ends right behind the map of full blocks and the names.
    let child = Child { blocks: Vec::new(), ..child.clone() };
    let folder = folder(&child);
    let path = folder.path().join("child.vhd");
    let before = fs::read(&path).expect("readable");
    let image = open(&path, None, OpenMode::Write).expect("opened");
    image.write_at(&[7; 4096], 0).expect("written");
    image.close().expect("closed");
    let after = fs::read(&path).expect("readable");
    // All but the table's first entry and the footer, which moved.
    let (table, end) = (3 * SECTOR, before.len() - SECTOR);
    assert!(after[..table] == before[..table] && after[table + 4..end] == before[table + 4..end]);
    assert_eq!(after[after.len() - SECTOR..], before[end..]);
}

#[test]
fn another_disk_is_not_taken_for_the_parent() {
    let (_, child) = vhd::vendors(CYLINDERS).remove(0);
    let folder = folder(&child);
    let parent = folder.path().join("parent.vhd");
    let mut bytes = fs::read(&parent).expect("readable");
    let end = bytes.len() - SECTOR;
    let size = end as u64;
    let other = vhd::footer(2, size, (CYLINDERS, 4, 17), *b"vpc ", *b"Wi2k", *b"another-disk-id-");
    bytes[end..].copy_from_slice(&other);
    fs::write(&parent, &bytes).expect("written");
    let error =
        open(&folder.path().join("child.vhd"), None, OpenMode::Read).expect_err("refused").to_string();
    assert!(error.contains("header.parent_unique_id"), "{error}");
    // Whoever names the parent, or none, has decided.
    let text = format!(
        "driver=vpc,file.filename={child},backing.driver=vpc,backing.file.filename={parent}",
        child = folder.path().join("child.vhd").display(),
        parent = parent.display()
    );
    let name = ImageName::parse_options(&text).expect("a name");
    Image::open(&name, &open_options(None, OpenMode::Read)).expect("the user knows");
}

#[test]
fn a_parent_that_was_changed_since_is_worth_a_warning() {
    let (_, child) = vhd::vendors(CYLINDERS).remove(0);
    let folder = folder(&child);
    let parent = folder.path().join("parent.vhd");
    let mut bytes = fs::read(&parent).expect("readable");
    // Another time stamp in the footer; its sum, a complement, grows by as much as the byte falls.
    let end = bytes.len() - SECTOR;
    bytes[end + 24] -= 1;
    let sum = u32::from_be_bytes(bytes[end + 64..end + 68].try_into().expect("four bytes")) + 1;
    bytes[end + 64..end + 68].copy_from_slice(&sum.to_be_bytes());
    fs::write(&parent, &bytes).expect("written");
    let image = open(&folder.path().join("child.vhd"), None, OpenMode::Read).expect("opened all the same");
    let [warning] = image.warnings() else { panic!("{:?}", image.warnings()) };
    assert!(warning.text.contains("another time stamp"), "{warning:?}");
    let output = img(folder.path(), ["info", "child.vhd"]).output();
    assert_eq!(output.code, 0, "{output}");
}

#[test]
fn a_missing_parent_is_named() {
    let (_, child) = vhd::vendors(CYLINDERS).remove(0);
    let folder = folder(&child);
    fs::remove_file(folder.path().join("parent.vhd")).expect("removed");
    let output = img(folder.path(), ["convert", "-O", "raw", "child.vhd", "out.raw"]).output();
    assert_eq!(output.code, 1, "{output}");
    assert!(output.stderr.contains("parent.vhd"), "{output}");
    // What is known of it needs no parent.
    let output = img(folder.path(), ["info", "child.vhd"]).output();
    assert!(output.code == 0 && output.stdout.contains("backing file: parent.vhd"), "{output}");
}

#[test]
fn img_makes_children_that_follow_their_parent() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let run = |line: &str| img(folder.path(), line.split(' ')).output();
    fs::create_dir(folder.path().join("sub")).expect("a directory");
    for line in [
        "create -q -f vpc base.vhd 5M",
        "create -q -f vpc -b ../base.vhd -F vpc sub/child.vhd",
        "create -q -f vpc -b child.vhd -F vpc sub/grandchild.vhd",
    ] {
        assert_eq!(run(line).code, 0, "{}", run(line));
    }
    let image = open(&folder.path().join("sub/grandchild.vhd"), None, OpenMode::Write).expect("opened");
    assert_eq!(image.layers().len(), 3);
    image.write_at(&[9; 1000], 100).expect("written");
    image.close().expect("closed");
    let output = run("map sub/grandchild.vhd");
    assert!(output.stdout.contains("0               0x600"), "{output}");
    // Refusals.
    for (line, why) in [
        ("create -f vpc -b base.vhd -F vpc x.vhd 6M", "has the size of its backing file"),
        ("create -f vpc -o subformat=fixed -b base.vhd -F vpc x.vhd", "cannot have a backing file"),
        ("resize sub/child.vhd 8M", "resizing a differencing VHD"),
    ] {
        let output = run(line);
        assert!(output.code == 1 && output.stderr.contains(why), "{output}");
    }
}

#[test]
fn a_fixed_disk_is_known_by_its_end_unless_its_start_says_otherwise() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = folder.path().join("fixed.vhd");
    let mut data = parent_bytes();
    fs::write(&path, vhd::fixed(&data, (CYLINDERS, 4, 17), *b"vpc ")).expect("written");
    let image = open(&path, None, OpenMode::Read).expect("opened");
    assert_eq!(image.layers()[0].driver().name(), "vpc");
    assert_same(&read_all(&image).expect("readable"), &data, "the data without the footer");
    // A guest that writes another format's magic number into its first sector.
    data[..4].copy_from_slice(b"QFI\xfb");
    fs::write(&path, vhd::fixed(&data, (CYLINDERS, 4, 17), *b"vpc ")).expect("written");
    let error = open(&path, None, OpenMode::Read).expect_err("ambiguous").to_string();
    assert!(error.contains("name the format"), "{error}");
    let image = open(&path, Some("vpc"), OpenMode::Read).expect("opened by name");
    assert_same(&read_all(&image).expect("readable"), &data, "by name");
}

#[test]
fn a_guessed_raw_disk_does_not_become_a_fixed_one() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = folder.path().join("disk.raw");
    let size = parent_bytes().len() as u64;
    fs::write(&path, vec![1; parent_bytes().len() + SECTOR]).expect("written");
    let footer = vhd::footer(2, size, (CYLINDERS, 4, 17), *b"vpc ", *b"Wi2k", vhd::PARENT_ID);
    let image = open(&path, None, OpenMode::Write).expect("opened");
    image.write_at(&footer, size).expect_err("the last sector is guarded");
    image.write_at(&footer[..300], size).expect("a part is nothing yet");
    image.write_at(&footer[300..], size + 300).expect_err("nor may two writes make it");
    image.write_at(&[2; SECTOR], size).expect("anything else may be written there");
    let image = open(&path, Some("raw"), OpenMode::Write).expect("named");
    image.write_at(&footer, size).expect("whoever names the format may");
}
