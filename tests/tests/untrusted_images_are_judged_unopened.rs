//! `img inspect --untrusted`: one verdict for each image, by its own file alone. That no file is opened that an image
//! names is watched through inotify: the kernel tells of every opening.

use std::path::Path;

use img_tests::command::{Output, Run, img, img_binary};
use rustix::{
    fs::inotify::{self, CreateFlags, WatchFlags},
    io::Errno,
};
use serde_json::Value;
use tempfile::TempDir;

/// A directory in which a shell line was run, `$img` being the program.
fn with(setup: &str) -> TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    Run::new("bash", directory.path())
        .args(["-c", &format!("set -euo pipefail; img=$1; {setup}"), "bash"])
        .arg(img_binary())
        .output()
        .success();
    directory
}

fn run(at: &Path, image: &str, options: &[&str]) -> Output {
    img(at, ["inspect", "--untrusted", "--output=json"]).args(options).arg(image).output()
}

/// The report of an image, whose exit code must say what it says.
#[track_caller]
fn report(at: &Path, image: &str, options: &[&str]) -> Value {
    let output = run(at, image, options);
    let report: Value =
        serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output}"));
    let expected = if report["verdict"] == "accept" { 0 } else { 2 };
    assert_eq!(output.code, expected, "{output}");
    assert_eq!(output.code == 0, report["reasons"] == Value::Array(Vec::new()), "{output}");
    report
}

/// The ids of its reasons, each once, in order.
#[track_caller]
fn reasons(report: &Value) -> Vec<&str> {
    let reasons = report["reasons"].as_array().expect("reasons").iter();
    let mut ids: Vec<_> = reasons.map(|reason| reason["id"].as_str().expect("an id")).collect();
    ids.dedup();
    ids
}

#[track_caller]
fn refused(at: &Path, image: &str, options: &[&str], ids: &[&str]) -> Value {
    let report = report(at, image, options);
    assert_eq!(reasons(&report), ids, "{image} {options:?}: {report:#}");
    report
}

#[track_caller]
fn accepted(at: &Path, image: &str, options: &[&str]) -> Value {
    refused(at, image, options, &[])
}

#[test]
fn sound_images_of_all_formats_are_accepted() {
    let directory = with(
        "qemu-img create -q -f qcow2 a.qcow2 64M; qemu-img create -q -f qed a.qed 64M; \
         qemu-img create -q -f vmdk a.vmdk 64M; qemu-img create -q -f vpc -o force_size=on a.vpc 64M; \
         truncate -s 64M a.raw; qemu-img create -q -f vpc -o subformat=fixed,force_size=on b.vpc 64M; \
         for f in qcow2 qed vmdk vpc raw; do qemu-io -f $f -c 'write -P 7 1M 3M' a.$f >text; done; \
         qemu-img convert -f raw -O vmdk -o subformat=streamOptimized a.raw b.vmdk; \
         qemu-img snapshot -c s a.qcow2; qemu-img bitmap --add a.qcow2 b",
    );
    let at = directory.path();
    for (image, format, stored) in [
        ("a.qcow2", "qcow2", Some(3 << 20)),
        ("a.qed", "qed", Some(3 << 20)),
        ("a.vmdk", "vmdk", Some(3 << 20)),
        ("b.vmdk", "vmdk", Some(3 << 20)),
        ("a.vpc", "vpc", Some(4 << 20)),
        ("b.vpc", "vpc", None),
        ("a.raw", "raw", None),
    ] {
        let report = accepted(at, image, &["--allow-format", format, "--max-size", "64M"]);
        assert_eq!(report["format"], format, "{report:#}");
        assert_eq!(report["virtual-size"], 64 << 20, "{report:#}");
        if let Some(bytes) = stored {
            assert_eq!(report["stored-bytes"], bytes, "{report:#}");
        }
        refused(at, image, &["--max-size", "63M"], &["virtual-size"]);
        let other = if format == "raw" { "qcow2,vmdk" } else { "raw" };
        refused(at, image, &["--allow-format", other], &["format-not-allowed"]);
    }
    let report = accepted(at, "a.qcow2", &[]);
    assert_eq!((&report["snapshots"], &report["bitmaps"]), (&1.into(), &1.into()), "{report:#}");
    assert_eq!(accepted(at, "b.vmdk", &[])["compressed-bytes"], 3 << 20);
}

