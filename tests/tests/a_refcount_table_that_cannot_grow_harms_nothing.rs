//! Moving to a larger refcount table may fail at any operation of the host: what was written can be read, later
//! writes and a flush succeed or say that they did not, and the image is sound.

use std::sync::Arc;

use img_core::{
    Error,
    format::{OpenMode, Repair},
    storage::{
        MemoryStorage, Storage,
        testing::{FailAt, Operation},
    },
};
use img_tests::{
    memory, read_all,
    scenario::{Layout, Qcow2},
};

/// One cluster of refcount table is soon full: 64 blocks of 64 counts for clusters of 512 bytes.
const LAYOUT: Layout = Layout::Qcow2(Qcow2 {
    version: 3,
    cluster_bits: 9,
    refcount_bits: 64,
    extended_l2: false,
    zstd: false,
    lazy_refcounts: false,
});
const PIECE: usize = 128 << 10;
const PIECES: usize = 20;

#[test]
fn a_refcount_table_that_cannot_grow_harms_nothing() {
    let base = MemoryStorage::new("growing.qcow2");
    let disk: Arc<dyn Storage> = Arc::new(base.snapshot());
    memory::create(&disk, &LAYOUT, (PIECES * PIECE) as u64).expect("created");
    // Everything up to shortly before the table is full is the same for all.
    let image = memory::open(Arc::clone(&disk), OpenMode::Write).expect("it opens");
    for piece in 0..13 {
        image
            .write_at(&vec![u8::try_from(piece + 1).expect("small"); PIECE], (piece * PIECE) as u64)
            .expect("written");
    }
    image.close().expect("closed");
    let mut bytes = vec![0; usize::try_from(disk.len_bytes().expect("known")).expect("small")];
    disk.read_at(&mut bytes, 0).expect("readable");
    let mut grew = false;
    for nth in 0.. {
        let memory = Arc::new(MemoryStorage::from_bytes("growing.qcow2", &bytes));
        let failing = Arc::new(FailAt::once(memory.clone(), |operation| operation != Operation::Punch, nth));
        let Ok(image) = memory::open(failing.clone(), OpenMode::Write) else { continue };
        let mut written = vec![true; 13];
        let mut halted = false;
        for piece in 13..PIECES {
            let result =
                image.write_at(&vec![u8::try_from(piece + 1).expect("small"); PIECE], (piece * PIECE) as u64);
            if let Err(error) = &result {
                assert!(!matches!(error, Error::Overlap { .. } | Error::Corrupt { .. }), "{nth}: {error}");
                halted |= matches!(error, Error::Halted { .. });
            }
            written.push(result.is_ok());
        }
        let flushed = image.flush().or_else(|_| image.flush()).is_ok();
        assert!(flushed || halted || written.iter().all(|&done| done), "{nth}: only a halt stops all");
        let check = |guest: &[u8]| {
            for (piece, _) in written.iter().enumerate().filter(|(_, done)| **done) {
                let expected = u8::try_from(piece + 1).expect("small");
                let range = piece * PIECE..(piece + 1) * PIECE;
                assert!(guest[range].iter().all(|&byte| byte == expected), "{nth}: piece {piece}");
            }
        };
        // The failure may meet the reading.
        check(&read_all(&image).or_else(|_| read_all(&image)).expect("it reads"));
        drop(image);
        let memory: Arc<dyn Storage> = memory;
        let image = memory::open(Arc::clone(&memory), OpenMode::Check { repair: false }).expect("it opens");
        let mut texts = Vec::new();
        let report = image.check(Repair::Nothing, &mut |finding| texts.push(finding.text)).expect("checked");
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{nth}: {texts:#?}");
        drop(image);
        if flushed {
            let image = memory::open(Arc::clone(&memory), OpenMode::Read).expect("it opens");
            check(&read_all(&image).expect("it reads"));
        }
        let mut clusters = [0; 4];
        memory.read_at(&mut clusters, 56).expect("readable");
        grew |= u32::from_be_bytes(clusters) > 1;
        if failing.seen() <= nth {
            break;
        }
    }
    assert!(grew, "the table was made larger");
}
