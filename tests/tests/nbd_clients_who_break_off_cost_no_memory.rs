//! A client that says nonsense while its requests are under way loses its connection; what the server had lent to those
//! requests comes back.

use std::{fs, io::Write, os::unix::net::UnixStream, path::Path};

use img_tests::{
    daemon::Daemon,
    nbd::{command, info_request, option, option_bytes},
    pattern::noise,
    peer::hear_out,
};

const REQUESTS: usize = 64;
const REQUEST_BYTES: usize = 16 << 10;
/// So many clients would cost half a gigabyte.
const CLIENTS: usize = 512;
/// What a daemon may take beyond what it takes after the first of them: far more than one connection ever holds.
const MOST_GROWTH_KIB: u64 = 96 << 10;

/// Asks for much, and then breaks a rule.
fn break_off(socket: &Path) {
    let mut said = vec![0, 0, 0, 3];
    said.extend(option_bytes(option::GO, &info_request("", &[])));
    for request in 0..REQUESTS {
        said.extend(0x2560_9513_u32.to_be_bytes());
        said.extend([0, command::READ].map(u16::to_be_bytes).concat());
        said.extend([request, request * REQUEST_BYTES].map(|word| (word as u64).to_be_bytes()).concat());
        said.extend(u32::try_from(REQUEST_BYTES).unwrap().to_be_bytes());
    }
    said.extend([0xFF; 28]);
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(&said).unwrap();
    hear_out(&mut stream, usize::MAX);
}

fn resident_kib(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid().as_raw_nonzero())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn nbd_clients_who_break_off_cost_no_memory() {
    for engine in ["io_uring", "threads"] {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("disk"), noise(1, REQUESTS * REQUEST_BYTES)).unwrap();
        let arguments =
            ["nbd", "--listen", "unix:socket", "--image", "disk", "--format", "raw", "--engine", engine];
        let Ok(daemon) = Daemon::try_start(directory.path(), arguments) else {
            assert_eq!(engine, "io_uring", "threads are everywhere");
            continue;
        };
        let socket = directory.path().join("socket");
        (0..8).for_each(|_| break_off(&socket));
        let before = resident_kib(&daemon);
        (0..CLIENTS).for_each(|_| break_off(&socket));
        let after = resident_kib(&daemon);
        assert!(after < before + MOST_GROWTH_KIB, "{engine}: {before} KiB became {after}");
        assert_eq!(daemon.terminate().code, Some(0));
    }
}
