//! The opened image under many threads, and on files that lie.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use super::{
    Qcow2,
    entry::{COPIED, ZERO},
    feature::incompatible,
    layer::Qcow2Layer,
    layer_tests::{audit, new_image, open, read, reference, text, write},
    lease::Epochs,
};
use crate::{
    Error,
    format::{Driver, HostFile, Layer, LayerWriter, Lease, OpenContext, OpenMode, OptionSet, Place},
    storage::{
        FileOptions, Storage,
        testing::{Gate, Gated, Request},
    },
};

fn open_to_write(storage: &Arc<dyn Storage>) -> Qcow2Layer {
    open(storage, OpenMode::Write, &OptionSet::new()).expect("it opens")
}

/// Threads that write, zero, discard and flush their own stripes, which share clusters and tables with the
/// stripes of the others, each find what they wrote.
#[test]
fn threads_do_not_disturb_each_other() {
    const THREADS: u64 = 4;
    /// Smaller than a cluster in most shapes: neighbours meet in it.
    const STRIPE_BYTES: u64 = 1536;
    for shape in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=2,lazy_refcounts=on",
        "cluster_size=16k,extended_l2=on",
    ] {
        let storage = new_image(shape);
        let layer = open_to_write(&storage);
        let stripes = layer.virtual_size_bytes() / STRIPE_BYTES / THREADS;
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let layer = &layer;
                scope.spawn(move || {
                    let mut random = thread + 1;
                    let mut model = vec![0_u8; usize::try_from(stripes).unwrap()];
                    for round in 0..150_u64 {
                        // xorshift: any spread will do.
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let stripe = random % stripes;
                        let at = (stripe * THREADS + thread) * STRIPE_BYTES;
                        let byte = u8::try_from(round).unwrap();
                        write(layer, at, &vec![byte; usize::try_from(STRIPE_BYTES).unwrap()])
                            .expect("written");
                        model[usize::try_from(stripe).unwrap()] = byte;
                        if round % 16 == thread {
                            LayerWriter::flush(layer).expect("flushed");
                        }
                        if round % 8 == 0 {
                            let _lease = Lease::of(layer);
                            let found = read(layer, at..at + STRIPE_BYTES);
                            assert!(found.iter().all(|&found| found == byte), "{shape}: at {at:#x}");
                        }
                    }
                    for (stripe, byte) in model.iter().enumerate() {
                        let at = (stripe as u64 * THREADS + thread) * STRIPE_BYTES;
                        let found = read(layer, at..at + STRIPE_BYTES);
                        assert!(
                            found.iter().all(|found| found == byte),
                            "{shape}: stripe {stripe} of {thread}"
                        );
                    }
                });
            }
        });
        LayerWriter::close(&layer).expect("closed");
        audit(&storage);
    }
}

/// A second write to a cluster waits until the first has landed, and then finds its bytes.
#[test]
fn a_second_write_waits_for_the_first() {
    let storage = new_image("cluster_size=64k");
    let layer = open_to_write(&storage);
    let first = layer.prepare_write(0..100).expect("prepared");
    let landed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            let second = layer.prepare_write(1000..1100).expect("prepared");
            assert!(landed.load(Ordering::SeqCst), "the first has not landed yet");
            assert_eq!(second.step().fill_before_bytes, 0, "it is in place by now");
            second.commit().expect("committed");
        });
        let at = first.step().at.0;
        storage.write_at(&[7; 100], at).expect("written");
        landed.store(true, Ordering::SeqCst);
        first.commit().expect("committed");
        second.join().expect("it ends");
    });
}

/// A cluster that was freed is not given out while a lease from before the free is held.
#[test]
fn a_lease_keeps_freed_clusters_from_others() {
    let storage = new_image("cluster_size=64k");
    let layer = open_to_write(&storage);
    write(&layer, 0, &[1; 65_536]).expect("written");
    LayerWriter::flush(&layer).expect("flushed");
    let place = |guest: u64| {
        let mut extents = Vec::new();
        layer.map_range(guest..guest + 1, &mut extents).expect("mapped");
        extents[0].place
    };
    let lease = Lease::of(&layer);
    let Place::Data { at: held, .. } = place(0) else { panic!("it was written") };
    LayerWriter::discard(&layer, 0..65_536).expect("discarded");
    LayerWriter::flush(&layer).expect("flushed");
    write(&layer, 65_536, &[2; 65_536]).expect("written");
    assert!(!matches!(place(65_536), Place::Data { at, .. } if at == held), "given out under a lease");
    drop(lease);
    LayerWriter::flush(&layer).expect("flushed");
    write(&layer, 131_072, &[3; 65_536]).expect("written");
    assert!(matches!(place(131_072), Place::Data { at, .. } if at == held), "free again");
    LayerWriter::close(&layer).expect("closed");
    audit(&storage);
}

