//! `img convert - ...`: images that come out of a pipe, a compressed file or an archive are copied as they come; one
//! that breaks off is an error wherever it breaks, and leaves nothing; memory is bounded.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::FileExt as _,
    process::{Command, Stdio},
};

use img_tests::{
    command::{img_binary, qemu_img, shell},
    pattern::noise,
};
use tempfile::TempDir;

/// A disk of 40 MiB: noise, text, holes, an end inside a cluster.
fn source() -> TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = File::create(directory.path().join("base.raw")).expect("a new file");
    file.set_len((40 << 20) + 512).expect("a sparse file");
    file.write_all_at(&noise(1, 300_000), 0).expect("written");
    file.write_all_at(&b"some words of text, again and again; ".repeat(30_000), 5 << 20).expect("written");
    file.write_all_at(&noise(1, 200_000), 33 << 20).expect("written");
    file.write_all_at(b"the end", (40 << 20) + 500).expect("written");
    directory
}

/// Names of images, how they are made of `base.raw`, and what has to be said to read them.
const IMAGES: &[(&str, &str, &str)] = &[
    ("raw", "cp base.raw raw", "-f raw --source-size 41943552"),
    ("q", "qemu-img convert -f raw -O qcow2 base.raw q", ""),
    ("qc", "qemu-img convert -f raw -c -O qcow2 base.raw qc", ""),
    ("qz", "$img convert -f raw -c -O qcow2 -o compression_type=zstd base.raw - >qz", ""),
    ("qe", "qemu-img convert -f raw -O qcow2 -o extended_l2=on,cluster_size=16k base.raw qe", "-f qcow2"),
    ("qed", "qemu-img convert -f raw -O qed base.raw qed", ""),
    ("vs", "qemu-img convert -f raw -O vmdk -o subformat=streamOptimized base.raw vs", ""),
    ("vm", "$img convert -f raw -O vmdk -o subformat=streamOptimized base.raw - >vm", ""),
    ("vf", "$img convert -f raw -O vmdk -o subformat=streamOptimized base.raw vf", ""),
    ("vd", "qemu-img convert -f raw -O vpc -o force_size=on base.raw vd", ""),
    (
        "vx",
        "qemu-img convert -f raw -O vpc -o force_size=on,subformat=fixed base.raw vx",
        "-f vpc --source-size 41943552",
    ),
];

#[test]
fn every_layout_goes_into_every_target() {
    let directory = source();
    let at = directory.path();
    for (name, make, how) in IMAGES {
        shell(at, make).success();
        for (format, options) in [
            ("raw", ""),
            ("qcow2", ""),
            ("qcow2", "-c"),
            ("qed", ""),
            ("vmdk", ""),
            ("vmdk", "-o subformat=streamOptimized"),
            ("vpc", "-o force_size=on"),
        ] {
            let line = format!("rm -f out; cat {name} | $img convert {how} -O {format} {options} - out");
            assert_eq!(shell(at, &line).success(), "", "{line}");
            let compare = qemu_img(at, ["compare", "-f", "raw", "-F", format, "base.raw", "out"]);
            assert_eq!(compare.output().success(), "Images are identical.\n", "{line}");
        }
        // From pipe to pipe, where the target need not know anything beforehand.
        let line = format!(
            "cat {name} | $img convert {how} -O vmdk -o subformat=streamOptimized - - | cat >out && \
             qemu-img compare -f raw -F vmdk base.raw out"
        );
        assert_eq!(shell(at, &line).success(), "Images are identical.\n", "{line}");
    }
}

