//! `create`: announcements, refusals and the files made.

use img_tests::twin::Twins;

#[test]
fn sizes() {
    let mut twins = Twins::new(&[]);
    for size in [
        "abc",
        "1e3",
        "8E",
        "16E",
        "-1",
        "-- -1",
        "\"\"",
        "1.5G",
        "0x10000",
        "1kb",
        "1KiB",
        "0x1.5",
        "0x10k",
        ".5k",
        "1.k",
        "\" 1k\"",
        "+1k",
        "1.1b",
        "1000b",
        "0x1B",
        "010",
        "513",
        "1",
        "0",
        "1M",
        "1 2",
        "1Z",
        "1.00000001k",
        "0.4k",
        "1.9999999999k",
    ] {
        twins.line(&format!("qemu-img create x {size}"));
        twins.line(&format!("qemu-img create -f qcow2 y {size}"));
    }
    twins.agree();
}

#[test]
fn too_large() {
    Twins::new(&[])
        .lines(&[
            // A target that cannot be made is removed here, and left behind as it is there.
            "qemu-img create x 7E; rm -f x",
            "qemu-img create -f qcow2 x 7E",
            "qemu-img create -f qcow2 -o size=9E x",
            "qemu-img create -f qcow2 -o size=16E x",
            "qemu-img create -f qcow2 -o cluster_size=512 x 1T",
        ])
        .agree();
}

#[test]
fn options() {
    let mut twins = Twins::new(&[]);
    for list in [
        "size=1M",
        "size=1Z",
        "foo=1",
        "foo",
        "lazy_refcounts",
        "nolazy_refcounts",
        "lazy_refcounts=foo",
        "lazy_refcounts=yes",
        "cluster_size=foo",
        "cluster_size=1000",
        "cluster_size=8.5k",
        "cluster_size=-1",
        "cluster_size=",
        "cluster_size=4M",
        "cluster_size=256",
        "refcount_bits=foo",
        "refcount_bits=3",
        "refcount_bits=0x10",
        "refcount_bits=16k",
        "refcount_bits=-1",
        "refcount_bits=128",
        "refcount_bits=1",
        "refcount_bits=99999999999999999999",
        "compat=foo",
        "compat=0.10",
        "compat=v2",
        "compat=v3",
        "compat=1.1",
        "compat=0.10,lazy_refcounts=on",
        "compat=0.10,refcount_bits=8",
        "compat=0.10,extended_l2=on",
        "compat=0.10,compression_type=zstd",
        "compat=0.10,data_file=d",
        "compat=v3,preallocation=metadata -o cluster_size=128k",
        ",",
        "\"\"",
        "a=b,",
        "a,,b",
        ",,a",
        "compression_type=foo",
        "compression_type=zstd",
        "extended_l2=on",
        "extended_l2=on,cluster_size=4k",
        "preallocation=foo",
        "preallocation=off",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "preallocation=full,extended_l2=on",
        "cluster_size=1k,cluster_size=2k",
        "cluster_size=512",
        "cluster_size=2M",
        "extent_size_hint=2M",
        "nocow=on",
        "data_file=foo",
        "data_file=bar,data_file_raw=on",
        "data_file_raw=on",
        "data_file=foo,data_file_raw=on,preallocation=metadata",
        "data_file=x2,preallocation=falloc",
        "help",
        "?",
        "cluster_size=4k,help",
        "hel",
        "help=1",
        "backing_fmt=raw",
        "encrypt.iter-time=x",
    ] {
        // The reference removes even a file that stood there before when it fails; here that one is kept.
        twins.line("rm -f x");
        twins.line(&format!("qemu-img create -f qcow2 -o {list} x 1M"));
    }
    for list in [
        "foo=1",
        "preallocation=off",
        "preallocation=falloc",
        "preallocation=full",
        "preallocation=metadata",
        "preallocation=foo",
        "nocow=on",
        "extent_size_hint=2M",
        "extent_size_hint=0",
        "size=2M",
        "help",
    ] {
        twins.line(&format!("qemu-img create -f raw -o {list} r 1M"));
    }
    twins
        .lines(&[
            "qemu-img create -f qcow2 -odata_file=x.data g 1M",
            "qemu-img create -f qcow2 -o size=1M y",
            "qemu-img create -f qcow2 -o size=513 y",
            "qemu-img create -o help",
            "qemu-img create -f qcow2 -o help",
            "qemu-img create -f qcow2 -o help nope:x",
            "qemu-img create -f nope -o help",
            "qemu-img create y -f qcow2 1M -q",
            "qemu-img create -f raw -f qcow2 y 1M",
            "qemu-img create --options=cluster_size=4k --format=qcow2 y 1M",
            "qemu-img create --object secret,id=s,data=x -f qcow2 y 1M",
        ])
        .agree();
}

