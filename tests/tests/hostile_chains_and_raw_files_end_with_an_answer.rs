//! Names inside images are data: loops, endless chains, pipes, devices, foreign protocols and nested JSON are
//! refused in bounded time and memory, whatever the command; so are the odd shapes a raw file can have.

use std::{fs, os::unix::fs::symlink, path::Path};

use img_core::{format::OpenMode, image::MAX_CHAIN_DEPTH};
use img_tests::{
    command::{Bounds, Output, Run, img_binary},
    craft::{Crafted, DISK, L2},
    open, read_all,
};

const BOUNDS: Bounds = Bounds { memory_bytes: 512 << 20, seconds: 10 };

/// Commands that open the whole chain of `top.qcow2`.
const WHOLE_CHAIN: [&[&str]; 4] = [
    &["convert", "-O", "raw", "top.qcow2", "out.raw"],
    &["map", "top.qcow2"],
    &["info", "--backing-chain", "top.qcow2"],
    &["compare", "top.qcow2", "top.qcow2"],
];

fn run(folder: &Path, arguments: &[&str]) -> Output {
    Run::new(img_binary(), folder).args(arguments).within(BOUNDS).output()
}

/// An overlay with nothing of its own.
fn overlay(folder: &Path, name: &str, below: &str, format: &str) {
    Crafted::new().u64(L2, 0).refcount(5, 0).backing(below.as_bytes(), format).save(&folder.join(name));
}

/// A failure of the program's own: exit code 1 (2 for compare), one or two lines that hold `words`, no panic.
#[track_caller]
fn assert_refused(output: &Output, words: &[&str]) {
    assert!(matches!(output.code, 1 | 2), "{output}");
    assert!(!output.stderr.contains("panicked"), "{output}");
    for word in words {
        assert!(output.stderr.to_lowercase().contains(&word.to_lowercase()), "no {word:?} in {output}");
    }
}

#[test]
fn loops_are_refused_by_every_command() {
    type Loop = (&'static str, fn(&Path));
    let loops: [Loop; 5] = [
        ("itself", |folder| overlay(folder, "top.qcow2", "top.qcow2", "qcow2")),
        ("two files", |folder| {
            overlay(folder, "top.qcow2", "other.qcow2", "qcow2");
            overlay(folder, "other.qcow2", "top.qcow2", "qcow2");
        }),
        ("a symbolic link", |folder| {
            overlay(folder, "top.qcow2", "link.qcow2", "qcow2");
            symlink("top.qcow2", folder.join("link.qcow2")).expect("linked");
        }),
        ("a hard link", |folder| {
            overlay(folder, "top.qcow2", "link.qcow2", "qcow2");
            fs::hard_link(folder.join("top.qcow2"), folder.join("link.qcow2")).expect("linked");
        }),
        ("json", |folder| {
            let name = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"}}"#;
            overlay(folder, "top.qcow2", name, "qcow2");
        }),
    ];
    for (what, make) in loops {
        let folder = tempfile::tempdir().expect("a temporary directory");
        make(folder.path());
        // Names inside json: are not relative to the image, so this one loops from its folder only.
        for command in WHOLE_CHAIN {
            let output = run(folder.path(), command);
            assert!(output.stderr.contains("loop"), "{what}: {output}");
            assert_refused(&output, &[".qcow2"]);
        }
        // One image alone can still be looked at.
        run(folder.path(), &["info", "top.qcow2"]).success();
    }
}

#[test]
fn long_chains_are_read_and_endless_ones_refused() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let chain = |layers: usize| {
        Crafted::new().save(&folder.path().join("0.qcow2"));
        for layer in 1..layers {
            overlay(folder.path(), &format!("{layer}.qcow2"), &format!("{}.qcow2", layer - 1), "qcow2");
        }
    };
    chain(MAX_CHAIN_DEPTH + 1);
    let top = open(&folder.path().join("199.qcow2"), Some("qcow2"), OpenMode::Read).expect("200 layers open");
    let base = open(&folder.path().join("0.qcow2"), Some("qcow2"), OpenMode::Read).expect("opens");
    assert!(read_all(&top).expect("readable") == read_all(&base).expect("readable"));
    let command = ["convert", "-O", "raw", &format!("{MAX_CHAIN_DEPTH}.qcow2"), "out.raw"];
    assert_refused(&run(folder.path(), &command), &["qcow2"]);
}

