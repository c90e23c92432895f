//! The QMP client that the QEMU project publishes (`qemu.qmp`, from PyPI) drives a daemon: snapshots under load among
//! the rest, with no request lost.

use std::{fs, process::Command};

use img_tests::{
    command::qemu_img,
    daemon::Daemon,
    nbd::{Client, Framing, command},
    pattern::assert_same,
    qmp::python,
};

/// Negotiates, asks, grows the disk, and takes three snapshots on top of each other and one inside.
const SCRIPT: &str = r#"
import asyncio
from qemu.qmp import QMPClient, ExecuteError

async def main():
    qmp = QMPClient("test")
    await qmp.connect("qmp")
    commands = {command["name"] for command in await qmp.execute("query-commands")}
    assert "blockdev-snapshot-sync" in commands, commands
    assert (await qmp.execute("query-status"))["running"]
    await qmp.execute("block_resize", {"device": "disk0", "size": 16 << 20})
    for n in range(3):
        await qmp.execute("blockdev-snapshot-sync", {
            "device": "disk0", "snapshot-file": f"overlay{n}", "snapshot-node-name": f"top{n}", "format": "qcow2"})
    await qmp.execute("blockdev-snapshot-internal-sync", {"device": "disk0", "name": "inside"})
    block, = await qmp.execute("query-block")
    assert block["inserted"]["node-name"] == "top2" and block["inserted"]["backing_file_depth"] == 3, block
    names = [node["node-name"] for node in await qmp.execute("query-named-block-nodes")]
    assert names == ["top2", "top1", "top0", "disk0"], names
    try:
        await qmp.execute("blockdev-snapshot-sync", {"node-name": "disk0", "snapshot-file": "x"})
        assert False
    except ExecuteError as error:
        assert str(error) == "Node 'disk0' is busy: node is used as backing hd of 'top0'", error
    try:
        await qmp.execute("blockdev-snapshot-sync", {"device": "disk0", "snapshot-file": "no/such/place"})
        assert False
    except ExecuteError as error:
        assert "no/such/place" in str(error), error
    with qmp.listener("BLOCK_EXPORT_DELETED") as listener:
        await qmp.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "top2", "name": "e"})
        await qmp.execute("block-export-del", {"id": "e"})
        event = await listener.get()
        assert event["data"] == {"id": "e"}, event
    await qmp.disconnect()

asyncio.run(main())
"#;

#[test]
fn qemu_qmp_drives_the_daemon_under_load() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let daemon =
        Daemon::start(directory, ["nbd", "--listen", "unix:socket", "--image", "disk", "--qmp", "unix:qmp"]);
    let mut client = Client::connect(&directory.join("socket"), "", Framing::Structured, &[]).unwrap();
    let mut model = vec![0; 8 << 20];
    let mut script =
        Command::new(python()).args(["-c", SCRIPT]).current_dir(directory).spawn().expect("it was made");
    // Writes and reads go on for as long as the script runs; not one may fail or be lost.
    let mut requests = 0_u64;
    let status = loop {
        requests += 1;
        let at = usize::try_from(requests * 7919 * 512 % (8 << 20)).unwrap().min((8 << 20) - 4096);
        let data = requests.to_le_bytes().repeat(512);
        let written = client.call(command::WRITE, 0, at as u64, 4096, &data).unwrap();
        assert_eq!(written.error, 0, "{written:?}");
        model[at..at + 4096].copy_from_slice(&data);
        let read = client.call(command::READ, 0, at as u64 & !0xffff, 65536, &[]).unwrap();
        assert_eq!(read.error, 0, "{read:?}");
        assert_same(&read.data, &model[at & !0xffff..(at & !0xffff) + 65536], "read under load");
        if let Some(status) = script.try_wait().unwrap() {
            break status;
        }
    };
    assert!(status.success() && requests > 10, "{status}, {requests} requests");
    drop(client);
    assert_eq!(daemon.terminate().code, Some(0));
    qemu_img(directory, ["convert", "-O", "raw", "overlay2", "end"]).output().success();
    model.resize(16 << 20, 0);
    assert_same(&fs::read(directory.join("end")).unwrap(), &model, "the chain at the end");
    for image in ["disk", "overlay0", "overlay1", "overlay2"] {
        qemu_img(directory, ["check", "-q", image]).output().success();
    }
    let listed = qemu_img(directory, ["snapshot", "-l", "overlay2"]).output().success();
    assert!(listed.contains("inside"), "{listed}");
}
