//! `null-co` and `null-aio`, as names, in `json:` and in `--image-opts`: alone, under `raw` and as backing files.

use std::time::Instant;

use img_tests::{command::img, twin::Twins};

const SETUP: &[&str] = &[
    "truncate -s 1M zeroes",
    "head -c 1M /dev/zero | tr '\\0' q > letters",
    "qemu-img create -q -f qcow2 -b null-co:// -F raw over && qemu-io -c 'write -P 1 64k 64k' over >/dev/null",
    "qemu-img create -q -f qcow2 -b null-co:// -F null-co straight",
];

/// One that promises zeroes.
const ZEROES: &str = r#"'json:{"driver":"null-co","size":1048576,"read-zeroes":true}'"#;

/// As operands of commands.
const NAMES: &[&str] = &[
    "null-co://",
    "null-aio://",
    "-f raw null-co://",
    "-f null-co null-co://",
    "-f null-aio null-co://",
    "-f null-co zeroes",
    "-f qcow2 null-co://",
    "null-co:",
    "null-co://name",
    "--image-opts driver=null-co,size=1M",
    "--image-opts driver=null-co,size=1000,read-zeroes=on",
    "--image-opts driver=null-aio,size=4k,latency-ns=10",
    "--image-opts driver=null-co,latency-ns=-5",
    "--image-opts driver=null-co,filename=null-co://",
    "--image-opts driver=null-co,size=0",
    "--image-opts driver=null-co,cache.direct=on,detect-zeroes=on,read-only=on",
    "--image-opts file.driver=null-co",
    "--image-opts driver=raw,file.driver=null-co,file.size=1M,file.read-zeroes=on",
    "--image-opts driver=qcow2,file.driver=null-co",
    r#"'json:{"driver":"null-co","size":1048576}'"#,
    ZEROES,
    r#"'json:{"driver":"raw","size":4096,"file":{"driver":"null-co","size":"1M"}}'"#,
    r#"'json:{"driver":"raw","file":{"driver":"null-co","foo":1}}'"#,
    "over",
    "straight",
];

#[test]
fn what_is_said_of_them() {
    let mut twins = Twins::new(SETUP).without_files();
    for name in NAMES {
        for command in ["info", "info --output=json", "map", "map --output=json", "check", "snapshot -l"] {
            // No two files of one content need take equal space.
            let ignored = ["disk size: ", "\"actual-size\": "];
            twins.line_seen_through(&format!("qemu-img {command} {name}"), &ignored);
        }
    }
    twins.lines(&[
        "qemu-img info --backing-chain over | grep -v 'disk size'",
        "qemu-img measure -O qcow2 null-co://",
        "qemu-img measure -O null-co zeroes",
    ]);
    twins.agree();
}

#[test]
fn bytes_go_in_and_out() {
    let mut twins = Twins::new(SETUP).without_disk_use();
    for name in ["null-co://", ZEROES] {
        for command in ["compare zeroes", "compare letters", "compare -s zeroes"] {
            twins.line(&format!("qemu-img {command} {name}"));
        }
        twins.line(&format!("qemu-img convert -O qcow2 {name} out"));
    }
    // Without read-zeroes the reference's dd writes what its memory held before.
    twins.line(&format!("qemu-img dd if={ZEROES} of=short bs=4k count=3"));
    let small = "driver=null-co,size=1M";
    twins.lines(&[
        "qemu-img compare over straight",
        "qemu-img convert -O raw over out",
        "qemu-img convert -n letters null-co://",
        "qemu-img convert -n -O raw letters null-co://",
        "qemu-img convert -n -O null-co letters null-co://",
        &format!("qemu-img convert -n --target-image-opts letters {small}"),
        &format!("qemu-img convert -n --target-image-opts letters {small},read-only=on"),
        "qemu-img convert -n --target-image-opts letters driver=null-co,size=1K",
        &format!("qemu-img bench -w -c 10 -s 64k --image-opts {small} | head -n 1"),
        &format!("qemu-img bench -c 10 --image-opts {small} | head -n 1"),
    ]);
    twins.agree();
    // How far an emptied file shrinks is the overlay's affair.
    Twins::new(SETUP).without_files().line("qemu-img commit over").agree();
}

#[test]
fn what_they_are_not_for() {
    let mut twins = Twins::new(SETUP);
    twins.lines(&[
        "qemu-img create -f null-co x 1M",
        "qemu-img create -f null-co -o help",
        "qemu-img create null-co:// 1M",
        "qemu-img convert letters null-co://",
        "qemu-img convert -O qcow2 letters null-co://",
        "qemu-img convert -O null-co letters x",
        "qemu-img convert -c -n -O null-co letters null-co://",
        "qemu-img resize -f raw null-co:// 2G",
        "qemu-img resize --shrink -f raw null-co:// 4M",
        "qemu-img resize --image-opts driver=null-co 2G",
        "qemu-img snapshot -c s -f null-co null-co://",
        "qemu-img amend -f null-co -o size=1 null-co://",
        "qemu-img bench -w --image-opts driver=null-co,size=1M,read-only=on",
    ]);
    twins.agree();
}

/// Bad numbers end the reference with an abort.
#[test]
fn numbers_are_checked() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    for (options, why) in [
        ("size=-1", "size"),
        ("size=abc", "size"),
        ("size=1000000000000000000000", "size"),
        ("read-zeroes=maybe", "Parameter 'read-zeroes' expects 'on' or 'off'"),
        ("latency-ns=abc", "Parameter 'latency-ns' expects a number"),
        ("latency-ns=9223372036854775808", "latency-ns is invalid"),
    ] {
        let node = format!("driver=null-co,{options}");
        let run = img(folder.path(), ["info", "--image-opts", &node]).output();
        assert_eq!(run.code, 1, "{run}");
        assert!(run.stderr.contains(why), "{run}");
    }
}

/// Who names one on the command line is made to wait; who opens an image that names one is not.
#[test]
fn latency_is_the_users_choice() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let slow = "driver=null-co,size=1M,latency-ns=20000000";
    let before = Instant::now();
    img(folder.path(), ["bench", "-c", "5", "-d", "1", "--image-opts", slow]).output().success();
    assert!(before.elapsed().as_millis() >= 100, "five reads of 20 ms took {:?}", before.elapsed());

    let backing = r#"json:{"driver":"null-co","latency-ns":9000000000000000000}"#;
    let create = ["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "null-co", "image", "1M"];
    img(folder.path(), create).output().success();
    let run = img(folder.path(), ["convert", "-O", "raw", "image", "out"]).output();
    assert_eq!(run.code, 1, "{run}");
    assert!(run.stderr.contains("an image names it with latency-ns"), "{run}");
}
