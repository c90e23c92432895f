//! A daemon that is killed under load loses nothing that was flushed and leaves an image that is sound; one that is
//! asked to end answers what it began, and what it answered is there.

use std::{fs, io::ErrorKind, path::Path, process::Command};

use img_tests::{
    command::{blk_backend_binary, qemu_img},
    daemon::Daemon,
    nbd::{Client, Framing, command, flag},
    pattern::Random,
};

const DISK: u64 = 16 << 20;
const BLOCK: u64 = 4096;
const BLOCKS: u64 = DISK / BLOCK;

fn serve(directory: &Path) -> Daemon {
    Daemon::start(directory, ["nbd", "--listen", "unix:socket", "--image", "disk"])
}

fn connect(directory: &Path) -> Client {
    Client::connect(&directory.join("socket"), "", Framing::Extended, &[]).unwrap()
}

/// A block that says where it belongs and which write it comes from.
fn block(index: u64, generation: u64) -> Vec<u8> {
    [index, generation].map(u64::to_le_bytes).concat().repeat(256)
}

/// What may stand in each block: the generation that was flushed, and those that were sent since.
#[derive(Clone, Debug, Default)]
struct Allowed {
    flushed: u64,
    since: Vec<u64>,
}

#[test]
fn a_killed_daemon_loses_nothing_that_was_flushed() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "disk", &DISK.to_string()]).output().success();
    let mut allowed = vec![Allowed::default(); usize::try_from(BLOCKS).unwrap()];
    let mut random = Random::new(5);
    let mut generation = 0;
    for round in 0..8 {
        let daemon = serve(directory);
        let mut client = connect(directory);
        let mut writes = std::collections::HashMap::new();
        // Killed in the middle of this: after so many replies, with the rest on its way.
        let replies = 50 + random.below(300);
        let mut sent = 0;
        for _ in 0..replies {
            while writes.len() < 24 {
                sent += 1;
                generation += 1;
                let index = random.below(BLOCKS);
                let busy = writes.values().any(|(other, _)| *other == index);
                if busy {
                    continue;
                }
                allowed[usize::try_from(index).unwrap()].since.push(generation);
                let flags = if u64::is_multiple_of(sent, 40) { flag::FUA } else { 0 };
                let data = block(index, generation);
                let cookie = client.send(command::WRITE, flags, index * BLOCK, BLOCK, &data).unwrap();
                writes.insert(cookie, (index, (generation, flags)));
            }
            let (cookie, reply) = client.receive().unwrap();
            assert_eq!(reply.error, 0, "{reply:?}");
            let (index, (written, flags)) = writes.remove(&cookie).unwrap();
            if flags == flag::FUA {
                // No other write of this block is under way: this one is durable, those before it are gone.
                let block = &mut allowed[usize::try_from(index).unwrap()];
                *block = Allowed { flushed: written, since: Vec::new() };
            }
            if sent.is_multiple_of(97) {
                flush(&mut client, &mut writes, &mut allowed);
            }
        }
        assert_eq!(daemon.kill().code, None);
        wait_for_locks(directory);
        let check = qemu_img(directory, ["check", "disk"]).output();
        // 3 is for leaks alone.
        assert!(check.code == 0 || check.code == 3, "round {round}: {check}");
        qemu_img(directory, ["convert", "-O", "raw", "disk", "now"]).output().success();
        let now = fs::read(directory.join("now")).unwrap();
        for (index, (bytes, allowed)) in (0..).zip(now.chunks_exact(4096).zip(&mut allowed)) {
            let found = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
            let whole = if found == 0 { vec![0; 4096] } else { block(index, found) };
            let known = found == allowed.flushed || allowed.since.contains(&found);
            assert!(bytes == whole && known, "round {round}, block {index}: {found} and {allowed:?}");
            // From here on it is what the disk holds.
            *allowed = Allowed { flushed: found, since: Vec::new() };
        }
    }
}

