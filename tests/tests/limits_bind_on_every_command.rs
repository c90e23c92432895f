//! `--limits` and `--allow-refs`: each bound ends a run that goes beyond it, on several commands, with exit code 1 and
//! a message; what was being made is gone, and a run inside its bounds is as without them.

use std::{fs, path::Path};

use img_tests::command::shell;
use tempfile::TempDir;

fn with(setup: &str) -> TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    shell(directory.path(), setup).success();
    directory
}

#[track_caller]
fn refused(at: &Path, line: &str, says: &str) {
    let output = shell(at, line);
    assert_eq!(output.code, 1, "{output}");
    assert!(output.stderr.contains(says), "{output}");
}

#[test]
fn memory() {
    let directory = with(
        "qemu-img create -q -f qcow2 -o cluster_size=4k big 8T && truncate -s 64M raw && \
         head -c 40M /dev/zero | tr '\\0' x >text",
    );
    let at = directory.path();
    let says = "the limit of 8388608 bytes of memory is reached";
    for command in [
        "map big",
        "measure -O qcow2 big",
        "convert -O qcow2 big out",
        "convert -f raw -c -O qcow2 -o cluster_size=2M -m 16 text out",
    ] {
        let line = format!("$img {command} --limits memory=8M >/dev/null");
        refused(at, &line, says);
        assert!(!at.join("out").exists(), "{line}");
    }
    for command in
        ["info big", "convert -f raw -O qcow2 raw out", "check out", "compare -f raw -F qcow2 raw out"]
    {
        shell(at, &format!("$img {command} --limits=memory=64M,cpu=100,depth=5,output=1G >log")).success();
    }
}

#[test]
fn cpu_time() {
    let directory = with("head -c 64M /dev/urandom >noise && qemu-img create -q -f qcow2 disk 1G");
    let at = directory.path();
    let says = "the limit of 1 s of CPU time is reached";
    refused(
        at,
        "cat noise{,,} >big; $img convert -f raw -O qcow2 -c --level 12 big out --limits cpu=1",
        says,
    );
    assert!(!at.join("out").exists());
    refused(at, "$img bench -c 100000000 -t unsafe -f qcow2 disk --limits cpu=1", says);
    let line = "$img convert -f raw -O qcow2 -c --level 12 --limits cpu=1 big - >caught";
    refused(at, line, says);
}

#[test]
fn depth_of_chains() {
    let directory = with(
        "qemu-img create -q -f qcow2 1 1M && for i in 2 3 4; do \
         qemu-img create -q -f qcow2 -b $((i-1)) -F qcow2 $i; done",
    );
    let at = directory.path();
    for command in [
        "info --backing-chain 4",
        "map 4",
        "convert 4 out",
        "measure -O qcow2 4",
        "dd if=4 of=out",
        "commit 4",
        "rebase -b 2 -F qcow2 4",
        "bench -c 1 4",
        "resize 4 2M",
    ] {
        refused(
            at,
            &format!("$img {command} --limits depth=3 >/dev/null"),
            "the backing chain is deeper than 3 images",
        );
        assert!(!at.join("out").exists(), "{command}");
    }
    for command in ["info --backing-chain 4", "map 4", "convert 4 out", "compare 4 4"] {
        shell(at, &format!("$img {command} --limits depth=4")).success();
    }
}

#[test]
fn output() {
    let directory = with(
        "head -c 10M /dev/urandom >noise && qemu-img create -q -f qcow2 disk 100M && \
         qemu-img create -q -f raw base 10M && qemu-img create -q -f qcow2 -b base -F raw over && \
         qemu-io -c 'write -P 3 0 10M' over >/dev/null && gzip -k noise",
    );
    let at = directory.path();
    let says = "more than the 5242880 bytes of output that are allowed would be written";
    for command in [
        "convert -f raw noise out",
        "convert -f raw -O qcow2 noise out",
        "convert -f raw -O qcow2 noise - >caught",
        "convert -f raw --unwrap -O qcow2 noise.gz out",
        "create -f qcow2 -o preallocation=full out 10M",
        "create -f raw -o preallocation=falloc out 10M",
        "resize -f raw --preallocation=full base 30M",
    ] {
        refused(at, &format!("$img {command} --limits output=5M"), says);
        assert!(!at.join("out").exists(), "{command}");
    }
    for command in ["dd if=noise of=out", "commit over", "bench -w -c 2000 -f qcow2 disk"] {
        let output = shell(at, &format!("$img {command} --limits output=5M"));
        assert_eq!(output.code, 1, "{output}");
        assert!(!at.join("out").exists(), "{command}");
    }
    shell(at, "$img convert -f raw -O qcow2 noise out --limits output=11M && $img compare -f raw noise -F qcow2 out")
        .success();
}

