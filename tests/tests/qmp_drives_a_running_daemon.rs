//! The control socket: what it says of itself is what there is, its errors are the reference's, and what it changes
//! happens to disks in use.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    time::Duration,
};

use blk_backend::virtio::Features;
use img_tests::{
    command::qemu_img,
    daemon::Daemon,
    guest::{
        Ask, GuestQueue, SharedRam,
        vhost::{FrontEnd, Wishes},
    },
    nbd::{self, Client, Framing},
    qmp::{Monitor, conforms},
};
use serde_json::{Value, json};

fn serve(directory: &Path, more: &[&str]) -> Daemon {
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let base = ["nbd", "--listen", "unix:socket", "--image", "disk", "--qmp", "unix:qmp"];
    Daemon::start(directory, base.iter().chain(more))
}

#[test]
fn replies_are_of_the_types_that_the_schema_tells() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = serve(directory.path(), &[]);
    let mut monitor = Monitor::negotiated(&directory.path().join("qmp"));
    let schema = monitor.success("query-qmp-schema", json!({}));
    let schema = schema.as_array().unwrap();
    let told: Vec<&str> = schema
        .iter()
        .filter(|entry| entry["meta-type"] == "command")
        .map(|entry| entry["name"].as_str().unwrap())
        .collect();
    let commands = monitor.success("query-commands", json!({}));
    let commands: Vec<&str> =
        commands.as_array().unwrap().iter().map(|command| command["name"].as_str().unwrap()).collect();
    assert_eq!(told, commands);
    monitor.success("blockdev-snapshot-internal-sync", json!({"device": "disk0", "name": "one"}));
    let mut queried = 0;
    for entry in schema.iter().filter(|entry| entry["meta-type"] == "command") {
        let name = entry["name"].as_str().unwrap();
        if name.starts_with("query-") {
            let reply = monitor.success(name, json!({}));
            conforms(&reply, entry["ret-type"].as_str().unwrap(), schema).unwrap();
            queried += 1;
        }
    }
    assert!(queried >= 8, "{queried}");
    let arguments = json!({"device": "disk0", "name": "one"});
    let deleted = monitor.success("blockdev-snapshot-delete-internal-sync", arguments);
    let entry =
        schema.iter().find(|entry| entry["name"] == "blockdev-snapshot-delete-internal-sync").unwrap();
    conforms(&deleted, entry["ret-type"].as_str().unwrap(), schema).unwrap();
    assert_eq!(daemon.terminate().code, Some(0));
}

