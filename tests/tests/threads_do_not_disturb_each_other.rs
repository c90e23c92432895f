//! Threads that write, zero, discard, compress and flush their own clusters of one image, in tables that they share,
//! each find what they left there; the image is sound afterwards.

use std::sync::Arc;

use img_core::{
    format::{OpenMode, OptionSet, Repair},
    image::Image,
    storage::{MemoryStorage, Storage},
};
use img_tests::{
    memory,
    pattern::Random,
    scenario::{Layout, Op, Qcow2, Qed, apply},
};

const THREADS: u64 = 4;
const ROUNDS: u64 = 250;
const CLUSTERS: u64 = 64;

fn layout(cluster_bits: u32, refcount_bits: u32, extended_l2: bool, lazy_refcounts: bool) -> Layout {
    Layout::Qcow2(Qcow2 { version: 3, cluster_bits, refcount_bits, extended_l2, zstd: false, lazy_refcounts })
}

#[test]
fn threads_do_not_disturb_each_other() {
    for (layout, external) in [
        (layout(9, 16, false, false), false),
        (layout(12, 64, false, true), false),
        (layout(12, 1, false, false), false),
        (layout(14, 16, true, false), false),
        (layout(12, 16, false, false), true),
        (layout(14, 16, true, false), true),
        (Layout::Qed(Qed { cluster_bits: 12, table_bits: 0 }), false),
        (Layout::Qed(Qed { cluster_bits: 13, table_bits: 2 }), false),
    ] {
        let data: Arc<dyn Storage> = Arc::new(MemoryStorage::new("data"));
        let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new("image.qcow2"));
        let data = external.then_some(&data);
        let virtual_size_bytes = THREADS * CLUSTERS * layout.cluster_bytes();
        memory::create_beside(&file, &layout, virtual_size_bytes, data).expect("created");
        let open =
            |mode: OpenMode, options: &OptionSet| memory::open_beside(Arc::clone(&file), data, mode, options);
        let image = open(OpenMode::Write, &layout.smallest_caches()).expect("it opens");
        let left: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let image = &image;
            let thread = |thread| scope.spawn(move || history(image, &layout, external, thread));
            let threads: Vec<_> = (0..THREADS).map(thread).collect();
            threads.into_iter().map(|thread| thread.join().expect("it ends")).collect()
        });
        image.close().expect("closed");
        let image = open(OpenMode::Check { repair: false }, &OptionSet::new()).expect("it opens");
        let mut texts = Vec::new();
        let report = image.check(Repair::Nothing, &mut |finding| texts.push(finding.text)).expect("checked");
        assert_eq!(
            (report.corruptions, report.check_errors, report.leaks),
            (0, 0, 0),
            "{layout:?} {texts:#?}"
        );
        drop(image);
        let image = open(OpenMode::Read, &OptionSet::new()).expect("it opens");
        for (thread, bytes) in (0..).zip(&left) {
            for (index, &byte) in (0..).zip(bytes) {
                expect(&image, &layout, place(&layout, thread, index), byte, "at the end");
            }
        }
    }
}

/// Neighbours belong to different threads.
fn place(layout: &Layout, thread: u64, index: u64) -> u64 {
    (index * THREADS + thread) * layout.cluster_bytes()
}

fn expect(image: &Image, layout: &Layout, at: u64, byte: u8, when: &str) {
    let mut guest = vec![!byte; usize::try_from(layout.cluster_bytes()).expect("small")];
    image.read_at(&mut guest, at).expect("readable");
    let wrong = guest.iter().position(|&found| found != byte);
    assert_eq!(
        wrong,
        None,
        "{layout:?}: cluster at {at:#x} is not {byte} {when}, but {}",
        guest[wrong.unwrap_or(0)]
    );
}

/// What one thread does, and the byte that each of its clusters is left with.
fn history(image: &Image, layout: &Layout, external: bool, thread: u64) -> Vec<u8> {
    let mut random = Random::new(thread + 7);
    let mut model = vec![0_u8; usize::try_from(CLUSTERS).expect("small")];
    let len = layout.cluster_bytes();
    for round in 0..ROUNDS {
        let index = random.below(CLUSTERS);
        let at = place(layout, thread, index);
        let byte = u8::try_from(round % 255 + 1).expect("a byte");
        let kind = random.below(8);
        let (op, byte) = match kind {
            0 => (Op::Discard { at, len }, 0),
            1 => (Op::Zero { at, len, unmap: true }, 0),
            2 => (Op::Zero { at, len, unmap: false }, 0),
            3 if !external && layout.codec().is_some() => (Op::Compress { at, len, byte }, byte),
            _ => (Op::Write { at, len, byte }, byte),
        };
        apply(image, &op, layout).expect("done");
        model[usize::try_from(index).expect("small")] = byte;
        expect(image, layout, at, byte, "at once");
        if round % 16 == thread {
            image.flush().expect("flushed");
        }
        let index = random.below(CLUSTERS);
        expect(
            image,
            layout,
            place(layout, thread, index),
            model[usize::try_from(index).expect("small")],
            "later",
        );
    }
    model
}
