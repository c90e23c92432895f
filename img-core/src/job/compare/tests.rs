//! Comparisons against qemu-img's.

use std::path::Path;
use std::process::Command;

use super::*;
use crate::{
    format::OpenMode,
    image::{ImageName, OpenOptions},
    job::Unwatched,
};

/// What qemu-img would print, with what it exits.
fn ours(one: &Path, two: &Path, strict: bool) -> (String, i32) {
    let open = |path: &Path| {
        let name = ImageName::parse(path.to_str().expect("text")).expect("a plain name");
        Image::open(&name, &OpenOptions::new(OpenMode::Read)).expect("it opens")
    };
    let (one, two) = (open(one), open(two));
    let mut text = String::new();
    let mut warn = || text.push_str("Warning: Image size mismatch!\n");
    let answer =
        compare([&one, &two], CompareOptions { strict }, &mut warn, &Unwatched).expect("both are readable");
    let (line, code) = match answer {
        Comparison::Identical => ("Images are identical.\n".to_owned(), 0),
        Comparison::ContentDiffers(at) => (format!("Content mismatch at offset {at}!\n"), 1),
        Comparison::AllocationDiffers(at) => {
            (format!("Strict mode: Offset {at} block status mismatch!\n"), 1)
        }
        Comparison::SizeDiffers => ("Strict mode: Image size mismatch!\n".to_owned(), 1),
    };
    (text + &line, code)
}

fn theirs(one: &Path, two: &Path, strict: bool) -> (String, i32) {
    let mut command = Command::new("qemu-img");
    command.arg("compare").args(strict.then_some("-s")).args([one, two]);
    let output = command.output().expect("qemu-utils are installed");
    (String::from_utf8(output.stdout).expect("text"), output.status.code().expect("an exit code"))
}

#[test]
fn answers_are_the_reference_s() {
    let dir = tempfile::tempdir().expect("a place for images");
    let path = |name: &str| dir.path().join(name);
    let script = r"
        set -e
        truncate -s 3M zero.raw
        cp zero.raw data.raw
        yes abcdefg | head -c 1000000 | dd of=data.raw bs=1k seek=700 conv=notrunc status=none
        cp data.raw one-bit.raw
        printf x | dd of=one-bit.raw bs=1 seek=1234567 conv=notrunc status=none
        cp data.raw long.raw; truncate -s 4M long.raw
        cp long.raw long-end.raw
        printf x | dd of=long-end.raw bs=1 seek=4000001 conv=notrunc status=none
        cp --sparse=never data.raw full.raw
        yes abcdefg | head -c 1000 > tail.raw
        yes abcdefg | head -c 1001 > tail1.raw
        qemu-img convert -f raw -O qcow2 data.raw data.qcow2
        qemu-img convert -f raw -O qcow2 -c data.raw packed.qcow2
        qemu-img create -q -f qcow2 empty.qcow2 3M
        qemu-img create -q -f qcow2 zeroed.qcow2 3M
        qemu-io -c 'write -z 0 3M' zeroed.qcow2 > /dev/null
        qemu-img create -q -f qcow2 -b data.raw -F raw over.qcow2 3M
        qemu-img create -q -f qcow2 -b tail.raw -F raw over-short.qcow2 3M
        qemu-img create -q -f qcow2 -b data.raw -F raw over-changed.qcow2 3M
        qemu-io -c 'write -P 7 2M 1k' over-changed.qcow2 > /dev/null
        qemu-img create -q -f qcow2 -o preallocation=metadata meta.qcow2 3M
        qemu-img convert -n -f raw -O qcow2 data.raw meta.qcow2
    ";
    let status = Command::new("sh").arg("-c").arg(script).current_dir(&dir).status().expect("a shell");
    assert!(status.success());
    let names = [
        "zero.raw",
        "data.raw",
        "one-bit.raw",
        "long.raw",
        "long-end.raw",
        "full.raw",
        "tail.raw",
        "tail1.raw",
        "data.qcow2",
        "packed.qcow2",
        "empty.qcow2",
        "zeroed.qcow2",
        "over.qcow2",
        "over-short.qcow2",
        "over-changed.qcow2",
        "meta.qcow2",
    ];
    let mut wrong = Vec::new();
    for (index, one) in names.iter().enumerate() {
        // Each pair in one order, in one mode or both, is enough.
        for two in &names[index..] {
            for strict in [false, true] {
                let (ours, theirs) =
                    (ours(&path(one), &path(two), strict), theirs(&path(one), &path(two), strict));
                if ours != theirs {
                    wrong.push(format!("{one} {two} strict={strict}: ours {ours:?}, theirs {theirs:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
