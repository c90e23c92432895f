//! A runner gives up what running its guest does not take: its guest runs to its end all the same, and whoever took the
//! process over would find little.

use std::fs;

use img_tests::{
    command::qemu_img,
    qmp::Monitor,
    vm::{Do, Vm, block, sum},
};
use serde_json::json;

#[test]
fn every_thread_is_filtered_and_those_of_the_guest_more_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    qemu_img(path, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let mut vm = Vm::start(path, ["--disk", "disk", "--qmp", "unix:qmp", "--cpus", "2", "--rng"]);
    assert_eq!(vm.ask(Do::Write(0)), "ok");
    for (name, mode) in vm.of_threads("Seccomp") {
        assert_eq!(mode, "2", "{name}");
    }
    for (name, bit) in vm.of_threads("NoNewPrivs") {
        assert_eq!(bit, "1", "{name}");
    }
    let filters = vm.of_threads("Seccomp_filters");
    let of = |prefix: &str| -> Vec<u32> {
        let named = filters.iter().filter(|(name, _)| name.starts_with(prefix));
        named.map(|(_, count)| count.parse().unwrap()).collect()
    };
    let outer = of("vmm-runner");
    for guests in ["vcpu0", "vcpu1", "blk-q0"] {
        assert_eq!(of(guests), [outer[0] + 2], "{guests}: {filters:?}");
    }
    assert_eq!(of("failures"), outer);
    vm.tell(Do::PowerOff);
    assert_eq!(vm.wait().code, Some(0));
    assert!(!path.join("qmp").exists());
}

/// What serves a guest does not take the time of the processors that the guest was given.
#[test]
fn processors_are_pinned_and_what_serves_them_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    qemu_img(path, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let mut vm = Vm::start(path, ["--disk", "disk", "--cpus", "1,affinity=0", "--rng"]);
    assert_eq!(vm.ask(Do::Write(0)), "ok");
    let allowed = vm.of_threads("Cpus_allowed_list");
    let of = |name: &str| {
        let found = allowed.iter().find(|(known, _)| known == name);
        found.unwrap_or_else(|| panic!("no {name} in {allowed:?}")).1.clone()
    };
    assert_eq!(of("vcpu0"), "0");
    assert_eq!(of("blk-q0"), of("vmm-runner"));
    vm.tell(Do::PowerOff);
    assert_eq!(vm.wait().code, Some(0));
}

#[test]
fn files_of_others_are_out_of_reach() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    qemu_img(path, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    fs::create_dir(path.join("snapshots")).unwrap();
    let arguments = ["--disk", "disk", "--qmp", "unix:qmp", "--allow-dir", "snapshots"];
    let mut vm = Vm::start(path, arguments);
    let mut monitor = Monitor::negotiated(&path.join("qmp"));
    assert_eq!(vm.ask(Do::Write(0)), "ok");
    let snapshot = |file: &str| json!({"device": "disk0", "snapshot-file": file, "format": "qcow2"});
    let refused = monitor.failure("blockdev-snapshot-sync", snapshot("beside"));
    assert!(refused.contains("beside") && refused.contains("--allow-dir"), "{refused}");
    assert!(!path.join("beside").exists());
    monitor.success("blockdev-snapshot-sync", snapshot("snapshots/top"));
    // A guest that resets gets a new machine, inside: the kernel is read again, and KVM is opened again.
    monitor.success("system_reset", json!({}));
    assert_eq!(vm.line(), "ready");
    assert_eq!(vm.ask(Do::Write(8)), "ok");
    assert_eq!(vm.ask(Do::Read(0)), sum(&block(0)));
    vm.tell(Do::PowerOff);
    assert_eq!(vm.wait().code, Some(0));
    qemu_img(path, ["check", "-q", "snapshots/top"]).output().success();
}

#[test]
fn temporary_overlays_are_gone_afterwards_and_the_fences_can_be_left_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    qemu_img(path, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let before = fs::read(path.join("disk")).unwrap();
    let scratch = path.join("scratch");
    for (sandbox, mode) in [("on", "2"), ("off", "0")] {
        fs::create_dir(&scratch).unwrap();
        let arguments = ["--disk", "disk", "--snapshot", "--sandbox", sandbox];
        let mut vm = Vm::start_with(path, arguments, [("TMPDIR", scratch.as_os_str())]);
        assert_eq!(vm.ask(Do::Write(0)), "ok");
        assert!(vm.of_threads("Seccomp").iter().all(|(_, value)| value == mode));
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 1);
        vm.tell(Do::PowerOff);
        let ended = vm.wait();
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        // Empty: it can be removed.
        fs::remove_dir(&scratch).unwrap();
        assert_eq!(fs::read(path.join("disk")).unwrap(), before);
    }
}
