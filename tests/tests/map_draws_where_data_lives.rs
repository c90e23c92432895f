//! `map --plot`: a picture for every format and size that is well-formed XML of bounded size, and whose legend says
//! what `map` and `check` say.

use std::{collections::BTreeMap, fs, path::Path};

use img_tests::command::{img, qemu_img, qemu_io};
use roxmltree::Document;
use serde_json::Value;

/// The most bytes of a picture with one host file.
const MOST_BYTES: usize = 200 << 10;

/// The legends of a picture, space by space: owner, bytes.
fn legends(directory: &Path, arguments: &[&str]) -> Vec<BTreeMap<String, u64>> {
    img(directory, [&["map", "--plot", "map.svg"], arguments].concat()).output().success();
    let text = fs::read_to_string(directory.join("map.svg")).expect("a picture");
    let picture = Document::parse(&text).expect("well-formed XML");
    assert_eq!(picture.root_element().tag_name().name(), "svg");
    let spaces: Vec<BTreeMap<String, u64>> = picture
        .descendants()
        .filter(|node| node.tag_name().name() == "g")
        .map(|space| {
            let lines = space.children().filter(|node| node.has_attribute("data-owner"));
            lines
                .map(|line| {
                    let value = |name| line.attribute(name).expect("an attribute").to_owned();
                    (value("data-owner"), value("data-bytes").parse().expect("a number"))
                })
                .collect()
        })
        .collect();
    assert!(text.len() <= MOST_BYTES * spaces.len(), "{} bytes", text.len());
    spaces
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

/// Bytes of the map's entries that `wanted` picks.
fn mapped(directory: &Path, file: &str, wanted: impl Fn(&Value) -> bool) -> u64 {
    let map = json(&qemu_img(directory, ["map", "--output=json", file]).output().success());
    let entries = map.as_array().expect("an array").iter().filter(|entry| wanted(entry));
    entries.map(|entry| entry["length"].as_u64().expect("a number")).sum()
}

fn is_data_at(depth: u64) -> impl Fn(&Value) -> bool {
    move |entry| entry["data"] == true && entry["depth"] == depth
}

#[test]
fn every_format_and_size_has_a_picture_that_agrees_with_map() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    for (format, size, options) in [
        ("raw", "1M", ""),
        ("raw", "512", ""),
        ("raw", "8T", ""),
        ("qcow2", "1M", "cluster_size=512"),
        ("qcow2", "16T", "cluster_size=2M"),
        ("qcow2", "64M", "extended_l2=on"),
        ("qcow2", "64M", "data_file=x.data"),
        ("qed", "1G", ""),
        ("vpc", "100M", ""),
        ("vpc", "100M", "subformat=fixed"),
        ("vmdk", "1G", ""),
        ("vmdk", "1G", "subformat=monolithicFlat"),
        ("vmdk", "5G", "subformat=twoGbMaxExtentSparse"),
    ] {
        let what = format!("{format} {size} {options}");
        let options =
            if options.is_empty() { format!("size={size}") } else { format!("size={size},{options}") };
        let file = format!("image & <{format}>.{}", if format == "vmdk" { "vmdk" } else { "img" });
        qemu_img(directory, ["create", "-q", "-f", format, "-o", &options, &file]).output().success();
        if size != "512" {
            qemu_io(directory, format, &file, &["write -q -P 1 4k 300k"]).output().success();
        }
        let spaces = legends(directory, &["-f", format, &file]);
        let info =
            json(&qemu_img(directory, ["info", "--output=json", "-f", format, &file]).output().success());
        let total = |space: &BTreeMap<String, u64>| space.values().sum::<u64>();
        assert_eq!(Value::from(total(&spaces[0])), info["virtual-size"], "{what}");
        let of = |space: &BTreeMap<String, u64>, owner: &str| space.get(owner).copied().unwrap_or(0);
        let map =
            json(&qemu_img(directory, ["map", "--output=json", "-f", format, &file]).output().success());
        let data: u64 = map
            .as_array()
            .expect("an array")
            .iter()
            .filter(|entry| entry["data"] == true)
            .map(|entry| entry["length"].as_u64().expect("a number"))
            .sum();
        assert_eq!(of(&spaces[0], "Layer(0)"), data, "{what}");
        if !(format == "vpc" || options.contains("Flat")) {
            let stored: u64 = spaces[1..].iter().map(|space| of(space, "Data")).sum();
            assert_eq!(stored, data, "{what}");
        }
        let file_bytes = fs::metadata(directory.join(&file)).expect("a file").len();
        assert_eq!(total(&spaces[1]), file_bytes, "{what}");
        for name in [file.as_str(), "x.data"] {
            fs::remove_file(directory.join(name)).ok();
        }
    }
}