/// The keys of a report, whatever the image is.
#[test]
fn the_report_has_the_same_keys_for_every_image() {
    let directory = with("qemu-img create -q -f qcow2 good 1M; printf 'QFI\\xfb' >bad; truncate -s 1M raw");
    let at = directory.path();
    let mut reports = [accepted(at, "good", &[]), accepted(at, "raw", &[]), report(at, "bad", &[])];
    assert_eq!(reports[2]["verdict"], "refuse");
    let keys = reports.each_mut().map(|report| {
        let mut keys: Vec<_> = report.as_object().expect("an object").keys().cloned().collect();
        keys.sort();
        keys
    });
    for found in keys {
        let expected = "bitmaps check compressed-bytes corrupt dirty encryption file-size filename format reasons \
                        references snapshots stored-bytes verdict virtual-size";
        assert_eq!(found.join(" "), expected);
    }
}

/// An image, what it names, under which kind, and with which further reasons.
const NAMING: [(&str, &str, &str, &[&str]); 8] = [
    ("over.qcow2", "secret", "backing", &["reference"]),
    ("unnamed.qcow2", "secret", "backing", &["reference", "reference-format-unknown"]),
    ("json.qcow2", "secret", "backing", &["reference-not-plain"]),
    ("over.qed", "secret", "backing", &["reference"]),
    ("data.qcow2", "secret", "data-file", &["reference"]),
    ("flat.vmdk", "flat-flat.vmdk", "extent", &["reference"]),
    ("two.vmdk", "two-s001.vmdk", "extent", &["reference", "tables-elsewhere"]),
    ("child.vpc", "parent.vpc", "backing", &["reference"]),
];

/// Images that name files, which are there and can be read.
fn naming() -> TempDir {
    with(
        "qemu-img create -q -f qcow2 -o data_file=secret data.qcow2 1M; head -c 1M /dev/zero >secret; \
         qemu-img create -q -f qcow2 -u -b secret -F raw over.qcow2 1M; \
         cp over.qcow2 unnamed.qcow2; printf none | dd of=unnamed.qcow2 bs=1 seek=112 conv=notrunc status=none; \
         qemu-img create -q -f qcow2 -u -F raw json.qcow2 1M \
           -b 'json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"secret\"}}'; \
         qemu-img create -q -f qed -u -b secret -F raw over.qed 1M; \
         qemu-img create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 1M; \
         qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse two.vmdk 1M; \
         qemu-img create -q -f vpc parent.vpc 1M; $img create -q -f vpc -b parent.vpc -F vpc child.vpc",
    )
}

#[test]
fn files_that_images_name_are_listed_and_never_opened() {
    let directory = naming();
    let at = directory.path();
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).expect("an inotify");
    for (_, named, ..) in NAMING {
        let path = at.join(named);
        inotify::add_watch(&watch, &path, WatchFlags::OPEN | WatchFlags::ACCESS).expect("a watch");
    }
    let is_quiet = || rustix::io::read(&watch, &mut [0; 4096]) == Err(Errno::AGAIN);
    for (image, named, kind, ids) in NAMING {
        let report = refused(at, image, &[], ids);
        let reference = &report["references"][0];
        assert_eq!(reference["kind"], kind, "{report:#}");
        assert_eq!(reference["allowed"], false, "{report:#}");
        assert!(reference["name"].as_str().expect("a name").contains(named), "{report:#}");
        // What is allowed is not opened either.
        let report = report_allowing(at, image);
        assert_eq!(report["references"][0]["allowed"], image != "json.qcow2", "{report:#}");
        // But where it holds the image's own tables.
        assert!(is_quiet() != (image == "two.vmdk"), "{image}: the file that it names");
        while !is_quiet() {}
    }
    // Others do open them, and the watch tells.
    img(at, ["map", "over.qcow2"]).output().success();
    assert!(!is_quiet());
}