/// Flushes, and does `meanwhile` when the flush has stopped at the gate: what stopped there, and what came of it;
/// `None` where the flush ended without coming by.
fn during_a_flush<T>(layer: &Qcow2Layer, gate: &Gate, meanwhile: impl FnOnce() -> T) -> Option<(Request, T)> {
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| {
            let flushed = LayerWriter::flush(layer);
            gate.let_pass();
            flushed
        });
        let stopped = gate.wait().map(|reached| (reached, meanwhile()));
        gate.let_pass();
        flush.join().expect("no panic").expect("flushed");
        stopped
    })
}

/// While a flush waits for the disk, at each of its operations, others allocate, commit and give up; what they did is
/// there afterwards, and a flush that began before is not held to it.
#[test]
fn a_flush_holds_nobody_up() {
    for stop in 0.. {
        let memory = new_image("cluster_size=512");
        let gated = Arc::new(Gated::new(Arc::clone(&memory)));
        let storage: Arc<dyn Storage> = gated.clone();
        let layer = open_to_write(&storage);
        write(&layer, 0, &[1; 16_384]).expect("written");
        let passed = AtomicU64::new(0);
        let gate = gated.close(move |request| {
            request.operation.is_change() && passed.fetch_add(1, Ordering::SeqCst) == stop
        });
        let stopped = during_a_flush(&layer, &gate, || {
            // In slices that are being written, in new ones, and in a new table.
            write(&layer, 16_384, &[2; 16_384])?;
            write(&layer, 200_100, &[3; 5000])?;
            LayerWriter::discard(&layer, 0..4096)
        });
        let reached = stopped.map(|(reached, done)| {
            done.expect("changed");
            reached
        });
        let Some(reached) = reached else {
            assert!(stop >= 5, "a flush of new tables is at least five operations, not {stop}");
            return;
        };
        for (guest, byte) in [(0..4096, 0), (4096..16_384, 1), (16_384..32_768, 2), (200_100..205_100, 3)] {
            assert!(read(&layer, guest.clone()).iter().all(|found| *found == byte), "{guest:?}, {reached:?}");
        }
        LayerWriter::close(&layer).expect("closed");
        audit(&memory);
    }
}

/// Whoever asks whether a sync of the files would make all of it durable hears no from the first change to the end of
/// the flush that writes its tables, whatever operation that is at.
#[test]
fn a_sync_is_not_enough_before_the_flush_of_the_tables_has_ended() {
    for stop in 0.. {
        let gated = Arc::new(Gated::new(new_image("cluster_size=512")));
        let layer = open_to_write(&(gated.clone() as Arc<dyn Storage>));
        assert!(layer.files_to_sync().is_some(), "nothing was changed");
        write(&layer, 0, &[1; 4096]).expect("written");
        assert!(layer.files_to_sync().is_none(), "tables wait to be written");
        let passed = AtomicU64::new(0);
        let gate = gated.close(move |_| passed.fetch_add(1, Ordering::SeqCst) == stop);
        let stopped = during_a_flush(&layer, &gate, || layer.files_to_sync().is_some());
        if let Some((reached, is_enough)) = &stopped {
            assert!(!is_enough, "a sync is taken for enough at {reached:?}");
        }
        assert!(layer.files_to_sync().is_some(), "all of it is written");
        LayerWriter::close(&layer).expect("closed");
        if stopped.is_none() {
            assert!(stop >= 5, "a flush of new tables is at least five operations, not {stop}");
            return;
        }
    }
}

