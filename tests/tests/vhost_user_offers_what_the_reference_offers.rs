//! What is negotiated with `blk-backend` and with the reference's daemon, side by side.

use std::{
    path::Path,
    process::{Child, Command},
};

use blk_backend::virtio::Features;
use img_tests::{
    command::img,
    daemon::Daemon,
    guest::{
        Ask, GuestQueue, SharedRam,
        vhost::{FrontEnd, Wishes},
    },
};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has seen then.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn peer(directory: &Path, writable: bool) -> Peer {
    let writable = if writable { "on" } else { "off" };
    let node = "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk";
    let export = format!(
        "vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path=peer,num-queues=2,writable={writable}"
    );
    let child = Command::new("qemu-storage-daemon")
        .args(["--blockdev", node, "--export", &export])
        .current_dir(directory)
        .spawn()
        .expect("it is installed");
    Peer(child)
}

fn negotiated(socket: &Path) -> (FrontEnd, Vec<GuestQueue>, SharedRam) {
    let ram = SharedRam::for_queues(2, 8);
    let queues: Vec<_> = (0..2).map(|index| GuestQueue::new(&ram, index, 128, 8, true)).collect();
    let front_end = FrontEnd::start(socket, &ram, &queues, None, Wishes::default());
    (front_end, queues, ram)
}

#[test]
fn all_that_the_reference_offers_and_more() {
    let directory = tempfile::tempdir().expect("a directory");
    let directory = directory.path();
    img(directory, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    for read_only in [false, true] {
        let theirs = {
            let _peer = peer(directory, !read_only);
            let (mut front_end, mut queues, _ram) = negotiated(&directory.join("peer"));
            assert_eq!(queues[0].ask(&Ask::Read { sector: 0, sectors: 8 }).data, vec![0; 4096]);
            (front_end.features, front_end.protocol, front_end.config())
        };
        std::fs::remove_file(directory.join("peer")).expect("its socket");
        let mut line = vec!["vhost-user", "--socket", "ours", "--image", "disk", "--queues", "2"];
        if read_only {
            line.push("--read-only");
        }
        let daemon = Daemon::start(directory, line);
        let (mut front_end, mut queues, ram) = negotiated(&directory.join("ours"));
        assert_eq!(queues[0].ask(&Ask::Read { sector: 0, sectors: 8 }).data, vec![0; 4096]);
        let ours = (front_end.features, front_end.protocol, front_end.config());

        // NOTIFY_ON_EMPTY is of legacy devices. What changes a disk is not offered for one that is read-only.
        let mut not_ours = Features(1 << 24);
        if read_only {
            not_ours =
                not_ours.with(Features::DISCARD).with(Features::WRITE_ZEROES).with(Features::CONFIG_WCE);
        }
        assert_eq!(theirs.0.without(ours.0), not_ours, "theirs {:#x}, ours {:#x}", theirs.0, ours.0);
        assert_eq!(ours.0.without(theirs.0), Features::RING_RESET);
        assert_eq!(ours.0.has(Features::RO), read_only);

        let more = Protocol::INFLIGHT_SHMFD | Protocol::RESET_DEVICE | Protocol::STATUS;
        assert_eq!(ours.1 - theirs.1, more);
        // Descriptors and doorbells that a block device has no use for, and migration by page faults, which is offered
        // to who may handle them.
        let less = Protocol::BACKEND_SEND_FD | Protocol::HOST_NOTIFIER;
        assert_eq!(theirs.1 - ours.1 - Protocol::PAGEFAULT, less);

        // Capacity, seg_max, blk_size, topology and queues are the same.
        for field in [0..8, 12..16, 20..32, 34..36] {
            assert_eq!(ours.2[field.clone()], theirs.2[field.clone()], "{field:?}");
        }
        drop((front_end, queues, ram));
        assert_eq!(daemon.terminate().code, Some(0));
    }
}
