//! `convert`: every option, the targets made, and the refusals.

use img_tests::{command::shell, twin::Twins};

const SETUP: &[&str] = &[
    "qemu-img create -q -f qcow2 c1 16M",
    "qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 5M 100k' -c 'write -z 2M 1M' c1 >/dev/null",
    "qemu-img snapshot -c s1 c1 && qemu-io -c 'write -P 3 64k 64k' c1 >/dev/null",
    "cp c1 grown && qemu-img resize -q grown 24M && qemu-io -c 'write -P 9 15M 5M' grown >/dev/null",
    "cp c1 shrunk && qemu-img resize -q --shrink shrunk 3M",
    "cp c1 c2 && qemu-io -c 'write -P 3 3M 64k' c2 >/dev/null",
    "qemu-img create -q -f qcow2 -b c1 -F qcow2 over && qemu-io -c 'write -P 7 3M 192k' over >/dev/null",
    "qemu-img create -q r 4M && qemu-io -f raw -c 'write -P 5 1M 64k' -c 'write -P 0 2M 64k' r >/dev/null",
    "printf hello > odd",
    "qemu-img create -q -f qcow2 bm 1M && qemu-img bitmap --add bm b0",
    "qemu-img convert -O qcow2 -c c1 zc",
    "qemu-img convert -O qcow2 -c -o compression_type=zstd c1 zz",
    "mkdir d",
];

#[test]
fn formats_and_options() {
    let mut twins = Twins::new(SETUP);
    for line in [
        "c1 o",
        "-O raw c1 o",
        "-O qcow2 c1 o",
        "-O qcow2 r o",
        "-f raw -O qcow2 r o",
        "r o",
        "-O qcow2 odd o",
        "odd o",
        "-O qcow2 c1 c2 o",
        "c1 r odd o",
        "over o",
        "-O qcow2 over o",
        "zc o",
        "zz o",
        "-O qcow2 zc o",
        "-S 0 -O qcow2 c1 o",
        "-S 0 c1 o",
        "-S 64k c1 o",
        "-S 16M c1 o",
        "-S 512 -O qcow2 r o",
        "-m 1 c1 o",
        "-m 16 -W -O qcow2 c1 o",
        "-r 1G c1 o",
        "-r 0 c1 o",
        "-C c1 o",
        "-C r o",
        "-t none c1 o",
        "-t writethrough -T none -O qcow2 c1 o",
        "-t directsync c1 o",
        "-T unsafe -t writeback c1 o",
        "-U c1 o",
        "-q c1 o",
        "--salvage c1 o",
        "-l s1 c1 o",
        "-l s1 grown o",
        "-l s1 -O qcow2 grown o",
        "-l s1 shrunk o",
        "-l 1 -O qcow2 c1 o",
        "-l snapshot.id=1 c1 o",
        "-l snapshot.name=s1 c1 o",
        "-l snapshot.id=1,snapshot.name=s1 c1 o",
        "-l snapshot.id=2,snapshot.name=s1 c1 o",
        "-l nope c1 o",
        "-l s1 r o",
        "-O qcow2 -o cluster_size=4k c1 o",
        "-O qcow2 -o compat=0.10 c1 o",
        "-O qcow2 -o extended_l2=on c1 o",
        "-O qcow2 -o preallocation=metadata c1 o",
        "-O qcow2 -o preallocation=full c1 o",
        "-o preallocation=full c1 o",
        "-o preallocation=falloc c1 o",
        "-O qcow2 -o data_file=o.data c1 o",
        "-O qcow2 -o data_file=o.data,data_file_raw=on c1 o",
        "-O qcow2 -o size=1M c1 o",
        "-o size=200M c1 o",
        "-O qcow2 -o lazy_refcounts=on c1 o",
        "-O qcow2 -o refcount_bits=1 c1 o",
        "--bitmaps -O qcow2 c1 o",
        "--image-opts driver=qcow2,file.filename=c1 o",
        "-B c1 -F qcow2 -O qcow2 c2 o",
        "-B c1 -F qcow2 -O qcow2 over o",
        "-o backing_file=c1,backing_fmt=qcow2 -O qcow2 c2 o",
        "-B r -F raw -O qcow2 c1 o",
        "-B ../c1 -F qcow2 -O qcow2 over d/o",
    ] {
        // Left by the line before.
        twins.line("rm -f o o.data d/o");
        twins.line(&format!("qemu-img convert {line}"));
    }
    twins.agree();
}