/// Who comes to flush is content with a drain that began after that, by whomever, and with no earlier one.
#[test]
fn flushes_that_wait_share_a_drain() {
    let storage = new_image("cluster_size=4k");
    let layer = open_to_write(&storage);
    write(&layer, 0, &[1; 4096]).expect("written");
    LayerWriter::flush(&layer).expect("flushed");
    let came = layer.state().drains_begun;
    let begun = || layer.state().drains_begun - came;
    let flush_of_who_came = || layer.drain_when(layer.state(), |state| state.drained <= came);
    flush_of_who_came().expect("flushed");
    assert_eq!(begun(), 1, "the drain before does not count");
    flush_of_who_came().expect("flushed");
    assert_eq!(begun(), 1, "the one of another who came as early does");
    LayerWriter::flush(&layer).expect("flushed");
    assert_eq!(begun(), 2);
}

#[test]
fn epochs_end_when_their_pins_are_gone() {
    let epochs = Epochs::default();
    let old = epochs.pin();
    let first = epochs.close();
    let young = epochs.pin();
    assert!(!epochs.all_gone(first));
    drop(old);
    assert!(epochs.all_gone(first));
    let second = epochs.close();
    assert!(!epochs.all_gone(second));
    for _ in 0..20 {
        epochs.close();
        assert!(!epochs.all_gone(second));
    }
    drop(young);
    assert!(epochs.all_gone(second));
}

/// A cluster of guest data that stands on `structure`.
fn overlaps(structure: &str, at: fn(&Qcow2Layer) -> u64) {
    let storage = new_image("cluster_size=64k");
    {
        let layer = open_to_write(&storage);
        write(&layer, 0, &[1; 131_072]).expect("written");
        LayerWriter::close(&layer).expect("closed");
    }
    let layer = open_to_write(&storage);
    let table = layer.map.l1_entry(layer.root(), 0).expect("readable").table().expect("made");
    let host = at(&layer);
    storage.write_at(&(host | COPIED).to_be_bytes(), table).expect("written");
    let layer = open_to_write(&storage);
    match write(&layer, 100, &[2; 100]) {
        Err(Error::Overlap { structure: found, .. }) => assert_eq!(found, structure),
        other => panic!("{structure}: {other:?}"),
    }
    assert!(write(&layer, 70_000, &[2; 100]).is_err(), "{structure}: nothing is written any more");
    assert!(layer.header().incompatible & incompatible::CORRUPT != 0);
    let context = OpenContext {
        mode: OpenMode::Write,
        options: &OptionSet::new(),
        open_file: &|name, _| panic!("no file '{name}' to open"),
    };
    assert!(Qcow2.open(Arc::clone(&storage), &context).is_err(), "a corrupt image is not written");
}

#[test]
fn writes_over_metadata_are_refused() {
    overlaps("active L1 table", |layer| layer.header().l1_offset);
    overlaps("refcount table", |layer| layer.header().refcount_table_offset);
    overlaps("refcount block", |_| 2 << 16);
    overlaps("active L2 table", |layer| {
        layer.map.l1_entry(layer.root(), 0).expect("readable").table().expect("made")
    });
}

/// Entries that break the format's rules are named, and never followed.
#[test]
fn broken_entries_are_named() {
    for (at, word, structure) in [
        ("l1", 0x5_0200 | COPIED, "L1 entry"),
        ("l1", 0x00ff_0000_0000_0000 | COPIED, "L1 entry"),
        ("l2", 0x5_0200 | COPIED, "L2 entry"),
        ("l2", 0x5_0200 | ZERO, "L2 entry"),
    ] {
        let storage = new_image("cluster_size=64k");
        let layer = open_to_write(&storage);
        write(&layer, 0, &[1; 100]).expect("written");
        LayerWriter::close(&layer).expect("closed");
        let root = layer.root();
        let table = layer.map.l1_entry(root, 0).expect("readable").table().expect("made");
        let place = if at == "l1" { root.l1_offset } else { table };
        storage.write_at(&word.to_be_bytes(), place).expect("written");
        for mode in [OpenMode::Read, OpenMode::Write] {
            let layer = open(&storage, mode, &OptionSet::new()).expect("it opens");
            match layer.map_range(0..65_536, &mut Vec::new()) {
                Err(Error::Corrupt { structure: found, at_bytes, .. }) => {
                    assert_eq!((found, at_bytes), (structure, place));
                }
                other => panic!("{structure} {word:#x}: {other:?}"),
            }
            let is_marked = layer.header().incompatible & incompatible::CORRUPT != 0;
            assert_eq!(is_marked, mode == OpenMode::Write, "only who writes marks");
        }
    }
}

