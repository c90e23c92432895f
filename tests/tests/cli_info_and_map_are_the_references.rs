//! `info` and `map`: human and JSON.

use img_tests::twin::Twins;

const SETUP: &[&str] = &[
    "qemu-img create -q -f qcow2 a 64M",
    "qemu-io -c 'write -P 1 0 1M' a >/dev/null",
    "qemu-img snapshot -c s1 a",
    "qemu-img snapshot -c 'a long snapshot name that goes on' a",
    "qemu-img bitmap --add a b0",
    "qemu-img bitmap --add --disable -g 4k a b1",
    "qemu-img create -q -f qcow2 -b a -F qcow2 b",
    "qemu-io -c 'write 1M 64k' -c 'write -z 2M 1M' -c 'write 4160k 128k' b >/dev/null",
    "cp b cmp && qemu-io -c 'write -c 8M 64k' cmp >/dev/null",
    "mkdir d && qemu-img create -q -f qcow2 -b ../b -F qcow2 d/c 7",
    "qemu-img create -q -f qcow2 -u -b gone -F raw e 100000000000",
    "qemu-img create -q -f qcow2 -u -b nbd:localhost:1 -F raw n 1M",
    "qemu-img create -q r 1025M",
    "qemu-io -f raw -c 'write 1M 1M' -c 'write 100M 4k' r >/dev/null",
    "qemu-img create -q -f qcow2 -o data_file=x.data,data_file_raw=on x 1M",
    "qemu-img create -q -f qcow2 -o compat=0.10 v2 0",
    "qemu-img create -q -f qcow2 -o lazy_refcounts=on,compression_type=zstd,extended_l2=on,refcount_bits=1 f 3T",
    "qemu-img create -q -f qcow2 loop1 1M",
    "qemu-img create -q -f qcow2 -b loop1 -F qcow2 loop2",
    "qemu-img rebase -u -b loop2 -F qcow2 loop1",
    "qemu-img create -q -f qcow2 self 1M && qemu-img rebase -u -b self -F qcow2 self",
    ": > empty",
    "echo hi > hi",
    "qemu-img create -q -f qcow2 -o preallocation=metadata pm 10M",
    "qemu-img create -q -f qcow2 -o compat=0.10 v2d 10M && qemu-io -c 'write -z 1M 1M' -c 'write 5M 1M' v2d >/dev/null",
    "touch \"$(printf 'u\\303\\274\"\\n\\\\x\\001')\"",
];

const NAMES: &[&str] = &[
    "a",
    "b",
    "cmp",
    "d/c",
    "e",
    "n",
    "r",
    "x",
    "v2",
    "f",
    "loop1",
    "loop2",
    "self",
    "empty",
    "hi",
    "pm",
    "v2d",
    "u*",
    "file:a",
    "none",
    "''",
    ".",
    "nope:x",
    "/dev/null",
];

#[test]
fn info() {
    let mut twins = Twins::new(SETUP).without_files();
    for name in NAMES {
        for options in ["", "--output=json", "-b", "-b --output json", "-f qcow2", "-f raw", "-U -f nope"] {
            // What is below is behind a protocol that is not here.
            if *name == "n" && options.starts_with("-b") {
                continue;
            }
            twins.line(&format!("qemu-img info {options} {name}"));
        }
    }
    twins.agree();
}

#[test]
fn info_by_description() {
    let mut twins = Twins::new(SETUP).without_files();
    for line in [
        "--image-opts driver=qcow2,file.filename=b",
        "--image-opts driver=qcow2,file.driver=file,file.filename=v2,foo=1",
        "--image-opts v2",
        "--image-opts driver=raw,file.filename=v2",
        "--image-opts -b driver=qcow2,file.filename=b",
        r#"'json:{"driver":"qcow2","file":{"driver":"file","filename":"v2"}}'"#,
        r#"'json:{"file":{"driver":"file","filename":"v2"}}'"#,
        r#"'json:{"driver":"raw","offset":512,"size":1024,"file.filename":"v2"}'"#,
        "'json:[]'",
        r#"-f raw 'json:{"driver":"qcow2","file.filename":"v2"}'"#,
        r#"-b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"b"}}'"#,
    ] {
        twins.line(&format!("qemu-img info {line}"));
        twins.line(&format!("qemu-img info --output json {line}"));
    }
    twins.agree();
}

#[test]
fn map() {
    let mut twins = Twins::new(SETUP).without_files();
    for name in NAMES {
        // The reference never comes back from a loop.
        if name.starts_with("loop") || *name == "self" || *name == "." || *name == "n" {
            continue;
        }
        for options in ["", "--output json", "-f raw --output=json"] {
            twins.line(&format!("qemu-img map {options} {name}"));
        }
    }
    for options in [
        "-s 1M",
        "-s 1M -l 64k",
        "-s 1000 -l 5",
        "-s 100M",
        "-s 64M",
        "-l 0",
        "-l 2500k",
        "-s 4M -l 1",
        "-s 63M -l 100M",
        "--start-offset=1M --max-length=1M",
        "-U",
    ] {
        twins.line(&format!("qemu-img map b {options}"));
        twins.line(&format!("qemu-img map --output json b {options}"));
    }
    twins.line("qemu-img map cmp 2>&1");
    twins.agree();
}

/// A cluster with subclusters has its place as a whole, which shows where some of them hold nothing.
#[test]
fn map_of_subclusters() {
    let mut twins = Twins::new(&[
        "qemu-img create -q -f qcow2 -o extended_l2=on a 600M",
        "qemu-io -c 'write -P 1 4k 2k' -c 'write 128k 64k' -c 'write -z 140k 4k' -c 'write 262k 3k' a >/dev/null",
        "qemu-io -c 'write 300M 70k' -c 'write 599M 1k' -c 'discard 301M 1M' a >/dev/null",
        "qemu-img create -q -f qcow2 -o extended_l2=on over 1G -b a -F qcow2",
        "qemu-io -c 'write 6k 2k' -c 'write 250k 30k' -c 'write 614399k 3k' -c 'write 700M 5k' over >/dev/null",
        "qemu-img create -q -f qcow2 short 256k && qemu-io -c 'write 64k 64k' short >/dev/null",
        "qemu-img create -q -f qcow2 -o extended_l2=on longer -b short -F qcow2 1M",
        "qemu-io -c 'write 4k 2k' -c 'write 66k 3k' -c 'write 262k 3k' -c 'write 254k 1k' longer >/dev/null",
        "qemu-img create -q -f qcow2 -o extended_l2=on,data_file=d.data d 1M",
        "qemu-io -c 'write 66k 3k' -c 'write 400k 1k' d >/dev/null",
        "qemu-img create -q -f qcow2 -o extended_l2=on,preallocation=metadata pm 1M",
        "qemu-io -c 'write 66k 3k' -c 'write 400k 1k' pm >/dev/null",
    ])
    .without_files();
    for name in ["a", "over", "longer", "d", "pm"] {
        for options in ["", "-s 5k -l 260k", "-s 255k -l 1M", "-s 299M", "-s 599M -l 150M"] {
            twins.line(&format!("qemu-img map {options} {name}"));
            twins.line(&format!("qemu-img map --output=json {options} {name}"));
        }
        twins.line(&format!("qemu-img check {name}"));
        twins.line(&format!("qemu-img check --output=json {name}"));
    }
    twins.agree();
}