/// As the reference's storage daemon answers them. It refuses to resize what is exported, which we do not.
#[test]
fn errors_are_the_references() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = serve(directory.path(), &[]);
    qemu_img(directory.path(), ["create", "-q", "-f", "qcow2", "theirs", "8M"]).output().success();
    let mut theirs = Reference::start(directory.path(), "theirs");
    let mut ours = Monitor::connect(&directory.path().join("qmp"));
    let texts = [
        r#"{"execute": "query-version"}"#,
        r#"{"execute": "qmp_capabilities", "id": {"any": [1]}}"#,
        r#"{"execute": "qmp_capabilities"}"#,
        r#"{"execute": "nonsense", "id": 7}"#,
        r"[1]",
        r"{}",
        r#"{"exec": 1}"#,
        r#"{"execute": 3}"#,
        r#"{"execute": "query-block", "more": 1}"#,
        r#"{"execute": "query-block", "arguments": 3}"#,
        r#"{"execute": "query-block", "arguments": {"x": 3}}"#,
        r#"{"execute": "block_resize", "arguments": {}}"#,
        r#"{"execute": "block_resize", "arguments": {"size": "x"}}"#,
        r#"{"execute": "block_resize", "arguments": {"size": 1, "other": 2}}"#,
        r#"{"execute": "block_resize", "arguments": {"size": 512, "node-name": "none"}}"#,
        r#"{"execute": "block_resize", "arguments": {"size": 512, "device": 1}}"#,
        r#"{"execute": "block_resize", "arguments": {"size": -512, "node-name": "disk0"}}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "a", "node-name": "disk0"}}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "a", "node-name": "disk0"}}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "none", "id": "b", "node-name": "disk0"}}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "1b", "node-name": "disk0"}}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "a b", "node-name": "disk0"}}"#,
        r#"{"execute": "block_resize", "arguments": {"size": 9223372036854775808, "node-name": "disk0"}}"#,
        r#"{"execute": "block_resize", "arguments": {"size": -512, "device": "none", "node-name": "disk0"}}"#,
        r#"{"execute": "blockdev-snapshot-sync", "arguments": {"node-name": "disk0", "snapshot-file": "s", "snapshot-node-name": "disk0"}}"#,
        r#"{"execute": "blockdev-snapshot-sync", "arguments": {"node-name": "disk0", "snapshot-file": "s", "snapshot-node-name": ""}}"#,
        r##"{"execute": "blockdev-snapshot-sync", "arguments": {"node-name": "disk0", "snapshot-file": "s", "snapshot-node-name": "#disk0-2"}}"##,
        r#"{"execute": "blockdev-snapshot-sync", "arguments": {"node-name": "disk0", "snapshot-file": "s", "snapshot-node-name": "a234567890123456789012345678901_2"}}"#,
        r#"{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "x"}}, "max-connections": -1}}"#,
        r#"{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "x"}}, "max-connections": 4294967296}}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "node-name": "disk0"}}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "b", "node-name": "disk0"}}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "b", "node-name": "disk0", "name": "b", "bitmaps": ["none"]}}"#,
        r#"{"execute": "block-export-del", "arguments": {"id": "none"}}"#,
        r#"{"execute": "block-export-del", "arguments": {"id": "a", "mode": "soft"}}"#,
        r#"{"execute": "nbd-server-add", "arguments": {"device": "none"}}"#,
        r#"{"execute": "nbd-server-add", "arguments": {"device": "disk0"}}"#,
        r#"{"execute": "nbd-server-remove", "arguments": {"name": "none"}}"#,
        r#"{"execute": "nbd-server-remove", "arguments": {"name": "disk0"}}"#,
        r#"{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "x"}}}}"#,
        r#"{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix"}}}"#,
        r#"{"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "none", "name": "s"}}"#,
        r#"{"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "disk0", "name": ""}}"#,
        r#"{"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "disk0", "name": "s"}}"#,
        r#"{"execute": "blockdev-snapshot-internal-sync", "arguments": {"device": "disk0", "name": "s"}}"#,
        r#"{"execute": "blockdev-snapshot-delete-internal-sync", "arguments": {"device": "disk0"}}"#,
        r#"{"execute": "blockdev-snapshot-delete-internal-sync", "arguments": {"device": "disk0", "name": "t"}}"#,
        r#"{"execute": "blockdev-snapshot-delete-internal-sync", "arguments": {"device": "disk0", "id": "1", "name": "t"}}"#,
        r#"{"execute": "nbd-server-stop"}"#,
        r#"{"execute": "nbd-server-stop"}"#,
        r#"{"execute": "block-export-add", "arguments": {"type": "nbd", "id": "a", "node-name": "disk0"}}"#,
    ];
    let mut differences = Vec::new();
    for text in texts {
        let (ours, theirs) = (ours.say(text), theirs.monitor.say(text));
        if ours != theirs {
            differences.push(format!("{text}\n  ours: {ours}\ntheirs: {theirs}"));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// The reference's daemon with the same disk and server.
struct Reference {
    child: std::process::Child,
    monitor: Monitor,
}

impl Reference {
    fn start(directory: &Path, image: &str) -> Self {
        // Its monitor connects to us: there is nothing to wait for.
        let listener = std::os::unix::net::UnixListener::bind(directory.join("theirs-qmp")).unwrap();
        let child = std::process::Command::new(img_tests::command::oracle("qemu-storage-daemon"))
            .args(["--blockdev", &format!("driver=file,filename={image},node-name=f")])
            .args(["--blockdev", "driver=qcow2,file=f,node-name=disk0"])
            .args(["--nbd-server", "addr.type=unix,addr.path=theirs-socket"])
            .args(["--export", "type=nbd,id=disk0,node-name=disk0,name=,writable=off"])
            .args(["--chardev", "socket,id=c,path=theirs-qmp"])
            .args(["--monitor", "chardev=c"])
            .current_dir(directory)
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut monitor = Monitor::over(stream);
        monitor.line();
        Self { child, monitor }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A snapshot calls what is below it by the name by which that was opened, as the reference has it. Where that leads
/// nowhere from the snapshot's directory, as it does for the reference, it names the way from the root.
#[test]
fn snapshots_name_what_is_below_them_so_that_it_is_found() {
    let mut of_reference_found = 0;
    for (given, overlay) in [
        ("base", "over"),
        ("./base", "over"),
        ("sub/base", "over"),
        ("base", "sub/over"),
        ("sub/base", "sub/over"),
    ] {
        let directories = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let [ours, theirs] = directories.each_ref().map(|directory| {
            let directory = directory.path();
            fs::create_dir(directory.join("sub")).unwrap();
            for file in ["base", "sub/base"] {
                qemu_img(directory, ["create", "-q", "-f", "qcow2", file, "8M"]).output().success();
            }
            directory
        });
        let arguments =
            |node: &str| json!({node: "disk0", "snapshot-file": overlay, "snapshot-node-name": "over"});
        {
            let image = ["nbd", "--listen", "unix:socket", "--image", given, "--qmp", "unix:qmp"];
            let daemon = Daemon::start(ours, image);
            let mut monitor = Monitor::negotiated(&ours.join("qmp"));
            monitor.success("blockdev-snapshot-sync", arguments("device"));
            assert_eq!(daemon.terminate().code, Some(0));
            let mut reference = Reference::start(theirs, given);
            reference.monitor.success("qmp_capabilities", json!({}));
            reference.monitor.success("blockdev-snapshot-sync", arguments("node-name"));
        }
        // What is recorded, and whether that is the disk.
        let [ours, theirs] = [ours, theirs].map(|directory| {
            let info = qemu_img(directory, ["info", "-U", "--output=json", overlay]).output().success();
            let info: Value = serde_json::from_str(&info).unwrap();
            let full = directory.join(info["full-backing-filename"].as_str().unwrap());
            let is_found =
                full.canonicalize().is_ok_and(|full| full == directory.join(given).canonicalize().unwrap());
            (info["backing-filename"].as_str().unwrap().to_owned(), is_found)
        });
        assert!(ours.1, "{given} {overlay}: {ours:?}");
        if theirs.1 {
            assert_eq!(ours.0, theirs.0, "{given} {overlay}");
            of_reference_found += 1;
        }
    }
    assert_eq!(of_reference_found, 3);
}

/// Layers are called by what clients chose or by what nobody can have chosen, and keep their names; an export offers the
/// top of its disk, whatever came there.
#[test]
fn layers_keep_their_names_and_exports_name_the_top() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    qemu_img(directory, ["create", "-q", "-f", "raw", "base", "8M"]).output().success();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "disk"])
        .output()
        .success();
    let serve = ["nbd", "--listen", "unix:socket", "--image", "disk"];
    for (more, why) in [
        (["--node-name", "1 disk"], "Invalid node-name: '1 disk'"),
        (["--allow-dir", "nowhere"], "nowhere: "),
        (["--allow-dir", "disk"], "disk: not a directory"),
    ] {
        let refused = Daemon::try_start(directory, serve.iter().chain(&more)).expect_err(why);
        assert!(refused.stderr.contains(why), "{}", refused.stderr);
    }
    let more = ["--qmp", "unix:qmp", "--cache", "unsafe"];
    let daemon = Daemon::start(directory, serve.iter().chain(&more));
    let mut monitor = Monitor::negotiated(&directory.join("qmp"));
    monitor.success("blockdev-snapshot-sync", json!({"device": "disk0", "snapshot-file": "one"}));
    monitor.success(
        "blockdev-snapshot-sync",
        json!({"device": "disk0", "snapshot-file": "two", "snapshot-node-name": "two"}),
    );
    let nodes = monitor.success("query-named-block-nodes", json!({}));
    let of_each = |member: &str| -> Vec<Value> {
        nodes.as_array().unwrap().iter().map(|node| node[member].clone()).collect()
    };
    assert_eq!(of_each("node-name"), ["two", "#disk0-2", "disk0", "#disk0-1"]);
    let cache = json!({"writeback": true, "direct": false, "no-flush": true});
    assert_eq!(of_each("cache"), [(); 4].map(|()| cache.clone()));
    let exports = monitor.success("query-block-exports", json!({}));
    assert_eq!(exports[0]["node-name"], "two", "{exports}");
    // A device that is not there is passed over, as in the reference.
    monitor.success("block_resize", json!({"device": "none", "node-name": "two", "size": 16 << 20}));
    monitor.success("blockdev-snapshot-internal-sync", json!({"device": "two", "name": "inside"}));
    assert_eq!(daemon.terminate().code, Some(0));
}

#[test]
fn a_disk_grows_under_a_client() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = serve(directory.path(), &[]);
    let mut monitor = Monitor::negotiated(&directory.path().join("qmp"));
    let mut client = Client::connect(&directory.path().join("socket"), "", Framing::Structured, &[]).unwrap();
    let data = vec![7; 4096];
    let past_the_end = |client: &mut Client| {
        client.call(nbd::command::WRITE, nbd::flag::FUA, 8 << 20, 4096, &data).unwrap().error
    };
    assert_eq!(past_the_end(&mut client), 28);
    monitor.success("block_resize", json!({"device": "disk0", "size": 16 << 20}));
    assert_eq!(past_the_end(&mut client), 0);
    let stats = monitor.success("query-blockstats", json!({}));
    assert_eq!(stats[0]["stats"]["wr_bytes"], 4096, "{stats}");
    assert_eq!(daemon.terminate().code, Some(0));
    let info = qemu_img(directory.path(), ["info", "--output=json", "disk"]).output().success();
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], 16 << 20);
}

