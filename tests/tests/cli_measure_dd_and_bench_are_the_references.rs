//! `measure`, `dd` and `bench`.

use img_tests::{
    command::{img, qemu_img},
    twin::Twins,
};

#[test]
fn measure() {
    let mut lines: Vec<String> = Vec::new();
    // Every option that counts, on sizes around the borders of tables.
    for options in [
        "",
        "-o cluster_size=512",
        "-o cluster_size=4k",
        "-o cluster_size=2M",
        "-o extended_l2=on",
        "-o extended_l2=on,cluster_size=16k",
        "-o refcount_bits=1",
        "-o refcount_bits=64,cluster_size=4k",
        "-o compat=0.10",
        "-o preallocation=metadata",
        "-o preallocation=falloc",
        "-o preallocation=full,cluster_size=4k",
        "-o backing_file=x,backing_fmt=raw",
        "-o lazy_refcounts=on,compression_type=zstd",
        "-o data_file=x,data_file_raw=on",
    ] {
        for size in ["0", "1", "1000", "64M", "513M", "1G", "3T"] {
            lines.push(format!("qemu-img measure -O qcow2 {options} --size {size}"));
        }
        for file in ["raw", "q", "o", "x", "e", "g"] {
            lines.push(format!("qemu-img measure -O qcow2 {options} {file}"));
        }
    }
    for file in ["raw", "q", "o", "x", "e", "g", "b"] {
        lines.push(format!("qemu-img measure {file}"));
        lines.push(format!("qemu-img measure -O qcow2 --output=json {file}"));
    }
    for refused in [
        "",
        "a b",
        "--size 1M q",
        "-O qed --size 1M",
        "-O nope --size 1M",
        "-O qcow2 -o help",
        "-O qcow2 -o foo=1 --size 1M",
        "-O raw -o foo=1 --size 1M",
        "-O qcow2 -o lazy_refcounts=foo --size 1M",
        "-O qcow2 -o size=4M --size 1M",
        "-O qcow2 -o size=4M",
        "-O qcow2 --size 1Z",
        "-O qcow2 --size 16E",
        "-O qcow2 --size 7E",
        "-O qcow2 --size -1",
        "-O qcow2 --size",
        "-O qcow2 -o cluster_size=512 --size 1T",
        "-O qcow2 -o cluster_size=1000 --size 1T",
        "-O qcow2 -o extended_l2=on,cluster_size=8k --size 1M",
        "-O qcow2 -o compat=9 --size 1G",
        "-O qcow2 -o refcount_bits=3 --size 1G",
        "-O qcow2 -o compat=0.10,refcount_bits=8 --size 1G",
        "-O qcow2 -o preallocation=foo --size 1G",
        "-l none -O qcow2 q",
        "-l none -O qcow2 raw",
        "-l one -O qcow2 b",
        "-l x --size 1M",
        "-f qcow2 --size 1M",
        "--image-opts --size 1M",
        "--image-opts -f raw q",
        "--image-opts -O qcow2 driver=qcow2,file.filename=q",
        "-U -O qcow2 q",
        "--output=foo q",
        "nope",
        "-f qcow2 raw",
        "-O raw -o preallocation=full --size 1000",
    ] {
        lines.push(format!("qemu-img measure {refused}"));
    }
    Twins::new(&[
        "truncate -s 10M raw && printf x | dd of=raw bs=1 seek=5000000 conv=notrunc status=none",
        "qemu-img create -q -f qcow2 q 64M && qemu-io -c 'write 100k 3M' -c 'write -z 5M 1M' -c 'write -c 40M 64k' q \
         >/dev/null",
        "qemu-img create -q -f qcow2 -b q -F qcow2 o 100M && qemu-io -c 'write 70M 100' -c 'discard 0 1M' o >/dev/null",
        "qemu-img create -q -f qcow2 -o extended_l2=on x 20M && qemu-io -c 'write 4k 3k' -c 'write 1M 1' x >/dev/null",
        "qemu-img create -q -f qed -o cluster_size=4k,table_size=2 e 5M && qemu-io -f qed -c 'write 5000 70k' e >/dev/null",
        "qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=512 g 3M && qemu-io -c 'write 700 70k' g >/dev/null",
        "qemu-img create -q -f qcow2 b 64M && qemu-img bitmap --add b first && qemu-img bitmap --add -g 512 b two \
         && qemu-io -c 'write 0 1M' b >/dev/null && qemu-img snapshot -c one b",
    ])
    .without_files()
    .lines(&lines.iter().map(String::as_str).collect::<Vec<_>>())
    .agree();
}