/// Requests that the kernel still had keep the image open, and locked, for a moment after the process is gone.
fn wait_for_locks(directory: &Path) {
    let image = fs::OpenOptions::new().read(true).write(true).open(directory.join("disk")).unwrap();
    rustix::fs::fcntl_lock(&image, rustix::fs::FlockOperation::LockExclusive).unwrap();
}

/// Waits for all writes, then flushes: each block then holds the last write to it.
fn flush(
    client: &mut Client,
    writes: &mut std::collections::HashMap<u64, (u64, (u64, u16))>,
    allowed: &mut [Allowed],
) {
    while !writes.is_empty() {
        let (cookie, reply) = client.receive().unwrap();
        assert_eq!(reply.error, 0);
        writes.remove(&cookie).unwrap();
    }
    assert_eq!(client.call(command::FLUSH, 0, 0, 0, &[]).unwrap().error, 0);
    for block in allowed {
        if let Some(last) = block.since.last() {
            *block = Allowed { flushed: *last, since: Vec::new() };
        }
    }
}

#[test]
fn a_daemon_that_is_asked_to_end_keeps_what_it_answered() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "disk", &DISK.to_string()]).output().success();
    for round in 1..=4 {
        let daemon = serve(directory);
        let mut client = connect(directory);
        let mut idle = connect(directory);
        let mut sent = std::collections::HashMap::new();
        for index in (0..BLOCKS).step_by(64) {
            let cookie = client.send(command::WRITE, 0, index * BLOCK, BLOCK, &block(index, round)).unwrap();
            sent.insert(cookie, index);
        }
        // One reply is there; how many more there will be is the daemon's affair.
        let (first, _) = client.receive().unwrap();
        daemon.signal(rustix::process::Signal::TERM);
        let mut answered = vec![sent[&first]];
        let end = loop {
            match client.receive() {
                Ok((cookie, reply)) => {
                    assert_eq!(reply.error, 0);
                    answered.push(sent[&cookie]);
                }
                Err(error) => break error,
            }
        };
        let kinds = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
        assert!(kinds.contains(&end.kind()), "{end}");
        assert!(idle.receive().is_err());
        let ended = daemon.wait();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        qemu_img(directory, ["check", "-q", "disk"]).output().success();
        qemu_img(directory, ["convert", "-O", "raw", "disk", "now"]).output().success();
        let now = fs::read(directory.join("now")).unwrap();
        for index in answered {
            let at = usize::try_from(index * BLOCK).unwrap();
            assert!(now[at..at + 4096] == block(index, round), "block {index} was answered and is not there");
        }
        assert!(!directory.join("socket").exists());
    }
}

/// Also one that has no image yet.
#[test]
fn a_daemon_that_waits_for_a_lock_may_be_ended() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "disk", &DISK.to_string()]).output().success();
    let disk = ["--image", "disk", "--wait-for-lock"];
    // More seconds than a clock has.
    let arguments = ["nbd", "--listen", "unix:socket"].iter().chain(&disk).chain(&["18446744073709551615"]);
    let first = Daemon::start(directory, arguments);
    for serve in [["nbd", "--listen", "unix:other"], ["vhost-user", "--socket", "other"]] {
        let mut waiting = Command::new(blk_backend_binary())
            .args(serve.iter().chain(&disk).chain(&["20"]))
            .current_dir(directory)
            .spawn()
            .unwrap();
        // Before it listens to signals they end it as they end any program.
        let status = format!("/proc/{}/status", waiting.id());
        let hears_of_sigterm = || {
            let status = fs::read_to_string(&status).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:\t")).unwrap();
            u64::from_str_radix(caught, 16).unwrap() & (1 << 14) != 0
        };
        while !hears_of_sigterm() {
            std::thread::yield_now();
        }
        rustix::process::kill_process(
            rustix::process::Pid::from_child(&waiting),
            rustix::process::Signal::TERM,
        )
        .unwrap();
        assert_eq!(waiting.wait().unwrap().code(), Some(0), "{serve:?}");
    }
    assert_eq!(first.terminate().code, Some(0));
}
