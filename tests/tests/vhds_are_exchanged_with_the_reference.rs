//! Histories of VHDs that this library and `qemu-io` write in turns: after each turn both read the model.

use std::path::Path;

use img_core::format::{OpenMode, Repair};
use img_tests::{
    command::{qemu_img, qemu_io},
    open,
    pattern::{Random, assert_same},
    read_all,
};

const DISK: usize = 7 << 20;

/// A write of one byte value.
struct Write {
    at: usize,
    len: usize,
    byte: u8,
}

/// A turn of up to five writes, which the model follows.
fn turn(random: &mut Random, model: &mut [u8]) -> Vec<Write> {
    let below = |random: &mut Random, end: usize| {
        usize::try_from(random.below(u64::try_from(end).expect("a small number"))).expect("a small number")
    };
    (0..=below(random, 5))
        .map(|_| {
            let at = below(random, DISK - 1);
            let longest = if below(random, 4) == 0 { 3 << 20 } else { 2000 };
            let len = (1 + below(random, longest)).min(DISK - at);
            let byte = random.next().to_le_bytes()[0];
            model[at..at + len].fill(byte);
            Write { at, len, byte }
        })
        .collect()
}

fn ours(path: &Path, writes: &[Write]) {
    let image = open(path, Some("vpc"), OpenMode::Write).expect("opened");
    for (index, write) in writes.iter().enumerate() {
        image.write_at(&vec![write.byte; write.len], write.at as u64).expect("written");
        if index % 2 == 0 {
            image.flush().expect("flushed");
        }
    }
    image.close().expect("closed");
}

fn theirs(folder: &Path, writes: &[Write]) {
    let commands: Vec<String> =
        writes.iter().map(|write| format!("write -q -P {} {} {}", write.byte, write.at, write.len)).collect();
    qemu_io(folder, "vpc", "disk.vhd", &commands).output().success();
}

#[test]
fn both_read_what_the_other_wrote() {
    for (subformat, seed) in [("dynamic", 1), ("dynamic", 2), ("dynamic", 3), ("fixed", 4)] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let path = folder.path().join("disk.vhd");
        let options = format!("subformat={subformat},force_size=on");
        qemu_img(folder.path(), ["create", "-q", "-f", "vpc", "-o", &options, "disk.vhd", &DISK.to_string()])
            .output()
            .success();
        let mut random = Random::new(seed);
        let mut model = vec![0; DISK];
        for number in 0..8 {
            let writes = turn(&mut random, &mut model);
            if number % 2 == 0 {
                ours(&path, &writes)
            } else {
                theirs(folder.path(), &writes)
            }
            let what = format!("{subformat}, seed {seed}, turn {number}");
            let image = open(&path, Some("vpc"), OpenMode::Read).expect("opened");
            assert_same(&read_all(&image).expect("readable"), &model, &what);
            drop(image);
            let convert = ["convert", "-f", "vpc", "-O", "raw", "disk.vhd", "disk.raw"];
            qemu_img(folder.path(), convert).output().success();
            let raw = std::fs::read(folder.path().join("disk.raw")).expect("readable");
            assert_same(&raw, &model, &what);
            let image = open(&path, Some("vpc"), OpenMode::Check { repair: false }).expect("opened");
            let mut told = Vec::new();
            let report =
                image.check(Repair::Nothing, &mut |finding| told.push(finding.text)).expect("audited");
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{what}: {told:?}");
        }
    }
}
