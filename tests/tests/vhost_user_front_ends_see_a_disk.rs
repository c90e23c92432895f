//! Whatever a vhost-user front end sets up and in whatever order it leaves, its guest sees a disk.

use std::{
    io::{Read as _, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use blk_backend::{
    disk::{Disk, DiskOptions},
    vhost_user::Server,
    virtio::{Device, DeviceOptions, Features, dirty_log::LOG_PAGE_BYTES},
};
use img_core::image::ImageName;
use img_tests::{
    command::{img, qemu_img},
    guest::{
        Ask, GuestQueue, SharedRam,
        model::{DiskModel, next_ask},
        vhost::{FrontEnd, USER_OFFSET, Wishes, addresses, event, region},
    },
    pattern::Random,
};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{MemfdFlags, ftruncate, memfd_create},
};
use tempfile::TempDir;
use vhost::{
    VhostBackend as _, VhostUserDirtyLogRegion,
    vhost_user::{VhostUserFrontend as _, message::VhostUserProtocolFeatures},
};

const SLOTS: u16 = 32;
const SIZE: u16 = 128;
const SECTORS: u64 = 16 << 11;

/// A served qcow2 overlay on a raw image of noise.
struct Served {
    directory: TempDir,
    disk: Arc<Disk>,
    server: Server,
    told: Arc<Mutex<Vec<String>>>,
}

fn serve(queues: u16) -> Served {
    let directory = tempfile::tempdir().expect("a directory");
    img(directory.path(), ["create", "-q", "-f", "qcow2", "disk", "16M"]).output().success();
    let path = directory.path().join("disk");
    let name = ImageName::parse(path.to_str().expect("UTF-8")).expect("a plain name");
    let disk = Disk::open(&name, &DiskOptions::default()).expect("it opens");
    let device = Device::new(&disk, &DeviceOptions { queues, ..DeviceOptions::default() }).expect("a device");
    let told = Arc::new(Mutex::new(Vec::new()));
    let telling = Arc::clone(&told);
    let tell = Arc::new(move |line: &str| telling.lock().expect("it tells").push(line.to_owned()));
    let server = Server::start(device, &directory.path().join("socket"), tell).expect("it listens");
    Served { directory, disk, server, told }
}

impl Served {
    fn socket(&self) -> PathBuf {
        self.server.path().to_owned()
    }

    /// Stops in order; the image is good, and nothing had to be told.
    #[track_caller]
    fn stop(self) {
        let Self { directory, disk, server, told } = self;
        server.stop();
        disk.close().expect("it closes");
        drop(disk);
        assert_eq!(*told.lock().expect("it told"), Vec::<String>::new());
        qemu_img(directory.path(), ["check", "-f", "qcow2", "disk"]).output().success();
    }
}

fn queues(ram: &SharedRam, count: u16, event_idx: bool) -> Vec<GuestQueue> {
    (0..count).map(|index| GuestQueue::new(ram, index, SIZE, SLOTS, event_idx)).collect()
}

/// Keeps many requests under way on all queues, in parts of the disk that do not overlap while they are.
fn play(queues: &mut [GuestQueue], model: &mut DiskModel, seed: u64, rounds: u32) {
    let mut random = Random::new(seed);
    let parts = queues.len() as u64 * 16;
    let part = SECTORS / parts;
    for _ in 0..rounds {
        let mut asked: Vec<Vec<(u64, Ask)>> = Vec::new();
        for (number, queue) in (0u64..).zip(&mut *queues) {
            let asks = (0..16).map(|index| {
                let ask = next_ask(&mut random, (number * 16 + index) * part, part);
                (queue.submit(&ask), ask)
            });
            asked.push(asks.collect());
            queue.publish();
        }
        for (queue, mut asked) in queues.iter_mut().zip(asked) {
            while !asked.is_empty() {
                let answer = queue.wait();
                let at = asked.iter().position(|(token, _)| *token == answer.token).expect("asked once");
                let (_, ask) = asked.swap_remove(at);
                model.apply(&ask);
                model.check_answer(&ask, &answer);
            }
        }
    }
}

fn check_all(queue: &mut GuestQueue, model: &DiskModel) {
    for sector in (0..SECTORS).step_by(256) {
        model.check(sector, &queue.read(sector, 256));
    }
}

fn model() -> DiskModel {
    DiskModel::new(usize::try_from(SECTORS).expect("small"))
}

#[test]
fn one_after_the_other_with_whatever_features() {
    let served = serve(2);
    let mut model = model();
    let without_event_idx = |offered: Features| offered.without(Features::EVENT_IDX);
    let write_through = |offered: Features| offered.without(Features::FLUSH.with(Features::CONFIG_WCE));
    // VHOST_USER_F_PROTOCOL_FEATURES is bit 30: without it rings are enabled from the start.
    let bare = |offered: Features| offered.without(Features(1 << 30)).without(Features::INDIRECT_DESC);
    let all = Wishes::default();
    let wishes = [
        (2, all),
        (1, Wishes { accept: without_event_idx, slots: true, ..all }),
        (2, Wishes { accept: write_through, inflight: false, ..all }),
    ];
    for (seed, (count, wishes)) in (1u64..).zip(wishes) {
        let ram = SharedRam::for_queues(count, SLOTS);
        let event_idx = (wishes.accept)(Features::EVENT_IDX).has(Features::EVENT_IDX);
        let mut queues = queues(&ram, count, event_idx);
        let front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, wishes);
        play(&mut queues, &mut model, seed, 12);
        check_all(&mut queues[0], &model);
        drop(front_end);
    }
    // No indirect descriptors, so requests of the plain kind only.
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut bare_queue = queues(&ram, 1, true).pop().expect("one");
    bare_queue.never_indirect();
    let queues = [bare_queue];
    let front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, Wishes { accept: bare, ..all });
    let [mut queue] = queues;
    check_all(&mut queue, &model);
    drop(front_end);
    served.stop();
}

