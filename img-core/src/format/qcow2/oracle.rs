//! What the tests of this format share: the reference programs, and images compared byte by byte.

use std::{ops::Range, path::Path, process::Command};

use crate::storage::{FileOptions, Storage};

/// Runs `qemu-img` in `directory` and returns what it printed to stdout.
pub(super) fn qemu_img(directory: &Path, arguments: &[&str]) -> String {
    let (ok, out, err) = try_qemu_img(directory, arguments);
    assert!(ok, "qemu-img {arguments:?}: {out}{err}");
    out
}

/// Like [`qemu_img`]: success, stdout, stderr.
pub(super) fn try_qemu_img(directory: &Path, arguments: &[&str]) -> (bool, String, String) {
    run("qemu-img", directory, arguments)
}

/// Runs `qemu-io` commands on a qcow2 image.
pub(super) fn qemu_io(directory: &Path, image: &str, commands: &[&str]) -> String {
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    let (ok, out, err) = run("qemu-io", directory, &arguments);
    assert!(ok && !out.contains("failed"), "qemu-io {arguments:?}: {out}{err}");
    out
}

fn run(tool: &str, directory: &Path, arguments: &[&str]) -> (bool, String, String) {
    let output = Command::new(tool).args(arguments).current_dir(directory).output();
    let output = output.unwrap_or_else(|error| panic!("{tool} of qemu-utils is needed: {error}"));
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8 output");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

/// A directory in memory where there is one: the reference syncs a lot.
pub(super) fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a temporary directory")
}

/// Opens a file for reading and writing.
pub(super) fn file(path: &Path) -> std::sync::Arc<dyn Storage> {
    let open = FileOptions::new().write(true).create(true).open(path);
    std::sync::Arc::new(open.unwrap_or_else(|error| panic!("{error}")))
}

/// Panics at the first byte in which two storages differ.
pub(super) fn assert_same_bytes(ours: &dyn Storage, theirs: &dyn Storage, what: &str) {
    let length = |storage: &dyn Storage| storage.len_bytes().expect("a length");
    assert_eq!(length(ours), length(theirs), "{what}: file length, ours and theirs");
    for storage in [ours, theirs] {
        let mut from = 0;
        while let Some(range) = storage.next_allocated(from).expect("ranges") {
            assert_same_range(ours, theirs, range.clone(), what);
            from = range.end;
        }
    }
}

fn assert_same_range(ours: &dyn Storage, theirs: &dyn Storage, range: Range<u64>, what: &str) {
    const PIECE: u64 = 1 << 20;
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(PIECE.min(range.end - at)).expect("a piece");
        let [mut left, mut right] = [vec![0; length], vec![0; length]];
        ours.read_at(&mut left, at).expect("our bytes");
        theirs.read_at(&mut right, at).expect("their bytes");
        if let Some(first) = left.iter().zip(&right).position(|(left, right)| left != right) {
            let shown = first & !7..(first & !7) + 16;
            let show = |bytes: &[u8]| format!("{:02x?}", &bytes[shown.start..shown.end.min(length)]);
            panic!(
                "{what}: differ at {:#x}: ours {}, theirs {}",
                at + shown.start as u64,
                show(&left),
                show(&right)
            );
        }
        at += length as u64;
    }
}
