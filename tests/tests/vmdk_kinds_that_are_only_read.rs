//! COWD and seSparse, which no tool here writes: `img` and the reference read the same from the same bytes.

use std::{fs, path::Path};

use img_core::format::OpenMode;
use img_tests::{
    command::qemu_img,
    open,
    pattern::assert_same,
    read_all,
    vmdk::{cowd, descriptor, sesparse},
};

fn both_read(folder: &Path, create_type: &str, line: &str, extent: &[u8], guest: &[u8]) {
    fs::write(folder.join("d.vmdk"), descriptor(create_type, line)).expect("written");
    fs::write(folder.join("x.vmdk"), extent).expect("written");
    let ours = open(&folder.join("d.vmdk"), None, OpenMode::Read).unwrap_or_else(|error| panic!("{error}"));
    assert_same(&read_all(&ours).expect("readable"), guest, create_type);
    drop(ours);
    qemu_img(folder, ["convert", "-f", "vmdk", "-O", "raw", "d.vmdk", "d.raw"]).output().success();
    assert_same(&fs::read(folder.join("d.raw")).expect("readable"), guest, create_type);
}

#[test]
fn cowd_reads_as_the_reference_reads_it() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let (extent, guest) = cowd();
    both_read(folder.path(), "vmfsSparse", "RW 4098 VMFSSPARSE \"x.vmdk\"", &extent, &guest);
}

#[test]
fn sesparse_reads_as_the_reference_reads_it() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let (extent, guest) = sesparse();
    both_read(folder.path(), "seSparse", "RW 32776 SESPARSE \"x.vmdk\"", &extent, &guest);
}

#[test]
fn vmfs_is_a_plain_file() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let guest: Vec<u8> = (0..1 << 20).map(|at: u32| (at >> 9).to_le_bytes()[0]).collect();
    both_read(folder.path(), "vmfs", "RW 2048 VMFS \"x.vmdk\"", &guest, &guest);
}