#[test]
fn what_comes_out_of_compressed_sources() {
    let directory =
        with("head -c 30M /dev/zero | gzip >bomb.gz && head -c 30M /dev/zero | zstd -q >bomb.zst");
    let at = directory.path();
    for command in ["convert bomb.gz out", "convert -O qcow2 bomb.zst out", "convert --spool . bomb.gz out"] {
        let says = "more than 20971520 bytes come out of the";
        refused(at, &format!("$img {command} --limits unwrapped=20M"), says);
        assert!(!at.join("out").exists(), "{command}");
        shell(at, &format!("$img {command} --limits unwrapped=30M && rm out")).success();
    }
}

#[test]
fn references_outside_of_a_directory() {
    let directory = with(
        "mkdir in out && qemu-img create -q -f qcow2 in/base 1M && qemu-img create -q -f qcow2 out/base 1M && \
         qemu-img create -q -f qcow2 -b base -F qcow2 in/good && qemu-img create -q -f qcow2 -b ../out/base -F qcow2 in/bad && \
         ln -s ../out/base in/link && qemu-img create -q -f qcow2 -b link -F qcow2 in/linked && \
         qemu-img create -q -f qcow2 -o data_file=$PWD/out/data in/data 1M && \
         (cd out && qemu-img create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 1M)",
    );
    let at = directory.path();
    let says = "where references have to lead";
    for image in ["in/bad", "in/linked", "in/data", "out/flat.vmdk"] {
        for command in ["map", "convert -O raw", "compare in/good", "measure -O raw", "bench -c 1"] {
            let target = if command.starts_with("convert") { "o" } else { "" };
            let output = shell(at, &format!("$img {command} {image} {target} --allow-refs in >/dev/null"));
            // `compare` keeps 1 for disks that differ.
            let code = if command.starts_with("compare") { 2 } else { 1 };
            assert_eq!(output.code, code, "{output}");
            assert!(output.stderr.contains(says), "{output}");
            assert!(!at.join("o").exists());
        }
    }
    refused(at, "$img info --backing-chain in/bad --allow-refs in", says);
    refused(at, "$img create -f qcow2 -b out/base -F qcow2 new --allow-refs in", says);
    refused(at, "$img rebase -b ../out/base -F qcow2 in/good --allow-refs in", says);
    refused(at, "$img map in/good --allow-refs nowhere", "nowhere");
    // A full description leads to its file as a plain name does; one that names no file leads nowhere.
    let outside =
        r#"json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"$PWD/out/base\"}}"#;
    shell(at, &format!("qemu-img create -q -f qcow2 -u -b \"{outside}\" -F qcow2 in/json 1M")).success();
    refused(at, "$img info --backing-chain in/json --allow-refs in", says);
    refused(at, "$img map in/json --allow-refs in", says);
    refused(at, &format!("$img create -f qcow2 -b \"{outside}\" -F qcow2 new --allow-refs in"), says);
    refused(at, &format!("$img rebase -b \"{outside}\" -F qcow2 in/good --allow-refs in"), says);
    shell(at, "qemu-img create -q -f qcow2 -b null-co:// -F raw in/null 1M").success();
    assert!(!at.join("new").exists());
    for command in [
        "map in/good",
        "convert -O raw in/good o",
        "info in/bad",
        "map out/base",
        "info --backing-chain in/good",
        "info --backing-chain in/null",
        "map in/null",
    ] {
        shell(at, &format!("$img {command} --allow-refs in")).success();
    }
    fs::remove_file(at.join("o")).expect("it was made");
}

#[test]
fn limits_that_make_no_sense_are_refused() {
    let directory = with("truncate -s 1M raw");
    for (limits, says) in [
        ("nope=1", "--limits expects memory, cpu, depth, output or unwrapped, not 'nope'"),
        ("memory", "Invalid limit 'memory' specified"),
        ("memory=1M", "The limit 'memory' is at least 4194304"),
        ("cpu=0", "Invalid limit 'cpu' specified"),
        ("depth=x", "Invalid limit 'depth' specified"),
    ] {
        refused(directory.path(), &format!("$img info raw --limits {limits}"), says);
    }
}
