//! QED images: made, described, checked, converted and resized as the reference does.

use img_tests::twin::Twins;

/// An image with data in several clusters and a run of zero clusters.
const DISK: &str = "qemu-img create -q -f qed a.qed 10M && qemu-io -f qed -c 'write -P 3 100k 300k' \
                    -c 'write -z 1M 128k' -c 'write -P 9 5M 1M' a.qed >/dev/null";

#[test]
fn create() {
    // What the host takes for the disk that is there already is its own affair.
    Twins::new(&[DISK])
        .without_disk_use()
        .lines(&[
            "qemu-img create -f qed -o help",
            "qemu-img create -f qed -o help x",
            "qemu-img create -f qed x 10M",
            "qemu-img create -f qed -o cluster_size=4k,table_size=2 x 10M",
            "qemu-img create -f qed -o cluster_size=4k,table_size=16 x 1G",
            "qemu-img create -f qed -o cluster_size=1M x 3M",
            "qemu-img create -f qed x 1000",
            "qemu-img create -f qed x 0",
            "qemu-img create -f qed x",
            "qemu-img create -f qed -b a.qed -F qed o",
            "qemu-img create -f qed -b a.qed -F qed o 20M",
            "qemu-img create -f qed -b a.qed o2",
            "qemu-img create -f qed -b a.qed -F qcow2 o2",
            "qemu-img create -f qed -u -b raw -F raw o3 1M",
            "qemu-img create -f qed -u -o backing_file=none,backing_fmt=qcow2 o4 1M",
            "qemu-img create -f qcow2 -b a.qed -F qed o5",
            "qemu-img create -f qed -o nocow=on z 1M",
        ])
        .agree();
}

/// The reference leaves an empty file behind.
#[test]
fn create_refused() {
    Twins::new(&[])
        .without_files()
        .lines(&[
            "qemu-img create -f qed -o cluster_size=1000 y 1M",
            "qemu-img create -f qed -o cluster_size=2k y 1M",
            "qemu-img create -f qed -o cluster_size=128M y 1M",
            "qemu-img create -f qed -o cluster_size=64M y 1M",
            "qemu-img create -f qed -o table_size=3 y 1M",
            "qemu-img create -f qed -o table_size=32 y 1M",
            "qemu-img create -f qed -o cluster_size=4k,table_size=1 y 2G",
            "qemu-img create -f qed y 100T",
            "qemu-img create -f qed -o preallocation=metadata y 1M",
            "qemu-img create -f qed -o preallocation=some y 1M",
            "qemu-img create -f qed -o foo=1 y 1M",
        ])
        .agree();
}

#[test]
fn info_and_map() {
    Twins::new(&[
        DISK,
        "qemu-img create -q -f qed -b a.qed -F qed o.qed 12M && qemu-io -f qed -c 'write 0 64k' o.qed >/dev/null",
        "truncate -s 1M r && qemu-img create -q -f qed -b r -F raw p.qed",
        "printf 'QED\\0rest' > short",
        "head -c 60 a.qed > cut",
    ])
    .without_files()
    .lines(&[
        "qemu-img info a.qed",
        "qemu-img info --output=json a.qed",
        "qemu-img info -f qed a.qed",
        "qemu-img info o.qed",
        "qemu-img info --output=json o.qed",
        "qemu-img info --backing-chain o.qed",
        "qemu-img info p.qed",
        "qemu-img info short 2>/dev/null",
        "qemu-img info cut 2>/dev/null",
        "qemu-img info -f qcow2 a.qed",
        "qemu-img info -f qed r",
        "qemu-img info -f raw a.qed",
        "qemu-img info --image-opts driver=qed,file.filename=a.qed",
        "qemu-img info --image-opts driver=qed,l2-cache-size=1M,file.filename=a.qed",
        "qemu-img info 'json:{\"driver\":\"qed\",\"file\":{\"driver\":\"file\",\"filename\":\"a.qed\"}}'",
        "qemu-img map a.qed",
        "qemu-img map --output=json a.qed",
        "qemu-img map o.qed",
        "qemu-img map --output=json o.qed",
        "qemu-img map --output=json -s 100k -l 1M o.qed",
        "qemu-img map --output=json p.qed",
        "qemu-img snapshot -l a.qed",
        "qemu-img snapshot -c x a.qed",
    ])
    .agree();
}

