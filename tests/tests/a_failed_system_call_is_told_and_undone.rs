//! Every command of `img`, with each of its calls that touch an image failing once, by strace's fault injection.
//!
//! Either the command does without that call and its work is whole, or it says which file the host failed on, in which
//! operation and where; then what it was making is gone, what it was changing is sound and reads as before or after,
//! and what it only reads is as it was. A call that a signal interrupted is made again.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use img_tests::command::{Output, Run, img, img_binary};

/// Calls that fail, with what messages call them.
const CALLS: [(&str, &[&str]); 10] = [
    ("pread64", READS),
    ("preadv", READS),
    ("pwrite64", WRITES),
    ("pwritev", WRITES),
    ("fdatasync", FLUSHES),
    ("fsync", FLUSHES),
    ("ftruncate", &["resize"]),
    ("fallocate", &["preallocate", "punch hole", "write zeroes", "discard"]),
    ("copy_file_range", &["copy"]),
    ("lseek", &["find data at byte 0x"]),
];
const READS: &[&str] = &["read at byte 0x"];
const WRITES: &[&str] = &["write at byte 0x", "write zeroes at byte 0x", "preallocate at byte 0x"];
const FLUSHES: &[&str] = &["flush"];
/// More calls of a kind are not made by any of these commands.
const MOST_CALLS: usize = 200;
const SOURCE_BYTES: usize = 1 << 20;

/// A folder with images, and a command on them.
struct Case<'a> {
    folder: &'a Path,
    format: &'a str,
    /// Its arguments, with a blank between them.
    command: String,
    /// Files that it changes.
    changes: &'a [&'a str],
}

/// What files hold.
type Files = BTreeMap<PathBuf, Vec<u8>>;

fn files(folder: &Path) -> Files {
    let entries = fs::read_dir(folder).expect("readable").map(|entry| entry.expect("readable").path());
    entries.map(|path| (path.clone(), fs::read(path).expect("readable"))).collect()
}

fn put(folder: &Path, wanted: &Files) {
    for path in files(folder).into_keys().filter(|path| !wanted.contains_key(path)) {
        fs::remove_file(path).expect("removed");
    }
    for (path, bytes) in wanted {
        fs::write(path, bytes).expect("written");
    }
}

/// Runs `img` in `folder` with the `nth` `call` on one of its files answered by `error`, and says whether that came
/// to pass. The calls of each thread are counted apart.
fn injected(folder: &Path, command: &str, call: &str, error: &str, nth: usize) -> (Output, bool) {
    let log = tempfile::NamedTempFile::new().expect("a temporary file");
    let what = format!("{call}:error={error}:when={nth}");
    let mut run = Run::new("timeout", folder).args(["60", "strace", "-f", "-qq", "-o"]).arg(log.path());
    run = run.args(["-e", &format!("trace={call}"), "-e", &format!("inject={what}")]);
    for name in ["source", "in", "out", "old", "base", "top", "picture"] {
        run = run.arg("-P").arg(folder.join(name));
    }
    let output = run.arg(img_binary()).args(command.split(' ')).output();
    let told = fs::read_to_string(log.path()).expect("a log");
    (output, told.contains("(INJECTED)"))
}