/// Sparse extents are judged by their own files, where they may be opened: as good as one file, or as bad.
#[test]
fn tables_in_extents_are_judged_where_they_may_be_opened() {
    let directory = with(
        "qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse good.vmdk 3G; \
         qemu-io -f vmdk -c 'write -P 7 1M 3M' -c 'write -P 8 2500M 1M' good.vmdk >text; \
         for n in bad gone out; do sed s/good-s/$n-s/ good.vmdk >$n.vmdk; \
           for e in 1 2; do cp good-s00$e.vmdk $n-s00$e.vmdk; done; done; \
         directory=$(od -An -tu8 -j56 -N8 bad-s002.vmdk); \
         printf '\\377\\377\\377\\000' | dd of=bad-s002.vmdk bs=512 seek=$((directory)) conv=notrunc status=none; \
         rm gone-s002.vmdk; mkdir sub; mv out-s002.vmdk sub; ln -s /etc/passwd out-s002.vmdk",
    );
    let at = directory.path();
    let report = accepted(at, "good.vmdk", &["--allow-refs", "."]);
    assert_eq!(report["virtual-size"], 3_u64 << 30, "{report:#}");
    assert_eq!(report["stored-bytes"], 4 << 20, "{report:#}");
    assert_eq!(report["check"]["errors"], 0, "{report:#}");
    let ids = |image| -> Vec<String> {
        let report = report_allowing(at, image);
        assert_eq!(report["verdict"], "refuse", "{report:#}");
        let reasons = report["reasons"].as_array().expect("reasons");
        reasons.iter().map(|reason| reason["id"].as_str().expect("an id").to_owned()).collect()
    };
    assert!(ids("bad.vmdk").contains(&"structure-invalid".to_owned()));
    assert_eq!(ids("gone.vmdk"), ["image-unusable"]);
    assert!(ids("out.vmdk").contains(&"reference-outside".to_owned()));
}

#[track_caller]
fn report_allowing(at: &Path, image: &str) -> Value {
    report(at, image, &["--allow-refs", "."])
}

#[test]
fn names_are_judged_by_where_they_lead() {
    let directory = with(
        "mkdir in out; touch in/base out/base; ln -s ../out in/away; cd in; \
         for name in base ../in/base ./sub/../base missing ../out/base /etc/passwd away/base ../in nbd:x:1; do \
           n=$((${n:-0} + 1)); qemu-img create -q -f qcow2 -u -b \"$name\" -F raw $n 1M; done",
    );
    let at = directory.path();
    for (image, reason) in [
        ("1", None),
        ("2", None),
        ("3", None),
        ("4", None),
        ("5", Some("reference-outside")),
        ("6", Some("reference-outside")),
        ("7", Some("reference-outside")),
        ("8", Some("reference-outside")),
        ("9", Some("reference-not-plain")),
    ] {
        refused(at, &format!("in/{image}"), &["--allow-refs", "in"], &Vec::from_iter(reason));
    }
}

