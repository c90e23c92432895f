//! What `img` does with VHD images under the name `qemu-img` is what `qemu-img` does.

use img_tests::twin::Twins;

/// An empty dynamic image, one with data, a fixed one, and a raw disk.
const SETUP: &[&str] = &[
    "qemu-img create -q -f vpc empty.vhd 100M",
    "qemu-img create -q -f vpc -o force_size=on data.vhd 64M",
    "qemu-io -f vpc -c 'write -q -P 7 0 70000' -c 'write -q -P 8 5M 3M' -c 'write -q -z 9M 4M' data.vhd",
    "qemu-img create -q -f vpc -o subformat=fixed fixed.vhd 10M",
    "qemu-io -f vpc -c 'write -q -P 9 1M 64k' fixed.vhd",
    "qemu-img create -q -f raw disk.raw 9M",
    "qemu-io -f raw -c 'write -q -P 3 100k 3M' disk.raw",
];

/// Ids and time stamps stand at the end of fixed images, which the reference takes for raw ones.
fn twins(setup: &[&str]) -> Twins {
    Twins::new(setup).reading_as("fixed", "vpc")
}

#[test]
fn create_agrees() {
    let mut twins = twins(&[]);
    for size in
        ["0", "1", "512", "34817", "1M", "7M", "8M", "100M", "503M", "1G", "31G", "100G", "127G", "2040G"]
    {
        twins.line(&format!("qemu-img create -f vpc size.vhd {size}"));
        twins.line(&format!("qemu-img create -f vpc -o force_size size.vhd {size}"));
    }
    twins.lines(&[
        "qemu-img create -f vpc -o subformat=fixed fixed.vhd 5M",
        "qemu-img create -f vpc -o subformat=fixed,force_size=on fixed.vhd 5M",
        "qemu-img create -f vpc -o subformat=dynamic,size=5M dynamic.vhd",
        "qemu-img create -q -f vpc quiet.vhd 5M",
        "qemu-img create -f vpc -o subformat=fixed fixed.vhd 1",
        "qemu-img create -f vpc -o help",
        "qemu-img create -f vpc -o help new.vhd",
        "qemu-img create -f vpc new.vhd",
    ]);
    twins.agree();
}

#[test]
fn create_refuses_alike() {
    // The reference leaves an empty file behind.
    let mut twins = Twins::new(&["qemu-img create -q -f vpc base.vhd 5M"]).without_files();
    twins.lines(&[
        "qemu-img create -f vpc big.vhd 2041G",
        "qemu-img create -f vpc -o force_size big.vhd 2041G",
        "qemu-img create -f vpc big.vhd 7E",
        "qemu-img create -f vpc -o subformat=thin new.vhd 5M",
        "qemu-img create -f vpc -o force_size=perhaps new.vhd 5M",
        "qemu-img create -f vpc -o backing_file=base.vhd new.vhd",
        "qemu-img create -f vpc -b base.vhd -F vpc new.vhd",
        "qemu-img create -f vpc -F vpc new.vhd 5M",
        "qemu-img create -f vpc -o preallocation=metadata new.vhd 5M",
        "qemu-img create -f vpc -o preallocation=some new.vhd 5M",
    ]);
    twins.agree();
}

#[test]
fn descriptions_and_maps_agree() {
    let mut twins = twins(SETUP);
    for file in ["empty.vhd", "data.vhd", "fixed.vhd"] {
        for format in ["", "-f vpc", "-f raw"] {
            twins.lines(&[
                &format!("qemu-img info {format} {file}"),
                &format!("qemu-img info --output=json {format} {file}"),
                &format!("qemu-img map {format} {file}"),
                &format!("qemu-img map --output=json {format} {file}"),
                &format!("qemu-img map --output=json -s 1M -l 5M {format} {file}"),
            ]);
        }
    }
    twins.lines(&[
        "qemu-img info --backing-chain -f vpc data.vhd",
        "qemu-img info -f vpc disk.raw",
        "qemu-img info -f vpc /dev/null",
        "qemu-img info --image-opts driver=vpc,force_size_calc=most,file.filename=data.vhd",
        "qemu-img info --image-opts driver=vpc,no-such-option=1,file.filename=data.vhd",
    ]);
    twins.agree();
}

#[test]
fn what_vpc_cannot_do_is_refused_alike() {
    let mut twins = twins(SETUP);
    twins.lines(&[
        "qemu-img check data.vhd",
        "qemu-img check -r all data.vhd",
        "qemu-img check --output=json data.vhd",
        "qemu-img check -f vpc fixed.vhd",
        "qemu-img resize data.vhd 80M",
        "qemu-img resize -f vpc fixed.vhd +5M",
        "qemu-img resize --shrink data.vhd 10M",
        "qemu-img resize data.vhd 10M",
        "qemu-img resize data.vhd -10G",
        "qemu-img resize --preallocation=full --shrink data.vhd 10M",
        "qemu-img snapshot -l data.vhd",
        "qemu-img snapshot -c one data.vhd",
        "qemu-img convert -c -O vpc disk.raw new.vhd",
        "qemu-img convert -O vpc -B empty.vhd -F vpc disk.raw new.vhd",
    ]);
    twins.agree();
}

#[test]
fn conversions_agree() {
    // A file system counts its own tables as well, of which a file in more pieces needs more.
    let mut twins = twins(SETUP).without_disk_use();
    twins.lines(&[
        "qemu-img convert -O vpc disk.raw dynamic.vhd",
        "qemu-img convert -O vpc -o force_size=on disk.raw forced.vhd",
        "qemu-img convert -O vpc -o subformat=fixed disk.raw fixed-too.vhd",
        "qemu-img convert -O vpc -o subformat=fixed,force_size=on disk.raw fixed-forced.vhd",
        "qemu-img convert -O vpc -S 0 disk.raw full.vhd",
        "qemu-img convert -O raw data.vhd data.raw",
        "qemu-img convert -f vpc -O raw fixed.vhd fixed.raw",
        "qemu-img convert -f vpc -O vpc fixed.vhd again.vhd",
        "qemu-img convert -O qcow2 data.vhd data.qcow2",
        "qemu-img convert -f vpc -O qcow2 -c fixed.vhd fixed.qcow2",
        "qemu-img convert -O vpc data.qcow2 back.vhd",
        "qemu-img convert -O vpc disk.raw data.vhd joined.vhd",
        "qemu-img compare data.vhd data.raw",
        "qemu-img compare -s data.vhd back.vhd",
        "qemu-img compare -f vpc -F raw fixed.vhd fixed.raw",
        "qemu-img compare -p data.vhd empty.vhd",
    ]);
    twins.agree();
}