#[test]
fn compressed_targets() {
    let mut twins = Twins::new(SETUP);
    for line in [
        "-c -O qcow2 c1 o",
        "-c -W -O qcow2 c1 o",
        "-c -O qcow2 -o compression_type=zstd c1 o",
        "-c -O qcow2 -o cluster_size=4k r o",
        "-c -O qcow2 odd o",
        "-c -B c1 -F qcow2 -O qcow2 over o",
    ] {
        // Codecs differ: what is compared is what the target reads as.
        twins.line(&format!(
            "rm -f o; qemu-img convert {line}; qemu-img compare -f qcow2 o -F raw r; \
             qemu-img convert o plain; rm o"
        ));
    }
    twins.agree();
}

/// `b0` and `b1` are enabled, `b2` is not; in `lost` all but `good` are inconsistent.
const BITMAPS: &[&str] = &[
    "qemu-img create -q -f qcow2 bm 4M && qemu-img bitmap --add bm b0 && qemu-img bitmap --add -g 512 bm b1",
    "qemu-img bitmap --add --disable bm b2 && qemu-img snapshot -c s1 bm",
    "qemu-io -c 'write -P 4 100k 100k' -c 'discard 512k 64k' bm >/dev/null && cp bm lost",
    "qemu-img create -q -f qcow2 -b bm -F qcow2 over && qemu-img bitmap --add over top",
    "qemu-io -c 'write 0 1' -c abort lost >/dev/null 2>&1; qemu-img bitmap --add lost good",
    "for t in t1 t2; do qemu-img create -q -f qcow2 $t 4M; done; qemu-img create -q -f qcow2 big 5M",
    "qemu-img bitmap --add -g 4k t2 b1 && qemu-img bitmap --add t2 own && qemu-img create -q raw 4M",
    "qemu-img create -q -f qcow2 -o compat=0.10 old 4M",
];

/// Space on the host aside, which the reference's rewriting of bitmaps takes and gives back at its own time.
#[test]
fn bitmaps_are_copied() {
    let mut twins = Twins::new(BITMAPS).without_disk_use();
    for line in [
        "--bitmaps -O qcow2 bm o",
        "--bitmaps -l s1 -O qcow2 bm o",
        "--bitmaps -O qcow2 -o cluster_size=512 bm o",
        "--bitmaps -O qcow2 over o",
        "--bitmaps --skip-broken-bitmaps -O qcow2 bm o",
        "--bitmaps --skip-broken-bitmaps -O qcow2 lost o",
        "--bitmaps --skip-broken-bitmaps -q -O qcow2 lost o",
        "-n --bitmaps -O qcow2 bm t1",
        // Refused, and the enabled ones are stored with what was copied: not in the same places.
        "-n --bitmaps -O qcow2 bm t1; code=$?; qemu-img info t1 | grep -v 'size\\|length'; rm t1; exit $code",
        "-n --bitmaps -O qcow2 bm t2",
        "-n --bitmaps -O qcow2 bm big",
        "-n --bitmaps bm raw",
        "-n --bitmaps -O qcow2 bm old",
    ] {
        twins.line(&format!("rm -f o; qemu-img convert {line}"));
    }
    for line in [
        "-O raw bm o",
        "-O qcow2 -o compat=0.10 bm o",
        "-O qcow2 old o",
        "-O qcow2 bm bm o",
        "-O raw lost o",
        "-O qcow2 lost o",
        "-q -O qcow2 lost o",
        "-p -O qcow2 lost o",
    ] {
        twins.line(&format!("qemu-img convert --bitmaps {line}; code=$?; rm -f o; exit $code"));
    }
    twins.agree();
}

