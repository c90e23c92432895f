//! New images are the reference's byte for byte, and refusals are in its words.

use std::{path::Path, process::Command};

use crate::{
    Result,
    format::{Backing, CreateRequest, Driver as _, OptionSet, options::parse_size},
    storage::{FileOptions, Storage},
};

fn qemu_img(directory: &Path, arguments: &[&str]) -> (bool, String) {
    let output = Command::new("qemu-img").args(arguments).current_dir(directory).output();
    let output = output.unwrap_or_else(|error| panic!("qemu-img of qemu-utils is needed: {error}"));
    (output.status.success(), String::from_utf8(output.stderr).expect("UTF-8 output"))
}

fn create_ours(directory: &Path, size: &str, options: &str) -> Result<()> {
    let mut set = OptionSet::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        let (name, value) = option.split_once('=').expect("name=value");
        set.set(name, value);
    }
    let format = set.take("backing_fmt");
    let backing = set.take("backing_file").map(|name| Backing { name, format });
    let file = FileOptions::new().write(true).create(true).open(directory.join("ours"));
    let storage: std::sync::Arc<dyn Storage> = std::sync::Arc::new(file.expect("a file"));
    let virtual_size_bytes = parse_size(size).expect("a size").next_multiple_of(512);
    let open_file = |name: &str, _| panic!("no file '{name}' to open");
    let request = CreateRequest { virtual_size_bytes, backing, options: &set, open_file: &open_file };
    super::super::Qed.create(&storage, &request)
}

fn create_theirs(directory: &Path, size: &str, options: &str) -> (bool, String) {
    let mut arguments = vec!["create", "-q", "-f", "qed", "-u"];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend(["theirs", size]);
    qemu_img(directory, &arguments)
}

#[test]
fn new_images_are_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    for options in [
        "",
        "cluster_size=4096",
        "cluster_size=4k,table_size=1",
        "cluster_size=4k,table_size=16",
        "cluster_size=8M,table_size=1",
        "cluster_size=1M,table_size=2",
        "table_size=16",
        "backing_file=base.raw,backing_fmt=raw",
        "backing_file=some/long/name.qcow2,backing_fmt=qcow2",
        "backing_file=base.qed,backing_fmt=qed,cluster_size=4k",
    ] {
        for size in ["0", "1", "1M", "1G"] {
            let (made, error) = create_theirs(folder.path(), size, options);
            assert!(made, "{options} {size}: {error}");
            create_ours(folder.path(), size, options)
                .unwrap_or_else(|error| panic!("{options} {size}: {error}"));
            let [ours, theirs] = ["ours", "theirs"].map(|name| folder.path().join(name));
            let [ours_bytes, theirs_bytes] =
                [&ours, &theirs].map(|path| std::fs::read(path).expect("readable"));
            assert!(ours_bytes == theirs_bytes, "{options} {size}");
            for path in [ours, theirs] {
                std::fs::remove_file(path).expect("removed");
            }
        }
    }
}

#[test]
fn refusals_are_in_the_same_words() {
    for (size, options) in [
        ("1M", "cluster_size=1000"),
        ("1M", "cluster_size=2048"),
        ("1M", "cluster_size=0"),
        ("1M", "cluster_size=128M"),
        ("1M", "cluster_size=8G"),
        ("1M", "table_size=0"),
        ("1M", "table_size=3"),
        ("1M", "table_size=32"),
        ("2G", "cluster_size=4k,table_size=1"),
        ("100T", ""),
        ("1M", "cluster_size=64M,table_size=16"),
        ("1M", "cluster_size=16M,table_size=1"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary directory");
        let (made, theirs) = create_theirs(folder.path(), size, options);
        assert!(!made, "{options} {size}");
        let ours = create_ours(folder.path(), size, options).expect_err(options);
        assert_eq!(format!("qemu-img: theirs: {ours}\n"), theirs, "{options} {size}");
    }
}