#[test]
fn queues_stop_and_go_on_where_they_were() {
    let served = serve(1);
    let mut model = model();
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = queues(&ram, 1, true);
    let mut front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, Wishes::default());
    for seed in 0..5 {
        play(&mut queues, &mut model, seed, 3);
        let token = queues[0].submit(&Ask::Read { sector: 0, sectors: 8 });
        queues[0].publish();
        // Either it was answered before the queue stopped, or it is after it goes on.
        let base = front_end.frontend.get_vring_base(0).expect("a base");
        assert!(base == u32::from(queues[0].used_idx()), "nothing is under way in a stopped queue");
        front_end.start_queue(0, &queues[0]);
        assert_eq!(queues[0].wait().token, token);
    }
    // Disabled, it does nothing; enabled again, it forgets nothing.
    front_end.frontend.set_vring_enable(0, false).expect("disabled");
    queues[0].submit(&Ask::Write { sector: 3, data: vec![9; 512] });
    queues[0].publish();
    front_end.frontend.set_vring_enable(0, false).expect("disabled");
    assert_eq!(queues[0].answer(), None);
    front_end.frontend.set_vring_enable(0, true).expect("enabled");
    assert_eq!(queues[0].wait().status, 0);
    assert_eq!(queues[0].read(3, 1), vec![9; 512]);
    drop(front_end);
    served.stop();
}

/// Nothing in the protocol says what comes first.
#[test]
fn the_size_of_a_queue_may_come_behind_its_addresses() {
    let served = serve(1);
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = queues(&ram, 1, true);
    let mut front_end = FrontEnd::connect(&served.socket(), 1, None, Wishes::default());
    front_end.share(&ram, false);
    let frontend = &mut front_end.frontend;
    frontend.set_vring_addr(0, &addresses(&queues[0])).expect("addresses");
    frontend.set_vring_num(0, SIZE).expect("a size");
    frontend.set_vring_base(0, 0).expect("a base");
    frontend.set_vring_call(0, &event(&queues[0].call)).expect("a call descriptor");
    frontend.set_vring_kick(0, &event(&queues[0].kick)).expect("a kick descriptor");
    frontend.set_vring_enable(0, true).expect("enabled");
    assert_eq!(queues[0].read(3, 1), vec![0; 512]);
    drop(front_end);
    served.stop();
}

/// A front end leaves a daemon that lives on, with writes that it has not flushed, and comes again with the same
/// inflight memory: what others did to the disk meanwhile is not undone.
#[test]
fn nothing_is_done_again_that_was_not_lost() {
    let served = serve(1);
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = queues(&ram, 1, true);
    let mut front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, Wishes::default());
    assert_eq!(queues[0].ask(&Ask::Write { sector: 0, data: vec![1; 512] }).status, 0);
    let inflight = front_end.inflight.take();
    drop(front_end);
    while served.server.is_connected() {
        std::thread::yield_now();
    }
    let image = served.disk.image();
    image.discard(0..65536).expect("inside");
    image.flush().expect("space");
    // It takes the place that was given up.
    image.write_at(&[7; 65536], 1 << 20).expect("inside");
    image.flush().expect("space");
    drop(image);
    let front_end = FrontEnd::start(&served.socket(), &ram, &queues, inflight, Wishes::default());
    assert_eq!(queues[0].read(0, 1), vec![0; 512]);
    assert_eq!(queues[0].read(2048, 1), vec![7; 512]);
    drop(front_end);
    served.stop();
}