#[test]
fn a_stream_that_breaks_off_is_an_error_and_leaves_nothing() {
    let directory = source();
    let at = directory.path();
    for (name, make, how) in IMAGES {
        shell(at, make).success();
        let len = fs::metadata(at.join(name)).expect("made").len();
        // The reference's VMDKs and QED images have nothing behind their data that would show that it is missing:
        // their last unit has to be cut into. qcow2's last cluster may be empty space.
        let slack = if matches!(*name, "vs" | "qed" | "q" | "qc" | "qe") { 66_000 } else { 1 };
        for cut in [slack, 70_000, len / 3, len / 2, len - 2000, len - 600, len - 100, len] {
            let line = format!("rm -f out; head -c {} {name} | $img convert {how} -O qcow2 - out", len - cut);
            let output = shell(at, &line);
            if cut == len && !how.contains("source-size") {
                // Nothing at all is a raw disk of nothing, unless somebody says what it is.
                continue;
            }
            assert_eq!(output.code, 1, "{line}: {output}");
            assert!(output.stderr.starts_with("img: "), "{line}: {output}");
            assert!(!at.join("out").exists(), "{line}");
        }
    }
    let line = "(cat raw; printf x) | $img convert -f raw --source-size 41943552 - out";
    let output = shell(at, line);
    assert!(output.code == 1 && output.stderr.contains("there is more than the 41943552 bytes"), "{output}");
}

#[test]
fn a_raw_stream_of_unknown_length_makes_what_can_grow() {
    let directory = source();
    let at = directory.path();
    for (format, options) in [("raw", ""), ("qcow2", ""), ("qcow2", "-c"), ("qcow2", "-o cluster_size=2M")] {
        let line = format!(
            "rm -f out; cat base.raw | $img convert -f raw -O {format} {options} - out && \
             qemu-img compare -f raw -F {format} base.raw out"
        );
        assert_eq!(shell(at, &line).success(), "Images are identical.\n", "{line}");
    }
    for format in ["qed", "vpc", "vmdk"] {
        let output = shell(at, &format!("cat base.raw | $img convert -f raw -O {format} - x"));
        assert!(output.code == 1 && output.stderr.contains("--source-size"), "{format}: {output}");
        assert!(!at.join("x").exists());
    }
    // An odd end is filled up to its sector.
    let line = "printf hello | $img convert -f raw - odd && stat -c %s odd && head -c 5 odd";
    assert_eq!(shell(at, line).success(), "512\nhello");
}

#[test]
fn wrappers_are_taken_off_on_the_fly() {
    let directory = source();
    let at = directory.path();
    shell(
        at,
        "qemu-img convert -f raw -O qcow2 base.raw q && mkdir d && cp q d/disk.qcow2 && echo x >d/readme",
    )
    .success();
    let identical = "qemu-img compare -f raw -F qcow2 base.raw out";
    for (make, convert) in [
        ("gzip -k q", "$img convert -O qcow2 q.gz out"),
        ("xz -k q", "$img convert -O qcow2 q.xz out"),
        ("zstd -q q", "$img convert -O qcow2 q.zst out"),
        ("tar cf q.tar q", "$img convert -O qcow2 q.tar out"),
        ("tar czf q.tgz q", "$img convert -O qcow2 q.tgz out"),
        ("tar cf two.tar d", "$img convert -O qcow2 --member d/disk.qcow2 two.tar out"),
        ("tar cf pax.tar --format=pax d", "$img convert -O qcow2 --member ./d/disk.qcow2 pax.tar out"),
        ("gzip -c base.raw >r.gz", "$img convert -f raw --unwrap -O qcow2 r.gz out"),
        ("gzip -c base.raw >r.gz", "cat r.gz | $img convert -f raw --unwrap=gz -O qcow2 - out"),
        (
            "(gzip -c <(head -c 5000 q); gzip -c <(tail -c +5001 q)) >two.gz",
            "$img convert -O qcow2 two.gz out",
        ),
        ("tar cf - q | xz >t.xz", "$img convert --unwrap=xz,tar -O qcow2 t.xz out"),
    ] {
        let line = format!("{make} && rm -f out && {convert} && {identical}");
        assert_eq!(shell(at, &line).success(), "Images are identical.\n", "{line}");
    }
    // A raw member's size is known.
    let line = "tar cf raw.tar base.raw && rm -f out && $img convert --unwrap -f raw -O qcow2 raw.tar out";
    assert_eq!(shell(at, &format!("{line} && {identical}")).success(), "Images are identical.\n");

    for (line, says) in [
        ("$img convert two.tar x", "there is more than one file in the archive ('d/"),
        ("$img convert --member nope two.tar x", "the archive has no member 'nope'"),
        ("$img convert --unwrap=xz q.gz x", "there is no xz stream"),
        ("$img convert --unwrap=rar q.gz x", "--unwrap expects gz, xz, zst or tar"),
        ("xz -k -9 -c q >big.xz; $img convert big.xz x", "a window of more than 16 MiB"),
        ("cat q | zstd -q --ultra --long=27 -c >long.zst; $img convert long.zst x", "long.zst"),
        ("printf 'zzzz' | dd of=q.gz bs=1 seek=20000 conv=notrunc status=none; $img convert q.gz x", "q.gz"),
    ] {
        let output = shell(at, line);
        assert!(output.code == 1 && output.stderr.contains(says), "{line}: {output}");
        assert!(!at.join("x").exists(), "{line}");
    }
    for name in ["q.xz", "q.zst", "q.tar", "q.tgz", "two.gz", "t.xz"] {
        let line = format!("head -c -9 {name} >cut && $img convert --unwrap cut x");
        let output = shell(at, &line);
        // What is behind the end of a tar archive is padding.
        if name != "q.tar" {
            assert_eq!(output.code, 1, "{line}: {output}");
            assert!(!at.join("x").exists(), "{line}");
        }
        fs::remove_file(at.join("x")).ok();
    }
    // Under the reference's name, and where a format is named, bytes are what they are.
    let line = "ln -s $img qemu-img && ./qemu-img convert -f raw q.xz a && $img convert -f raw q.xz b && \
                $img convert --unwrap=none -f raw q.xz c && cmp a b && cmp b c && cmp -n 1000 a q.xz";
    assert_eq!(shell(at, line).success(), "");
}

