//! What each request does.

use std::time::{Duration, Instant};

use img_core::format::Attempt;

use super::client::{Client, directories, engines, fresh_disk, image};
use crate::{
    disk::{Disk, DiskOptions},
    engine::{EngineChoice, OpKind, ring_support},
    request::{Errno, Op, Request, Segments, Submitted, iovec},
};

const MIB: u64 = 1 << 20;
const WRITE_ZEROES: Op = Op::WriteZeroes { may_unmap: true, fast_only: false, fua: false };

/// Also for a worker that is done before the lane looks around for the first time.
#[test]
fn a_request_takes_as_long_as_it_is_not_answered() {
    const LONG: Duration = Duration::from_millis(5);
    for engine in engines() {
        let (_dir, disk) = fresh_disk("qcow2", 4 * MIB);
        let mut client = Client::new(&disk, engine);
        // A new cluster, for which a worker finds a place.
        let tag = client.submit_write(0, &[1; 512]);
        let asked = Instant::now();
        while asked.elapsed() < LONG {
            std::hint::spin_loop();
        }
        assert_eq!(client.wait(tag).0, Ok(()));
        let nanoseconds = disk.stats().op(OpKind::Write).nanoseconds;
        assert!(u128::from(nanoseconds) >= LONG.as_nanos(), "{engine:?}: {nanoseconds} ns");
    }
}

#[test]
fn every_request_does_what_it_says() {
    for engine in engines() {
        for format in ["raw", "qcow2"] {
            let (_dir, disk) = fresh_disk(format, 4 * MIB);
            let mut client = Client::new(&disk, engine);
            assert_eq!(client.read(MIB - 100, 300), Ok(vec![0; 300]), "{format}");
            let bytes: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
            assert_eq!(client.write(MIB - 100_000, &bytes), Ok(()));
            assert_eq!(client.read(MIB - 100_000, bytes.len()).as_deref(), Ok(&bytes[..]), "{format}");
            assert_eq!(client.change(WRITE_ZEROES, MIB - 50, 100), Ok(()));
            let mut expected = bytes.clone();
            expected[99_950..100_050].fill(0);
            assert_eq!(client.read(MIB - 100_000, bytes.len()).as_deref(), Ok(&expected[..]), "{format}");
            assert_eq!(client.change(Op::Discard { fua: true }, 0, 4 * MIB), Ok(()));
            assert_eq!(client.read(0, 4 << 20), Ok(vec![0; 4 << 20]), "{format}");
            assert_eq!(client.change(Op::Cache, 0, 3 * MIB), Ok(()));
            assert_eq!(client.change(Op::Flush, 0, 0), Ok(()));
            let tag = client.submit(Op::Write { fua: true }, 0, 512, &[7; 512]).expect("room");
            assert_eq!(client.wait(tag).0, Ok(()));
            let stats = disk.stats();
            let done = OpKind::ALL.map(|kind| stats.op(kind).done);
            assert_eq!(done, [5, 2, 1, 1, 1], "{format}");
            assert_eq!((stats.op(OpKind::Write).bytes, stats.depth), (200_512, 0));
        }
    }
}

/// Once tables were read and clusters made, whatever the format, no request is given to a worker.
#[test]
fn warm_requests_are_given_to_no_worker() {
    if ring_support().is_err() {
        return;
    }
    let kinds: [(&str, &[(&str, &str)]); 8] = [
        ("raw", &[]),
        ("qcow2", &[]),
        ("qed", &[]),
        ("vpc", &[("subformat", "dynamic")]),
        ("vpc", &[("subformat", "fixed")]),
        ("vmdk", &[("subformat", "monolithicSparse")]),
        ("vmdk", &[("subformat", "monolithicFlat")]),
        ("vmdk", &[("subformat", "twoGbMaxExtentSparse")]),
    ];
    for (format, options) in kinds {
        let dir = tempfile::tempdir().expect("a directory");
        let name = image(dir.path(), "disk", format, options, 8 * MIB, None);
        let options = DiskOptions { format: Some(format.to_owned()), ..DiskOptions::default() };
        let disk = Disk::open(&name, &options).expect("it was just made");
        let mut client = Client::new(&disk, EngineChoice::Ring);
        let mut model = vec![0; 8 << 20];
        model[1 << 20..3 << 20].fill(1);
        // The first makes places for the bytes. The second is the first to meet them: their tables are read.
        for _ in 0..2 {
            assert_eq!(client.write(MIB, &model[1 << 20..3 << 20]), Ok(()), "{format}");
        }
        assert_eq!(client.read(0, 8 << 20).as_deref(), Ok(&model[..]), "{format}");
        let before = disk.stats();
        for at in (1 << 20..3 << 20).step_by(40_000) {
            let end = (at + 40_000).min(3 << 20);
            model[at..end].fill(2);
            assert_eq!(client.write(at as u64, &model[at..end]), Ok(()), "{format}");
        }
        for at in (0..8 << 20).step_by(1 << 18) {
            let found = client.read(at as u64, 1 << 18);
            assert_eq!(found.as_deref(), Ok(&model[at..at + (1 << 18)]), "{format}");
        }
        let after = disk.stats();
        assert_eq!((after.handed_over, after.misses), (before.handed_over, before.misses), "{format}");
        drop(client);
        disk.close().expect("closed");
    }
}