impl Case<'_> {
    /// Every call fails once.
    fn walk(&self) {
        let before = files(self.folder);
        let whole = img(self.folder, self.command.split(' ')).output();
        assert_eq!(whole.code, 0, "{whole}");
        let after = self.seen();
        put(self.folder, &before);
        let then = self.seen();
        let mut failures = 0;
        for (call, operations) in CALLS {
            for nth in 1.. {
                assert!(nth < MOST_CALLS, "{}: {call} without end", self.command);
                let (output, happened) = injected(self.folder, &self.command, call, "EIO", nth);
                if !happened {
                    put(self.folder, &before);
                    break;
                }
                let told = format!("{call} number {nth} failed: {output}");
                if output.code == whole.code {
                    assert_eq!(self.seen(), after, "{told}");
                } else {
                    failures += 1;
                    self.judge(&output, operations, &told, (&before, &then, &after));
                }
                put(self.folder, &before);
            }
        }
        assert!(failures > 0, "{}: nothing failed", self.command);
        for call in ["preadv", "pread64", "pwritev", "pwrite64"] {
            for nth in 1.. {
                let (output, happened) = injected(self.folder, &self.command, call, "EINTR", nth);
                if !happened {
                    put(self.folder, &before);
                    break;
                }
                assert_eq!(output.code, whole.code, "{call} number {nth} was interrupted: {output}");
                assert_eq!(self.seen(), after, "{call} number {nth} was interrupted: {output}");
                put(self.folder, &before);
            }
        }
        put(self.folder, &before);
    }

    /// After a failure.
    fn judge(
        &self,
        output: &Output,
        operations: &[&str],
        told: &str,
        (before, then, after): (&Files, &Files, &Files),
    ) {
        assert!(output.code != 124 && output.code < 128, "{told}");
        // A verdict is told on standard output.
        let text = format!("{}{}", output.stdout, output.stderr);
        let named = text.contains("Input/output error")
            && operations.iter().any(|operation| text.contains(operation));
        assert!(named, "{told}");
        let now = files(self.folder);
        let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&now), names(before), "{told}");
        for (path, bytes) in &now {
            let name = path.file_name().expect("a file").to_str().expect("ASCII");
            if !self.changes.contains(&name) {
                assert!(before[path] == *bytes, "{name} has changed: {told}");
            }
        }
        for (path, guest) in self.seen() {
            let known = [then, after].map(|files| files.get(&path));
            let longest = known.iter().flatten().map(|bytes| bytes.len()).max();
            assert!(longest >= Some(guest.len()), "{}: {told}", path.display());
            for (at, byte) in guest.iter().enumerate() {
                let is_known = known.iter().flatten().any(|bytes| bytes.get(at) == Some(byte));
                assert!(is_known, "byte {at:#x} of {} is {byte:#x}: {told}", path.display());
            }
        }
    }

    /// What the guests of the files that it may change or make read, which are sound, but for leaks.
    fn seen(&self) -> Files {
        let outside = tempfile::tempdir().expect("a temporary directory");
        let mut seen = Files::new();
        for name in self.changes.iter().copied().chain(["out"]) {
            if !self.folder.join(name).exists() {
                continue;
            }
            if self.format != "raw" {
                let check = || img(self.folder, ["check", "-f", self.format, name]).output();
                if ![0, 3].contains(&check().code) {
                    // What is marked as not finished is made good by who opens it for writing.
                    img(self.folder, ["resize", "-q", "-f", self.format, name, "+0"]).output().success();
                }
                let check = check();
                assert!([0, 3].contains(&check.code), "{}: {check}", self.command);
            }
            let flat = outside.path().join(name);
            let convert = img(self.folder, ["convert", "-f", self.format, "-O", "raw", name]).arg(&flat);
            convert.output().success();
            seen.insert(name.into(), fs::read(flat).expect("readable"));
        }
        seen
    }
}

/// Whether this machine lets a process be traced. Where it does not, that is said.
fn can_trace() -> bool {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let output = Run::new("strace", folder.path()).args(["-f", "-qq", "-o", "log", "true"]).output();
    if output.code != 0 {
        writeln!(io::stderr(), "SKIPPED: no process can be traced here: {}", output.stderr).expect("told");
    }
    output.code == 0
}

/// A source, and an image of it.
fn folder(format: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let mut bytes: Vec<u8> = (1..=250).flat_map(|byte| [byte; 512]).cycle().take(SOURCE_BYTES).collect();
    bytes[SOURCE_BYTES / 4..SOURCE_BYTES / 2].fill(0);
    fs::write(folder.path().join("source"), bytes).expect("written");
    img(folder.path(), ["convert", "-f", "raw", "-O", format, "source", "in"]).output().success();
    folder
}