#[test]
fn marks_of_trouble_are_reasons() {
    let directory = with(
        "mark() { cp plain $1; printf $2 | dd of=$1 bs=1 seek=79 conv=notrunc status=none; }; \
         qemu-img create -q -f qcow2 plain 1M; mark corrupt '\\x02'; mark dirty '\\x01'; mark unknown '\\x80'; \
         qemu-img create -q -f qcow2 --object secret,id=s,data=abc \
           -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks 1M; \
         head -c 100M /dev/zero | tr '\\0' x >text; qemu-img convert -f raw -O qcow2 -c text bomb; \
         qemu-img convert -f raw -O qcow2 text full; cp full l1; \
         printf '\\x80\\0\\0\\x70\\0\\0\\0\\0' | dd of=l1 bs=1 seek=$((0x30000)) conv=notrunc status=none; \
         cp full header; printf '\\x00\\x01' | dd of=header bs=1 seek=46 conv=notrunc status=none; \
         head -c 50 full >short; cp -r full both; qemu-img create -q -f vpc v 1M; tail -c 512 v >>text",
    );
    let at = directory.path();
    assert_eq!(refused(at, "corrupt", &[], &["corrupt"])["corrupt"], true);
    assert_eq!(refused(at, "dirty", &[], &["dirty"])["dirty"], true);
    assert_eq!(refused(at, "luks", &[], &["encrypted"])["encryption"], "luks");
    refused(at, "unknown", &[], &["image-unusable"]);
    refused(at, "bomb", &[], &["expansion-ratio"]);
    assert_eq!(accepted(at, "bomb", &["--max-ratio", "1000"])["compressed-bytes"], 100 << 20);
    accepted(at, "full", &["--max-ratio", "1"]);
    refused(at, "plain", &["-f", "vmdk"], &["format-mismatch"]);
    let report = refused(at, "l1", &[], &["check-errors", "check-finding", "structure-invalid"]);
    let last = report["reasons"].as_array().expect("reasons").last().expect("one");
    for key in ["structure", "offset", "found", "expected"] {
        assert!(!last[key].is_null(), "{key}: {report:#}");
    }
    let report = refused(at, "header", &[], &["structure-invalid"]);
    assert_eq!(report["reasons"][0]["structure"], "header.l1_table_offset", "{report:#}");
    assert_eq!(report["reasons"][0]["offset"], 40, "{report:#}");
    assert_eq!(report["verdict"], "refuse");
    assert_eq!(self::report(at, "short", &[])["verdict"], "refuse");
}

#[test]
fn without_a_verdict_the_exit_code_is_one() {
    let directory =
        with("mkfifo pipe; truncate -s 1M raw; qemu-img create -q -f qcow2 -o cluster_size=4k big 8T");
    let at = directory.path();
    for (image, options, says) in [
        ("pipe", &[][..], "to be a regular file"),
        ("none", &[], "No such file"),
        ("raw", &["--allow-format", "raw,dmg"], "Unknown format 'dmg'"),
        ("raw", &["-f", "dmg"], "Unknown format 'dmg'"),
        ("raw", &["--max-size", "x"], "Invalid maximal size"),
        ("raw", &["--max-ratio", "0"], "Invalid ratio"),
        ("raw", &["--allow-refs", "nowhere"], "nowhere"),
        ("big", &["--limits", "memory=8M"], "the limit of 8388608 bytes of memory is reached"),
    ] {
        let output = run(at, image, options);
        assert_eq!((output.code, output.stdout.as_str()), (1, ""), "{output}");
        assert!(output.stderr.contains(says), "{output}");
    }
    let output = img(at, ["inspect", "raw"]).output();
    assert_eq!(output.code, 1, "{output}");
    assert!(output.stderr.contains("say --untrusted"), "{output}");
}

#[test]
fn people_are_told_the_same_without_harm_to_their_terminal() {
    let directory = with("qemu-img create -q -f qcow2 -u -b $'a\\e[2Jb' -F raw over 1M");
    let output = img(directory.path(), ["inspect", "--untrusted", "over"]).output();
    assert_eq!(output.code, 2, "{output}");
    assert!(output.stdout.starts_with("image: over\nverdict: refuse\nreason: reference: over: "), "{output}");
    assert!(output.stdout.contains("reference: backing: a\\u{1b}[2Jb (refused, not opened)\n"), "{output}");
    assert!(!output.stdout.contains('\u{1b}'), "{output}");
}