#[test]
fn names() {
    Twins::new(&["qemu-img create -q old 3M"])
        .lines(&[
            "qemu-img create -f nope x 1M",
            "qemu-img create -f qcow2 nope:x 1M",
            "qemu-img create -f qcow2 nodir/x 1M",
            "qemu-img create nodir/x 1M",
            "qemu-img create -f qcow2 . 1M",
            "qemu-img create -f qcow2 '' 1M",
            "qemu-img create -f qcow2 file:zz 1M",
            "qemu-img create -f qcow2 ./a:b 1M",
            "qemu-img create -f qcow2 x",
            "qemu-img create x",
            "qemu-img create -f qcow2 old 1M",
            "qemu-img create old 1M",
            "qemu-img create -- -x 1M",
            "qemu-img create -f qcow2 'json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"q\"}}' 1M",
            "qemu-img create -f qcow2 x 1M 2>&1",
            "qemu-img create -f qcow2 nodir/x 1M 2>&1",
            "qemu-img create -f qcow2 'a space ü' 1M",
        ])
        .agree();
}

#[test]
fn backing_files() {
    let json = r#"'json:{"driver":"qcow2","file":{"driver":"file","filename":"q"}}'"#;
    let mut twins = Twins::new(&[
        "qemu-img create -q b.raw 3M",
        "qemu-img create -q -f qcow2 q 5M",
        "mkdir d",
        "qemu-img create -q -f qcow2 -b ../q -F qcow2 d/mid",
        "qemu-img create -q -f qcow2 loop1 1M",
        "qemu-img create -q -f qcow2 -b loop1 -F qcow2 loop2",
        "qemu-img create -q b.odd 1000",
    ]);
    for line in [
        "qemu-img create -f qcow2 -b b.raw o",
        "qemu-img create -f qcow2 -b q o",
        "qemu-img create -f qcow2 -b q -F qcow2 o",
        "qemu-img create -f qcow2 -b q -F qcow2 o 1M",
        "qemu-img create -f qcow2 -b q -F qcow2 o 100M",
        "qemu-img create -f qcow2 -b q -F raw o",
        "qemu-img create -f qcow2 -b b.odd -F raw o",
        "qemu-img create -f qcow2 -b q -F nope o",
        "qemu-img create -f qcow2 -b b.raw -F qcow2 o",
        "qemu-img create -f qcow2 -b none -F qcow2 o",
        "qemu-img create -f qcow2 -b none -F qcow2 o 1M",
        "qemu-img create -f qcow2 -b none o 1M",
        "qemu-img create -f qcow2 -u -b none o 1M",
        "qemu-img create -f qcow2 -u -b none -F qcow2 o",
        "qemu-img create -f qcow2 -u -b none -F qcow2 o 1M",
        "qemu-img create -f qcow2 -u -b none -F nope o 1M",
        "qemu-img create -f qcow2 -b o -F qcow2 o 1M",
        "qemu-img create -f raw -b q -F qcow2 r 1M",
        "qemu-img create -f raw -F qcow2 r 1M",
        "qemu-img create -f qcow2 -F qcow2 o 1M",
        "qemu-img create -f qcow2 -b '' o 1M",
        "qemu-img create -f qcow2 -b '' -F raw o 1M",
        "qemu-img create -f qcow2 -o backing_file=q,backing_fmt=qcow2 o",
        "qemu-img create -f qcow2 -o backing_file=q,backing_fmt=qcow2 -b b.raw -F raw o",
        "qemu-img create -f qcow2 -b a,b -F raw -u o 1M",
        "qemu-img create -f qcow2 -o backing_file=a,,b -o backing_fmt=raw -u o 1M",
        "qemu-img create -f qcow2 -b d/mid -F qcow2 top",
        "qemu-img create -f qcow2 -b mid -F qcow2 d/top",
        "qemu-img create -f qcow2 -b none -F qcow2 d/top",
        "qemu-img create -f qcow2 -b file:q -F qcow2 o",
        "qemu-img create -f qcow2 -b nope:q -F qcow2 o",
        "qemu-img create -f qcow2 -u -b nbd:localhost:1 -F raw o 1M",
        "qemu-img create -f qcow2 -b q -F qcow2 -o preallocation=metadata o",
        "qemu-img create -f qcow2 -b q -F qcow2 -o extended_l2=on,preallocation=metadata o",
        "qemu-img create -f qcow2 -b q -F qcow2 -o data_file=dd,data_file_raw=on o",
        "qemu-img create -f qcow2 -b q -F qcow2 -o compat=0.10 o",
        "qemu-img create -f qcow2 -b loop2 -F qcow2 loop1",
    ] {
        twins.line("rm -f o");
        twins.line(line);
    }
    twins.line(&format!("qemu-img create -f qcow2 -b {json} o"));
    twins.line(&format!("qemu-img create -f qcow2 -F qcow2 -b {json} o"));
    twins.agree();
}

/// Wishes for the host file are told of every file that is made.
#[test]
fn data_files_and_extents_are_made_as_their_image() {
    let mut twins = Twins::new(&[]).without_files();
    for (options, file) in [
        ("-f qcow2 -o data_file=d,nocow=on,extent_size_hint=2M", "d"),
        ("-f vmdk -o subformat=monolithicFlat,nocow=on,extent_size_hint=2M", "x-flat"),
        ("-f vmdk -o subformat=twoGbMaxExtentSparse,nocow=on", "x-s001"),
    ] {
        twins.lines(&[
            &format!("strace -qq -y -e trace=ioctl -o log qemu-img create -q {options} x 1M"),
            &format!(
                "grep '/{file}>' log | grep -oE 'SETFLAGS|FSSETXATTR|fsx_extsize=[0-9]+'; rm -f log x* d"
            ),
        ]);
    }
    twins.agree();
}
