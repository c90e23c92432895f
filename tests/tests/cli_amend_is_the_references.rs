//! `amend`.

use img_tests::{
    command::{Run, img, qemu_img},
    craft::{CLUSTER, Crafted, DATA, DISK, L1, L2, header, snapshot_entry},
    twin::Twins,
};

/// What is refused, and in which words.
#[test]
fn refusals() {
    Twins::new(&[
        "qemu-img create -q -f qcow2 a 1M",
        "qemu-img create -q -f qcow2 -o compat=0.10 v2 1M",
        "qemu-img create -q -f raw base 1M",
        "qemu-img create -q -f qcow2 -b base -F raw over",
        "qemu-img create -q -f qcow2 -o data_file=d.data d 1M",
        "qemu-img create -q -f qcow2 -o extended_l2=on e 1M",
        "qemu-img create -q -f qcow2 s 1M && qemu-io -c 'write 0 128k' s >/dev/null && \
         for i in 1 2 3 4; do qemu-img snapshot -c s$i s; done",
        "qemu-img create -q -f qcow2 t 1M && qemu-img snapshot -c one t && qemu-img resize -q t 2M",
        "qemu-img create -q -f qcow2 -o compat=0.10 t2 1M && qemu-img snapshot -c one t2",
        "qemu-img create -q -f qed q 1M",
        "qemu-img create -q -f vpc vhd 1M && qemu-img create -q -f vmdk vm 1M",
    ])
    .without_files()
    .lines(&[
        "qemu-img amend",
        "qemu-img amend a",
        "qemu-img amend -o size=2M",
        "qemu-img amend -o size=2M a v2",
        "qemu-img amend -o size=2M none",
        "qemu-img amend -p -o size=2M none",
        "qemu-img amend -o '' a",
        "qemu-img amend -o , a",
        "qemu-img amend -o size=1M -o '' a",
        "qemu-img amend -o foo a",
        "qemu-img amend -p -o foo=1 a",
        "qemu-img amend -o preallocation=off a",
        "qemu-img amend -o cluster_size=64k a",
        "qemu-img amend -o extended_l2=on a",
        "qemu-img amend -o compression_type=zstd a",
        "qemu-img amend -o encryption=off a",
        // The hint stands where all of the list would do for a new image.
        "qemu-img amend -o cluster_size=x a",
        "qemu-img amend -o cluster_size=4k,foo=1 a",
        "qemu-img amend -o cluster_size=4k,nocow=on a",
        "qemu-img amend -o extended_l2=maybe a",
        "qemu-img amend -o extended_l2=on,cluster_size=4k a",
        "qemu-img amend -o encrypt.format=luks a",
        "qemu-img amend -o encrypt.new-secret=x a",
        "qemu-img amend -o extent_size_hint=1M a",
        "qemu-img amend -o nocow=on a",
        "qemu-img amend -o size a",
        "qemu-img amend -o size=foo a",
        "qemu-img amend -o size=100 a",
        "qemu-img amend -o size=10E a",
        "qemu-img amend -p -o size=100 a",
        "qemu-img amend -o compat a",
        "qemu-img amend -o compat= a",
        "qemu-img amend -o compat=foo a",
        "qemu-img amend -o lazy_refcounts=maybe a",
        "qemu-img amend -o refcount_bits=3 a",
        "qemu-img amend -o refcount_bits=0 a",
        "qemu-img amend -o refcount_bits=128 a",
        "qemu-img amend -o refcount_bits=-1 a",
        "qemu-img amend -o refcount_bits=x a",
        "qemu-img amend -o backing_file=base a",
        "qemu-img amend -o backing_fmt=raw a",
        "qemu-img amend -o backing_file=,backing_fmt= a",
        "qemu-img amend -o backing_file=base over",
        "qemu-img amend -o backing_file=base,backing_fmt=qcow2 over",
        "qemu-img amend -o data_file=x a",
        "qemu-img amend -o data_file= a",
        "qemu-img amend -o data_file_raw=on a",
        "qemu-img amend -o data_file_raw=on d",
        "qemu-img amend -o compat=v2 d",
        "qemu-img amend -o compat=v2 e",
        "qemu-img amend -o compat=v2,refcount_bits=8 a",
        "qemu-img amend -o refcount_bits=8 v2",
        "qemu-img amend -o lazy_refcounts=on v2",
        "qemu-img amend -o compat=v2,lazy_refcounts=on a",
        "qemu-img amend -o refcount_bits=2 s",
        "qemu-img amend -o refcount_bits=1 s",
        "qemu-img amend -o compat=0.10 t",
        "qemu-img amend -o size=2M t2",
        "qemu-img amend -f raw -o size=2M base",
        "qemu-img amend -o size=2M base",
        "qemu-img amend -o size=2M q",
        "qemu-img amend -o size=2M vhd",
        "qemu-img amend -o size=2M vm",
        "qemu-img amend -f nope -o size=2M a",
        "qemu-img amend -t nope -o size=2M a",
        "qemu-img amend --object foo -o size=1M a",
        "qemu-img amend --image-opts -f qcow2 -o size=2M driver=qcow2,file.filename=a",
        "qemu-img amend -U -o size=2M a",
        "qemu-img amend -f qcow2 -o help",
        "qemu-img amend -f qed -o help",
        "qemu-img amend -f raw -o help",
        "qemu-img amend -f nope -o help",
        "qemu-img amend -o help",
        "qemu-img amend -o help none",
        "qemu-img amend -o help a",
        "qemu-img amend -p -o help a",
        "qemu-img amend -o compat=v3,? a",
        "qemu-img amend -o help q",
        // Nothing was changed.
        "qemu-img info a",
        "qemu-img info v2",
        "qemu-img info s | head -4",
        "qemu-img info t2 | head -4",
        "qemu-img info over",
        "qemu-img info d",
    ])
    .agree();
}