#[test]
fn existing_targets() {
    Twins::new(SETUP)
        .lines(&[
            "qemu-img create -q t 20M && qemu-io -f raw -c 'write -P 9 0 20M' t >/dev/null",
            "qemu-img convert -n c1 t",
            "qemu-img convert -n --target-is-zero r t",
            "qemu-img create -q -f qcow2 q 20M && qemu-io -c 'write -P 9 0 20M' q >/dev/null",
            "qemu-img convert -n -O qcow2 c1 q",
            "qemu-img convert -n -O qcow2 c1 t",
            "qemu-img convert -n c1 nofile",
            "qemu-img convert -n c1 odd",
            "qemu-img convert --target-image-opts -n c1 driver=raw,file.filename=t",
            "qemu-img convert -O qcow2 c1 t",
            "qemu-img convert c1 c1",
            "qemu-img convert -O qcow2 c1 c1",
            "qemu-img convert -n -B r -F raw -O qcow2 c1 q",
        ])
        .agree();
}

#[test]
fn refusals() {
    let mut twins = Twins::new(SETUP);
    for line in [
        "-O nope c1 o",
        "-f nope c1 o",
        "-f raw -O qcow2 none o",
        "-O qcow2 c1 nodir/o",
        "-B c1 c1 c2 o",
        "-B c1 -O qcow2 c2 o",
        "-B none -F raw -O qcow2 c2 o",
        "-c c1 o",
        "-c -O raw c1 o",
        "-t foo c1 o",
        "--bitmaps c1 o",
        "--bitmaps r o",
        "--bitmaps -f raw -O qcow2 r o",
        "-o foo=1 c1 o",
        "-o cluster_size=1 -O qcow2 c1 o",
        "-o cluster_size=foo -O qcow2 c1 o",
        "-F qcow2 c1 o",
        "-F qcow2 -O qcow2 c1 o",
        "-B '' -O qcow2 c1 o",
        "-o backing_file=c1 -O qcow2 c1 o",
        "-B c1 -O raw c1 o",
        "-O qcow2 -c -o preallocation=metadata c1 o",
        "-O qcow2 -c -o data_file=o.data c1 o",
        "-O qcow2 -c -o compat=0.10,preallocation=full c1 o",
        "'' o",
        "c1 ''",
        "c1 .",
        "-O qcow2 -B c1 -F qcow2 c1 c2 o",
        "c1 -O qcow2 nope:o",
        "-p -l nope c1 o",
        "-p -n c1 odd",
        "-p -q c1 o",
        "-f qcow2 r o",
        // Which of two reasons is named.
        "-C -c -S 4k c1 o",
        "-C -S 4k -n -o foo=1 c1 o",
        "-C --salvage --target-is-zero c1 o",
        "-C -c --target-image-opts c1 o",
        "--skip-broken-bitmaps -C -c c1 o",
        "-n -o foo=1 --skip-broken-bitmaps c1 o",
        "-t foo -O nope c1 o",
        "-t foo -c -O qed c1 o",
        "-t foo -o foo=1 -O qcow2 c1 o",
        "-t foo --bitmaps -f raw -O qcow2 r o",
        "--bitmaps -B c1 -O raw r o",
        "-l snapshot.name=nope, c1 o",
    ] {
        // The reference leaves a half-made target behind, img does not.
        twins.line(&format!("qemu-img convert {line}; code=$?; rm -f o o.data; exit $code"));
    }
    twins.agree();
}

/// Steps in between depend on how the work is cut; the first and the last do not.
#[test]
fn progress() {
    Twins::new(SETUP)
        .lines(&[
            "qemu-img convert -p c1 o > p; tr '\\r' '\\n' < p | sed -n '1p;$p'; tail -c 42 p | od -c; rm p",
            "qemu-img convert -p -O qcow2 r o > p; tail -c 42 p | od -c; rm p",
            "qemu-img compare -p c1 c1 > p; tail -c 42 p | od -c; rm p",
        ])
        .agree();
}

/// Version 2 has no such flag: what the cluster reads as is not known. In which words is each program's own.
#[test]
fn a_zero_flag_in_version_2_is_damage() {
    Twins::new(&[
        "qemu-img create -q -f qcow2 -o compat=0.10 old 1M && qemu-io -c 'write -q -P 1 0 64k' old",
        "printf '\\1' | dd of=old bs=1 seek=$((4 * 65536 + 7)) conv=notrunc status=none",
    ])
    .without_files()
    .lines(&[
        "qemu-img convert -O raw old out 2>/dev/null",
        "qemu-img map --output=json old >/dev/null 2>&1",
        "qemu-img check old >/dev/null 2>&1",
    ])
    .agree();
}