#[test]
fn what_is_not_laid_out_front_to_back_is_named_and_can_be_kept() {
    let directory = source();
    let at = directory.path();
    // The first table is written last.
    let line = "qemu-img create -q -f qcow2 -o cluster_size=4k back 200M && \
                qemu-io -c 'write -P 1 100M 60M' -c 'write -P 2 0 4M' back >/dev/null && \
                qemu-img create -q -f qcow2 -b back -F qcow2 over";
    shell(at, line).success();
    let output = shell(at, "cat back | $img convert - x");
    assert!(output.code == 1 && output.stderr.contains("not laid out front to back"), "{output}");
    let output = shell(at, "cat over | $img convert - x");
    assert!(output.code == 1 && output.stderr.contains("over a backing file ('back')"), "{output}");
    assert!(!at.join("x").exists());
    let line = "mkdir keep && cat back | $img convert --spool keep -O qcow2 -c - - >out && qemu-img compare back out && \
                gzip back && $img convert --spool keep -O vpc back.gz out && ls keep";
    assert_eq!(shell(at, line).success(), "Images are identical.\n");
    for option in ["-l s", "-C", "-W", "--salvage", "-T none", "--bitmaps", "--dirty-bitmap b"] {
        let output = shell(at, &format!("cat over | $img convert {option} - x"));
        assert!(
            output.code == 1 && output.stderr.contains("is not possible with a source"),
            "{option}: {output}"
        );
    }
    let output = shell(at, "cat base.raw | $img convert -f raw --source-size 41943552 -O qcow2 - -");
    assert!(output.code == 1 && output.stderr.contains("begins with a map of the disk"), "{output}");
}

#[test]
fn a_target_that_exists_is_overwritten_whole() {
    let directory = source();
    let line = "qemu-img create -q -f raw there 50M && qemu-io -f raw -c 'write -P 9 0 50M' there >/dev/null && \
                qemu-img convert -f raw -O qcow2 base.raw q && cat q | $img convert -n -O raw - there && \
                truncate -s 41943552 there && cmp there base.raw";
    assert_eq!(shell(directory.path(), line).success(), "");
}

