//! The images of `testdata/`, made by qemu-img 10.0.2 with every feature bit, read as `MANIFEST` says.

use std::{fs, path::Path};

use img_core::{
    format::{OpenMode, Repair},
    image::{Image, ImageName},
};
use img_tests::{command, golden, open, open_options, pattern::assert_same, read_all};

/// What the reference's `check` ends with for formats that it cannot check.
const NO_AUDIT: i32 = 63;

/// A copy that tests may write to: opening for reading must not change the originals, and locks need
/// files of our own.
fn copies(format: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a temporary directory");
    for entry in fs::read_dir(golden::folder(format)).expect("the folder is there") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copied");
    }
    copy
}

#[test]
fn every_image_reads_as_the_manifest_says() {
    for format in golden::FORMATS {
        let folder = copies(format);
        for image in golden::manifest(format) {
            let path = folder.path().join(&image.name);
            let before = fs::read(&path).expect("readable");
            let opened = open(&path, Some(format), OpenMode::Read);
            match image.guest {
                None => {
                    let refusal = opened.expect_err("encrypted images are refused").to_string();
                    assert!(refusal.contains("encrypt"), "{}: {refusal}", image.name);
                }
                Some(guest) => {
                    let opened = opened.unwrap_or_else(|error| panic!("{}: {error}", image.name));
                    assert_same(&read_all(&opened).expect("readable"), &guest, &image.name);
                }
            }
            assert!(fs::read(&path).expect("readable") == before, "{}: reading changed it", image.name);
        }
    }
}

#[test]
fn every_snapshot_reads_as_the_manifest_says() {
    for format in golden::FORMATS {
        let folder = copies(format);
        for image in golden::manifest(format) {
            for (snapshot, guest) in &image.snapshots {
                let what = format!("{}, snapshot {snapshot}", image.name);
                let path = folder.path().join(&image.name);
                let name = ImageName::parse(path.to_str().expect("UTF-8")).expect("a plain path");
                let options = open_options(Some(format), OpenMode::Read);
                let opened = Image::open_snapshot(&name, &options, snapshot)
                    .unwrap_or_else(|error| panic!("{what}: {error}"));
                // As the reference shows it: at the disk's present size, zeroes where the snapshot did not reach.
                let mut guest = guest.clone();
                guest.resize(image.guest.as_ref().expect("a readable image").len(), 0);
                assert_same(&read_all(&opened).expect("readable"), &guest, &what);
            }
        }
    }
}

#[test]
fn every_image_checks_as_the_reference_checks_it() {
    for format in golden::FORMATS {
        let folder = copies(format);
        for image in golden::manifest(format).iter().filter(|image| image.guest.is_some()) {
            let path = folder.path().join(&image.name);
            let theirs =
                command::qemu_img(folder.path(), ["check", "-f", format, image.name.as_str()]).output();
            let opened = open(&path, Some(format), OpenMode::Check { repair: false }).expect("opens");
            let mut texts = Vec::new();
            let report = opened
                .check(Repair::Nothing, &mut |finding| texts.push(finding.text))
                .unwrap_or_else(|error| panic!("{}: {error}", image.name));
            let code = match report {
                _ if report.check_errors > 0 => 1,
                _ if report.corruptions > 0 => 2,
                _ if report.leaks > 0 => 3,
                _ => 0,
            };
            // The reference has no audit of VHDs; ours finds nothing in what it wrote.
            let expected = if theirs.code == NO_AUDIT { 0 } else { theirs.code };
            assert_eq!(code, expected, "{}: ours {report:?} {texts:#?}\ntheirs {theirs}", image.name);
        }
    }
}

/// The manifest itself: the reference reads the same from the images.
#[test]
fn the_reference_reads_as_the_manifest_says() {
    for format in golden::FORMATS {
        let folder = copies(format);
        for image in golden::manifest(format) {
            let read = |arguments: &[&str], guest: &[u8], what: &str| {
                command::qemu_img(folder.path(), ["convert", "-U", "-f", format, "-O", "raw"])
                    .args(arguments)
                    .args([image.name.as_str(), "out.raw"])
                    .output()
                    .success();
                let mut bytes = read_file(&folder.path().join("out.raw"));
                // The reference reads a snapshot at the size that the disk has now.
                bytes.resize(guest.len(), 0);
                assert_same(&bytes, guest, what);
            };
            if let Some(guest) = &image.guest {
                read(&[], guest, &image.name);
            }
            for (snapshot, guest) in &image.snapshots {
                read(&["-l", snapshot], guest, &format!("{}, snapshot {snapshot}", image.name));
            }
        }
    }
}

fn read_file(path: &Path) -> Vec<u8> {
    fs::read(path).expect("readable")
}
