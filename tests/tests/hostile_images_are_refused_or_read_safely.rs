//! Each rule of each format, broken alone: opening, reading, auditing, repairing and writing end with an answer,
//! never with a panic, a hang or memory sized by the file; and what fails leaves the image no worse.

use std::{collections::BTreeMap, fs, panic, path::Path};

use img_core::{
    Result,
    format::{CheckReport, OpenMode, Repair},
    image::Image,
};
use img_tests::{
    command::{Bounds, Run, img, img_binary, oracle},
    craft::{CLUSTER, Crafted, FILL},
    hostile::{ANSWERED_DIFFERENTLY, Fate, Hostile, images},
    open,
};

/// What a hostile file of a few clusters may cost: the largest tables a header can claim are 32 MiB each.
const BOUNDS: Bounds = Bounds { memory_bytes: 512 << 20, seconds: 20 };

/// Runs `check` on every hostile image and tells all that fail, not only the first.
fn for_each(check: impl Fn(&Path, &Hostile) -> std::result::Result<(), String>) {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let mut failures = BTreeMap::new();
    for (index, hostile) in images().iter().enumerate() {
        let path = folder.path().join(format!("hostile-{index}.{}", hostile.format));
        hostile.image.save(&path);
        let outcome = panic::catch_unwind(panic::AssertUnwindSafe(|| check(&path, hostile)));
        if let Err(text) = outcome.unwrap_or_else(|_| Err("panicked, see above".to_owned())) {
            failures.insert(format!("{index} ({})", hostile.name), text);
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

fn read_first_cluster(image: &Image) -> Result<Vec<u8>> {
    let mut guest = vec![0; CLUSTER];
    image.read_at(&mut guest, 0)?;
    Ok(guest)
}

fn audit(path: &Path, format: &str, repair: Repair) -> Result<CheckReport> {
    let image = open(path, Some(format), OpenMode::Check { repair: repair != Repair::Nothing })?;
    let report = image.check(repair, &mut |_| {})?;
    if repair != Repair::Nothing {
        image.close()?;
    }
    Ok(report)
}

#[test]
fn reading_ends_as_the_rules_say() {
    for_each(|path, hostile| {
        let format = hostile.format;
        let read = open(path, Some(format), OpenMode::Read).map(|image| read_first_cluster(&image));
        let words_missing = |error: &img_core::Error, words: &str| {
            let text = error.to_string();
            let name = path.file_name().expect("a file").to_string_lossy();
            (!text.to_lowercase().contains(&words.to_lowercase()) || !text.contains(&*name)).then_some(text)
        };
        match (hostile.fate, read) {
            (Fate::Refused(words), Err(error)) | (Fate::Unreadable(words), Ok(Err(error))) => {
                words_missing(&error, words)
                    .map_or(Ok(()), |text| Err(format!("no file name or {words:?} in: {text}")))
            }
            (Fate::Corrupt, Ok(Ok(_))) => match audit(path, format, Repair::Nothing) {
                Ok(report) if report.corruptions > 0 => Ok(()),
                other => Err(format!("the audit found {other:?}")),
            },
            (Fate::Harmless, Ok(_)) => Ok(()),
            (fate, read) => Err(format!("should be {fate:?}, is {read:?}").chars().take(300).collect()),
        }
    });
}

/// Whatever was read before a failed repair or write is read after it, and the audit finds no more.
#[test]
fn repair_and_writes_never_make_it_worse() {
    for_each(|path, hostile| {
        let format = hostile.format;
        let read =
            || open(path, Some(format), OpenMode::Read).and_then(|image| read_first_cluster(&image)).ok();
        let (guest, before) = (read(), audit(path, format, Repair::Nothing).ok());
        let original = fs::read(path).expect("readable");

        let written = open(path, Some(format), OpenMode::Write)
            .and_then(|image| image.write_at(&[1; 100], CLUSTER as u64).and_then(|()| image.close()));
        let worse = |what: &str, failed: bool| {
            // A repair never changes it; a write writes another cluster.
            if guest.is_some() && read() != guest && (failed || what != "write") {
                return Err(format!("{what} changed what the guest reads"));
            }
            match (&before, audit(path, format, Repair::Nothing).ok()) {
                (Some(before), Some(after)) if after.corruptions > before.corruptions => {
                    Err(format!("{what}: {before:?} became {after:?}"))
                }
                (Some(before), None) => Err(format!("{what}: {before:?} became something no audit opens")),
                _ => Ok(()),
            }
        };
        worse("write", written.is_err())?;

        for repair in [Repair::Leaks, Repair::All] {
            fs::write(path, &original).expect("writable");
            worse(&format!("repair of {repair:?}"), audit(path, format, repair).is_err())?;
        }
        Ok(())
    });
}

/// What a broken snapshot holds looks like a leak. No repair frees it: with the number mended it is all there.
#[test]
fn repair_keeps_the_clusters_of_a_snapshot_that_cannot_be_read() {
    use img_tests::command::{qemu_img, qemu_io};
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = folder.path().join("image.qcow2");
    let run = |run: Run| assert_eq!(run.output().code, 0);
    run(qemu_img(folder.path(), ["create", "-qf", "qcow2", "image.qcow2", "1M"]));
    run(qemu_io(folder.path(), "qcow2", "image.qcow2", &["write -P 1 0 512k"]));
    run(qemu_img(folder.path(), ["snapshot", "-c", "one", "image.qcow2"]));
    run(qemu_io(folder.path(), "qcow2", "image.qcow2", &["write -P 2 0 256k"]));
    let whole = fs::read(&path).expect("readable");
    let be64 = |at: usize| u64::from_be_bytes(whole[at..at + 8].try_into().expect("eight bytes"));
    let entry = usize::try_from(be64(64)).expect("small");
    // Where its L1 table is, and how long: inside a cluster, too large, behind the end.
    let breaks: [(usize, &[u8]); 3] = [(7, &[8]), (8, &[0xff; 4]), (1, &[1])];
    for (at, bytes) in breaks {
        for how in ["leaks", "all"] {
            let mut broken = whole.clone();
            broken[entry + at..][..bytes.len()].copy_from_slice(bytes);
            fs::write(&path, &broken).expect("writable");
            let ours = img(folder.path(), ["check", "-r", how, "image.qcow2"]).output();
            assert!(ours.stderr.contains("Leaked cluster"), "{ours}");
            let mut repaired = fs::read(&path).expect("readable");
            fs::write(folder.path().join("theirs.qcow2"), &broken).expect("writable");
            let theirs = qemu_img(folder.path(), ["check", "-r", how, "theirs.qcow2"]).output();
            // With leaks freed the reference goes on to flags, and there it may give up.
            let agrees = theirs.code == ours.code || theirs.stderr.contains("Check failed");
            assert!(ours.code == 2 && agrees, "{at} {how}: ours {ours}\ntheirs {theirs}");
            repaired[entry + at..][..bytes.len()].copy_from_slice(&whole[entry + at..][..bytes.len()]);
            fs::write(&path, &repaired).expect("writable");
            run(qemu_img(folder.path(), ["check", "-q", "image.qcow2"]));
            run(qemu_img(folder.path(), ["convert", "-l", "one", "-O", "raw", "image.qcow2", "one.raw"]));
            let one = fs::read(folder.path().join("one.raw")).expect("readable");
            assert!(one[..512 << 10].iter().all(|byte| *byte == 1), "{at} {how}");
        }
    }
}

/// The binary under a memory limit: an exit code of its own, and the same as the reference's where that ends.
#[test]
fn the_binary_answers_with_the_exit_code_of_the_reference() {
    let commands: [&[&str]; 4] = [
        &["info", "-f", "FORMAT", "IMAGE"],
        &["check", "-f", "FORMAT", "IMAGE"],
        &["map", "-f", "FORMAT", "--output=json", "IMAGE"],
        &["convert", "-f", "FORMAT", "-O", "raw", "IMAGE", "OUT"],
    ];
    for_each(|path, hostile| {
        let folder = path.parent().expect("a folder");
        for command in commands {
            let arguments = |out: &str| -> Vec<String> {
                let name = path.file_name().expect("a file").to_string_lossy();
                command
                    .iter()
                    .map(|word| {
                        word.replace("IMAGE", &name).replace("OUT", out).replace("FORMAT", hostile.format)
                    })
                    .collect()
            };
            let ours = Run::new(img_binary(), folder).args(arguments("ours.raw")).within(BOUNDS).output();
            if !matches!(ours.code, 0..=3) || ours.stderr.contains("panicked") {
                return Err(format!("{ours}"));
            }
            if matches!(hostile.fate, Fate::Refused(_)) && command[0] == "convert" {
                let name = path.file_name().expect("a file").to_string_lossy();
                if ours.code != 1 || !ours.stderr.contains(&*name) || ours.stderr.lines().count() > 3 {
                    return Err(format!("{ours}"));
                }
            }
            // Some of these the reference answers after a minute, 65536 snapshots in a hole for one.
            if ANSWERED_DIFFERENTLY.contains(&hostile.name) {
                continue;
            }
            let theirs =
                Run::new(oracle("qemu-img"), folder).args(arguments("theirs.raw")).within(BOUNDS).output();
            if matches!(theirs.code, 0..=3) && theirs.code != ours.code {
                return Err(format!("exit codes differ\nours {ours}\ntheirs {theirs}")
                    .chars()
                    .take(900)
                    .collect());
            }
        }
        Ok(())
    });
}

/// Cut anywhere, an image is refused or read, and never more than that.
#[test]
fn truncated_images_are_refused_or_read() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    for (format, whole) in [
        ("qcow2", Crafted::new().backing(b"below.raw", "raw").snapshot(16, b"1", b"one")),
        ("qed", Crafted::new_qed()),
    ] {
        let path = folder.path().join("cut").with_extension(format);
        let lengths = (0..256).chain((256..whole.bytes.len()).step_by(509));
        for length in lengths {
            fs::write(&path, &whole.bytes[..length]).expect("writable");
            for mode in
                [OpenMode::Inspect, OpenMode::Read, OpenMode::Write, OpenMode::Check { repair: false }]
            {
                // Refused or read, both are answers; a panic fails the test.
                if let Ok(image) = open(&path, Some(format), mode) {
                    drop((read_first_cluster(&image), image.check(Repair::Nothing, &mut |_| {})));
                }
            }
        }
    }
}

/// What a hostile image may not do to the image itself: a write that would land in a table is refused, the
/// image is marked corrupt, and nothing else changes.
#[test]
fn a_write_that_would_land_in_a_table_is_refused() {
    use img_tests::craft::{COPIED, L1, L2, REFCOUNT_BLOCK, REFCOUNT_TABLE, header};
    let folder = tempfile::tempdir().expect("a temporary directory");
    for (what, place) in [
        ("refcount table", REFCOUNT_TABLE),
        ("refcount block", REFCOUNT_BLOCK),
        ("L1 table", L1),
        ("L2 table", L2),
    ] {
        let crafted = Crafted::new().u64(L2, COPIED | place as u64);
        let path = folder.path().join("overlap.qcow2");
        crafted.save(&path);
        let image = open(&path, Some("qcow2"), OpenMode::Write).expect("opens");
        let error = image.write_at(&[FILL; CLUSTER], 0).expect_err("refused").to_string();
        assert!(error.to_lowercase().contains("corrupt"), "{what}: {error}");
        let again = image.write_at(&[FILL; CLUSTER], 4 * CLUSTER as u64);
        assert!(again.is_err(), "{what}: a corrupt image is written no more");
        drop(image);
        let marked = crafted.clone().u64(header::INCOMPATIBLE, 1 << 1);
        assert!(fs::read(&path).expect("readable") == marked.bytes, "{what}: only the corrupt bit changes");
        let error = open(&path, Some("qcow2"), OpenMode::Write).expect_err("refused").to_string();
        assert!(error.contains("corrupt"), "{what}: {error}");
    }
    let check = img(folder.path(), ["check", "-f", "qcow2", "overlap.qcow2"]).output();
    assert_eq!(check.code, 2, "{check}");
}