/// What is said is what the file then has.
#[test]
fn what_is_measured_is_what_a_new_image_takes() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    for options in ["cluster_size=4k", "preallocation=metadata", "refcount_bits=64,cluster_size=4k"] {
        let arguments = ["measure", "-O", "qcow2", "-o", options, "--size", "77M"];
        let measured = img(folder.path(), arguments).output().success();
        let full: u64 = measured
            .lines()
            .find_map(|line| line.strip_prefix("fully allocated size: "))
            .and_then(|bytes| bytes.parse().ok())
            .expect("a number");
        qemu_img(folder.path(), ["create", "-q", "-f", "qcow2", "-o", options, "x", "77M"])
            .output()
            .success();
        let filled = ["bench", "-q", "-f", "qcow2", "-w", "-c", "77", "-s", "1M", "-d", "1", "x"];
        img(folder.path(), filled).output().success();
        let len = std::fs::metadata(folder.path().join("x")).expect("a file").len();
        assert!(len <= full && full - len <= 1 << 20, "{options}: measured {full}, is {len}");
    }
}

#[test]
fn dd() {
    Twins::new(&[
        "truncate -s 10M r && printf hello | dd of=r bs=1 seek=5000000 conv=notrunc status=none",
        "qemu-img create -q -f qcow2 q 8M && qemu-io -c 'write -P 3 100k 3M' -c 'write -z 5M 1M' q >/dev/null",
        "qemu-img create -q -f qcow2 -b q -F qcow2 o 9M",
    ])
    // The same bytes, in other extents of the host's file system.
    .without_disk_use()
    .lines(&[
        "qemu-img dd if=r of=a1 bs=1M",
        "qemu-img dd if=r of=a2 count=0",
        "qemu-img dd if=r of=a3 bs=100 count=1",
        "qemu-img dd if=r of=a4 bs=1M skip=20",
        "qemu-img dd if=r of=a5 bs=1M skip=8 count=9",
        "qemu-img dd if=r of=a6 bs=1M skip=4 count=6",
        "qemu-img dd if=r of=a7 bs=300 skip=16660 count=1000",
        "qemu-img dd if=r of=a8 bs=0x100 count=0x2",
        "qemu-img dd bs=1k bs=2k count=1 if=r of=a9",
        "qemu-img dd if=q if=r of=lost of=b1 bs=1M",
        "qemu-img dd -O qcow2 if=r of=b2 bs=1M",
        "qemu-img dd -O qed if=r of=b3 bs=64k",
        "qemu-img dd -f qcow2 -O raw if=o of=b4 bs=1M skip=1 count=7",
        "qemu-img dd -O qcow2 if=o of=b5 bs=1M count=3",
        "qemu-img dd -U if=q of=b6 bs=1M count=1",
        "qemu-img dd --image-opts if=driver=qcow2,file.filename=q of=b7 bs=1M count=1",
        "qemu-img dd if=r of=b7 bs=1M count=2",
        "qemu-img dd bs=1M skip=9223372036854775807 if=r of=b8",
        "qemu-img dd",
        "qemu-img dd if=r",
        "qemu-img dd of=c",
        "qemu-img dd if=r of=c1 count=010",
        "qemu-img dd if=r of=c2 skip=024000",
        "qemu-img dd if=r of=c count=1k",
        "qemu-img dd if=r of=c skip=1M",
        "qemu-img dd if=r of=c count=08",
        "qemu-img dd if=r of=nope:c",
        "qemu-img dd if=r of=c bs=0",
        "qemu-img dd if=r of=c bs=3G",
        "qemu-img dd if=r of=c bs=2147483648",
        "qemu-img dd if=r of=c bs=1Z",
        "qemu-img dd if=r of=c count=x",
        "qemu-img dd if=r of=c count=-1",
        "qemu-img dd if=r of=c skip=-1",
        "qemu-img dd if=r of=c skip=q",
        "qemu-img dd if=r of=c foo=1",
        "qemu-img dd if=r of=c foo",
        "qemu-img dd if=r of=c seek=1",
        "qemu-img dd if=r of=c count=1 extra",
        "qemu-img dd -n if=r of=c",
        "qemu-img dd -O nope if=r of=c",
        "qemu-img dd -f qcow2 if=r of=c",
        "qemu-img dd --image-opts -f raw if=r of=c",
        "qemu-img dd if=nope of=c",
        "qemu-img dd if=r of=/nonexistent/c",
    ])
    .agree();
}

