//! What each target does with an image, and what must hold.

use std::sync::Arc;

use img_core::{
    Result,
    format::{CheckReport, OpenMode, Repair},
    image::Image,
    storage::{MemoryStorage, Storage},
};

use super::script::Script;
use crate::{craft::CLUSTER, memory};

/// The longest guest range that is mapped or read at once: a header may claim 2^63 bytes.
const SPAN_BYTES: u64 = 1 << 20;

fn storage(bytes: &[u8]) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes("fuzz.qcow2", bytes))
}

/// Ranges at both ends of the disk and where the script says.
pub(super) fn ranges(image: &Image, script: &mut Script<'_>) -> Vec<std::ops::Range<u64>> {
    let size = image.virtual_size_bytes();
    let chosen = script.tricky() % size.max(1);
    [0, chosen, size.saturating_sub(SPAN_BYTES)]
        .into_iter()
        .map(|start| start..size.min(start.saturating_add(SPAN_BYTES)))
        .filter(|range| !range.is_empty())
        .collect()
}

/// Opens in every mode and asks all that needs no map.
pub fn open(input: &[u8]) {
    let bytes = Script::new(input).image().bytes;
    for mode in [OpenMode::Inspect, OpenMode::Read, OpenMode::Write, OpenMode::Check { repair: false }] {
        let Ok(image) = memory::open(storage(&bytes), mode) else { continue };
        let layer = &image.layers()[0];
        // Answers and errors are both fine here; only panics are not.
        drop((layer.details(), layer.backing(), layer.is_dirty(), layer.cluster_size_bytes()));
        if let Some(snapshots) = layer.snapshots()
            && let Ok(list) = snapshots.list()
        {
            list.iter().for_each(|snapshot| drop(snapshots.view(&snapshot.id)));
        }
    }
}

/// The extents of a range cover it exactly, in order.
pub fn map(input: &[u8]) {
    let mut script = Script::new(input);
    let bytes = script.image().bytes;
    let Ok(image) = memory::open(storage(&bytes), OpenMode::Read) else { return };
    for range in ranges(&image, &mut script) {
        assert_covered(&image, &range);
    }
}

/// The extents of `range`, where there is an answer, cover it exactly and in order.
pub(super) fn assert_covered(image: &Image, range: &std::ops::Range<u64>) {
    let mut extents = Vec::new();
    if image.map_range(range.clone(), &mut extents).is_ok() {
        let mut at = range.start;
        for extent in &extents {
            assert_eq!((extent.guest_offset, extent.len_bytes > 0), (at, true), "{extents:?}");
            at += extent.len_bytes;
        }
        assert_eq!(at, range.end, "{extents:?}");
    }
}

/// Reading answers, and the same twice.
pub fn read(input: &[u8]) {
    let mut script = Script::new(input);
    let bytes = script.image().bytes;
    let Ok(image) = memory::open(storage(&bytes), OpenMode::Read) else { return };
    for range in ranges(&image, &mut script) {
        assert_reads_alike(&image, &range);
    }
}

/// `range` reads the same twice, or not at all.
pub(super) fn assert_reads_alike(image: &Image, range: &std::ops::Range<u64>) {
    let read = || -> Option<Vec<u8>> {
        let mut guest = vec![0xee; usize::try_from(range.end - range.start).ok()?];
        image.read_at(&mut guest, range.start).ok().map(|()| guest)
    };
    assert!(read() == read(), "{range:?} reads differently the second time");
}

fn audit(storage: &Arc<dyn Storage>, repair: Repair) -> Result<CheckReport> {
    let image = memory::open(Arc::clone(storage), OpenMode::Check { repair: repair != Repair::Nothing })?;
    let report = image.check(repair, &mut |_| {})?;
    if repair != Repair::Nothing {
        image.close()?;
    }
    Ok(report)
}

