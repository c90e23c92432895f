//! A hostile front end: a script of messages, right, nearly right and wrong, with descriptors that fit and others, and
//! guest memory that it filled as it likes, against a device in this process.
//!
//! Whatever it says, the back end answers or hangs up within its time, and serves the next front end.

use std::{
    fs::File,
    io::IoSlice,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::FileExt as _, net::UnixStream},
    },
    sync::{Arc, OnceLock},
    time::Duration,
};

use blk_backend::{
    vhost_user::Server,
    virtio::{Device, DeviceOptions},
};
use rustix::{
    event::{EventfdFlags, eventfd},
    fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, open},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};

use super::{script::Script, served::Served};
use crate::{
    guest::{
        Ask, GuestQueue, SharedRam,
        vhost::{FrontEnd, Wishes},
    },
    peer::hear_out,
};

/// Guest memory: the rings of a queue, and requests.
const RAM_BYTES: u64 = 0x8000;
/// Where the front end says that it has that memory.
const USER_START: u64 = 0x10_0000;
/// Descriptors of a queue that is set up right.
const SIZE: u32 = 16;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x600;
/// More messages than any way through the protocol takes.
const MOST_MESSAGES: usize = 64;

fn server() -> &'static Served<Server> {
    static SERVER: OnceLock<Served<Server>> = OnceLock::new();
    SERVER.get_or_init(|| {
        Served::new(|disk, path| {
            let options = DeviceOptions { queues: 2, ..DeviceOptions::default() };
            let device = Device::new(disk, &options).expect("a device");
            // What front ends did wrong is no news here.
            Server::start(device, path, Arc::new(|_: &str| {})).expect("a socket of its own")
        })
    })
}

/// Says what the script says, and reads to the end.
pub fn vhost_user(input: &[u8]) {
    let path = &server().path;
    let mut script = Script::new(input);
    let things = Things::new(&mut script);
    let mut stream = UnixStream::connect(path).expect("the back end is there");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("not zero");
    let mut said = 0;
    for (message, fds) in opening(&mut script, &things) {
        if send(&stream, &message, &fds).is_err() {
            // It hung up.
            break;
        }
    }
    while !script.is_empty() && said < MOST_MESSAGES {
        said += 1;
        let (message, fds) = a_message(&mut script, &things);
        if send(&stream, &message, &fds).is_err() {
            break;
        }
    }
    stream.shutdown(std::net::Shutdown::Write).ok();
    hear_out(&mut stream, usize::MAX);
    drop(stream);
    let ram = SharedRam::for_queues(1, 4);
    let mut queues = [GuestQueue::new(&ram, 0, 16, 4, true)];
    let _front_end = FrontEnd::start(path, &ram, &queues, None, Wishes::default());
    let answer = queues[0].ask(&Ask::Read { sector: 0, sectors: 1 });
    assert_eq!(answer.status, 0, "an honest guest reads");
}

/// What a front end has to give away.
struct Things {
    memory: OwnedFd,
    /// Shorter than any message says.
    short: OwnedFd,
    event: OwnedFd,
    pipe: std::io::PipeReader,
    null: OwnedFd,
    socket: UnixStream,
}

impl Things {
    /// The first bytes of the script are said of the memory: where in it, and what.
    fn new(script: &mut Script<'_>) -> Self {
        let file = |len| {
            let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("memory");
            ftruncate(&fd, len).expect("memory");
            fd
        };
        let memory = File::from(file(RAM_BYTES));
        for (at, bytes) in sound_requests() {
            memory.write_all_at(&bytes, at).expect("inside");
        }
        for _ in 0..script.byte() % 16 {
            let at = u64::from(script.u16()) % RAM_BYTES;
            memory.write_all_at(&[script.byte()], at).expect("inside");
        }
        let (pipe, _) = std::io::pipe().expect("a pipe");
        Self {
            memory: memory.into(),
            short: file(16),
            event: eventfd(1, EventfdFlags::CLOEXEC).expect("a descriptor"),
            pipe,
            null: open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).expect("there is one"),
            socket: UnixStream::pair().expect("a pair").0,
        }
    }

    fn any(&self, script: &mut Script<'_>) -> BorrowedFd<'_> {
        match script.byte() % 8 {
            0 => self.short.as_fd(),
            1 => self.pipe.as_fd(),
            2 => self.null.as_fd(),
            3 => self.socket.as_fd(),
            4 | 5 => self.memory.as_fd(),
            _ => self.event.as_fd(),
        }
    }
}

/// A read and a write, made available in a ring at the start of the memory.
fn sound_requests() -> Vec<(u64, Vec<u8>)> {
    let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
        [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    let (has_next, writable) = (1, 2);
    let mut places = Vec::new();
    for (index, kind) in [(0_u16, 0_u32), (3, 1)] {
        let at = 0x1000 + u64::from(index) * 0x400;
        let data_flags = if kind == 0 { has_next | writable } else { has_next };
        places.push((at, [&kind.to_le_bytes()[..], &[0; 12]].concat()));
        let chain = [
            descriptor(at, 16, has_next, index + 1),
            descriptor(at + 0x100, 512, data_flags, index + 2),
            descriptor(at + 16, 1, writable, 0),
        ];
        places.push((u64::from(index) * 16, chain.concat()));
    }
    let available: [u16; 4] = [0, 2, 0, 3];
    places.push((AVAILABLE, available.iter().flat_map(|word| word.to_le_bytes()).collect()));
    places
}

/// A message, and what comes with it.
type Message<'a> = (Vec<u8>, Vec<BorrowedFd<'a>>);

fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("short");
    [&words([request, 1, len])[..], payload].concat()
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs<const N: usize>(longs: [u64; N]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// So much of the way into a session at work as the script wants, done right: what comes afterwards meets queues.
fn opening<'a>(script: &mut Script<'_>, things: &'a Things) -> Vec<Message<'a>> {
    let none = Vec::new;
    let ring = [USER_START, USER_START + USED, USER_START + AVAILABLE, 0];
    let region = [&words([1, 0])[..], &longs([0, RAM_BYTES, USER_START, 0])].concat();
    let steps: Vec<Message<'a>> = vec![
        (message(3, &[]), none()),                                             // SET_OWNER
        (message(2, &(1_u64 << 30 | 1 << 32 | 1 << 9).to_le_bytes()), none()), // SET_FEATURES
        (message(16, &0x1_b22b_u64.to_le_bytes()), none()),                    // SET_PROTOCOL_FEATURES
        (message(5, &region), vec![things.memory.as_fd()]),                    // SET_MEM_TABLE
        (message(8, &words([0, SIZE])), none()),                               // SET_VRING_NUM
        (message(10, &words([0, 0])), none()),                                 // SET_VRING_BASE
        (message(9, &[&words([0, 0])[..], &longs(ring)].concat()), none()),    // SET_VRING_ADDR
        (message(13, &0_u64.to_le_bytes()), vec![things.event.as_fd()]),       // SET_VRING_CALL
        (message(12, &0_u64.to_le_bytes()), vec![things.event.as_fd()]),       // SET_VRING_KICK
        (message(18, &words([0, 1])), none()),                                 // SET_VRING_ENABLE
    ];
    let wanted = usize::from(script.byte()) % (steps.len() + 1);
    // Nearly always all of it: a session that is not set up refuses most of what follows.
    let wanted = if script.byte().is_multiple_of(4) { wanted } else { steps.len() };
    steps.into_iter().take(wanted).collect()
}

fn a_message<'a>(script: &mut Script<'_>, things: &'a Things) -> Message<'a> {
    let request = u32::from(script.byte() % 45);
    let index = u32::from(script.byte() % 4);
    let address = |script: &mut Script<'_>| match script.byte() % 4 {
        0 => script.tricky(),
        _ => USER_START + u64::from(script.u16()),
    };
    let size = |script: &mut Script<'_>| match script.byte() % 4 {
        0 => script.tricky(),
        1 => RAM_BYTES,
        _ => u64::from(script.u16()),
    };
    let region = |script: &mut Script<'_>| {
        let guest = if script.byte().is_multiple_of(2) { script.tricky() } else { RAM_BYTES };
        longs([guest, size(script), address(script), u64::from(script.byte() % 4) << 12])
    };
    let mut payload = match request {
        2 | 16 | 39 => script.tricky().to_le_bytes().to_vec(),
        5 => {
            let count = u32::from(script.byte() % 4);
            let regions: Vec<u8> = (0..count).flat_map(|_| region(script)).collect();
            [words([count, 0]), regions].concat()
        }
        6 => longs([size(script), u64::from(script.byte() % 4) << 12]),
        8 => words([index, u32::from(script.u16())]),
        9 => {
            let flags = u32::from(script.byte() % 2);
            let addresses: [u64; 4] = std::array::from_fn(|_| address(script));
            [words([index, flags]), longs(addresses)].concat()
        }
        10 | 11 | 18 => words([index, u32::from(script.byte() % 4)]),
        12..=14 => longs([u64::from(index) | u64::from(script.byte() % 2) << 8]),
        24 | 25 => {
            let (offset, len) = (u32::from(script.byte()), u32::from(script.byte()));
            let bytes = vec![script.byte() % 2; usize::try_from(len).expect("short")];
            [words([offset, len, 0]), bytes].concat()
        }
        31 | 32 => {
            let queues = u32::from(script.byte() % 4) | u32::from(script.u16()) << 16;
            [longs([size(script), u64::from(script.byte() % 4) << 12]), words([queues])].concat()
        }
        37 | 38 => [longs([0]), region(script)].concat(),
        1 | 3 | 4 | 15 | 17 | 34 | 36 | 40 => Vec::new(),
        _ => (0..script.byte()).map(|_| script.byte()).collect(),
    };
    let mut fds = Vec::new();
    let takes_fds = matches!(request, 5 | 6 | 12..=14 | 21 | 32 | 37);
    if takes_fds || script.byte().is_multiple_of(16) {
        let count = if request == 5 || script.byte().is_multiple_of(8) { script.byte() % 4 } else { 1 };
        fds.extend((0..count).map(|_| things.any(script)));
    }
    if script.byte().is_multiple_of(16) {
        payload.truncate(usize::from(script.byte()));
    }
    let mut bytes = message(request, &payload);
    // Ask for a reply, often.
    bytes[4] |= script.byte() & 8;
    if script.byte().is_multiple_of(16) {
        let at = usize::from(script.byte()) % 12;
        bytes[at] ^= script.byte();
    }
    (bytes, fds)
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)), "room for four");
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    assert_eq!(sent, bytes.len(), "a socket takes a short message whole");
    Ok(())
}
