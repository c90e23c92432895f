//! Whatever clients do over NBD, in every framing, several requests at a time: what they read is what was written, and
//! what the image holds at the end is the same.

use std::{fs, path::Path};

use img_tests::{
    command::qemu_img,
    daemon::Daemon,
    nbd::{Client, Framing, Reply, command, flag},
    pattern::{Random, assert_same, noise},
    proptest_config,
};
use proptest::{collection::vec, prelude::*};

const DISK: usize = 3 << 20;

/// What a client does, on ranges that requests sent together do not share.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read,
    Write { fua: bool },
    Zero { no_hole: bool, fua: bool },
    FastZero,
    Trim,
    Cache,
    Flush,
    Status { one: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Read),
        5 => any::<bool>().prop_map(|fua| Step::Write { fua }),
        2 => any::<(bool, bool)>().prop_map(|(no_hole, fua)| Step::Zero { no_hole, fua }),
        1 => Just(Step::FastZero),
        1 => Just(Step::Trim),
        1 => Just(Step::Cache),
        1 => Just(Step::Flush),
        2 => any::<bool>().prop_map(|one| Step::Status { one }),
    ]
}

/// Steps sent together: kind, where the range begins between its neighbours, and its length.
fn batch() -> impl Strategy<Value = Vec<(Step, u32, u32)>> {
    vec((step(), any::<u32>(), any::<u32>()), 1..8)
}

/// The part of the disk that is one request's own, cut to a range by two numbers.
fn range(at: usize, of: usize, start: u32, len: u32) -> std::ops::Range<usize> {
    let room = DISK / of;
    let start = if start.is_multiple_of(3) { (start as usize % room) & !4095 } else { start as usize % room };
    let len = match len % 4 {
        0 => (len as usize % 70_000) & !511,
        1 => len as usize % 5000,
        2 => 65536,
        _ => len as usize % (room - start + 1),
    };
    at * room + start..at * room + (start + len.max(1)).min(room)
}

struct Served {
    model: Vec<u8>,
    client: Client,
    seed: u64,
}

impl Served {
    fn connect(directory: &Path, framing: Framing, model: Vec<u8>, seed: u64) -> Self {
        let contexts: &[&str] =
            if framing == Framing::Simple { &[] } else { &["base:allocation", "qemu:allocation-depth"] };
        let client = Client::connect(&directory.join("socket"), "", framing, contexts).unwrap();
        assert_eq!((client.size_bytes, client.contexts.len()), (DISK as u64, contexts.len()));
        Self { model, client, seed }
    }

    /// Sends all steps, then takes all replies, in whatever order they come.
    fn batch(&mut self, steps: &[(Step, u32, u32)]) {
        let mut sent = Vec::new();
        for (at, (step, start, len)) in steps.iter().enumerate() {
            if matches!(step, Step::Status { .. }) && self.client.contexts.is_empty() {
                continue;
            }
            let range = range(at, steps.len(), *start, *len);
            let (kind, flags) = request(*step);
            self.seed += 1;
            let payload = if kind == command::WRITE { noise(self.seed, range.len()) } else { Vec::new() };
            let (offset, length) =
                if kind == command::FLUSH { (0, 0) } else { (range.start as u64, range.len() as u64) };
            let cookie = self.client.send(kind, flags, offset, length, &payload).unwrap();
            sent.push((cookie, *step, range, payload));
        }
        for _ in 0..sent.len() {
            let (cookie, reply) = self.client.receive().unwrap();
            let (_, step, range, payload) = sent.iter().find(|(of, ..)| *of == cookie).unwrap();
            let too_slow = matches!(step, Step::FastZero) && reply.error == 95;
            assert!(reply.error == 0 || too_slow, "{step:?} {range:?}: {reply:?}");
            match step {
                Step::Read => assert_same(&reply.data, &self.model[range.clone()], "read"),
                Step::Write { .. } => self.model[range.clone()].copy_from_slice(payload),
                Step::Zero { .. } => self.model[range.clone()].fill(0),
                Step::FastZero if reply.error == 0 => self.model[range.clone()].fill(0),
                Step::Status { one } => self.check_status(&reply, range, *one),
                _ => {}
            }
        }
        for (_, step, range, _) in sent {
            if matches!(step, Step::Trim) {
                self.after_trim(range);
            }
        }
    }