fn walk(folder: &Path, format: &str, commands: &[&str], changes: &[&str]) {
    for command in commands {
        let command = command.replace("FORMAT", format);
        Case { folder, format, command, changes }.walk();
    }
}

const READING: [&str; 5] = [
    "map -f FORMAT in",
    "compare -f FORMAT -F raw in source",
    "measure -f FORMAT -O qcow2 in",
    "bench -q -c 4 -f FORMAT in",
    "inspect --untrusted in",
];
const MAKING: [&str; 4] = [
    "create -q -f FORMAT out 1M",
    "convert -f FORMAT -O FORMAT in out",
    "convert -W -m 4 -f FORMAT -O FORMAT in out",
    "dd -f FORMAT -O FORMAT bs=64k if=in of=out",
];
const CHANGING: [&str; 3] = [
    "bench -q -w -c 4 -s 64k --pattern 7 -f FORMAT old",
    "convert -n -f raw -O FORMAT source old",
    "resize -q -f FORMAT old 2M",
];

fn every_command(format: &str) {
    if !can_trace() {
        return;
    }
    let folder = folder(format);
    let folder = folder.path();
    walk(folder, format, &READING, &[]);
    if format != "raw" {
        walk(folder, format, &["info -f FORMAT in", "check -f FORMAT in"], &[]);
    }
    walk(folder, format, &MAKING, &[]);
    img(folder, ["create", "-q", "-f", format, "old", "1M"]).output().success();
    walk(folder, format, &CHANGING, &["old"]);
}

#[test]
fn raw() {
    every_command("raw");
}

#[test]
fn qcow2() {
    every_command("qcow2");
}

#[test]
fn qed() {
    every_command("qed");
}

#[test]
fn vmdk() {
    every_command("vmdk");
}

#[test]
fn vpc() {
    every_command("vpc");
}

/// What qcow2 alone has.
#[test]
fn qcow2_s_own() {
    if !can_trace() {
        return;
    }
    let folder = folder("qcow2");
    let folder = folder.path();
    walk(
        folder,
        "qcow2",
        &["convert -c -O qcow2 in out", "convert -c -O qcow2 -o compression_type=zstd in out"],
        &[],
    );
    fs::rename(folder.join("in"), folder.join("old")).expect("renamed");
    let changing = [
        "snapshot -c s old",
        "amend -f qcow2 -o refcount_bits=64 old",
        "amend -f qcow2 -o compat=0.10 old",
        "bitmap --add old b",
        "resize -q --preallocation=metadata old 2M",
        "resize -q --shrink old 512k",
    ];
    walk(folder, "qcow2", &changing, &["old"]);
    img(folder, ["snapshot", "-c", "s", "old"]).output().success();
    img(folder, ["bench", "-q", "-w", "-c", "4", "-s", "64k", "--pattern", "7", "old"]).output().success();
    walk(folder, "qcow2", &["snapshot -a s old", "snapshot -d s old"], &["old"]);
    img(folder, ["bitmap", "--add", "old", "b"]).output().success();
    walk(folder, "qcow2", &["bitmap --remove old b", "bitmap --disable old b"], &["old"]);
}

/// Layers: what is moved from one to the other is in one of them all the time.
#[test]
fn chains() {
    if !can_trace() {
        return;
    }
    for format in ["qcow2", "qed"] {
        let folder = folder(format);
        let folder = folder.path();
        fs::rename(folder.join("in"), folder.join("base")).expect("renamed");
        img(folder, ["create", "-q", "-f", format, "-b", "base", "-F", format, "top"]).output().success();
        img(folder, ["bench", "-q", "-w", "-c", "4", "-s", "64k", "--pattern", "7", "-f", format, "top"])
            .output()
            .success();
        walk(folder, format, &["commit -q -f FORMAT top"], &["top", "base"]);
        walk(
            folder,
            format,
            &["rebase -f FORMAT -b  top", "rebase -u -f FORMAT -F raw -b source top"],
            &["top"],
        );
    }
}