#[test]
fn exports_come_and_go_and_events_tell() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = serve(directory.path(), &[]);
    let mut monitor = Monitor::negotiated(&directory.path().join("qmp"));
    let mut watcher = Monitor::negotiated(&directory.path().join("qmp"));
    let add = json!({"type": "nbd", "id": "e", "node-name": "disk0", "name": "second", "writable": false});
    monitor.success("block-export-add", add);
    let socket = directory.path().join("socket");
    let mut client = Client::connect(&socket, "second", Framing::Extended, &[]).unwrap();
    assert_eq!(client.call(nbd::command::WRITE, 0, 0, 512, &[1; 512]).unwrap().error, 1, "it is read-only");
    assert_eq!(monitor.failure("block-export-del", json!({"id": "e"})), "export 'second' still in use");
    monitor.success("block-export-del", json!({"id": "e", "mode": "hard"}));
    let mut rest = Vec::new();
    assert_eq!(client.stream().read_to_end(&mut rest).unwrap(), 0, "the client was sent away");
    for monitor in [&mut monitor, &mut watcher] {
        let event = if monitor.events.is_empty() { monitor.line() } else { monitor.events.remove(0) };
        assert_eq!((&event["event"], &event["data"]), (&json!("BLOCK_EXPORT_DELETED"), &json!({"id": "e"})));
        assert!(event["timestamp"]["seconds"].is_u64() && event["timestamp"]["microseconds"].is_u64());
    }
    assert!(Client::connect(&socket, "second", Framing::Simple, &[]).is_err());

    monitor.success("nbd-server-stop", json!({}));
    assert!(!socket.exists());
    let address = json!({"type": "unix", "data": {"path": "again"}});
    monitor.success("nbd-server-start", json!({"addr": address, "max-connections": 1}));
    monitor.success("nbd-server-add", json!({"device": "disk0", "writable": true}));
    Client::connect(&directory.path().join("again"), "disk0", Framing::Simple, &[]).unwrap();
    let everywhere = json!({"type": "inet", "data": {"host": "0.0.0.0", "port": "0"}});
    monitor.success("nbd-server-stop", json!({}));
    monitor.success("nbd-server-start", json!({"addr": everywhere}));
    let refused = monitor.failure("nbd-server-add", json!({"device": "disk0", "writable": true}));
    assert!(refused.contains("can be reached from other hosts"), "{refused}");
    monitor.success("nbd-server-add", json!({"device": "disk0"}));

    monitor.success("quit", json!({}));
    let ended = daemon.wait();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!directory.path().join("qmp").exists());
}

