//! `--stats json`: when a guest got where, and what it took to get there.

use img_tests::{
    command::qemu_img,
    vm::{Do, Vm},
};
use serde_json::Value;

/// What a runner says at its end of a guest that did this before it switched off.
fn stats(tasks: &[Do]) -> Value {
    let directory = tempfile::tempdir().unwrap();
    qemu_img(directory.path(), ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let mut vm = Vm::start(directory.path(), ["--stats", "json", "disk"]);
    for &task in tasks {
        assert_eq!(vm.ask(task), "ok");
    }
    vm.tell(Do::PowerOff);
    let ended = vm.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    serde_json::from_str(&ended.stderr).unwrap()
}

fn sum(exits: &Value) -> u64 {
    exits["by_reason"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum()
}

#[test]
fn a_guest_that_tells_of_its_init_is_counted_up_to_there() {
    let stats = stats(&[Do::Write(0), Do::TellInit, Do::Flush, Do::TellInit]);
    let moments = ["entered", "first_byte", "init", "ended"].map(|name| stats["timeline_ms"][name].as_f64());
    assert!(moments[0].is_some_and(|first| first > 0.0) && moments.is_sorted(), "{stats}");
    let exits = &stats["exits"];
    assert_eq!(exits["total"], sum(exits), "{stats}");
    let to_init = &exits["to_init"];
    assert_eq!(to_init["total"], sum(to_init), "{stats}");
    // It says a byte at a time; three lines came behind.
    let written = |exits: &Value| exits["by_reason"]["port-write"].as_u64().unwrap();
    assert!(written(to_init) >= "ready\nok\n".len() as u64, "{stats}");
    assert!(written(exits) >= written(to_init) + "ok\nok\nok\n".len() as u64, "{stats}");
    assert_eq!(stats["disks"][0]["operations"]["flush"]["done"], 1, "{stats}");
}

#[test]
fn a_guest_that_tells_nothing_has_no_init() {
    let stats = stats(&[]);
    assert!(stats["timeline_ms"]["init"].is_null() && stats["exits"]["to_init"].is_null(), "{stats}");
    assert!(stats["timeline_ms"]["first_byte"].is_number(), "{stats}");
}