#[test]
fn check() {
    // The first two words of the second entry of the L2 table, which stands at 0x90000.
    let lost = "printf '\\0\\0\\0\\0\\1\\0\\0\\0' | dd of=lost.qed bs=1 seek=589832 conv=notrunc status=none";
    let twice = "dd if=a.qed of=twice.qed bs=1 skip=589832 seek=589840 count=8 conv=notrunc status=none";
    let dirty = |file: &str| format!("printf '\\2' | dd of={file} bs=1 seek=16 conv=notrunc status=none");
    Twins::new(&[
        DISK,
        "cp a.qed leak.qed; truncate -s +128k leak.qed; cp leak.qed leak2.qed",
        &format!("cp a.qed lost.qed; {lost}; cp lost.qed lost2.qed; cp lost.qed lost3.qed"),
        &format!("cp a.qed twice.qed; {twice}"),
        &format!("cp a.qed d.qed; {}; cp lost.qed d2.qed; {}", dirty("d.qed"), dirty("d2.qed")),
        "cp d.qed d3.qed",
    ])
    .lines(&[
        "qemu-img check a.qed",
        "qemu-img check --output=json a.qed",
        "qemu-img check -q a.qed",
        "qemu-img check -r all a.qed",
        "qemu-img check leak.qed",
        "qemu-img check --output=json leak.qed",
        "qemu-img check -r leaks leak.qed",
        "qemu-img check -r all leak.qed",
        "qemu-img check -r all --output=json leak2.qed",
        "qemu-img check lost.qed",
        "qemu-img check --output=json lost.qed",
        "qemu-img check -r leaks lost.qed",
        "qemu-img check -r all lost2.qed",
        "qemu-img check -r all --output=json lost3.qed",
        "qemu-img check twice.qed",
        "qemu-img check -r all twice.qed",
        "qemu-img check --output=json -r leaks twice.qed",
        "qemu-img check d.qed",
        "qemu-img check -r all d.qed",
        "qemu-img check d2.qed",
        "qemu-img check -r leaks d2.qed",
        "qemu-img check -f raw a.qed",
        // Opening for writing repairs.
        "qemu-img resize d3.qed 11M",
        "qemu-img info d3.qed",
    ])
    .agree();
}

#[test]
fn resize_convert_and_compare() {
    Twins::new(&[
        DISK,
        "qemu-img create -q -f qed -b a.qed -F qed o.qed 1M",
        "qemu-img create -q -f qed n.qed 10M",
    ])
    // Whole clusters in the order in which they are read take other extents of the host's file system.
    .without_disk_use()
    .lines(&[
        "qemu-img resize a.qed 20M",
        "qemu-img resize a.qed +1000",
        "qemu-img resize a.qed +512",
        "qemu-img resize a.qed 15M",
        "qemu-img resize --shrink a.qed 15M",
        "qemu-img resize --preallocation=off a.qed 30M",
        "qemu-img resize --preallocation=metadata a.qed 40M",
        "qemu-img resize --preallocation=falloc a.qed 40M",
        "qemu-img resize --preallocation=full a.qed 40M",
        "qemu-img resize a.qed 200T",
        "qemu-img compare a.qed o.qed",
        "qemu-img compare -s a.qed o.qed",
        "qemu-img convert -O raw a.qed out.raw && qemu-img compare -f qed -F raw a.qed out.raw",
        "qemu-img convert -O qcow2 a.qed out.qcow2 && qemu-img compare a.qed out.qcow2",
        "qemu-img convert -c -O qed a.qed no.qed",
        "qemu-img convert -O qed -o foo=1 a.qed no.qed",
    ])
    .agree();
    let mut converted = Twins::new(&[DISK, "qemu-img create -q -f qed n.qed 10M"]).without_files();
    converted
        .lines(&[
            "qemu-img convert -f qed -O qed a.qed b.qed && qemu-img compare a.qed b.qed",
            "qemu-img convert -O qed -o cluster_size=4k,table_size=2 a.qed b.qed && qemu-img check -q b.qed",
            "qemu-img convert -n -O qed a.qed n.qed && qemu-img compare a.qed n.qed",
            "qemu-img convert -O qed -B a.qed -F qed a.qed c.qed && qemu-img map --output=json c.qed",
            "qemu-img convert -O qed -o preallocation=metadata a.qed no.qed",
            "qemu-img convert -S 0 -O qed a.qed full.qed && qemu-img check full.qed",
        ])
        .agree();
}
