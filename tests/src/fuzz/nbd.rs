//! A hostile NBD client: a script of options and requests, right, nearly right and wrong, against a server in this
//! process.
//!
//! Whatever it says, the server answers or hangs up within its time, says no more than it was asked for, and serves
//! the next client.

use std::{
    io::Write,
    os::unix::net::UnixStream,
    sync::{Arc, OnceLock},
    time::Duration,
};

use blk_backend::nbd::{Export, ExportOptions, ListenAddress, Server, ServerOptions};

use super::{script::Script, served::Served};
use crate::{
    nbd::{Client, Framing, command, info_request, meta_request, option, option_bytes},
    peer::hear_out,
};

/// Far more than any script can ask for: a disk of some clusters, read a few dozen times.
const MOST_BYTES: usize = 64 << 20;

fn server() -> &'static Served<Server> {
    static SERVER: OnceLock<Served<Server>> = OnceLock::new();
    SERVER.get_or_init(|| {
        Served::new(|disk, path| {
            let server = Server::start(
                &ListenAddress::Unix(path.to_owned()),
                ServerOptions::default(),
                // What clients did wrong is no news here.
                Arc::new(|_: &str| {}),
            )
            .expect("a socket of its own");
            let options = ExportOptions { allocation_depth: true, ..ExportOptions::default() };
            let export = Export::new(Arc::clone(disk), options).expect("it has no bitmaps");
            server.add(export).expect("the first of its name");
            server
        })
    })
}

/// Says what the script says, and reads to the end.
pub fn nbd(input: &[u8]) {
    let path = &server().path;
    let mut script = Script::new(input);
    let said = conversation(&mut script);
    let mut stream = UnixStream::connect(path).expect("the server is there");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("not zero");
    // It may hang up before all is said.
    if stream.write_all(&said).is_ok() {
        stream.shutdown(std::net::Shutdown::Write).ok();
    }
    hear_out(&mut stream, MOST_BYTES);
    let mut honest = Client::connect(path, "", Framing::Structured, &["base:allocation"]).expect("served");
    let read = honest.call(command::READ, 0, 0, 512, &[]).expect("a reply");
    assert_eq!(read.error, 0, "{read:?}");
}

/// Everything that the client says.
fn conversation(script: &mut Script<'_>) -> Vec<u8> {
    let mut said = match script.byte() % 8 {
        0 => script.tricky().to_be_bytes()[4..].to_vec(),
        1 => vec![0, 0, 0, 0],
        _ => vec![0, 0, 0, 3],
    };
    let framing = script.byte() % 4;
    match framing {
        1 => said.extend(option_bytes(option::STRUCTURED_REPLY, &[])),
        2 | 3 => said.extend(option_bytes(option::EXTENDED_HEADERS, &[])),
        _ => {}
    }
    for _ in 0..script.byte() % 6 {
        said.extend(an_option(script));
    }
    said.extend(option_bytes(option::GO, &info_request("", &[3])));
    while !script.is_empty() {
        said.extend(a_request(script, framing >= 2));
    }
    said
}

fn an_option(script: &mut Script<'_>) -> Vec<u8> {
    let contexts = ["base:allocation", "qemu:allocation-depth", "qemu:", "x", "base:", ":"];
    let kind = script.byte();
    let number = match kind % 16 {
        number @ 0..12 => u32::from(number),
        _ => u32::from_be_bytes(std::array::from_fn(|_| script.byte())),
    };
    let data = match script.byte() % 5 {
        0 => Vec::new(),
        1 => info_request("", &[0, 1, 2, 3, u16::from(script.byte())]),
        2 => meta_request("", &contexts[..usize::from(script.byte()) % 7]),
        3 => meta_request("other", &["base:allocation"]),
        _ => (0..script.byte()).map(|_| script.byte()).collect(),
    };
    let mut bytes = option_bytes(number, &data);
    if script.byte().is_multiple_of(16) {
        // The magic number or the length is wrong.
        let at = usize::from(script.byte()) % 16;
        bytes[at] ^= script.byte();
    }
    bytes
}

fn a_request(script: &mut Script<'_>, extended: bool) -> Vec<u8> {
    let kind = u16::from(script.byte() % 10);
    let flags = u16::from(script.byte()) % 64;
    let offset = script.tricky();
    let len = script.tricky();
    let mut bytes = if extended {
        let mut bytes = 0x21e4_1c71_u32.to_be_bytes().to_vec();
        bytes.extend([flags, kind].map(u16::to_be_bytes).concat());
        bytes.extend([1, offset, len].map(u64::to_be_bytes).concat());
        bytes
    } else {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend([flags, kind].map(u16::to_be_bytes).concat());
        bytes.extend([1, offset].map(u64::to_be_bytes).concat());
        bytes.extend_from_slice(&len.to_be_bytes()[4..]);
        bytes
    };
    if script.byte().is_multiple_of(32) {
        let at = usize::from(script.byte()) % 4;
        bytes[at] ^= script.byte();
    }
    if kind == command::WRITE || flags & 32 != 0 {
        // As much as is announced, where that is little; else the stream falls apart.
        let payload = usize::try_from(len % 8192).expect("small");
        bytes.extend(std::iter::repeat_n(script.byte(), payload));
    }
    bytes
}