#[test]
fn memory_that_moves_keeps_its_requests() {
    let served = serve(1);
    let mut model = model();
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = queues(&ram, 1, true);
    let mut front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, Wishes::default());
    for seed in 0..4 {
        play(&mut queues, &mut model, seed, 2);
        queues[0].submit(&Ask::Read { sector: seed, sectors: 64 });
        queues[0].publish();
        front_end.frontend.set_mem_table(&[region(&ram)]).expect("it is mapped again");
        let answer = queues[0].wait();
        model.check(seed, &answer.data);
    }
    // A second slot that nobody uses comes and goes.
    let other = SharedRam::for_queues(1, 1);
    let mut slot = region(&other);
    slot.guest_phys_addr = 1 << 40;
    slot.userspace_addr = USER_OFFSET + (1 << 40);
    front_end.frontend.add_mem_region(&slot).expect("a free address");
    play(&mut queues, &mut model, 77, 2);
    front_end.frontend.remove_mem_region(&slot).expect("it is there");
    front_end.frontend.remove_mem_region(&slot).expect_err("it is not there");
    drop(front_end);
    // The refusal ended that connection, and was told.
    served.server.stop();
    assert_eq!(served.told.lock().expect("it told").len(), 1);
}

#[test]
fn the_configuration_tells_of_a_resize() {
    let served = serve(1);
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = queues(&ram, 1, true);
    let mut front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, Wishes::default());
    let (ours, theirs) = UnixStream::pair().expect("a channel");
    front_end.frontend.set_backend_request_fd(&theirs).expect("it takes the channel");
    let capacity = |front_end: &mut FrontEnd| {
        u64::from_le_bytes(front_end.config()[..8].try_into().expect("eight bytes"))
    };
    assert_eq!(capacity(&mut front_end), SECTORS);
    let read = Ask::Read { sector: SECTORS, sectors: 1 };
    assert_eq!(queues[0].ask(&read).status, 1, "behind the end");
    served.disk.resize(32 << 20).expect("it grows");
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: request 2, version 1, no payload.
    let mut message = [0; 12];
    (&ours).read_exact(&mut message).expect("a message");
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(capacity(&mut front_end), 2 * SECTORS);
    assert_eq!(queues[0].ask(&read).status, 0, "inside by now");
    drop(front_end);
    served.stop();
}

#[test]
fn the_cache_mode_is_the_drivers_choice() {
    let served = serve(1);
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = queues(&ram, 1, true);
    let mut front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, Wishes::default());
    assert_eq!(front_end.config()[32], 1, "write-back at first");
    front_end.set_writeback(false);
    assert_eq!(front_end.config()[32], 0);
    // What was written through survives the death of the host, so it is in the file; this looks at the answer only.
    assert_eq!(queues[0].ask(&Ask::Write { sector: 0, data: vec![1; 512] }).status, 0);
    front_end.frontend.reset_device().expect("a reset");
    assert_eq!(front_end.config()[32], 1, "a reset takes it back");
    drop(front_end);
    served.stop();
}

#[test]
fn pages_that_are_written_are_logged() {
    let served = serve(1);
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = queues(&ram, 1, true);
    let front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, Wishes::default());
    let log_bytes = ram.len_bytes.div_ceil(LOG_PAGE_BYTES * 8).next_multiple_of(8);
    let log = std::fs::File::from(memfd_create("log", MemfdFlags::CLOEXEC).expect("memory"));
    ftruncate(&log, log_bytes).expect("memory");
    let base = VhostUserDirtyLogRegion {
        mmap_size: log_bytes,
        mmap_offset: 0,
        mmap_handle: std::os::fd::AsRawFd::as_raw_fd(&log),
    };
    front_end.frontend.set_log_base(0, Some(base)).expect("it is mapped");
    let dirty = || -> Vec<u64> {
        let mut bits = vec![0; usize::try_from(log_bytes).expect("small")];
        rustix::io::pread(log.as_fd(), &mut bits, 0).expect("the log");
        (0..log_bytes * 8)
            .filter(|page| bits[usize::try_from(page / 8).expect("small")] >> (page % 8) & 1 == 1)
            .collect()
    };
    queues[0].read(0, 8);
    assert_eq!(dirty(), Vec::<u64>::new(), "nothing is logged before it is asked for");
    // The used ring under the address of page 1, as QEMU does it: features with LOG_ALL, then the addresses.
    let all = front_end.features.with(Features(1 << 26));
    front_end.frontend.set_features(all.0).expect("while it works");
    let mut logged = addresses(&queues[0]);
    logged.flags = 1;
    logged.log_addr = Some(LOG_PAGE_BYTES);
    front_end.frontend.set_vring_addr(0, &logged).expect("while it works");
    queues[0].ask(&Ask::Write { sector: 0, data: vec![1; 512] });
    let slot = (64 << 10) / LOG_PAGE_BYTES;
    let status_page = slot; // Header and status share the slot's first page.
    assert_eq!(dirty(), [1, status_page]);
    queues[0].read(0, 16);
    assert_eq!(dirty(), [1, status_page, status_page + 2, status_page + 3], "8 KiB of data");
    drop(front_end);
    served.stop();
}