/// Tables that are not in memory are read by the lane itself, those of a layer below too.
#[test]
fn cold_reads_are_given_to_no_worker() {
    if ring_support().is_err() {
        return;
    }
    // In a piece of an L2 table each.
    let places = [0, 40, 80, 120].map(|mib| mib * MIB + 12_345);
    for dir in directories() {
        for (name, format, backing) in [
            ("one", "qcow2", None),
            ("two", "qed", None),
            ("three", "qcow2", Some("one")),
            ("four", "vmdk", None),
        ] {
            let name = image(dir.path(), name, format, &[], 128 * MIB, backing);
            let options = DiskOptions { format: Some(format.to_owned()), ..DiskOptions::default() };
            let open = || Disk::open(&name, &options).expect("it was just made");
            if backing.is_none() {
                let disk = open();
                let mut client = Client::new(&disk, EngineChoice::Ring);
                places.iter().for_each(|at| assert_eq!(client.write(*at, &[7; 5000]), Ok(())));
                drop(client);
                disk.close().expect("closed");
            }
            let disk = open();
            let mut client = Client::new(&disk, EngineChoice::Ring);
            let tags = places.map(|at| client.submit_read(at, 5000));
            for tag in tags {
                let (result, bytes) = client.wait(tag);
                assert_eq!((result, &bytes[..]), (Ok(()), &[7; 5000][..]), "{format}");
            }
            let stats = disk.stats();
            assert_eq!((stats.handed_over, stats.misses), (0, 0), "{format}");
            assert!(stats.table_reads >= places.len() as u64, "{format}: {}", stats.table_reads);
        }
    }
}

#[test]
fn wrong_numbers_are_refused_and_touch_nothing() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("qcow2", MIB);
        let mut client = Client::new(&disk, engine);
        assert_eq!(client.read(MIB - 1, 2), Err(Errno::INVAL));
        assert_eq!(client.read(u64::MAX, 2), Err(Errno::INVAL));
        assert_eq!(client.write(MIB - 1, &[1, 2]), Err(Errno::NOSPC));
        assert_eq!(client.change(WRITE_ZEROES, MIB, 1), Err(Errno::NOSPC));
        assert_eq!(client.change(Op::Discard { fua: false }, 1, u64::MAX), Err(Errno::INVAL));
        let tag = client.submit(Op::Read, 0, 100, &[0; 99]).expect("room");
        assert_eq!(client.wait(tag).0, Err(Errno::INVAL), "its memory is shorter than it says");
        assert_eq!(client.read(MIB - 1, 1), Ok(vec![0]));
        assert_eq!(client.read(MIB, 0), Ok(vec![]));
    }
}

#[test]
fn memory_of_more_bytes_than_a_number_holds_is_refused() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("raw", MIB);
        let mut client = Client::new(&disk, engine);
        let run = iovec { iov_base: std::ptr::null_mut(), iov_len: usize::MAX };
        let vectors = [run, run];
        // SAFETY: it is refused before anyone looks at it.
        #[allow(unsafe_code)]
        let segments = unsafe { Segments::new(&vectors) };
        let request = Request { tag: 7, op: Op::Read, offset: 0, len_bytes: u64::MAX, segments };
        assert_eq!(client.lane.submit(&request), Submitted::Taken);
        let mut events = Vec::new();
        client.lane.run_once(crate::engine::Wait::No, &mut events).expect("it runs");
        assert_eq!(events, [crate::engine::Event::Done { tag: 7, result: Err(Errno::INVAL) }]);
    }
}

#[test]
fn a_read_only_disk_is_not_changed() {
    for engine in engines() {
        let dir = tempfile::tempdir().expect("a directory");
        let name = image(dir.path(), "disk", "qcow2", &[], MIB, None);
        let disk =
            Disk::open(&name, &DiskOptions { read_only: true, ..DiskOptions::default() }).expect("opens");
        let mut client = Client::new(&disk, engine);
        assert_eq!(client.write(0, &[1]), Err(Errno::ROFS));
        assert_eq!(client.change(WRITE_ZEROES, 0, MIB), Err(Errno::ROFS));
        assert_eq!(client.change(Op::Flush, 0, 0), Ok(()));
        assert_eq!(client.read(0, 1), Ok(vec![0]));
    }
}

