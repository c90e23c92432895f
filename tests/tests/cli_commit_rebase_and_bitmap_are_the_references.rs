//! `commit`, `rebase` and `bitmap`: every option, what is left in the files, and the refusals.

use img_tests::twin::Twins;

/// A chain of three, and images to stand on instead.
const CHAIN: &[&str] = &[
    "qemu-img create -q -f qcow2 base 4M && qemu-io -c 'write -q -P 1 0 1M' base",
    "qemu-img create -q -f qcow2 -b base -F qcow2 mid && qemu-io -c 'write -q -P 2 64k 128k' mid",
    "qemu-img create -q -f qcow2 -b mid -F qcow2 top",
    "qemu-io -c 'write -q -P 3 128k 128k' -c 'write -q -z 512k 64k' -c 'write -q -P 4 3900k 10k' top",
    "qemu-img create -q -f qcow2 new 3M && qemu-io -c 'write -q -P 1 0 100k' -c 'write -q -P 9 2M 1M' new",
    "qemu-img create -q -f raw plain 5M && qemu-io -f raw -c 'write -q -P 1 0 300k' plain",
    "mkdir d && qemu-img create -q -f qcow2 -b ../base -F qcow2 d/over",
];

/// Space and length differ: the tables of an emptied overlay stay, new tables stand where there is room, and zeroes are
/// not written as data.
fn twins(setup: &[&str]) -> Twins {
    Twins::new(setup).without_disk_use().ignoring("file length: ")
}

#[test]
fn commits_agree() {
    for line in [
        "qemu-img commit top",
        "qemu-img commit -q top",
        "qemu-img commit -d top",
        "qemu-img commit -b base top",
        "qemu-img commit -b mid top",
        "qemu-img commit -b ./base -d top",
        "qemu-img commit -b ../base d/over",
        "qemu-img commit -t none top",
        "qemu-img commit -t writethrough -r 100M top",
        "qemu-img commit -f qcow2 top && qemu-img commit mid",
        "qemu-img commit --image-opts driver=qcow2,file.filename=top",
    ] {
        twins(CHAIN).line(line).line("qemu-img check -q top").agree();
    }
}

#[test]
fn commits_of_other_formats_and_sizes_agree() {
    let mut twins = twins(&[
        "qemu-img create -q -f raw r 3M && qemu-io -f raw -c 'write -q -P 5 1M 1M' r",
        "qemu-img create -q -f qcow2 -b r -F raw larger 6M && qemu-io -c 'write -q -P 9 5M 64k' larger",
        "qemu-img create -q -f raw s 3M && qemu-img create -q -f qcow2 -b s -F raw smaller 2M",
        "qemu-io -c 'write -q -P 9 1M 64k' smaller",
        "qemu-img create -q -f raw t 3M && qemu-img create -q -f qed -b t -F raw qed",
        "qemu-io -f qed -c 'write -q -P 9 1M 64k' -c 'write -q -z 2M 64k' qed",
        "qemu-img create -q -f raw u 3M && qemu-img create -q -f qcow2 -o compat=0.10 -b u -F raw old",
        "qemu-io -c 'write -q -P 9 1M 64k' old",
        "qemu-img create -q -f raw v 3M && qemu-img create -q -f qcow2 -o extended_l2=on -b v -F raw sub",
        "qemu-io -c 'write -q -P 9 1M 2k' -c 'write -q -z 10k 2k' sub",
        "qemu-img create -q -f raw w 3M && qemu-img create -q -f qcow2 -b w -F raw kept",
        "qemu-io -c 'write -q -P 9 1M 2k' kept && qemu-img snapshot -c one kept",
        "qemu-img create -q -f qcow2 x 3M && qemu-img create -q -f qcow2 -o cluster_size=4k -b x -F qcow2 small",
        "qemu-io -c 'write -q -P 9 1M 20k' small",
    ]);
    for file in ["larger", "smaller", "qed", "old", "sub", "kept", "small"] {
        twins.line(&format!("qemu-img commit {file} && qemu-img check -q {file}"));
    }
    // What is around the bytes in a cluster of the base is data, too.
    twins.line("qemu-img map --output=json x");
    twins.agree();
}