/// An audit without repair answers, and changes nothing.
pub fn check(input: &[u8]) {
    let bytes = Script::new(input).image().bytes;
    let storage = Arc::new(MemoryStorage::from_bytes("fuzz.qcow2", &bytes));
    let shared: Arc<dyn Storage> = Arc::clone(&storage) as _;
    drop(audit(&shared, Repair::Nothing));
    assert!(storage.to_vec() == bytes, "an audit without repair changed the image");
}

/// What the guest reads, cluster by cluster; `None` where reading is refused.
fn readable(storage: &Arc<dyn Storage>) -> Vec<Option<Vec<u8>>> {
    let Ok(image) = memory::open(Arc::clone(storage), OpenMode::Read) else { return Vec::new() };
    let end = image.virtual_size_bytes().min(SPAN_BYTES);
    (0..end)
        .step_by(CLUSTER)
        .map(|at| {
            let len = usize::try_from((end - at).min(CLUSTER as u64)).expect("at most a cluster");
            let mut guest = vec![0; len];
            image.read_at(&mut guest, at).ok().map(|()| guest)
        })
        .collect()
}

/// Whatever is broken, a repair leaves no more corruption than there was, and every byte that the guest could
/// read; where there was nothing worse than leaks it leaves a clean image.
pub fn repair(input: &[u8]) {
    let mut script = Script::new(input);
    let bytes = script.image().bytes;
    let storage = storage(&bytes);
    let (before, guest) = (audit(&storage, Repair::Nothing), readable(&storage));
    let how = if script.byte().is_multiple_of(4) { Repair::Leaks } else { Repair::All };
    let repaired = audit(&storage, how);
    let after = audit(&storage, Repair::Nothing);
    for (number, (old, new)) in guest.iter().zip(readable(&storage)).enumerate() {
        let is_kept = old.is_none() || *old == new;
        assert!(is_kept, "{how:?} changed guest cluster {number}: {before:?}, {repaired:?}, {after:?}");
    }
    let Ok(before) = before else { return };
    let after = after.unwrap_or_else(|error| panic!("{before:?} became unreadable: {error}"));
    assert!(after.corruptions <= before.corruptions, "{before:?} became {after:?} by {repaired:?}");
    if before.corruptions == 0 && before.check_errors == 0 {
        repaired.expect("leaks can be given back");
        // QED has no way to give them back.
        let leaks = if bytes.starts_with(b"QED\0") { before.leaks } else { 0 };
        assert_eq!((after.corruptions, after.leaks), (0, leaks), "{before:?} became {after:?}");
    }
}

/// Writes either happen or are refused; the image can be audited afterwards as well as before.
pub fn write(input: &[u8]) {
    let mut script = Script::new(input);
    let bytes = script.image().bytes;
    let storage = storage(&bytes);
    let before = audit(&storage, Repair::Nothing);
    let Ok(image) = memory::open(Arc::clone(&storage), OpenMode::Write) else { return };
    let size = image.virtual_size_bytes();
    let mut operations = 0;
    while !script.is_empty() && operations < 16 && size > 0 {
        operations += 1;
        let what = script.byte();
        let start = script.tricky() % size;
        let end = size.min(start + 1 + u64::from(script.u16()));
        let outcome = match what % 6 {
            0 | 1 => {
                let data = vec![what; usize::try_from(end - start).expect("at most 64 KiB")];
                image.write_at(&data, start).map(|()| {
                    let mut back = vec![0; data.len()];
                    image.read_at(&mut back, start).expect("what was just written can be read");
                    assert!(back == data, "{start:#x}..{end:#x} does not read as written");
                })
            }
            2 => image.write_zeroes(start..end, what & 8 != 0),
            3 => image.discard(start..end),
            4 => image.flush(),
            _ => image.snapshot_create("fuzz", (0, 0)),
        };
        // A refusal ends it: an image that refuses one write may refuse all.
        if outcome.is_err() {
            break;
        }
    }
    let closed = image.close();
    if let (Ok(before), Ok(())) = (before, closed)
        && before.corruptions == 0
        && before.check_errors == 0
    {
        let after = audit(&storage, Repair::Nothing).expect("a clean image stays readable");
        assert_eq!(after.corruptions, 0, "a clean image became {after:?}");
    }
}
