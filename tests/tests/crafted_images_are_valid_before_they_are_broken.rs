//! The hand-made image that the hostile tests start from is a good one: only what they change is wrong.

use img_tests::{
    command::qemu_img,
    craft::{CLUSTER, Crafted, DISK, FILL},
    pattern::assert_same,
};

#[test]
fn crafted_images_are_valid_before_they_are_broken() {
    let folder = tempfile::tempdir().expect("a temporary directory");
    Crafted::new().save(&folder.path().join("crafted.qcow2"));
    qemu_img(folder.path(), ["check", "-f", "qcow2", "crafted.qcow2"]).output().success();
    qemu_img(folder.path(), ["convert", "-f", "qcow2", "-O", "raw", "crafted.qcow2", "out.raw"])
        .output()
        .success();
    let mut guest = vec![0; DISK];
    guest[..CLUSTER].fill(FILL);
    assert_same(&std::fs::read(folder.path().join("out.raw")).expect("readable"), &guest, "read by them");
}