#[test]
fn owners_of_a_qcow2_file_are_those_of_check() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    qemu_img(directory, ["create", "-q", "-f", "raw", "below", "64M"]).output().success();
    qemu_io(directory, "raw", "below", &["write -q -P 9 0 1M"]).output().success();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "-b", "below", "-F", "raw", "x"]).output().success();
    qemu_io(
        directory,
        "qcow2",
        "x",
        &["write -q -P 1 2M 2M", "write -q -z 8M 1M", "write -q -c -P 3 16M 640k"],
    )
    .output()
    .success();
    let before = legends(directory, &["x"]);
    assert_eq!(before.len(), 3, "the disk, and a file for each layer");
    assert_eq!(before[0]["Layer(0)"], mapped(directory, "x", is_data_at(0)));
    assert_eq!(before[0]["Layer(1)"], mapped(directory, "x", is_data_at(1)));
    let is_zero = |entry: &Value| entry["data"] == false && entry["present"] == true;
    assert_eq!(before[0]["Zero"], mapped(directory, "x", is_zero));
    assert_eq!(before[1]["Data"], 2 << 20);
    assert_eq!(before[1]["Refcounts"], 2 * 65536);
    // The header, L1, and one L2 table.
    assert_eq!(before[1]["Tables"], 3 * 65536);
    assert!(before[1]["Compressed"] > 0 && before[1]["Compressed"] < 65536, "{before:?}");
    assert!(!before[1].contains_key("Snapshots"));
    let check = json(&qemu_img(directory, ["check", "--output=json", "x"]).output().success());
    let in_use: u64 = before[1].iter().filter(|(owner, _)| *owner != "Free").map(|(_, bytes)| bytes).sum();
    assert!(in_use <= check["image-end-offset"].as_u64().expect("a number"));

    qemu_img(directory, ["snapshot", "-c", "one", "x"]).output().success();
    qemu_io(directory, "qcow2", "x", &["write -q -P 2 2M 1M"]).output().success();
    let after = legends(directory, &["x"]);
    assert_eq!(after[1]["Data"], 2 << 20);
    // What was overwritten, the snapshot's tables, and what they share a cluster with.
    let snapshots = after[1]["Snapshots"];
    let expected = (1 << 20) + 3 * 65536..(1 << 20) + 6 * 65536;
    assert!(expected.contains(&snapshots), "{after:?}");
}

#[test]
fn what_a_picture_cannot_show_is_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let directory = directory.path();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "a", "1M"]).output().success();
    for arguments in [
        &["--plot", "p.svg", "--start-offset", "1k", "a"][..],
        &["--plot", "p.svg", "--max-length", "1k", "a"],
        &["--plot", "p.svg", "--dirty-bitmap", "b", "a"],
        &["--plot", "p.svg", "--output", "json", "a"],
        &["--plot", "none/p.svg", "a"],
    ] {
        let run = img(directory, [&["map"], arguments].concat()).output();
        assert!(run.code == 1 && run.stderr.contains("p"), "{run}");
        assert!(!directory.join("p.svg").exists(), "{run}");
    }
    let left: Vec<_> = fs::read_dir(directory).expect("a directory").collect();
    assert_eq!(left.len(), 1, "{left:?}");
}