#[test]
fn names_of_things_that_are_no_images_are_refused_at_once() {
    let names = [
        ("pipe", "pipe"),
        (".", "regular file"),
        ("missing.raw", "no such file"),
        ("nbd://127.0.0.1:1/x", "nbd"),
        ("https://127.0.0.1:1/x", "https"),
        ("ssh://127.0.0.1/x", "ssh"),
        ("fd:0", "fd"),
        ("json:{", "json"),
        (r#"json:{"driver":"nbd","host":"127.0.0.1"}"#, "nbd"),
        (r#"json:{"driver":"qcow2"}"#, "file"),
    ];
    for (name, word) in names {
        let folder = tempfile::tempdir().expect("a temporary directory");
        Run::new("mkfifo", folder.path()).arg("pipe").output().success();
        overlay(folder.path(), "top.qcow2", name, "raw");
        for command in [WHOLE_CHAIN[0], WHOLE_CHAIN[1]] {
            assert_refused(&run(folder.path(), command), &[word]);
        }
        assert!(
            !folder.path().join("out.raw").exists(),
            "{name}: a target was made for a source that is none"
        );
    }
}

/// `info` describes an image whose other files could not or should not be opened.
#[test]
fn info_opens_no_file_that_the_image_names() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    Run::new("mkfifo", folder.path()).arg("pipe").output().success();
    let data_file =
        Crafted::new().extension(0x4441_5441, 4, b"pipe").u64(img_tests::craft::header::INCOMPATIBLE, 1 << 2);
    data_file.save(&folder.path().join("data-file.qcow2"));
    overlay(folder.path(), "overlay.qcow2", "pipe", "raw");
    for image in ["data-file.qcow2", "overlay.qcow2"] {
        let output = run(folder.path(), &["info", image]).success();
        assert!(output.contains("pipe"), "{output}");
    }
    assert_refused(&run(folder.path(), &["convert", "-O", "raw", "data-file.qcow2", "out.raw"]), &["pipe"]);
}

#[test]
fn nested_json_names_do_not_exhaust_the_stack() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let nested = |depth: usize| format!("json:{}{}", r#"{"file":"#.repeat(depth), "}".repeat(depth));
    for name in [
        nested(5_000),
        format!("json:{}", "[".repeat(100_000)),
        format!("json:{{\"driver\":\"{}\"}}", "x".repeat(100_000)),
    ] {
        assert_refused(&run(folder.path(), &["info", &name]), &[]);
    }
}

#[test]
fn raw_files_of_every_shape_are_read_or_refused() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    for length in [0_usize, 1, 511, 512, 513, 70_001] {
        let bytes = img_tests::pattern::noise(length as u64, length);
        fs::write(folder.path().join("odd.raw"), &bytes).expect("written");
        run(folder.path(), &["convert", "-f", "raw", "-O", "raw", "odd.raw", "out.raw"]).success();
        let mut padded = bytes;
        padded.resize(length.next_multiple_of(512), 0);
        let copied = fs::read(folder.path().join("out.raw")).expect("readable");
        img_tests::pattern::assert_same(&copied, &padded, &format!("{length} bytes"));
    }
    let file = fs::File::create(folder.path().join("sparse.raw")).expect("created");
    file.set_len(8 << 40).expect("a sparse file of 8 TiB");
    let map = run(folder.path(), &["map", "-f", "raw", "--output=json", "sparse.raw"]).success();
    assert!(map.contains(r#""zero": true, "data": false"#), "{map}");
    run(folder.path(), &["convert", "-f", "raw", "-O", "qcow2", "sparse.raw", "out.qcow2"]).success();
    assert_refused(&run(folder.path(), &["info", "-f", "raw", "."]), &["."]);
    // A character device has no size, and so nothing to read.
    assert!(run(folder.path(), &["info", "-f", "raw", "/dev/zero"]).success().contains("(0 bytes)"));
    Run::new("mkfifo", folder.path()).arg("pipe").output().success();
    assert_refused(&run(folder.path(), &["info", "-f", "raw", "pipe"]), &["pipe"]);
}

/// A raw disk whose first bytes the guest chose is believed to be what it says only when no format was named.
#[test]
fn a_named_raw_format_is_never_probed_away() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let bytes = Crafted::new().backing(b"/etc/hostname", "raw").bytes;
    fs::write(folder.path().join("guest.raw"), &bytes).expect("written");
    run(folder.path(), &["convert", "-f", "raw", "-O", "raw", "guest.raw", "out.raw"]).success();
    assert!(fs::read(folder.path().join("out.raw")).expect("readable") == bytes);
    assert_ne!(bytes.len(), DISK, "the two readings must not look alike");
}