/// The reference empties the file and then reads nothing from it.
#[test]
fn dd_does_not_empty_what_it_reads() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(folder.path().join("below"), [7; 4096]).expect("written");
    qemu_img(folder.path(), ["create", "-qf", "qcow2", "-b", "below", "-F", "raw", "top"]).output().success();
    for (input, output) in [("below", "below"), ("top", "top"), ("top", "below")] {
        let run = img(folder.path(), ["dd", &format!("if={input}"), &format!("of={output}")]).output();
        assert!(run.code == 1 && run.stderr.contains("would be emptied"), "{run}");
        assert_eq!(std::fs::read(folder.path().join("below")).expect("readable"), [7; 4096]);
    }
}

#[test]
fn bench() {
    let timed = "| sed 's/in .* seconds/in N seconds/'";
    let good = [
        "-c 10 -f raw r",
        "-q -c 10 -f raw r",
        "-c 10 q",
        "-S 1M -s 64k -o 100 -c 30 -f raw r",
        "-w --pattern=0x41 -c 10 -s 8k -S 16k -f raw r",
        "-w --pattern 7 -c 100 -d 3 -s 5000 -f raw r",
        "-w --flush-interval 5 -c 23 -d 4 -s 1k -f raw r",
        "-w --flush-interval 5 --no-drain -c 20 -d 4 -f raw r",
        "-w --no-drain -c 20 -d 4 -f raw r",
        "-t none -n -c 10 -f raw r",
        "-i native -t directsync -c 10 -f raw r",
        "-i threads -c 10 -f raw r",
        "-i io_uring -c 10 -f raw r",
        "-U -c 10 -f raw r",
        "-c 10 --image-opts driver=raw,file.filename=r",
        "-c 3 -s 512 -o 512 -f raw f",
        "-c 010 -d 0x4 -s 0512 -f raw r",
        "-w -c 012 --pattern 0377 -d 1 --flush-interval 02 -f raw r",
        "--pattern 3 -c 10 -f raw r",
    ];
    let refused = [
        "",
        "-c 10 r x",
        "-c 0 r",
        "-c -1 r",
        "-c 4G r",
        "-d 0 r",
        "-d x r",
        "-c 09 r",
        "-d 99999999999 r",
        "-s 0 r",
        "-s 4G r",
        "-s x r",
        "-S -1 r",
        "-S 3000000000 r",
        "-o x r",
        "-o 1Z r",
        "--pattern 300 -w r",
        "--pattern x -w r",
        "--flush-interval x -w r",
        "--flush-interval 5 -c 10 -f raw r",
        "--flush-interval 2 -w -c 20 -d 4 -f raw r",
        "-n -c 10 -f raw r",
        "-i foo -c 10 -f raw r",
        "-t foo -c 10 -f raw r",
        "-U -w -c 10 -f raw r",
        "-c 10 nope",
        "--image-opts -c 10 -f raw r",
        "-c 10 -s 11M -f raw r",
        "-c 10 -o 20M -f raw r",
        "-c 10 -f raw empty",
        "-w -c 2 -o 9M -s 2M -f raw r",
    ];
    let lines: Vec<String> = good
        .into_iter()
        .map(|arguments| format!("qemu-img bench {arguments} {timed}"))
        .chain(refused.into_iter().map(|arguments| format!("qemu-img bench {arguments}")))
        .collect();
    Twins::new(&[
        "truncate -s 10M r; truncate -s 0 empty; truncate -s 1000 f",
        "qemu-img create -q -f qcow2 q 10M",
    ])
    .without_disk_use()
    .lines(&lines.iter().map(String::as_str).collect::<Vec<_>>())
    .agree();
}
