//! Raw data files: while their bytes and the map become zero no write comes in between.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{
    layer::Qcow2Layer,
    layer_tests::{read, reference, text, write},
};
use crate::{
    format::{Attempt, Below, LayerWriter, Lease, OpenContext, OpenMode, OptionSet},
    storage::{
        MemoryStorage, Storage,
        testing::{Gated, Operation, Random},
    },
};

const DISK_BYTES: u64 = 1 << 20;
const CLUSTER: u64 = 65_536;

/// An image whose guest bytes are in `data`, a raw data file, all of them mapped there.
fn image_over(data: &Arc<dyn Storage>) -> Qcow2Layer {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("a.qcow2");
    let options = format!("data_file={},data_file_raw=on", text(&dir.path().join("a.data")));
    reference("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&image), "1M"]);
    let bytes = std::fs::read(&image).expect("it was made");
    let context = OpenContext {
        mode: OpenMode::Write,
        options: &OptionSet::new(),
        open_file: &|_, _| Ok(Arc::clone(data)),
    };
    let layer = Qcow2Layer::open(Arc::new(MemoryStorage::from_bytes("image", &bytes)), &context);
    let layer = layer.expect("it opens");
    write(&layer, 0, &vec![1; usize::try_from(DISK_BYTES).unwrap()]).expect("written");
    layer
}

fn memory() -> Arc<MemoryStorage> {
    Arc::new(MemoryStorage::new("data"))
}

/// A write in place that has begun ends before the bytes below it are zeroed, with the map's words and without.
#[test]
fn zeroes_wait_for_writes_in_place() {
    for discards in [false, true] {
        let memory = memory();
        let data: Arc<dyn Storage> = memory.clone();
        let gated = Arc::new(Gated::new(data));
        let layer = image_over(&(gated.clone() as Arc<dyn Storage>));
        let prepared = layer.prepare_write(CLUSTER..CLUSTER + 512).expect("prepared");
        let landed = AtomicBool::new(false);
        let gate = gated.close(|request| request.operation == Operation::Zero);
        std::thread::scope(|scope| {
            let zeroing = scope.spawn(|| {
                if discards {
                    LayerWriter::discard(&layer, 0..4 * CLUSTER).expect("discarded");
                } else {
                    assert!(layer.write_zeroes(0..4 * CLUSTER, true).expect("zeroed"));
                }
            });
            let watching = scope.spawn(|| {
                gate.wait_until_reached();
                assert!(landed.load(Ordering::SeqCst), "zeroed under a write in place");
                gate.let_pass();
            });
            data_write(&layer, 7, prepared.step().at.0);
            landed.store(true, Ordering::SeqCst);
            prepared.commit().expect("committed");
            watching.join().expect("no panic");
            zeroing.join().expect("no panic");
        });
        assert_eq!(memory.to_vec(), read(&layer, 0..DISK_BYTES));
        assert!(memory.to_vec()[..usize::try_from(4 * CLUSTER).unwrap()].iter().all(|&byte| byte == 0));
    }
}

fn data_write(layer: &Qcow2Layer, byte: u8, at: u64) {
    layer.data_file.as_ref().expect("it has one").write_at(&[byte; 512], at).expect("written");
}

/// While the bytes are being zeroed, nobody writes them in place, from memory or waiting; the clusters around them
/// are written as ever. Who waited writes over the zeroes.
#[test]
fn writes_wait_for_zeroes_in_their_clusters_alone() {
    let memory = memory();
    let data: Arc<dyn Storage> = memory.clone();
    let gated = Arc::new(Gated::new(data));
    let layer = image_over(&(gated.clone() as Arc<dyn Storage>));
    let gate = gated.close(|request| request.operation == Operation::Zero);
    let zeroed = AtomicBool::new(false);
    let attempt = |guest| {
        let _lease = Lease::of(&layer);
        let mut steps = Vec::new();
        layer.try_prepare_write(guest, &|_| Below::Zeroes, &mut steps).expect("asked")
    };
    assert_eq!(attempt(CLUSTER..CLUSTER + 512), Attempt::Done(None), "in place, from memory");
    std::thread::scope(|scope| {
        let zeroing = scope.spawn(|| {
            assert!(layer.write_zeroes(CLUSTER..3 * CLUSTER, true).expect("zeroed"));
        });
        gate.wait_until_reached();
        assert_eq!(attempt(0..512), Attempt::Done(None));
        for (guest, reason) in [
            (CLUSTER..CLUSTER + 512, "inside"),
            (0..DISK_BYTES, "around"),
            (3 * CLUSTER - 1..3 * CLUSTER, "its last byte"),
        ] {
            assert_eq!(attempt(guest), Attempt::Busy, "{reason}");
        }
        let before = layer.prepare_write(CLUSTER - 512..CLUSTER + 512).expect("prepared");
        assert_eq!(before.step().guest_bytes, CLUSTER - 512..CLUSTER, "up to what is being zeroed");
        data_write(&layer, 8, before.step().at.0);
        before.commit().expect("committed");

        let waiting = scope.spawn(|| {
            write(&layer, CLUSTER, &[9; 512]).expect("written");
            assert!(zeroed.load(Ordering::SeqCst), "written while it was being zeroed");
        });
        zeroed.store(true, Ordering::SeqCst);
        gate.open();
        zeroing.join().expect("no panic");
        waiting.join().expect("no panic");
    });
    let mut model = vec![1; usize::try_from(DISK_BYTES).unwrap()];
    model[usize::try_from(CLUSTER).unwrap()..usize::try_from(3 * CLUSTER).unwrap()].fill(0);
    model[usize::try_from(CLUSTER - 512).unwrap()..][..512].fill(8);
    model[usize::try_from(CLUSTER).unwrap()..][..512].fill(9);
    assert_eq!(memory.to_vec(), model);
    assert_eq!(read(&layer, 0..DISK_BYTES), model);
    assert_eq!(layer.zeroing.load(Ordering::SeqCst), 0);
}

/// Whatever overlaps at the same time, the data file reads as the guest does when all is quiet.
#[test]
fn the_data_file_is_the_disk_after_any_race() {
    let memory = memory();
    let layer = image_over(&(memory.clone() as Arc<dyn Storage>));
    std::thread::scope(|scope| {
        for seed in 1..5_u64 {
            let layer = &layer;
            scope.spawn(move || {
                let mut random = Random::new(seed);
                for _ in 0..300 {
                    let start = random.below(DISK_BYTES / 4 / 512) * 512;
                    let end = start + (random.below(300) + 1) * 512;
                    let clusters = start / CLUSTER * CLUSTER..end.next_multiple_of(CLUSTER);
                    match random.below(4) {
                        0 => drop(layer.write_zeroes(clusters, random.below(2) == 0).expect("zeroed")),
                        1 => LayerWriter::discard(layer, clusters).expect("discarded"),
                        _ => {
                            let bytes = vec![u8::try_from(random.below(255)).unwrap(); 4096];
                            write(layer, start, &bytes).expect("written");
                        }
                    }
                }
            });
        }
    });
    assert!(memory.to_vec() == read(&layer, 0..DISK_BYTES));
    LayerWriter::close(&layer).expect("closed");
}
