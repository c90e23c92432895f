//! A runner and its guest, held, continued, reset and ended over QMP: what clients are told is what happens.

use std::{io::Write, os::unix::net::UnixStream, process::Command};

use img_tests::{
    command::qemu_img,
    daemon::Daemon,
    qmp::{Monitor, conforms, python},
    vm::{Do, Vm, block, sum},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// A runner with one disk of 8 MiB, its guest, and a client.
fn start(more: &[&str]) -> (TempDir, Vm, Monitor) {
    let directory = tempfile::tempdir().unwrap();
    qemu_img(directory.path(), ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let arguments = ["--disk", "disk", "--qmp", "unix:qmp"];
    let vm = Vm::start(directory.path(), arguments.iter().chain(more));
    let monitor = Monitor::negotiated(&directory.path().join("qmp"));
    (directory, vm, monitor)
}

fn status(monitor: &mut Monitor) -> String {
    let status = monitor.success("query-status", json!({}));
    assert_eq!(status["running"], status["status"] == "running", "{status}");
    status["status"].as_str().unwrap().to_owned()
}

fn writes(monitor: &mut Monitor) -> u64 {
    monitor.success("query-blockstats", json!({}))[0]["stats"]["wr_operations"].as_u64().unwrap()
}

/// Waits until the guest has written more blocks.
fn await_writes(monitor: &mut Monitor, more_than: u64) {
    while writes(monitor) <= more_than {}
}

#[test]
fn replies_and_events_are_what_the_schema_tells() {
    let (_directory, mut vm, mut monitor) = start(&["--cpus", "2"]);
    let schema = monitor.success("query-qmp-schema", json!({}));
    let schema = schema.as_array().unwrap();
    let of_kind =
        |kind: &str| -> Vec<&Value> { schema.iter().filter(|entry| entry["meta-type"] == kind).collect() };
    let mut names = Vec::new();
    for command in of_kind("command") {
        let name = command["name"].as_str().unwrap();
        names.push(name.to_owned());
        if name.starts_with("query-") {
            let reply = monitor.success(name, json!({}));
            conforms(&reply, command["ret-type"].as_str().unwrap(), schema).unwrap();
        }
    }
    for name in
        ["stop", "cont", "system_powerdown", "system_reset", "quit", "query-cpus-fast", "block_resize"]
    {
        assert!(names.iter().any(|known| known == name), "{name}");
    }
    let processors = monitor.success("query-cpus-fast", json!({}));
    let threads = format!("/proc/{}/task", vm.pid().as_raw_nonzero());
    for (index, processor) in processors.as_array().unwrap().iter().enumerate() {
        assert_eq!(processor["cpu-index"], index);
        let comm = format!("{threads}/{}/comm", processor["thread-id"]);
        assert_eq!(std::fs::read_to_string(comm).unwrap(), format!("vcpu{index}\n"));
    }
    assert_eq!(processors.as_array().unwrap().len(), 2);
    monitor.success("stop", json!({}));
    monitor.success("cont", json!({}));
    monitor.success("system_powerdown", json!({}));
    monitor.success("system_reset", json!({}));
    assert_eq!(vm.line(), "ready");
    monitor.success("quit", json!({}));
    let mut told = std::mem::take(&mut monitor.events);
    while told.last().is_none_or(|event| event["event"] != "SHUTDOWN") {
        told.push(monitor.line());
    }
    let told_names: Vec<&str> = told.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(told_names, ["STOP", "RESUME", "POWERDOWN", "RESET", "SHUTDOWN"]);
    for event in &told {
        let known = of_kind("event").into_iter().find(|known| known["name"] == event["event"]).unwrap();
        let data = event.get("data").cloned().unwrap_or_else(|| json!({}));
        conforms(&data, known["arg-type"].as_str().unwrap(), schema).unwrap();
    }
    assert_eq!(told[3]["data"], json!({"guest": false, "reason": "host-qmp-system-reset"}));
    assert_eq!(told[4]["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
    assert_eq!(vm.wait().code, Some(0));
}

#[test]
fn a_guest_that_is_held_does_nothing_and_goes_on_where_it_was() {
    let (_directory, mut vm, mut monitor) = start(&[]);
    vm.tell(Do::Load(0));
    for _ in 0..20 {
        let before = writes(&mut monitor);
        await_writes(&mut monitor, before);
        monitor.success("stop", json!({}));
        assert_eq!(status(&mut monitor), "paused");
        // It is held: how many there are is final, however often one looks.
        let held = writes(&mut monitor);
        for _ in 0..50 {
            assert_eq!(writes(&mut monitor), held);
        }
        monitor.success("stop", json!({}));
        monitor.success("cont", json!({}));
        monitor.success("cont", json!({}));
        assert_eq!(status(&mut monitor), "running");
    }
    let told = monitor.events.iter().filter(|event| event["event"] == "STOP").count();
    assert_eq!(told, 20, "only what changes something is told");
    vm.press();
    let written = u64::from_str_radix(&vm.line(), 16).unwrap();
    assert_eq!(written, writes(&mut monitor));
    vm.tell(Do::PowerOff);
    assert_eq!(monitor.event("SHUTDOWN"), json!({"guest": true, "reason": "guest-shutdown"}));
    assert_eq!(vm.wait().code, Some(0));
}

#[test]
fn a_held_guest_can_be_reset_and_ended() {
    let (_directory, mut vm, mut monitor) = start(&["--cpus", "2"]);
    vm.tell(Do::Load(0));
    await_writes(&mut monitor, 0);
    monitor.success("stop", json!({}));
    monitor.success("system_reset", json!({}));
    assert_eq!(monitor.event("RESET")["reason"], "host-qmp-system-reset");
    assert_eq!(status(&mut monitor), "paused");
    monitor.success("cont", json!({}));
    assert_eq!(vm.line(), "ready");
    assert_eq!(vm.ask(Do::Write(8)), "ok");
    vm.tell(Do::Reset);
    assert_eq!(monitor.event("RESET"), json!({"guest": true, "reason": "guest-reset"}));
    assert_eq!(vm.line(), "ready");
    assert_eq!(vm.ask(Do::Read(8)), sum(&block(8)));
    vm.tell(Do::Load(0));
    monitor.success("stop", json!({}));
    monitor.success("quit", json!({}));
    assert_eq!(monitor.event("SHUTDOWN")["guest"], false);
    assert_eq!(vm.wait().code, Some(0));
}

/// Nobody reads what the guest says: its processor waits in a write, and is held there all the same.
#[test]
fn a_guest_that_waits_for_its_console_is_held_and_ended() {
    for serial in ["stdio", "unix:console"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let arguments = ["--serial", serial, "--qmp", "unix:qmp"];
        qemu_img(path, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
        let mut vm = Vm::spawn(path, arguments.iter().chain(&["disk"]));
        let mut monitor = Monitor::negotiated(&path.join("qmp"));
        // It can be asked before it has a processor.
        let thread = loop {
            let processors = monitor.success("query-cpus-fast", json!({}));
            if let Some(thread) = processors[0]["thread-id"].as_u64() {
                break thread;
            }
        };
        let console;
        if serial == "stdio" {
            vm.tell(Do::Shout);
        } else {
            console = UnixStream::connect(path.join("console")).unwrap();
            (&console).write_all(b"S\0\0\0\0").unwrap();
        }
        // What the kernel calls the place where a thread waits in a write.
        let wchan = format!("/proc/{}/task/{thread}/syscall", vm.pid().as_raw_nonzero());
        let waits = |text: String| text.starts_with("1 ") || text.starts_with("44 ");
        while !waits(std::fs::read_to_string(&wchan).unwrap()) {}
        monitor.success("stop", json!({}));
        assert_eq!(status(&mut monitor), "paused");
        monitor.success("cont", json!({}));
        while !waits(std::fs::read_to_string(&wchan).unwrap()) {}
        monitor.success("quit", json!({}));
        assert_eq!(vm.wait().code, Some(0));
    }
}

#[test]
fn signals_and_crashes_end_a_run_and_are_told() {
    for held in [false, true] {
        let (directory, vm, mut monitor) = start(&[]);
        if held {
            monitor.success("stop", json!({}));
        }
        vm.signal(Signal::TERM);
        assert_eq!(monitor.event("SHUTDOWN"), json!({"guest": false, "reason": "host-signal"}));
        assert_eq!(vm.wait().code, Some(0));
        qemu_img(directory.path(), ["check", "-q", "disk"]).output().success();
        assert!(!directory.path().join("qmp").exists());
    }
    let (_directory, mut vm, mut monitor) = start(&[]);
    vm.tell(Do::Crash);
    assert_eq!(monitor.event("SHUTDOWN"), json!({"guest": true, "reason": "guest-panic"}));
    let ended = vm.wait();
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("triple fault on processor 0"), "{}", ended.stderr);
}

#[test]
fn the_power_button_is_pressed() {
    let (_directory, mut vm, mut monitor) = start(&[]);
    vm.tell(Do::AwaitButton);
    monitor.success("system_powerdown", json!({}));
    assert_eq!(vm.line(), "button");
    assert!(monitor.event("POWERDOWN").is_null());
    vm.tell(Do::PowerOff);
    assert_eq!(vm.wait().code, Some(0));
}

#[test]
fn a_disk_grows_while_the_guest_looks() {
    let (_directory, mut vm, mut monitor) = start(&[]);
    let beyond = 12 << 11;
    assert_eq!(vm.ask(Do::Capacity), format!("{:08x}", 8 << 11));
    assert_eq!(vm.ask(Do::Write(beyond)), "error");
    monitor.success("block_resize", json!({"device": "disk0", "size": 16 << 20}));
    assert_eq!(vm.ask(Do::Capacity), format!("{:08x}", 16 << 11));
    assert_eq!(vm.ask(Do::Write(beyond)), "ok");
    // A disk can be changed while the guest is held, too.
    monitor.success("stop", json!({}));
    monitor.success("block_resize", json!({"device": "disk0", "size": 32 << 20}));
    monitor.success("cont", json!({}));
    assert_eq!(vm.ask(Do::Capacity), format!("{:08x}", 32 << 11));
    assert_eq!(vm.ask(Do::Read(beyond)), sum(&block(beyond)));
}

/// Holds, continues, grows and snapshots a guest under load.
const SCRIPT: &str = r#"
import asyncio
from qemu.qmp import QMPClient

async def main():
    qmp = QMPClient("test")
    await qmp.connect("qmp")
    commands = {command["name"] for command in await qmp.execute("query-commands")}
    assert {"stop", "cont", "blockdev-snapshot-sync"} <= commands, commands
    async def writes():
        return (await qmp.execute("query-blockstats"))[0]["stats"]["wr_operations"]
    for n in range(3):
        before = await writes()
        await qmp.execute("blockdev-snapshot-sync", {
            "device": "disk0", "snapshot-file": f"overlay{n}", "snapshot-node-name": f"top{n}", "format": "qcow2"})
        while await writes() <= before:
            pass
        with qmp.listener(("STOP", "RESUME")) as listener:
            await qmp.execute("stop")
            assert (await listener.get())["event"] == "STOP"
            assert (await qmp.execute("query-status")) == {"running": False, "status": "paused"}
            await qmp.execute("cont")
            assert (await listener.get())["event"] == "RESUME"
    await qmp.execute("block_resize", {"device": "disk0", "size": 16 << 20})
    block, = await qmp.execute("query-block")
    assert block["inserted"]["node-name"] == "top2" and block["inserted"]["backing_file_depth"] == 3, block
    await qmp.disconnect()

asyncio.run(main())
"#;

#[test]
fn the_reference_s_own_client_drives_a_guest_under_load() {
    let (directory, mut vm, mut monitor) = start(&["--allow-dir", "."]);
    vm.tell(Do::Load(64));
    let script = Command::new(python()).args(["-c", SCRIPT]).current_dir(directory.path()).status();
    assert!(script.unwrap().success());
    vm.press();
    assert!(u32::from_str_radix(&vm.line(), 16).unwrap() > 3);
    assert_eq!(vm.ask(Do::Flush), "ok");
    assert_eq!(vm.ask(Do::Read(64)), sum(&block(64)));
    monitor.success("quit", json!({}));
    assert_eq!(vm.wait().code, Some(0));
    for image in ["disk", "overlay0", "overlay1", "overlay2"] {
        qemu_img(directory.path(), ["check", "-q", image]).output().success();
    }
    qemu_img(directory.path(), ["convert", "-O", "raw", "overlay2", "end"]).output().success();
    let end = std::fs::read(directory.path().join("end")).unwrap();
    assert_eq!(end.len(), 16 << 20);
    assert_eq!(end[64 * 512..][..4096], block(64));
}

/// A backend in another process stops when the guest is held, and goes on from there.
#[test]
fn a_disk_of_a_backend_is_held_with_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    qemu_img(path, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let backend = ["vhost-user", "--socket", "disk.sock", "--image", "disk", "--metrics", "unix:metrics"];
    let backend = Daemon::start(path, backend);
    let mut vm = Vm::start(path, ["--disk", "vhost-user=disk.sock", "--qmp", "unix:qmp"]);
    let mut monitor = Monitor::negotiated(&path.join("qmp"));
    let written = || {
        let mut stream = UnixStream::connect(path.join("metrics")).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let page = std::io::read_to_string(stream).unwrap();
        let line = page
            .lines()
            .find(|line| line.starts_with("blk_operations_total") && line.contains("op=\"write\""));
        line.unwrap().rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    vm.tell(Do::Load(0));
    for _ in 0..5 {
        let before = written();
        while written() <= before {}
        monitor.success("stop", json!({}));
        let held = written();
        for _ in 0..20 {
            assert_eq!(written(), held);
        }
        monitor.success("cont", json!({}));
    }
    vm.press();
    let count = u64::from_str_radix(&vm.line(), 16).unwrap();
    assert_eq!(count, written(), "each block once");
    assert_eq!(vm.ask(Do::Read(0)), sum(&block(0)));
    vm.tell(Do::PowerOff);
    assert_eq!(vm.wait().code, Some(0));
    assert_eq!(backend.terminate().code, Some(0));
}