#[test]
fn rebase_keeps_subclusters_apart() {
    twins(&[
        "qemu-img create -q -f qcow2 -o cluster_size=1M,extended_l2=on base 2M",
        "qemu-img create -q -f qcow2 -o cluster_size=1M,extended_l2=on -b base -F qcow2 mid",
        "qemu-io -c 'write -q -P 1 32k 32k' -c 'write -q -P 2 960k 32k' -c 'write -q -P 3 1M 1k' mid",
        "qemu-img create -q -f qcow2 -o cluster_size=1M,extended_l2=on -b mid -F qcow2 top",
        "qemu-io -c 'write -q -P 4 1056k 32k' top",
    ])
    .lines(&["qemu-img rebase -b base -F qcow2 top", "qemu-img map --output=json top", "qemu-img check top"])
    .agree();
}

#[test]
fn a_protocol_can_be_recorded_as_a_format() {
    twins(CHAIN)
        .lines(&[
            "qemu-img rebase -u -b base -F host_device top",
            "qemu-img info top",
            "qemu-img rebase -u -b base -F nonesuch top",
        ])
        .agree();
}

#[test]
fn commit_refuses_alike() {
    let mut twins = twins(CHAIN).without_files();
    twins.lines(&[
        "qemu-img commit",
        "qemu-img commit top extra",
        "qemu-img commit base",
        "qemu-img commit -f raw top",
        "qemu-img commit -b nope top",
        "qemu-img commit -b top top",
        "qemu-img commit -t often top",
        "qemu-img commit -r fast top",
        "qemu-img commit -U top",
        "qemu-img commit nofile",
        "qemu-img commit -f zork top",
        "qemu-img commit --image-opts -f qcow2 top",
        // Opened for writing before anything else is looked at.
        "qemu-img commit plain",
        "qemu-img commit -p nofile",
        "qemu-img commit -p base",
        "qemu-img create -q -f qcow2 -u -b gone -F qcow2 orphan 1M && qemu-img commit -p orphan",
        "printf '\\2' | dd of=new bs=1 seek=79 conv=notrunc status=none; qemu-img commit new",
    ]);
    twins.agree();
}

#[test]
fn rebases_agree() {
    for line in [
        "qemu-img rebase -b base -F qcow2 top",
        "qemu-img rebase -b new -F qcow2 top",
        "qemu-img rebase -f qcow2 -b plain -F raw top",
        "qemu-img rebase -b '' top",
        "qemu-img rebase -b '' -F qcow2 top",
        "qemu-img rebase -c -b '' top",
        "qemu-img rebase -q -t none -T none -b new -F qcow2 top",
        "qemu-img rebase -U -b new -F qcow2 top",
        "qemu-img rebase -u -b new -F qcow2 top",
        "qemu-img rebase -u -b '' top",
        "qemu-img rebase -u top",
        "qemu-img rebase -u -b zork -F qcow2 top",
        "qemu-img rebase -c -u -b new -F qcow2 top",
        "qemu-img rebase -b ../new -F qcow2 d/over",
        "qemu-img rebase -b file:new -F qcow2 top",
        "qemu-img rebase --image-opts -b new -F qcow2 driver=qcow2,file.filename=top",
        "qemu-img rebase -b new -F qcow2 'json:{\"driver\":\"qcow2\",\"file.filename\":\"top\"}'",
    ] {
        let look =
            "qemu-img info -U top | grep back; qemu-img convert -U -O raw top out.raw; qemu-img check -q top";
        twins(CHAIN).line(line).line(look).agree();
    }
}

#[test]
fn rebases_of_other_formats_agree() {
    let mut twins = twins(CHAIN);
    twins.lines(&[
        "qemu-img create -q -f qed -b base -F qcow2 a.qed && qemu-img rebase -b new -F qcow2 a.qed",
        "qemu-img rebase -b plain -F raw a.qed",
        "qemu-img rebase -b base -F qcow2 a.qed",
        "qemu-img rebase -b '' a.qed && qemu-img check -q a.qed",
        "qemu-img rebase -c -b new -F qcow2 a.qed",
        "qemu-img create -q -f qcow2 -o compat=0.10 -b base -F qcow2 v2 && qemu-img rebase -b new -F qcow2 v2",
        "qemu-img create -q -f qcow2 -o extended_l2=on -b base -F qcow2 sub && qemu-io -c 'write -q -P 7 3k 3k' sub",
        "qemu-img rebase -b new -F qcow2 sub && qemu-img check -q sub",
        "qemu-img create -q -f qcow2 -o cluster_size=4k -b base -F qcow2 k4 8M && qemu-img rebase -b plain -F raw k4",
    ]);
    twins.agree();
}