/// A message of the protocol: request, flags, payload.
fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("short");
    [&request.to_le_bytes()[..], &flags.to_le_bytes(), &len.to_le_bytes(), payload].concat()
}

fn reply(stream: &mut UnixStream) -> (u32, u64) {
    let mut bytes = [0; 20];
    stream.read_exact(&mut bytes).expect("a reply");
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    (number(0), u64::from_le_bytes(bytes[12..].try_into().expect("eight bytes")))
}

#[test]
fn the_device_status_is_kept_and_acknowledged() {
    let served = serve(1);
    let mut stream = UnixStream::connect(served.socket()).expect("it listens");
    let all = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::STATUS;
    stream.write_all(&message(1, 1, &[])).expect("GET_FEATURES");
    assert_eq!(reply(&mut stream).0, 1);
    stream.write_all(&message(16, 1, &all.bits().to_le_bytes())).expect("SET_PROTOCOL_FEATURES");
    // VERSION_1 and NEED_REPLY.
    for status in [1u64, 3, 11, 15] {
        stream.write_all(&message(39, 1 | 8, &status.to_le_bytes())).expect("SET_STATUS");
        assert_eq!(reply(&mut stream), (39, 0));
        stream.write_all(&message(40, 1, &[])).expect("GET_STATUS");
        assert_eq!(reply(&mut stream), (40, status));
    }
    drop(stream);
    served.stop();
}

#[test]
fn a_guest_that_breaks_its_ring_is_told_to_reset() {
    let served = serve(1);
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = queues(&ram, 1, true);
    let mut front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, Wishes::default());
    queues[0].ask(&Ask::Write { sector: 7, data: vec![4; 512] });
    let error = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
    front_end.frontend.set_vring_err(0, &img_tests::guest::vhost::event(&error)).expect("it is taken");
    queues[0].make_available(SIZE + 5);
    queues[0].kick();
    let patience = Timespec { tv_sec: 60, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(error.as_fd(), PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "the device says that the queue is broken");
    assert_eq!(queues[0].answer(), None);
    // A reset, and the same device serves a new driver.
    front_end.frontend.reset_device().expect("a reset");
    let mut queues = self::queues(&ram, 1, true);
    front_end.frontend.set_features(front_end.features.0).expect("again");
    front_end.inflight = None;
    let inflight = vhost::vhost_user::message::VhostUserInflight::new(0, 0, 1, SIZE);
    front_end.frontend.get_inflight_fd(&inflight).expect("new memory");
    front_end.start_queue(0, &queues[0]);
    assert_eq!(queues[0].read(7, 1), vec![4; 512]);
    drop(front_end);
    served.server.stop();
    let told = served.told.lock().expect("it told").join("\n");
    assert!(told.contains("a queue is broken: the available ring names descriptor 133"), "{told}");
}

/// Messages of every number with hostile content: an answer or the end of the connection, and the next front end is
/// served.
#[test]
fn hostile_messages_end_the_connection_at_most() {
    let served = serve(1);
    let mut random = Random::new(5);
    for round in 0..400u32 {
        let mut stream = UnixStream::connect(served.socket()).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        for _ in 0..random.below(4) {
            let mut payload = vec![0; usize::try_from(random.below(80)).expect("small")];
            if random.below(2) == 0 {
                random.fill(&mut payload);
            }
            let request = u32::try_from(random.below(48)).expect("small");
            let flags = if random.below(8) == 0 { round } else { 1 | 8 };
            let mut bytes = message(request, flags, &payload);
            if random.below(10) == 0 {
                let shorter = bytes.len() - 1;
                bytes.truncate(shorter);
            }
            if random.below(10) == 0 {
                bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
            }
            if stream.write_all(&bytes).is_err() {
                break;
            }
        }
    }
    let ram = SharedRam::for_queues(1, SLOTS);
    let mut queues = queues(&ram, 1, true);
    let front_end = FrontEnd::start(&served.socket(), &ram, &queues, None, Wishes::default());
    play(&mut queues, &mut model(), 3, 2);
    drop(front_end);
    served.server.stop();
}

#[test]
fn two_servers_do_not_share_a_socket() {
    let served = serve(1);
    let device = Device::new(&served.disk, &DeviceOptions::default()).expect("a device");
    let tell: blk_backend::vhost_user::Told = Arc::new(|_: &str| {});
    let again = |path: &Path| Server::start(Arc::clone(&device), path, Arc::clone(&tell));
    assert!(again(&served.socket()).expect_err("it is taken").to_string().contains("listens there already"));
    let file = served.directory.path().join("disk");
    assert!(again(&file).expect_err("it is a file").to_string().contains("not a socket"));
    drop(device);
    served.stop();
}