#[test]
fn zeroes_that_would_have_to_be_written_are_refused_when_they_must_be_fast() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("qcow2", MIB);
        let mut client = Client::new(&disk, engine);
        assert_eq!(client.write(0, &[9; 200_000]), Ok(()));
        let fast = Op::WriteZeroes { may_unmap: false, fast_only: true, fua: false };
        assert_eq!(client.change(fast, 65536, 65536), Ok(()));
        assert_eq!(client.change(fast, 0, 100), Err(Errno::OPNOTSUPP));
        let mut expected = vec![9; 200_000];
        expected[65536..131_072].fill(0);
        assert_eq!(client.read(0, 200_000), Ok(expected));
    }
}

#[test]
fn a_full_lane_says_so() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("raw", MIB);
        let mut client = Client::new(&disk, engine);
        let tags: Vec<_> = (0..16).map(|at| client.submit_read(at * 512, 512)).collect();
        assert_eq!(client.submit(Op::Flush, 0, 0, &[]), None);
        for tag in tags {
            assert_eq!(client.wait(tag).0, Ok(()));
        }
        assert!(client.submit(Op::Flush, 0, 0, &[]).is_some());
    }
}

/// Where a flush has nothing to do but to sync files, no thread is asked for it.
#[test]
fn flushes_ask_a_thread_only_where_tables_have_changed() {
    if ring_support().is_err() {
        return;
    }
    for dir in directories() {
        let data = dir.path().join("data");
        let beside = [("data_file", data.to_str().expect("plain names"))];
        for (name, format, options) in
            [("one", "raw", &[][..]), ("two", "qcow2", &[]), ("three", "qcow2", &beside)]
        {
            let name = image(dir.path(), name, format, options, MIB, None);
            let open = DiskOptions { format: Some(format.to_owned()), ..DiskOptions::default() };
            let disk = Disk::open(&name, &open).expect("it was just made");
            let mut client = Client::new(&disk, EngineChoice::Ring);
            assert_eq!(client.write(0, &[1; 200_000]), Ok(()));
            let before = disk.stats().handed_over;
            assert_eq!(client.change(Op::Flush, 0, 0), Ok(()));
            let by_worker = u64::from(format == "qcow2");
            assert_eq!(disk.stats().handed_over - before, by_worker, "{format}: the map has changed");
            assert_eq!(client.write(100, &[2; 5000]), Ok(()));
            assert_eq!(client.change(Op::Flush, 0, 0), Ok(()));
            let tag = client.submit(Op::Write { fua: true }, 70_000, 512, &[3; 512]).expect("room");
            assert_eq!(client.wait(tag).0, Ok(()));
            assert_eq!(
                disk.stats().handed_over - before,
                by_worker,
                "{format}: nothing but bytes has changed"
            );
            drop(client);
            disk.close().expect("closed");
        }
    }
}

/// Several flushes under way at once, of two lanes, beside writes that change the map.
#[test]
fn flushes_meet_each_other_and_writes() {
    for engine in engines() {
        for format in ["raw", "qcow2"] {
            let (_dir, disk) = fresh_disk(format, 8 * MIB);
            let mut clients = [Client::new(&disk, engine), Client::new(&disk, engine)];
            for round in 0..32 {
                for client in &mut clients {
                    let tags: Vec<u64> = (0..12)
                        .map(|number| {
                            if number % 2 == 0 {
                                return client.submit(Op::Flush, 0, 0, &[]).expect("room");
                            }
                            client.submit_write((round * 12 + number) * 16_384, &[7; 4096])
                        })
                        .collect();
                    for tag in tags {
                        assert_eq!(client.wait(tag).0, Ok(()));
                    }
                }
            }
        }
    }
}

/// After a sync that failed no flush succeeds: the kernel tells of lost pages once.
#[test]
fn no_flush_succeeds_after_a_sync_that_failed() {
    for engine in engines() {
        let (_dir, disk) = fresh_disk("raw", MIB);
        let mut client = Client::new(&disk, engine);
        assert_eq!(client.change(Op::Flush, 0, 0), Ok(()));
        let Attempt::Done(ticket) = disk.image().try_flush() else { panic!("syncs are enough") };
        ticket.failed(Errno::IO);
        assert_eq!(client.change(Op::Flush, 0, 0), Err(Errno::IO));
        let tag = client.submit(Op::Write { fua: true }, 0, 512, &[7; 512]).expect("room");
        assert_eq!(client.wait(tag).0, Err(Errno::IO));
        assert_eq!(client.write(0, &[8; 512]), Ok(()));
    }
}