/// Guest data in an external file: read and written as the reference does.
#[test]
fn external_data_files() {
    let dir = tempfile::tempdir().expect("a directory");
    for raw in ["off", "on"] {
        let (image, data, flat) =
            (dir.path().join("a.qcow2"), dir.path().join("a.data"), dir.path().join("flat"));
        let options = format!("data_file={},data_file_raw={raw}", text(&data));
        reference("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&image), "1M"]);
        reference("qemu-io", &["-c", "write -P 1 64k 100k", text(&image)]);
        let storage: Arc<dyn Storage> =
            Arc::new(FileOptions::new().write(true).open(&image).expect("it opens"));
        let context = OpenContext {
            mode: OpenMode::Write,
            options: &OptionSet::new(),
            open_file: &|name, _| Ok(Arc::new(FileOptions::new().write(true).open(name)?)),
        };
        let layer = Qcow2Layer::open(storage, &context).expect("it opens");
        assert!(layer.file(HostFile(1)).is_some());
        let mut model = vec![0_u8; 1 << 20];
        model[65_536..65_536 + 102_400].fill(1);
        assert!(read(&layer, 0..1 << 20) == model);
        write(&layer, 500_000, &[5; 70_000]).expect("written");
        model[500_000..570_000].fill(5);
        LayerWriter::discard(&layer, 65_536..131_072).expect("discarded");
        model[65_536..131_072].fill(0);
        assert!(LayerWriter::write_zeroes(&layer, 524_288..589_824, true).expect("zeroed"));
        model[524_288..589_824].fill(0);
        assert!(layer.prepare_compressed(0, 100).is_err());
        assert!(read(&layer, 0..1 << 20) == model);
        LayerWriter::close(&layer).expect("closed");
        drop(layer);
        reference("qemu-img", &["check", "-q", text(&image)]);
        reference("qemu-img", &["convert", "-O", "raw", text(&image), text(&flat)]);
        assert!(std::fs::read(&flat).expect("converted") == model, "raw={raw}");
        if raw == "on" {
            assert!(
                std::fs::read(&data).expect("it is there") == model,
                "the data file reads as the guest does"
            );
        }
        std::fs::remove_file(&data).expect("removed");
    }
}

/// Zeroes and discards leave the same map as the reference's, over a backing file and without one.
#[test]
fn zeroes_and_discards_are_those_of_the_reference() {
    let dir = tempfile::tempdir().expect("a directory");
    let base = dir.path().join("base.qcow2");
    reference("qemu-img", &["create", "-q", "-f", "qcow2", text(&base), "4M"]);
    for options in [
        "cluster_size=64k",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=4k",
        "cluster_size=64k,compat=0.10",
    ] {
        for backing in [false, true] {
            let (theirs, ours) = (dir.path().join("theirs.qcow2"), dir.path().join("ours.qcow2"));
            let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
            if backing {
                args.extend(["-F", "qcow2", "-b", text(&base)]);
            }
            args.extend([text(&theirs), "4M"]);
            reference("qemu-img", &args);
            reference("qemu-io", &["-c", "write -P 1 0 1M", "-c", "write -c -P 2 2M 128k", text(&theirs)]);
            std::fs::copy(&theirs, &ours).expect("copied");
            let mut theirs_args =
                vec!["-d", "unmap", "-c", "discard 64k 128k", "-c", "discard 2M 64k", "-c", "discard 3M 64k"];
            let is_old = options.contains("0.10");
            if !is_old {
                theirs_args.extend([
                    "-c",
                    "write -z 256k 64k",
                    "-c",
                    "write -z -u 384k 64k",
                    "-c",
                    "write -z 2112k 64k",
                    "-c",
                    "write -z 3584k 64k",
                    "-c",
                    "write -z -u 3200k 64k",
                ]);
            }
            if options.contains("extended") {
                theirs_args.extend([
                    "-c",
                    "write -z -u 516k 12k",
                    "-c",
                    "write -z 3650k 6k",
                    "-c",
                    "write -P 9 386k 3k",
                ]);
            }
            theirs_args.push(text(&theirs));
            // The reference refuses to discard in old images over a backing file.
            if !(is_old && backing) {
                reference("qemu-io", &theirs_args);
            }

            let storage: Arc<dyn Storage> =
                Arc::new(FileOptions::new().write(true).open(&ours).expect("it opens"));
            let layer = open_to_write(&storage);
            const KIB: u64 = 1024;
            for (at, len) in [(64, 128), (2048, 64), (3072, 64)] {
                LayerWriter::discard(&layer, at * KIB..(at + len) * KIB).expect("discarded");
            }
            let mut zeroes = Vec::new();
            if !is_old {
                zeroes.extend([
                    (256, 64, false),
                    (384, 64, true),
                    (2112, 64, false),
                    (3584, 64, false),
                    (3200, 64, true),
                ]);
            }
            if options.contains("extended") {
                zeroes.extend([(516, 12, true), (3650, 6, false)]);
            }
            for (at, len, may_unmap) in zeroes {
                assert!(
                    LayerWriter::write_zeroes(&layer, at * KIB..(at + len) * KIB, may_unmap).expect("zeroed")
                );
            }
            if options.contains("extended") {
                write(&layer, 386 * KIB, &[9; 3072]).expect("written");
            }
            LayerWriter::close(&layer).expect("closed");
            drop((layer, storage));
            reference("qemu-img", &["check", "-q", text(&ours)]);
            let map = |image| {
                let map = reference("qemu-img", &["map", "--output=json", image]);
                // Where clusters are given out again is each one's own affair.
                map.lines()
                    .map(|line| line.split(", \"offset\"").next().unwrap().to_owned())
                    .collect::<Vec<_>>()
            };
            assert_eq!(map(text(&ours)), map(text(&theirs)), "{options}, backing: {backing}");
        }
    }
}

/// Compressed clusters are packed as the reference packs them.
#[test]
fn compressed_clusters_are_packed_as_the_reference_does() {
    let dir = tempfile::tempdir().expect("a directory");
    for options in
        ["cluster_size=64k", "cluster_size=4k,refcount_bits=1", "cluster_size=512", "cluster_size=2M"]
    {
        let (theirs, ours) = (dir.path().join("theirs.qcow2"), dir.path().join("ours.qcow2"));
        reference("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&theirs), "8M"]);
        std::fs::copy(&theirs, &ours).expect("copied");
        let mut args = Vec::new();
        for cluster in 0..4_u64 {
            let at = cluster << 21;
            args.extend(["-c".to_owned(), format!("write -c -P {} {at} 2M", cluster + 1)]);
            args.extend(["-c".to_owned(), format!("write -P 77 {} 512", at + 4096)]);
        }
        args.push(text(&theirs).to_owned());
        reference("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());
        let theirs: Arc<dyn Storage> = Arc::new(FileOptions::new().open(&theirs).expect("it opens"));
        let theirs = open(&theirs, OpenMode::Read, &OptionSet::new()).expect("it opens");
        let mut extents = Vec::new();
        theirs.map_range(0..8 << 20, &mut extents).expect("mapped");

        // The same stored bytes in the same order must land in the same places.
        let storage: Arc<dyn Storage> =
            Arc::new(FileOptions::new().write(true).open(&ours).expect("it opens"));
        let layer = open_to_write(&storage);
        let mut at = 0;
        let mut places = Vec::new();
        for extent in &extents {
            if let Place::Encoded { at: host, decoded_bytes, .. } = extent.place {
                assert_eq!(extent.len_bytes, u64::from(decoded_bytes));
                places.push((at, host));
            }
            at += extent.len_bytes;
        }
        // It compresses clusters side by side: they are placed in the order in which they are done.
        places.sort_by_key(|(_, host): &(u64, crate::format::HostOffset)| host.0);
        assert!(places.len() > 1 || options.ends_with("2M"), "{options}");
        // Where guest cluster 0 came first, it is not there any more.
        let lead = places.first().map_or(0, |(_, host)| layer.geometry.in_cluster(host.0));
        if lead > 0 {
            let prepared = layer.prepare_compressed(0, u32::try_from(lead).unwrap()).expect("prepared");
            prepared.commit().expect("committed");
        }
        for pair in places.windows(2).take_while(|pair| pair[1].0 < 2 << 20) {
            let [(guest, host), (_, next)] = pair else { unreachable!() };
            // Before the first plain write nothing but compressed clusters and tables lies between.
            let Some(stored) = next.0.checked_sub(host.0).filter(|&stored| stored < 512) else { break };
            let prepared =
                layer.prepare_compressed(*guest, u32::try_from(stored).unwrap()).expect("prepared");
            assert_eq!(prepared.step().at, *host, "{options}: guest {guest:#x}");
            prepared.commit().expect("committed");
        }
    }
}
