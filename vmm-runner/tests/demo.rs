//! The newcomer's command: everything that needs no KVM always works, and where there is a KVM the guest runs too.

use std::{path::Path, process::Command};

fn demo(arguments: &[&str]) -> (bool, String, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_vmm-runner")).arg("demo").args(arguments).output().expect("it runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

fn assert_all_done(arguments: &[&str]) {
    let (success, stdout, stderr) = demo(arguments);
    assert!(success, "{stdout}{stderr}");
    for step in ["made", "read", "snapshot", "converted", "checked"] {
        assert!(
            stdout.contains(&format!("\n  {step} ")) || stdout.starts_with(&format!("  {step} ")),
            "{stdout}"
        );
    }
    if Path::new("/dev/kvm").exists() {
        assert!(stdout.contains("\n  verified   what the guest wrote is there"), "{stdout}{stderr}");
    } else {
        assert!(stdout.contains("not booted: cannot open /dev/kvm"), "{stdout}{stderr}");
    }
}

#[test]
fn the_demonstration_does_all_that_it_says() {
    assert_all_done(&[]);
}

#[test]
fn a_deep_chain_of_another_format_does_as_well() {
    assert_all_done(&["--format", "qed", "--base-format", "qcow2", "--depth", "12"]);
}

/// Layers that stand on no raw image get a base that they stand on, unless another is asked for.
#[test]
fn a_base_of_a_format_that_works_is_chosen() {
    for format in ["vmdk", "vpc"] {
        assert_all_done(&["--format", format]);
        let (success, _, stderr) = demo(&["--format", format, "--base-format", "raw"]);
        assert!(!success);
        let expected = format!(
            "vmm-runner: {format} images do not stand on raw ones: --base-format {format} makes a base for them\n"
        );
        assert_eq!(stderr, expected);
    }
}

/// Bytes are only compared, never read as a guest would: the kernel is no kernel.
#[test]
fn an_overlay_is_made_once_and_a_snapshot_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    std::fs::write(path("disk.raw"), vec![7; 1 << 20]).expect("room");
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_vmm-runner"))
            .args(["--serial", "off"])
            .args(arguments)
            .output()
            .expect("it runs");
        String::from_utf8(output.stderr).expect("text")
    };
    let nothing = "vmm-runner: no kernel was found in the disk; give --kernel or --firmware\n";
    let (disk, overlay) = (format!("path={},format=raw", path("disk.raw")), path("overlay.qcow2"));
    assert_eq!(run(&["--disk", &disk, "--overlay", &overlay]), nothing);
    assert!(Path::new(&overlay).exists());
    assert_eq!(
        run(&["--disk", &disk, "--overlay", &overlay]),
        format!("vmm-runner: {overlay}: it is there already; to go on with it, name it as the disk\n")
    );
    assert_eq!(run(&["--overlay", &overlay]), "vmm-runner: --overlay needs a disk\n");
    assert_eq!(run(&["--disk", &disk, "--snapshot"]), nothing);
    assert_eq!(std::fs::read(path("disk.raw")).expect("there"), vec![7; 1 << 20]);
    assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 2);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let (success, _, stderr) = demo(&["--format", "cowloop"]);
    assert!(!success);
    assert_eq!(stderr, "vmm-runner: 'cowloop' is not a format\n");
    let (success, _, stderr) = demo(&["--depth", "0"]);
    assert!(!success);
    assert!(stderr.contains("0 is not in 1..=64"), "{stderr}");
}

#[test]
fn the_images_stay_where_a_directory_was_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let name = dir.path().to_str().expect("text");
    assert_all_done(&["--dir", name]);
    for file in ["base.raw", "layer1.qcow2", "layer2.qcow2", "copy.qcow2"] {
        assert!(dir.path().join(file).exists(), "{file}");
    }
}
