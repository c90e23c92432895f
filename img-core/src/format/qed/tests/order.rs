//! What a power cut leaves between two steps of a drain.

use std::sync::Arc;

use super::{super::geometry::Geometry, audit, create, open};
use crate::{
    format::{LayerWriter as _, OpenMode, Repair},
    image::Image,
    storage::{MemoryStorage, Storage, testing::CrashRecorder},
};

/// A table that holds zeroes alone takes a place where a write that was given up has left bytes, which name a cluster:
/// L1 does not lead to the table before the bytes are gone.
#[test]
fn a_new_table_is_durable_before_it_is_named() {
    const CLUSTER: u64 = 4096;
    const DISK_BYTES: u64 = 1 << 20;
    let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::new("a.qed"));
    create(&memory, Geometry { cluster_bits: 12, table_bits: 0 }, DISK_BYTES);
    let recorder = CrashRecorder::new();
    let file = recorder.record(memory).expect("recorded");
    let layer = open(&file, OpenMode::Write).expect("opens");

    let given_up = layer.prepare_write(0..CLUSTER).expect("prepared");
    let behind = layer.prepare_write(CLUSTER..2 * CLUSTER).expect("prepared");
    let place = behind.step().at.0;
    file.write_at(&[7; 4096], place).expect("written");
    let entries: Vec<u8> =
        (0..512_u64).flat_map(|at| if at == 5 { place } else { 0 }.to_le_bytes()).collect();
    file.write_at(&entries, given_up.step().at.0).expect("written");
    layer.flush().expect("flushed");
    drop(given_up);
    assert!(layer.write_zeroes(2 * CLUSTER..3 * CLUSTER, true).expect("zeroed"));
    layer.flush().expect("flushed");
    drop(behind);

    let states = recorder.states(1, 2000);
    for state in states {
        let file: Arc<dyn Storage> = Arc::new(state.files[0].snapshot());
        let layer = open(&file, OpenMode::Write).expect("opens");
        let image = Image::from_layers(vec![Arc::new(layer)]).expect("one layer");
        let mut guest = vec![1; 1 << 20];
        image.read_at(&mut guest, 0).expect("readable");
        assert!(guest.iter().all(|byte| *byte == 0), "{} {}", state.moment, state.description);
        image.close().expect("closed");
        let report = audit(&file, Repair::Nothing);
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{}", state.description);
    }
}
