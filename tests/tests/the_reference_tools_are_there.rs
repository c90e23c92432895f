//! The tests that compare with the reference need its tools, of the right release.

use img_tests::command::{Run, oracle};

#[test]
fn the_reference_tools_are_there() {
    for tool in ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"] {
        let output = Run::new(oracle(tool), std::env::temp_dir().as_path()).arg("--version").output();
        assert!(output.success().contains(" 10.0."), "{tool}");
    }
}