/// A socket for guests comes and goes beside the NBD server, on the same disk; a guest that only reads has one beside
/// the guest that writes.
#[test]
fn sockets_for_guests_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = serve(directory.path(), &[]);
    let mut monitor = Monitor::negotiated(&directory.path().join("qmp"));
    let add = |id: &str, more: Value| {
        let mut arguments = json!({
            "type": "vhost-user-blk", "id": id, "node-name": "disk0", "addr": {"type": "unix", "path": id},
        });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        arguments
    };
    for (more, error) in [
        (json!({"num-queues": 0}), "a device has 1 to 256 queues, not 0"),
        (json!({"num-queues": 65536}), "Parameter 'num-queues' expects uint16_t"),
        (json!({"logical-block-size": 513}), "a block size is a power of two from 512 to 4096, not 513"),
        (json!({"node-name": "nobody"}), "Cannot find device='' nor node-name='nobody'"),
        (json!({"addr": {"type": "unix", "path": "disk"}}), "Failed to bind socket to disk: there is a file"),
        (
            json!({"addr": {"type": "unix", "path": "qmp"}}),
            "Failed to bind socket to qmp: a socket is there, and in a sandbox nobody can find out",
        ),
        (json!({"addr": {"type": "fd", "str": "3"}}), "Parameter 'addr.type' does not accept value 'fd'"),
    ] {
        let found = monitor.failure("block-export-add", add("guest", more));
        assert!(found.starts_with(error), "{found}");
    }
    monitor.success("block-export-add", add("guest", json!({"writable": true, "num-queues": 2})));
    let found = monitor.failure("block-export-add", add("guest", json!({})));
    assert_eq!(found, "Block export id 'guest' is already in use");
    let found = monitor.failure("block-export-add", add("other", json!({"writable": true})));
    assert!(found.contains("is written by the guest of export 'guest'"), "{found}");
    monitor.success("block-export-add", add("other", json!({"logical-block-size": 4096})));
    let exports = monitor.success("query-block-exports", json!({}));
    let kinds: Vec<_> =
        exports.as_array().unwrap().iter().map(|export| (&export["id"], &export["type"])).collect();
    let kind = |id: &'static str, kind: &'static str| (json!(id), json!(kind));
    let expected = [kind("disk0", "nbd"), kind("guest", "vhost-user-blk"), kind("other", "vhost-user-blk")];
    assert!(
        kinds.iter().zip(&expected).all(|(found, expected)| *found.0 == expected.0 && *found.1 == expected.1)
    );

    let write = |byte| Ask::Write { sector: 8, data: vec![byte; 4096] };
    let ram = SharedRam::for_queues(2, 8);
    let mut writer: Vec<_> = (0..2).map(|index| GuestQueue::new(&ram, index, 16, 8, true)).collect();
    let front_end = FrontEnd::start(&directory.path().join("guest"), &ram, &writer, None, Wishes::default());
    assert_eq!(writer[1].ask(&write(7)).status, 0);
    let read_ram = SharedRam::for_queues(1, 8);
    let mut reader = [GuestQueue::new(&read_ram, 0, 16, 8, true)];
    let other = FrontEnd::start(&directory.path().join("other"), &read_ram, &reader, None, Wishes::default());
    assert!(other.features.has(Features::RO) && !front_end.features.has(Features::RO));
    assert_eq!(reader[0].read(8, 8), [7; 4096]);
    assert_ne!(reader[0].ask(&write(8)).status, 0, "it is read-only");
    let socket = directory.path().join("socket");
    let mut client = Client::connect(&socket, "", Framing::Structured, &[]).unwrap();
    assert_eq!(client.call(nbd::command::READ, 0, 4096, 4096, &[]).unwrap().data, [7; 4096]);

    assert_eq!(monitor.failure("block-export-del", json!({"id": "guest"})), "export 'guest' still in use");
    monitor.success("block-export-del", json!({"id": "guest", "mode": "hard"}));
    assert_eq!(monitor.events.remove(0)["data"], json!({"id": "guest"}));
    assert!(!directory.path().join("guest").exists());
    drop(front_end);
    // The place of the writer is free, and so is its name.
    monitor.success("block-export-add", add("guest", json!({"writable": true})));
    let ram = SharedRam::for_queues(1, 8);
    let mut writer = [GuestQueue::new(&ram, 0, 16, 8, true)];
    let front_end = FrontEnd::start(&directory.path().join("guest"), &ram, &writer, None, Wishes::default());
    assert_eq!(writer[0].read(8, 8), [7; 4096]);
    assert_eq!(writer[0].ask(&Ask::Flush).status, 0);
    // What is connected when the daemon ends is drained, not waited for.
    monitor.success("quit", json!({}));
    let ended = daemon.wait();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!directory.path().join("guest").exists() && !directory.path().join("other").exists());
    drop((front_end, other));
    qemu_img(directory.path(), ["check", "-f", "qcow2", "disk"]).output().success();
}

