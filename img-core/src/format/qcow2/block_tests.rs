//! Where the file ends: a storage past the page cache writes whole blocks, and cuts the file off behind a write that
//! ends inside one. Its own writers wait for that. A data plane that writes to the descriptor does not, so there must
//! be nothing to cut off while it has places behind the end.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    Qcow2,
    layer_tests::{audit, open, write},
};
use crate::{
    format::{CreateRequest, Driver, LayerWriter, OpenMode, OptionSet},
    storage::{
        MemoryStorage, Storage,
        testing::{Gated, Operation, Random},
    },
};

const DISK_BYTES: u64 = 64 << 20;

/// Long runs of slices are written in pieces of this. No file has longer blocks.
const PIECE_BYTES: u64 = 1 << 20;

/// Tables of all levels come to be at the end of the file, with their clusters or before them, and each makes the file
/// longer by a whole cluster, whatever the slices in which tables are kept in memory.
#[test]
fn tables_make_the_file_longer_by_whole_clusters() {
    for (cluster, refcount_bits, slice) in [
        ("4k", "64", "4096"),
        ("4k", "16", "512"),
        ("64k", "16", "512"),
        ("64k", "1", "65536"),
        ("2M", "64", "512"),
    ] {
        let mut shape = OptionSet::new();
        shape.set("cluster_size", cluster);
        shape.set("refcount_bits", refcount_bits);
        let mut runtime = OptionSet::new();
        runtime.set("l2-cache-entry-size", slice);

        let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::new("memory.qcow2"));
        let request = CreateRequest {
            virtual_size_bytes: DISK_BYTES,
            backing: None,
            options: &shape,
            open_file: &|_, _| unreachable!("one file"),
        };
        Qcow2.create(&memory, &request).expect("created");
        let watched = Arc::new(Gated::new(Arc::clone(&memory)));
        let layer =
            open(&(watched.clone() as Arc<dyn Storage>), OpenMode::Write, &runtime).expect("it opens");
        let cluster_bytes = layer.geometry.cluster_bytes();
        let past_the_end: Arc<AtomicU64> = Arc::default();
        let torn: Arc<Mutex<Vec<Range<u64>>>> = Arc::default();
        let watch = {
            let (memory, past_the_end, torn) = (Arc::clone(&memory), past_the_end.clone(), torn.clone());
            watched.close(move |request| {
                let is_write = matches!(request.operation, Operation::Write | Operation::Zero);
                if is_write && request.range_bytes.end > memory.len_bytes().expect("a length") {
                    past_the_end.fetch_add(1, Ordering::Relaxed);
                    if !request.range_bytes.end.is_multiple_of(cluster_bytes.min(PIECE_BYTES)) {
                        torn.lock().expect("no panic").push(request.range_bytes.clone());
                    }
                }
                false
            })
        };

        let mut random = Random::new(7);
        let bytes = vec![1; usize::try_from(cluster_bytes).expect("at most 2 MiB")];
        for round in 0..400 {
            let at = random.below(DISK_BYTES / cluster_bytes) * cluster_bytes;
            if random.below(3) == 0 {
                // The table comes to be, and is written, before anything behind it is.
                let prepared = layer.prepare_write(at..at + cluster_bytes).expect("prepared");
                layer.flush().expect("flushed");
                drop(prepared);
            } else if random.below(4) == 0 {
                layer.write_zeroes(at..at + cluster_bytes, random.below(2) == 0).expect("zeroed");
            } else {
                write(&layer, at, &bytes).expect("written");
            }
            if round % 16 == 0 {
                layer.flush().expect("flushed");
            }
        }
        layer.close().expect("closed");
        watch.open();
        assert!(past_the_end.load(Ordering::Relaxed) > 10, "{cluster}: the file has grown");
        let torn = torn.lock().expect("no panic");
        assert!(torn.is_empty(), "clusters of {cluster}, slices of {slice}: {torn:?}");
        drop(layer);
        audit(&memory);
    }
}
