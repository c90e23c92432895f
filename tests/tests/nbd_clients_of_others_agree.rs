//! Clients that others wrote see, over NBD, what they see from the reference's server: data, maps, bitmaps, flags.

use std::{fs, path::Path};

use img_tests::{
    command::{Run, qemu_img, qemu_io},
    daemon::Daemon,
    pattern::{assert_same, noise},
    peer::Peer,
};

const OURS: &str = "nbd+unix:///?socket=ours";
const THEIRS: &str = "nbd+unix:///?socket=theirs";

/// The reference's server on an image. When it is dropped it is gone, and with it its locks.
fn qemu_nbd(directory: &Path, arguments: &[&str]) -> Peer {
    let socket = directory.join("theirs");
    let always = ["--persistent", "-e", "4", "-k", socket.to_str().unwrap()];
    Peer::start(directory, "qemu-nbd", &[&always, arguments].concat())
}

fn run(directory: &Path, program: &str, arguments: &[&str]) -> String {
    Run::new(program, directory).args(arguments).output().success()
}

/// A chain with everything in it: data, zeroes, holes, compressed clusters, and a bitmap of what changed last.
fn make_chain(directory: &Path) {
    fs::write(directory.join("raw"), noise(1, 3 << 20)).unwrap();
    qemu_img(directory, ["convert", "-c", "-O", "qcow2", "raw", "base"]).output().success();
    qemu_img(directory, ["resize", "-q", "base", "8M"]).output().success();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "disk"])
        .output()
        .success();
    qemu_io(directory, "qcow2", "disk", &["write -P 5 100k 300k", "write -z 1M 256k", "write -P 6 6M 64k"])
        .output()
        .success();
    qemu_img(directory, ["bitmap", "--add", "disk", "changes"]).output().success();
    qemu_io(directory, "qcow2", "disk", &["write -P 7 2M 128k", "write -P 8 7M 4k"]).output().success();
    qemu_img(directory, ["bitmap", "--disable", "disk", "changes"]).output().success();
}

#[test]
fn maps_and_bitmaps_are_the_references() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    make_chain(directory);
    let theirs = qemu_nbd(directory, &["-r", "-A", "-B", "changes", "-f", "qcow2", "disk"]);
    let ours = Daemon::start(
        directory,
        ["nbd", "--listen", "unix:ours", "--image", "disk", "--read-only", "--bitmap", "changes"],
    );
    let both = |make: &dyn Fn(&str) -> String| assert_eq!(make(OURS), make(THEIRS));
    both(&|uri| run(directory, "qemu-img", &["map", "--output=json", uri]));
    let maps = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:changes"];
    for map in maps {
        both(&|uri| run(directory, "nbdinfo", &["--json", &format!("--map={map}"), uri]));
    }
    // The map of the bitmap through qemu-img, which takes dirty for data.
    let through = |socket: &str| {
        let options = format!(
            "driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:changes"
        );
        run(directory, "qemu-img", &["map", "--output=json", "--image-opts", &options])
    };
    assert_eq!(through("ours"), through("theirs"));
    let convert = |uri: &str, to: &str| {
        run(directory, "qemu-img", &["convert", "-O", "raw", uri, to]);
        fs::read(directory.join(to)).unwrap()
    };
    assert_same(&convert(OURS, "from-ours"), &convert(THEIRS, "from-theirs"), "converted");
    run(directory, "nbdcopy", &[OURS, "copied"]);
    assert_same(&fs::read(directory.join("copied")).unwrap(), &convert(THEIRS, "again"), "nbdcopy");
    drop(theirs);
    assert_eq!(ours.terminate().code, Some(0));
}

#[test]
fn lists_and_flags_are_the_references() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    make_chain(directory);
    for access in [&[][..], &["-r"]] {
        let theirs = qemu_nbd(
            directory,
            &[access, &["-A", "-x", "name", "-D", "text", "-f", "qcow2", "disk"]].concat(),
        );
        let list = |socket: &str| {
            let socket = directory.join(socket);
            run(directory, "qemu-nbd", &["--list", "-k", socket.to_str().unwrap()])
        };
        let info = |uri: &str| {
            let info = run(directory, "nbdinfo", &["--json", "--list", uri]);
            let mut info: serde_json::Value = serde_json::from_str(&info).unwrap();
            info["exports"][0]["uri"].take();
            info
        };
        let (their_list, their_info) = (list("theirs"), info(THEIRS));
        drop(theirs);
        let mut arguments = vec!["nbd", "--listen", "unix:ours", "--image", "disk"];
        arguments.extend(["--name", "name", "--description", "text"]);
        arguments.extend(if access.is_empty() { None } else { Some("--read-only") });
        let ours = Daemon::start(directory, arguments);
        assert_eq!((list("ours"), info(OURS)), (their_list, their_info));
        assert_eq!(ours.terminate().code, Some(0));
    }
}

