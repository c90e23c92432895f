//! Histories of disks of every type against a flat model.

use std::{
    sync::{Arc, Barrier},
    thread,
};

use proptest::prelude::*;

use super::{create, create_small, footer, open};
use crate::{
    format::{OpenMode, Place, Repair, vpc::footer::DiskType},
    image::{
        Image,
        flat_model::{Histories, UnderTest, live_through, read_all},
    },
    storage::{MemoryStorage, Storage},
};

const DISK: u64 = 40 << 10;

const HISTORIES: Histories =
    Histories { disk_bytes: DISK, unit_bytes: 512, grows_by_sectors: 40, crashes: false };

/// A disk under test.
struct Disk {
    storage: Arc<dyn Storage>,
    below: Option<Arc<dyn Storage>>,
}

impl Disk {
    fn new(disk_type: DiskType, block_bytes: u32, below: &[u8]) -> Self {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("t.vhd"));
        let mut parent = None;
        match disk_type {
            DiskType::Fixed => create(&storage, DISK, &[("subformat", "fixed")], None).unwrap(),
            DiskType::Dynamic => create_small(&storage, DISK, block_bytes, None).unwrap(),
            DiskType::Differencing => {
                let of_parent = footer(DiskType::Fixed, DISK, b"qem2");
                let file = [below, zerocopy::IntoBytes::as_bytes(&of_parent)].concat();
                let file: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("parent.vhd", &file));
                create_small(&storage, DISK, block_bytes, Some(&of_parent)).unwrap();
                parent = Some(file);
            }
        }
        Self { storage, below: parent }
    }
}

impl UnderTest for Disk {
    fn open(&self) -> Image {
        let mut layers = vec![open(&self.storage, OpenMode::Write).unwrap()];
        layers.extend(self.below.iter().map(|below| open(below, OpenMode::Read).unwrap()));
        Image::from_layers(layers).unwrap()
    }

    fn closed(&self) {
        let layer = open(&self.storage, OpenMode::Check { repair: false }).unwrap();
        let mut told = Vec::new();
        let report = layer.check(Repair::Nothing, &mut |finding| told.push(finding.text)).unwrap();
        assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{told:?}");
    }

    fn can_grow(&self) -> bool {
        self.below.is_none()
    }
}

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

/// Bytes that differ from sector to sector.
fn pattern() -> Vec<u8> {
    (0..DISK).map(|at| (at / 100 % 251).to_le_bytes()[0]).collect()
}

proptest! {
    /// Whatever the history, a disk reads as the flat model, and is found clean.
    #[test]
    fn every_type_equals_a_flat_model(
        which in 0..3_u8,
        block_bits in 9..15_u32,
        steps in HISTORIES.steps(),
    ) {
        let disk_type = match which {
            0 => DiskType::Fixed,
            1 => DiskType::Dynamic,
            _ => DiskType::Differencing,
        };
        let disk = Disk::new(disk_type, 1 << block_bits, &pattern());
        let model = read_all(&disk.open());
        let written = if disk_type == DiskType::Differencing { pattern() } else { vec![0; index(DISK)] };
        // Fixed and dynamic ones may be a little larger than was asked for.
        prop_assert!(model.starts_with(&written) && model[written.len()..].iter().all(|byte| *byte == 0));
        live_through(&disk, model, &steps);
    }
}

#[test]
fn sectors_of_a_differencing_disk_come_one_by_one() {
    let disk = Disk::new(DiskType::Differencing, 4096, &pattern());
    let image = disk.open();
    image.write_at(&[1; 100], 700).unwrap();
    let mut extents = Vec::new();
    image.map_range(0..4096, &mut extents).unwrap();
    let shown: Vec<(u64, usize)> = extents.iter().map(|extent| (extent.len_bytes, extent.depth)).collect();
    assert_eq!(shown, [(512, 1), (512, 0), (3072, 1)]);
}

#[test]
fn sectors_that_a_dynamic_disk_never_wrote_are_zeroes_whatever_stands_there() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("t.vhd"));
    create_small(&storage, DISK, 4096, None).unwrap();
    // A block as another program may leave it: sectors 1 and 2 are there, and there is old data in all of them.
    let disk = Disk { storage, below: None };
    let image = disk.open();
    image.write_at(&[7; 4096], 0).unwrap();
    let mut extents = Vec::new();
    image.map_range(0..1, &mut extents).unwrap();
    let Place::Data { at, .. } = extents[0].place else { panic!("{extents:?}") };
    image.close().unwrap();
    disk.storage.write_at(&[0b0110_0000], at.0 - 512).unwrap();

    let image = disk.open();
    let mut guest = vec![0xee; 4096];
    image.read_at(&mut guest, 0).unwrap();
    let there: Vec<bool> = guest.chunks(512).map(|sector| sector[0] == 7).collect();
    assert_eq!(there, [false, true, true, false, false, false, false, false]);
    // A write to a part of such a sector brings no old data back.
    image.write_at(&[9; 10], 100).unwrap();
    image.read_at(&mut guest, 0).unwrap();
    assert_eq!(
        (&guest[..100], &guest[100..110], &guest[110..512]),
        (&[0; 100][..], &[9; 10][..], &[0; 402][..])
    );
}

#[test]
fn a_write_that_is_given_up_leaves_nothing() {
    let disk = Disk::new(DiskType::Dynamic, 4096, &[]);
    let before = disk.storage.len_bytes().unwrap();
    let image = disk.open();
    let writer = image.layers()[0].writer().unwrap();
    let prepared = writer.prepare_write(0..100).unwrap();
    let at = prepared.step().at.0;
    disk.storage.write_at(&[5; 100], at).unwrap();
    drop(prepared);
    assert!(read_all(&image).iter().all(|byte| *byte == 0));
    // Its place is given out again, and reads as zeroes around what is written there.
    let prepared = writer.prepare_write(8192..8192 + 10).unwrap();
    assert_eq!(prepared.step().at.0, at);
    drop(prepared);
    image.close().unwrap();
    disk.closed();
    assert_eq!(disk.storage.len_bytes().unwrap(), before, "the file is as long as it was");
}

#[test]
fn threads_share_sectors_and_blocks() {
    let disk = Disk::new(DiskType::Differencing, 4096, &pattern());
    let (image, barrier) = (disk.open(), Barrier::new(4));
    thread::scope(|scope| {
        for thread in 0..4_u8 {
            let (image, barrier) = (&image, &barrier);
            scope.spawn(move || {
                barrier.wait();
                // Four threads write to each sector, a quarter each.
                for sector in 0..DISK / 512 {
                    let at = sector * 512 + u64::from(thread) * 128;
                    image.write_at(&[thread + 1; 128], at).unwrap();
                }
            });
        }
    });
    let guest = read_all(&image);
    let wanted = (0..DISK).map(|at| (at % 512 / 128 + 1).to_le_bytes()[0]);
    assert!(guest.iter().copied().eq(wanted));
    image.close().unwrap();
    disk.closed();
    assert!(read_all(&disk.open()) == guest, "the disk reads differently when opened again");
}