#[test]
fn the_socket_is_its_owner_s_and_survives_nonsense() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = serve(directory.path(), &[]);
    let mode = fs::metadata(directory.path().join("qmp")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut nonsense = Monitor::connect(&directory.path().join("qmp"));
    assert!(nonsense.say("}\n").get("error").is_some());
    assert!(nonsense.say("\"\\u\"\n").get("error").is_some());
    let deep = ["[".repeat(100_000), "]".repeat(100_000)].concat();
    assert!(nonsense.say(&deep).get("error").is_some());
    // Too long to be followed: the daemon hangs up, perhaps before all is written.
    nonsense.lines.get_mut().write_all("[".repeat(4 << 20).as_bytes()).ok();
    let mut last = String::new();
    nonsense.lines.read_to_string(&mut last).ok();
    assert!(nonsense.lines.get_mut().write_all(b"{}").is_err());
    Monitor::negotiated(&directory.path().join("qmp")).success("query-status", json!({}));
    assert_eq!(daemon.terminate().code, Some(0));
}

#[test]
fn metrics_are_at_a_port_that_is_told_and_wait_for_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = serve(directory.path(), &["--metrics", "tcp:0"]);
    let line = daemon.line();
    let address = line.strip_prefix("metrics on tcp:").unwrap_or_else(|| panic!("{line}"));
    let mut slow = TcpStream::connect(address).unwrap();
    slow.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    // Byte by byte, and never done: sent away in time, whoever is next is served.
    let is_hung_up = (0..100).any(|_| {
        slow.write_all(b"G").is_err()
            || match slow.read(&mut [0]) {
                Ok(len) => len == 0,
                Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
            }
    });
    assert!(is_hung_up);
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("process_cpu_seconds_total"), "{answer}");
    assert_eq!(daemon.terminate().code, Some(0));
}