    /// After a trim each byte is as before or zero; which, is the format's choice, and from now on it stays so.
    fn after_trim(&mut self, range: std::ops::Range<usize>) {
        let reply = self.client.call(command::READ, 0, range.start as u64, range.len() as u64, &[]).unwrap();
        let old = &mut self.model[range];
        assert!(old.iter().zip(&reply.data).all(|(old, new)| *new == 0 || new == old));
        old.copy_from_slice(&reply.data);
    }

    fn check_status(&self, reply: &Reply, range: &std::ops::Range<usize>, one: bool) {
        assert_eq!(reply.status.len(), self.client.contexts.len());
        for (id, runs) in &reply.status {
            let total: u64 = runs.iter().map(|(len, _)| len).sum();
            assert!(total > 0 && total <= range.len() as u64, "{runs:?} for {range:?}");
            assert!(
                if one { runs.len() == 1 } else { total == range.len() as u64 },
                "{runs:?} for {range:?}"
            );
            let mut at = range.start;
            for (len, flags) in runs {
                let end = at + usize::try_from(*len).unwrap();
                // Bit 1 is NBD_STATE_ZERO.
                if self.client.contexts[id] == "base:allocation" && flags & 2 != 0 {
                    assert!(self.model[at..end].iter().all(|byte| *byte == 0), "{at}..{end} is no zero");
                }
                at = end;
            }
        }
    }
}

fn request(step: Step) -> (u16, u16) {
    let flags = |no_hole: bool, fua: bool| {
        (if no_hole { flag::NO_HOLE } else { 0 }) | (if fua { flag::FUA } else { 0 })
    };
    match step {
        Step::Read => (command::READ, 0),
        Step::Write { fua } => (command::WRITE, flags(false, fua)),
        Step::Zero { no_hole, fua } => (command::WRITE_ZEROES, flags(no_hole, fua)),
        Step::FastZero => (command::WRITE_ZEROES, flag::FAST_ZERO),
        Step::Trim => (command::TRIM, 0),
        Step::Cache => (command::CACHE, 0),
        Step::Flush => (command::FLUSH, 0),
        Step::Status { one } => (command::BLOCK_STATUS, if one { flag::REQ_ONE } else { 0 }),
    }
}

/// The kinds of images that are served: format, options of `create`, and whether there is something below.
const KINDS: [(&str, &str, bool); 4] = [
    ("raw", "preallocation=off", false),
    ("qcow2", "cluster_size=65536", false),
    ("qcow2", "cluster_size=4096", true),
    ("qcow2", "cluster_size=65536,extended_l2=on", true),
];

proptest! {
    #![proptest_config(proptest_config(24, "nbd_exports_are_the_model_byte_for_byte"))]

    #[test]
    fn nbd_exports_are_the_model_byte_for_byte(
        kind in 0..KINDS.len(),
        rounds in vec((0..3_usize, vec(batch(), 1..12)), 1..4),
        seed: u32,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let (format, options, below) = KINDS[kind];
        let mut model = vec![0; DISK];
        if below {
            Random::new(seed.into()).fill(&mut model[..DISK / 2]);
            fs::write(directory.path().join("below"), &model).unwrap();
        }
        let size = DISK.to_string();
        let mut create = vec!["create", "-q", "-f", format, "-o", options];
        create.extend(if below { &["-b", "below", "-F", "raw"][..] } else { &[] });
        create.extend(["disk", &size]);
        qemu_img(directory.path(), create).output().success();

        let daemon = Daemon::start(
            directory.path(),
            ["nbd", "--listen", "unix:socket", "--image", "disk", "--format", format],
        );
        let mut seed = u64::from(seed) << 20;
        for (framing, batches) in rounds {
            let framing = [Framing::Simple, Framing::Structured, Framing::Extended][framing];
            let mut served = Served::connect(directory.path(), framing, model, seed);
            batches.iter().for_each(|batch| served.batch(batch));
            (model, seed) = (served.model, served.seed);
        }
        let ended = daemon.terminate();
        prop_assert_eq!(ended.code, Some(0));
        // What it did is summed up at the end; nothing else is said.
        let is_summary = |line: &str| line.contains(" disk0: ") || line.contains(" CPU time ");
        prop_assert!(ended.stderr.lines().all(is_summary), "{}", ended.stderr);
        qemu_img(directory.path(), ["convert", "-f", format, "-O", "raw", "disk", "end"]).output().success();
        assert_same(&fs::read(directory.path().join("end")).unwrap(), &model, "the image at the end");
        if format == "qcow2" {
            qemu_img(directory.path(), ["check", "-f", format, "disk"]).output().success();
        }
    }
}