#[test]
fn writers_of_all_kinds_leave_the_same_disk() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut source = noise(3, 8 << 20);
    source[1 << 20..3 << 20].fill(0);
    fs::write(directory.join("source"), &source).unwrap();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "disk", "8M"]).output().success();
    let serve = || Daemon::start(directory, ["nbd", "--listen", "unix:ours", "--image", "disk"]);
    let holds = |model: &[u8], what: &str| {
        qemu_img(directory, ["convert", "-O", "raw", "disk", "end"]).output().success();
        assert_same(&fs::read(directory.join("end")).unwrap(), model, what);
        qemu_img(directory, ["check", "-q", "disk"]).output().success();
    };

    let daemon = serve();
    run(directory, "nbdcopy", &["--flush", "--connections=2", "source", OURS]);
    assert_eq!(daemon.terminate().code, Some(0));
    holds(&source, "nbdcopy");

    let daemon = serve();
    run(directory, "qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "source", OURS]);
    run(directory, "qemu-img", &["compare", "-f", "raw", "-F", "raw", "source", OURS]);
    let shell = "h.pwrite(b'A' * 1000, 77777, flags=nbd.CMD_FLAG_FUA); h.zero(4096, 100000); h.trim(65536, 131072); \
                 h.flush(); assert h.pread(1000, 77777) == b'A' * 1000; h.cache(1 << 20, 0)";
    // As nbdsh, with the system's Python, whatever else is in the path.
    run(directory, "/usr/bin/python3", &["-m", "nbd", "-u", OURS, "-c", shell]);
    source[77777..78777].fill(b'A');
    source[100_000..104_096].fill(0);
    source[131_072..196_608].fill(0);
    assert_eq!(daemon.terminate().code, Some(0));
    holds(&source, "qemu-img and nbdsh");

    // Through nbdkit in the middle, whose plugin is a client of ours.
    let daemon = serve();
    let through =
        ["-U", "-", "nbd", "socket=ours", "--run", "qemu-io -f raw -c 'write -P 9 5M 70k' -c flush $uri"];
    run(directory, "nbdkit", &through);
    source[5 << 20..(5 << 20) + 70 * 1024].fill(9);
    run(
        directory,
        "qemu-img",
        &["bench", "-w", "-c", "200", "-d", "16", "-s", "4k", "--pattern=3", "-f", "raw", OURS],
    );
    source[..200 * 4096].fill(3);
    assert_eq!(daemon.terminate().code, Some(0));
    holds(&source, "nbdkit and qemu-img bench");
}

/// Whichever way the bytes go: through memory of the server, or from the cache to the socket, with requests of both
/// kinds and bytes of several layers in one connection.
#[test]
fn readers_of_all_kinds_get_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    fs::write(directory.join("layer"), noise(5, 8 << 20)).unwrap();
    qemu_img(directory, ["convert", "-O", "qcow2", "-f", "raw", "layer", "base"]).output().success();
    qemu_img(directory, ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "disk"])
        .output()
        .success();
    let changes = ["write -P 5 100k 300k", "write -z 1M 256k", "write -P 6 6M 64k", "write -P 7 4093k 5k"];
    qemu_io(directory, "qcow2", "disk", &changes).output().success();
    qemu_img(directory, ["convert", "-O", "raw", "disk", "whole"]).output().success();
    let whole = fs::read(directory.join("whole")).unwrap();
    for arguments in [
        &["--image", "disk", "--read-only"][..],
        &["--image", "disk"],
        &["--image", "whole", "--format", "raw"],
    ] {
        let daemon = Daemon::start(directory, ["nbd", "--listen", "unix:ours"].iter().chain(arguments));
        for size in ["65536", "262144", "1048576", "2097152"] {
            for connections in ["1", "3"] {
                let (size, connections) =
                    (format!("--request-size={size}"), format!("--connections={connections}"));
                run(directory, "nbdcopy", &[&size, &connections, "--allocated", OURS, "copy"]);
                let copy = fs::read(directory.join("copy")).unwrap();
                assert_same(&copy, &whole, &format!("{arguments:?}, {size}, {connections}"));
            }
        }
        let odd = "print(h.pread(300001, 99999).hex())";
        let read = run(directory, "/usr/bin/python3", &["-m", "nbd", "-u", OURS, "-c", odd]);
        let expected: String = whole[99_999..400_000].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(read.trim(), expected);
        assert_eq!(daemon.terminate().code, Some(0));
    }
}

#[test]
fn other_hosts_cannot_write_unless_that_was_said() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    qemu_img(directory, ["create", "-q", "-f", "raw", "disk", "1M"]).output().success();
    let start = |more: &[&str]| {
        let base = ["nbd", "--image", "disk", "--format", "raw"];
        Daemon::try_start(directory, base.iter().chain(more))
    };
    let refused = start(&["--listen", "tcp:0.0.0.0:0"]).unwrap_err();
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("can be reached from other hosts"), "{}", refused.stderr);
    for allowed in [
        &["--listen", "tcp:0"][..],
        &["--listen", "tcp:0.0.0.0:0", "--read-only"],
        &["--listen", "tcp:0.0.0.0:0", "--allow-remote-writes"],
    ] {
        let daemon = start(allowed).unwrap();
        let address = daemon.address.strip_prefix("tcp:").unwrap().replace("0.0.0.0", "127.0.0.1");
        assert!(address.starts_with("127.0.0.1:") && !address.ends_with(":0"), "{address}");
        assert_eq!(run(directory, "nbdinfo", &["--size", &format!("nbd://{address}")]).trim(), "1048576");
        assert_eq!(daemon.terminate().code, Some(0));
    }
}