#[test]
fn versions_features_and_sizes() {
    Twins::new(&[
        "qemu-img create -q -f raw base 1M",
        "qemu-img create -q -f qcow2 a 1M && qemu-io -c 'write -P 1 100k 300k' a >/dev/null",
        "qemu-img create -q -f qcow2 -b base -F raw o && qemu-io -c 'write -z 0 256k' o >/dev/null",
        "qemu-img create -q -f qcow2 -o data_file=d.data,data_file_raw=on d 1M && cp d.data e.data",
    ])
    .without_disk_use()
    // Where clusters for zeroes stand, and how far the file reaches, is each one's own choice.
    .ignoring("file length: ")
    .lines(&[
        "qemu-img amend -o compat=0.10 a",
        "qemu-img amend -p -o compat=0.10 a",
        "qemu-img amend -q -p -o compat=1.1 a",
        "qemu-img amend -o size=2M,lazy_refcounts=on -t none a",
        "qemu-img amend -o size=1M --force a",
        "qemu-img amend -o size=0 a",
        "qemu-img amend -p -o size=1M a",
        "qemu-img amend -o nolazy_refcounts a",
        "qemu-img amend --image-opts -o size=3M driver=qcow2,file.filename=a",
        "qemu-img amend -o compat=v2 -o size=512k a",
        "qemu-img check a",
        "qemu-img amend -o backing_file=base,backing_fmt=raw o",
        "qemu-img amend -o compat=0.10 o",
        "qemu-img check -q o",
        "qemu-img amend -o compat=v3,lazy_refcounts=on,size=3M o",
        "qemu-img amend -o compat=v2,size=512k o",
        "qemu-img check -q o",
        "qemu-img amend -o data_file=e.data d",
        "qemu-img amend -o data_file_raw=off d",
        "qemu-img amend -o data_file= d",
    ])
    .agree();
}

#[test]
fn widths_of_reference_counts() {
    let mut twins = Twins::new(&[
        "qemu-img create -q -f qcow2 a 64M && qemu-io -c 'write -P 1 1M 3M' -c 'write -P 2 40M 100k' a >/dev/null",
        "qemu-img create -q -f qcow2 -o cluster_size=512 b 1M && qemu-io -c 'write -P 1 0 1M' b >/dev/null",
        "qemu-img snapshot -c one b && qemu-io -c 'write -P 3 100k 200k' b >/dev/null",
    ])
    .without_disk_use()
    .ignoring("file length: ");
    for bits in [64, 1, 4, 16] {
        // A cluster that the snapshot shares is used twice.
        let shared = if bits == 1 { 2 } else { bits };
        twins
            .line(&format!("qemu-img amend -o refcount_bits={bits} a"))
            .line("qemu-img check -q a")
            .line(&format!("qemu-img amend -o refcount_bits={shared} b"))
            .line("qemu-img check -q b && qemu-img convert -l one -O raw b out");
    }
    twins.agree();
}

/// Version 2 images of old have snapshots that do not say how large the disk was; version 3 demands it.
#[test]
fn snapshots_of_old_are_completed() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let entry_at = 8 * CLUSTER;
    let image = Crafted::new()
        .u32(header::VERSION, 2)
        // A snapshot with an L1 table of its own, in cluster 7, and everything else shared.
        .put(entry_at, &snapshot_entry(7 * CLUSTER as u64, 1, 0, b"1", b"old"))
        .u32(header::SNAPSHOT_COUNT, 1)
        .u64(header::SNAPSHOTS_OFFSET, entry_at as u64)
        .u64(L1, L2 as u64)
        .u64(7 * CLUSTER, L2 as u64)
        .u64(L2, DATA as u64)
        .refcount(L2 / CLUSTER, 2)
        .refcount(DATA / CLUSTER, 2)
        .refcount(7, 1)
        .refcount(8, 1);
    let in_directory = |run: Run| run.output().success();
    let mut told = Vec::new();
    for name in ["ours", "theirs"] {
        image.save(&directory.path().join(name));
        let amend = ["amend", "-o", "compat=1.1", name];
        match name {
            "ours" => in_directory(img(directory.path(), amend)),
            _ => in_directory(qemu_img(directory.path(), amend)),
        };
        in_directory(qemu_img(directory.path(), ["check", "-q", name]));
        let info = in_directory(qemu_img(directory.path(), ["info", "--output=json", name]));
        told.push(info.replace(name, "x"));
        let table = std::fs::read(directory.path().join(name)).expect("an image of the test");
        let at =
            usize::try_from(u64::from_be_bytes(table[64..72].try_into().expect("8 bytes"))).expect("small");
        let size = u64::from_be_bytes(table[at + 48..at + 56].try_into().expect("8 bytes"));
        assert_eq!(table[at + 36..at + 40], 24_u32.to_be_bytes(), "{name}: bytes of extra data");
        assert_eq!(size, DISK as u64, "{name}: the size of the disk");
    }
    let without_lengths = |text: &str| {
        let lines = text.lines().filter(|line| !line.contains("-size\": ") && !line.contains("length"));
        lines.collect::<Vec<_>>().join("\n")
    };
    assert_eq!(without_lengths(&told[0]), without_lengths(&told[1]));
}