#[test]
fn metrics_count_what_clients_do() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = serve(directory.path(), &["--metrics", "unix:metrics"]);
    let mut client = Client::connect(&directory.path().join("socket"), "", Framing::Structured, &[]).unwrap();
    for at in 0..5 {
        assert_eq!(client.call(nbd::command::WRITE, 0, at << 16, 4096, &[1; 4096]).unwrap().error, 0);
    }
    assert_eq!(client.call(nbd::command::READ, 0, 0, 8192, &[]).unwrap().error, 0);
    assert_eq!(client.call(nbd::command::FLUSH, 0, 0, 0, &[]).unwrap().error, 0);
    let ask = |request: &str| {
        let mut stream = UnixStream::connect(directory.path().join("metrics")).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK") && head.contains(&format!("Content-Length: {}", body.len())));
    for line in [
        "blk_operations_total{disk=\"disk0\",op=\"write\"} 5",
        "blk_bytes_total{disk=\"disk0\",op=\"write\"} 20480",
        "blk_operations_total{disk=\"disk0\",op=\"read\"} 1",
        "blk_bytes_total{disk=\"disk0\",op=\"read\"} 8192",
        "blk_operations_total{disk=\"disk0\",op=\"flush\"} 1",
        "blk_latency_seconds_count{disk=\"disk0\",op=\"write\"} 5",
        "blk_latency_seconds_bucket{disk=\"disk0\",op=\"write\",le=\"+Inf\"} 5",
        "blk_nbd_connections 1",
    ] {
        assert!(body.lines().any(|known| known == line), "no '{line}' in\n{body}");
    }
    // Every sample belongs to a family that was introduced.
    for line in body.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let family =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(body.contains(&format!("# TYPE {family} ")), "{line}");
    }
    assert!(ask("POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    let ended = daemon.terminate();
    assert!(ended.stderr.contains("disk0: 5 write: 20480 bytes, 0 failed"), "{}", ended.stderr);
}
