//! What a guest sees of a host that fails its requests: nothing, where it is held until the host has recovered.

use std::{fs, path::Path};

use img_tests::{
    command::qemu_img,
    qmp::{Monitor, conforms},
    vm::{Do, Vm, block, sum},
};
use serde_json::{Value, json};

/// Waits for a failure that holds the guest.
fn await_held(monitor: &mut Monitor, operation: &str, no_space: bool) {
    let failure = monitor.event("BLOCK_IO_ERROR");
    let expected = json!({
        "qom-path": "/machine/disk0", "device": "disk0", "node-name": "disk0", "operation": operation,
        "action": "stop", "nospace": no_space, "reason": failure["reason"],
    });
    assert_eq!(failure, expected);
    let schema = monitor.success("query-qmp-schema", json!({}));
    let schema = schema.as_array().unwrap();
    let event = schema.iter().find(|entry| entry["name"] == "BLOCK_IO_ERROR").unwrap();
    conforms(&failure, event["arg-type"].as_str().unwrap(), schema).unwrap();
    monitor.event("STOP");
    assert_eq!(monitor.success("query-status", json!({})), json!({"running": false, "status": "io-error"}));
    assert_eq!(io_status(monitor), if no_space { "nospace" } else { "failed" });
}

fn io_status(monitor: &mut Monitor) -> Value {
    monitor.success("query-block", json!({}))[0]["io-status"].take()
}

fn create(path: &Path) {
    qemu_img(path, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
}

#[test]
fn a_host_without_space_holds_the_guest_until_there_is_some() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    create(path);
    let mut vm = Vm::start_without_space(path, ["--disk", "full/disk", "--qmp", "unix:qmp"]);
    let mut monitor = Monitor::negotiated(&path.join("qmp"));
    assert_eq!(io_status(&mut monitor), "ok");
    vm.tell(Do::Load(0));
    await_held(&mut monitor, "write", true);
    // Nothing is better: it fails again, and is kept again.
    monitor.success("cont", json!({}));
    await_held(&mut monitor, "write", true);
    fs::remove_file(vm.inside(&path.join("full/ballast"))).unwrap();
    monitor.success("cont", json!({}));
    assert_eq!(io_status(&mut monitor), "ok");
    // All of its blocks: its load has gone around at least once.
    let written = |monitor: &mut Monitor| {
        monitor.success("query-blockstats", json!({}))[0]["stats"]["wr_operations"].as_u64().unwrap()
    };
    while written(&mut monitor) < 300 {}
    vm.press();
    assert_eq!(u64::from_str_radix(&vm.line(), 16).unwrap(), written(&mut monitor));
    for number in [0, 1, 100, 255] {
        assert_eq!(vm.ask(Do::Read(number * 8)), sum(&block(number * 8)));
    }
    assert_eq!(vm.ask(Do::Flush), "ok");
    // Held, its image is whole in its file.
    monitor.success("stop", json!({}));
    fs::copy(vm.inside(&path.join("full/disk")), path.join("copy")).unwrap();
    qemu_img(path, ["check", "-q", "copy"]).output().success();
    monitor.success("quit", json!({}));
    let ended = vm.wait();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.contains("disk0: a write failed: No space left on device"), "{ended:?}");
}

/// A guest that waits is reset and ended like any other.
#[test]
fn a_guest_that_waits_for_its_host_can_be_reset_and_ended() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    create(path);
    let mut vm = Vm::start_without_space(path, ["--disk", "full/disk", "--qmp", "unix:qmp"]);
    let mut monitor = Monitor::negotiated(&path.join("qmp"));
    vm.tell(Do::Load(0));
    await_held(&mut monitor, "write", true);
    monitor.success("system_reset", json!({}));
    monitor.success("cont", json!({}));
    assert_eq!(vm.line(), "ready");
    vm.tell(Do::Load(0));
    await_held(&mut monitor, "write", true);
    monitor.success("quit", json!({}));
    let _status = vm.wait();
}

#[test]
fn a_guest_is_told_where_the_user_wants_so() {
    for (arguments, answer, event) in [
        (["--disk", "full/disk,werror=report", "--qmp", "unix:qmp"].as_slice(), "error", Some("report")),
        (&["--disk", "full/disk,werror=ignore", "--qmp", "unix:qmp"], "ok", Some("ignore")),
        // Nobody could continue it.
        (&["--disk", "full/disk"], "error", None),
    ] {
        let directory = tempfile::tempdir().unwrap();
        create(directory.path());
        let mut vm = Vm::start_without_space(directory.path(), arguments);
        // Together they take a MiB.
        let answers: Vec<String> = (0..256).map(|number| vm.ask(Do::Write(number * 8))).collect();
        assert!(answers.iter().all(|it| it == "ok" || it == answer), "{arguments:?}: {answers:?}");
        assert_eq!(answers[0], "ok");
        assert_eq!(answers[255], answer);
        if let Some(action) = event {
            let mut monitor = Monitor::negotiated(&directory.path().join("qmp"));
            vm.tell(Do::Write(4096));
            let failure = monitor.event("BLOCK_IO_ERROR");
            assert_eq!((&failure["action"], &failure["nospace"]), (&json!(action), &json!(true)));
            assert_eq!(vm.line(), answer);
            assert_eq!(monitor.success("query-status", json!({}))["status"], "running");
        }
    }
}

/// A qcow2 image of 8 MiB whose first cluster is said to be where no cluster can be.
fn broken(path: &Path) {
    create(path);
    qemu_img(path, ["bench", "-q", "-w", "-c", "1", "-s", "65536", "-f", "qcow2", "disk"]).output().success();
    let mut bytes = fs::read(path.join("disk")).unwrap();
    let number = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let place = |entry: u64| usize::try_from(entry & 0x00ff_ffff_ffff_fe00).unwrap();
    let l2 = place(number(&bytes, place(number(&bytes, 40))));
    let entry = number(&bytes, l2) | 0x200;
    bytes[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
    fs::write(path.join("disk"), bytes).unwrap();
}

#[test]
fn reads_that_fail_are_told_hidden_or_kept() {
    for action in ["report", "ignore", "stop"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        broken(path);
        let disk = format!("disk,rerror={action}");
        let mut vm = Vm::start(path, ["--disk", &disk, "--qmp", "unix:qmp"]);
        let mut monitor = Monitor::negotiated(&path.join("qmp"));
        vm.tell(Do::Read(0));
        match action {
            "report" => assert_eq!(vm.line(), "error"),
            "ignore" => assert_eq!(vm.line().len(), 8),
            _ => {
                await_held(&mut monitor, "read", false);
                monitor.success("cont", json!({}));
                await_held(&mut monitor, "read", false);
            }
        }
        if action != "stop" {
            assert_eq!(monitor.event("BLOCK_IO_ERROR")["action"], action);
            assert_eq!(vm.ask(Do::Read(4096)), sum(&[0; 4096]));
        }
    }
}

#[test]
fn a_guest_that_nobody_could_continue_is_not_held() {
    let directory = tempfile::tempdir().unwrap();
    create(directory.path());
    for option in ["werror=stop", "werror=enospc", "rerror=stop"] {
        let ended = Vm::spawn(directory.path(), ["--disk", &format!("disk,{option}")]).wait();
        assert_eq!(ended.code, Some(1));
        let expected =
            "vmm-runner: disk: werror and rerror hold the guest only with --qmp: nobody could continue it\n";
        assert_eq!(ended.stderr, expected);
    }
}
