//! What one thread does while another is in the middle of its work.

use std::sync::Arc;

use super::{super::geometry::Geometry, audit, create, open};
use crate::{
    format::{Layer as _, LayerWriter as _, OpenMode, Place, Repair},
    storage::{
        MemoryStorage, Storage,
        testing::{Gated, Operation},
    },
};

/// A flush has seen that the file is too short when a prepared write makes it longer than the flush will.
#[test]
fn a_flush_that_sets_the_length_cuts_no_write_off() {
    const CLUSTER: u64 = 4096;
    const CLUSTER_LEN: usize = 4096;
    let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::new("a.qed"));
    create(&memory, Geometry { cluster_bits: 12, table_bits: 0 }, 1 << 20);
    let gated = Arc::new(Gated::new(Arc::clone(&memory)));
    let file: Arc<dyn Storage> = gated.clone();
    let layer = open(&file, OpenMode::Write).expect("opens");

    // On the map, its last bytes left out as they are zeroes: the file ends inside its cluster.
    let first = layer.prepare_write(0..512).expect("prepared");
    file.write_at(&[1; 512], first.step().at.0).expect("written");
    first.commit().expect("committed");
    let second = layer.prepare_write(CLUSTER..2 * CLUSTER).expect("prepared");
    let gate = gated.close(|request| request.operation == Operation::Resize);
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| layer.flush());
        gate.wait_until_reached();
        file.write_at(&[2; CLUSTER_LEN], second.step().at.0).expect("written");
        gate.open();
        flush.join().expect("no panic").expect("flushed");
    });
    second.commit().expect("committed");

    let mut extents = Vec::new();
    layer.map_range(CLUSTER..2 * CLUSTER, &mut extents).expect("mapped");
    let [Place::Data { at, .. }] = extents.iter().map(|extent| extent.place).collect::<Vec<_>>()[..] else {
        panic!("one piece of data, not {extents:?}")
    };
    let mut bytes = [0; CLUSTER_LEN];
    file.read_at(&mut bytes, at.0).expect("readable");
    assert!(bytes.iter().all(|&byte| byte == 2), "the flush cut the write off");
    layer.close().expect("closed");
    drop(layer);
    let report = audit(&memory, Repair::Nothing);
    assert_eq!((report.corruptions, report.leaks, report.allocated_clusters), (0, 0, 2));
}