#[test]
fn snapshots_of_a_chain() {
    let mut twins = Twins::new(SETUP);
    twins.line("qemu-img snapshot -c os over && qemu-io -c 'write -P 10 1M 64k' over >/dev/null");
    for line in [
        "-l os over o",
        "-l snapshot.id=1 over o",
        "-l snapshot.name=os -O qcow2 over o",
        "-l snapshot.name=os,snapshot.id=2 over o",
        "-l snapshot.foo=os over o",
        "-l snapshot. over o",
        "-l snapshot.id over o",
        "-l snapshot.id= over o",
        "-l '' over o",
        "-l os over over o",
        "-l os -B c1 -F qcow2 -O qcow2 over o",
    ] {
        twins.line("rm -f o");
        twins.line(&format!("qemu-img convert {line}"));
    }
    twins.agree();
}

#[test]
fn several_sources_of_odd_sizes_and_existing_targets() {
    let mut twins = Twins::new(SETUP);
    twins.line("yes abcdefg | head -c 100000 > odd2");
    for line in [
        "odd odd2 c1 o",
        "-O qcow2 odd odd2 odd o",
        "-O qcow2 -S 0 odd2 c1 odd2 o",
        "-O qcow2 -o cluster_size=512 odd2 odd odd2 o",
        "-O qcow2 -o extended_l2=on odd2 odd o",
        "-B odd2 -F raw -O qcow2 c1 o",
    ] {
        twins.line("rm -f o");
        twins.line(&format!("qemu-img convert {line}"));
    }
    for below in ["-b c1 -F qcow2", ""] {
        for line in ["-n -B c1 -F qcow2", "-n", "-n -S 0"] {
            twins.line(&format!("rm -f t; qemu-img create -q -f qcow2 {below} t 16M"));
            twins.line(&format!("qemu-img convert {line} -O qcow2 over t"));
        }
    }
    twins.agree();
}

/// What cannot be read becomes zeroes; how many sectors are named is the same, but not by how many threads.
#[test]
fn salvaging() {
    let mut twins = Twins::new(&[
        "qemu-img create -q -f qcow2 c1 1M && qemu-io -c 'write -P 1 0 512k' c1 >/dev/null",
        "qemu-img convert -O qcow2 -c c1 zip",
        "yes | dd of=zip bs=1 seek=$((0x50000)) count=200 conv=notrunc 2>/dev/null",
    ]);
    for format in ["raw", "qcow2"] {
        twins.line(&format!("qemu-img convert -O {format} zip o 2>/dev/null; code=$?; rm -f o; exit $code"));
        twins.line(&format!("qemu-img convert --salvage -O {format} zip o 2>&1 | sort -u; rm o"));
        twins.line(&format!("qemu-img convert --salvage -q -O {format} zip o 2>/dev/null"));
        twins.line("rm o");
    }
    twins.agree();
}

/// With `-C` the host copies all whole clusters, though data begins and ends inside of some; what is compressed is read
/// and written, and the host is asked again behind it.
#[test]
fn the_host_copies_what_it_can() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let make = "qemu-img create -q -f raw r 8M && qemu-io -f raw -c 'write -P 1 20k 1M' -c 'write -P 2 3M 2000k' r && \
                qemu-img create -q -f qcow2 q 8M && qemu-io -c 'write -c -P 1 0 64k' -c 'write -P 2 1M 1M' q";
    shell(directory.path(), make).success();
    for (format, source, target, copied) in [
        // The reference writes the first block of a new file.
        ("raw", "r", "-O raw", 4096 + (1 << 20) + (2000 << 10)),
        ("raw", "r", "-O qcow2", (15 << 16) + (31 << 16)),
        ("qcow2", "q", "-O qcow2", 1 << 20),
    ] {
        let line = format!(
            "rm -f out; strace -f -qq -e trace=copy_file_range -o log $img convert -C {target} -f {format} {source} out && \
             qemu-img compare -q -f {format} {source} out && sed -n 's/.* = //p' log"
        );
        let copies = shell(directory.path(), &line).success();
        let bytes: u64 = copies.lines().map(|line| line.parse::<u64>().expect(line)).sum();
        assert_eq!(bytes, copied, "{target} {source}");
    }
}