#[test]
fn what_a_source_does_not_reach_stays() {
    let directory = source();
    let line = "head -c 50M /dev/zero | tr '\\0' x >there && cp there too && \
                $img convert -n -f raw -O raw base.raw there && \
                cat base.raw | $img convert -n -f raw --source-size 41943552 -O raw - too && cmp there too && \
                tail -c 1 too";
    assert_eq!(shell(directory.path(), line).success(), "x");
}

#[test]
fn an_announced_size_is_looked_at_wherever_the_source_comes_from() {
    let directory = source();
    let at = directory.path();
    shell(at, "head -c 1000 base.raw >odd && qemu-img convert -f raw -O qcow2 base.raw q").success();
    for (line, code) in [
        ("$img convert -f raw --source-size 41943552 base.raw out", 0),
        ("$img convert -f raw --source-size 41943040 base.raw out", 1),
        ("$img convert --source-size 41943552 q out", 0),
        ("$img convert --source-size 41943551 q out", 1),
        ("$img convert -f raw --source-size 1000 odd out", 0),
        ("$img convert -f raw --source-size 1024 odd out", 1),
        ("cat odd | $img convert -f raw --spool . --source-size 1000 - out", 0),
        ("cat odd | $img convert -f raw --spool . --source-size 700 - out", 1),
        ("cat base.raw | $img convert -f raw --spool . --source-size 50M - out", 1),
        ("$img convert -f raw --source-size 1000 odd odd out", 1),
    ] {
        let output = shell(at, &format!("rm -f out; {line}"));
        assert_eq!((output.code, at.join("out").exists()), (code, code == 0), "{line}: {output}");
    }
}

#[test]
fn a_member_of_no_archive_is_refused() {
    let directory = source();
    let at = directory.path();
    shell(at, "gzip -k base.raw && qemu-img create -q -f qcow2 q 1M").success();
    for line in [
        "$img convert -f raw --member disk base.raw out",
        "$img convert --member disk base.raw.gz out",
        "$img convert --unwrap=gz --member disk base.raw.gz out",
        "$img convert --unwrap --member disk -f raw base.raw out",
        "cat base.raw | $img convert -f raw --member disk - out",
        "$img convert --source-image-opts --member disk driver=qcow2,file.filename=q out",
        "$img convert --source-image-opts --unwrap driver=qcow2,file.filename=q out",
    ] {
        let output = shell(at, line);
        assert_eq!((output.code, at.join("out").exists()), (1, false), "{line}: {output}");
    }
}

/// By its name it may be wrapped; to look at its first bytes would be to lose them.
#[test]
fn a_named_pipe_is_opened_once() {
    let directory = source();
    let line =
        "mkfifo p.gz; gzip -c base.raw >p.gz & timeout 50 $img convert p.gz out && wait && cmp base.raw out";
    assert_eq!(shell(directory.path(), line).success(), "");
}

/// All of a raw disk of 1 GiB is fed; then the program waits for the end, and is asked what it took.
#[test]
fn memory_is_bounded() {
    let directory = source();
    let at = directory.path();
    shell(at, "gzip -c base.raw >raw.gz; $img convert -f raw -O qcow2 -o cluster_size=64k base.raw - >q")
        .success();
    let text = b"some words of text, again and again; ".repeat(30_000);
    for options in [&["-O", "qcow2"][..], &["-O", "qcow2", "-c"], &["-O", "raw"]] {
        fs::remove_file(at.join("out")).ok();
        let mut child = Command::new(img_binary())
            .args(["convert", "-f", "raw"])
            .args(options)
            .args(["-", "out"])
            .current_dir(at)
            .stdin(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut input = child.stdin.take().expect("piped");
        for _ in 0..(256 << 20) / text.len() {
            input.write_all(&text).expect("it reads");
        }
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it waits for more");
        drop(input);
        assert!(child.wait().expect("it ends").success(), "{options:?}");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
        let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
        assert!((1..=64 << 10).contains(&peak), "{options:?}: {peak} KiB at the peak");
    }
}