#[test]
fn rebase_refuses_alike() {
    let mut twins = twins(CHAIN).without_files();
    twins.lines(&[
        "qemu-img rebase",
        "qemu-img rebase top",
        "qemu-img rebase -F qcow2 top",
        "qemu-img rebase -b base top extra",
        "qemu-img rebase -b base top",
        "qemu-img rebase -u -b zork top",
        "qemu-img rebase -b nofile -F qcow2 top",
        "qemu-img rebase -b new -F foo top",
        "qemu-img rebase -u -b new -F foo top",
        "qemu-img rebase -b top -F qcow2 top",
        "qemu-img rebase -t often -b '' top",
        "qemu-img rebase -T often -b '' top",
        "qemu-img rebase -f raw -b new -F qcow2 plain",
        "qemu-img rebase -f raw -u -b new -F qcow2 plain",
        "qemu-img rebase -f raw -u -b '' plain",
        "qemu-img rebase --image-opts -f qcow2 -b '' top",
        "qemu-img create -q -f vpc v.vhd 1M; qemu-img rebase -u -b new -F qcow2 v.vhd",
        "qemu-img rebase -b nofile -F qcow2 nofile2",
    ]);
    twins.agree();
}

const BITMAPS: &[&str] = &[
    "qemu-img create -q -f qcow2 a 8M && qemu-img bitmap --add a one && qemu-io -c 'write -q -P 1 1M 200k' a",
    "qemu-img create -q -f qcow2 b 8M && qemu-img bitmap --add -g 4k b two && qemu-io -c 'write -q -P 1 5M 10k' b",
    "qemu-img create -q -f qcow2 small 1M && qemu-img bitmap --add small two",
    "qemu-img create -q -f qcow2 -o cluster_size=512 tiny 1M",
    "qemu-img create -q -f qcow2 -o cluster_size=2M huge 1M",
    "qemu-img create -q -f qcow2 -o compat=0.10 v2 1M",
    "qemu-img create -q -f raw r 1M",
];

#[test]
fn bitmaps_agree() {
    let mut twins = twins(BITMAPS);
    for line in [
        "--add a x",
        "--add -g 512 a fine",
        "--add -g 2G a coarse",
        "--add -g 0 a default",
        "--add -g 0x1000 a hex",
        "--add tiny x",
        "--add huge x",
        "--disable a one",
        "--disable a one",
        "--enable a one",
        "--merge one a x",
        "--merge one a one",
        "--merge two -b b -F qcow2 a x",
        "--merge two -b b a fine",
        "--add --disable --merge one --clear --merge two --source-file b a y",
        "--clear a one",
        "--remove --add a one",
        "--remove -f qcow2 a coarse",
        "--add --image-opts driver=qcow2,file.filename=a z",
        "--merge x --merge y --merge fine a z",
        // Each mention counts, in its place.
        "--add --remove --add a again",
        "--clear --merge two --clear --merge one --disable --enable -b b a one",
        "--disable --enable --disable a one",
        "--enable --remove --enable a nope",
        "--add=x a y",
    ] {
        twins.line(&format!("qemu-img bitmap {line}"));
        twins.line("for n in a tiny huge; do qemu-img info $n | grep -v 'disk size\\|file length'; done");
    }
    twins.line("for n in a tiny huge; do qemu-img check -q $n || echo $n; done");
    twins.line("qemu-img convert -O qcow2 --bitmaps a copy && qemu-img info copy");
    // What lies below is not looked at.
    twins.line("qemu-img create -q -f qcow2 -u -b gone -F qcow2 o 1M && qemu-img bitmap --add o x");
    twins.agree();
}

#[test]
fn bitmap_refuses_alike() {
    let mut twins = twins(BITMAPS);
    for line in [
        "",
        "a",
        "a one",
        "--add a",
        "--add a one",
        "--add a x extra",
        "--add a ''",
        "--add -g 1000 a x",
        "--add -g 256 a x",
        "--add -g 4G a x",
        "--add -g foo a x",
        "--add -g -1 a x",
        "-g 64k --remove a one",
        "--remove a nope",
        "--clear a nope",
        "--enable a nope",
        "--disable a nope",
        "--merge one a nope",
        "--merge nope a one",
        "--merge nope -b b a one",
        "--merge two -b small a one",
        "--merge two -b a a one",
        "--merge two -F qcow2 a one",
        "--merge two -b b -F raw a one",
        "--merge two -b nofile -F qcow2 a one",
        "-b b --add a x",
        "-F qcow2 --add a x",
        "--add nofile x",
        "--add -U a x",
        "--add --image-opts -f qcow2 a x",
        "--clear v2 x",
        "--clear -f raw r x",
    ] {
        twins.line(&format!("qemu-img bitmap {line}"));
    }
    twins.agree();
}
