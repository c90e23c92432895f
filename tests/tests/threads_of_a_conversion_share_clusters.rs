//! Onto an image that exists, zeroes are written as well as data, and the threads of a conversion meet in one cluster: one
//! writes a part of it, another makes the rest zero. All of it is there in the end, and there is an end.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path};

use img_tests::command::{Run, img_binary, qemu_img};

const CLUSTER: u64 = 64 << 10;
const CLUSTERS: u64 = 256;
const BLOCK: usize = 4096;

/// A block or two of data somewhere in each cluster, and holes.
fn sparse_source(path: &Path) {
    let file = File::create(path).expect("a file");
    file.set_len(CLUSTERS * CLUSTER).expect("a sparse file");
    for cluster in 0..CLUSTERS {
        let block = vec![u8::try_from(cluster % 250 + 1).expect("below 251"); BLOCK];
        for part in [cluster % 16, cluster * 7 % 16] {
            file.write_all_at(&block, cluster * CLUSTER + part * BLOCK as u64).expect("written");
        }
    }
}

#[test]
fn and_end() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    let reference = |line: &str| qemu_img(directory, line.split(' ')).output().success();
    sparse_source(&directory.join("source"));
    // What the target held before, of which nothing may be left.
    reference("create -q -f raw old 16M");
    Run::new("qemu-io", directory).args(["-f", "raw", "-c", "write -P 255 0 16M", "old"]).output().success();
    for (format, options, ways) in [
        ("qcow2", "", &["", "-W", "-c", "-m 16"][..]),
        ("qcow2", "-o extended_l2=on", &["", "-W"]),
        ("qcow2", "-b old -F raw", &["", "-W"]),
        ("qed", "", &[""]),
        ("vmdk", "", &["", "-W"]),
        ("vpc", "-o force_size=on", &["", "-W"]),
    ] {
        for way in ways {
            let name = format!("{format} {options} {way}");
            let create = format!("create -q -f {format} {options} target 16M");
            qemu_img(directory, create.split_whitespace()).output().success();
            let convert = format!(
                "-k 1 120 {} convert -n {way} -f raw -O {format} source target",
                img_binary().display()
            );
            let converted = Run::new("timeout", directory).args(convert.split_whitespace()).output();
            assert_eq!(converted.code, 0, "{name}: {converted}");
            reference(&format!("compare -q -f raw -F {format} source target"));
        }
    }
}
