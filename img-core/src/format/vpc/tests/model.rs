//! Histories of disks of every type against a flat model.

use std::{
    sync::{Arc, Barrier},
    thread,
};

use proptest::{collection::vec, prelude::*};

use super::{create, create_small, footer, open};
use crate::{
    format::{OpenMode, Place, Repair, vpc::footer::DiskType},
    image::Image,
    storage::{MemoryStorage, Preallocation, Storage},
};

const DISK: u64 = 40 << 10;

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Flush,
    Reopen,
    Grow { sectors: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..DISK, 1..9000_u64);
    prop_oneof![
        6 => (range.clone(), 1..=255_u8).prop_map(|((at, len), byte)| Step::Write { at, len, byte }),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Step::Zero { at, len, unmap }),
        1 => range.prop_map(|(at, len)| Step::Discard { at, len }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => (1..40_u64).prop_map(|sectors| Step::Grow { sectors }),
    ]
}

/// A disk under test and what it must read as.
struct Disk {
    storage: Arc<dyn Storage>,
    below: Option<Arc<dyn Storage>>,
    image: Image,
    model: Vec<u8>,
}

impl Disk {
    fn new(disk_type: DiskType, block_bytes: u32, below: &[u8]) -> Self {
        let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("t.vhd"));
        let mut model = vec![0; index(DISK)];
        let mut parent = None;
        match disk_type {
            DiskType::Fixed => create(&storage, DISK, &[("subformat", "fixed")], None).unwrap(),
            DiskType::Dynamic => create_small(&storage, DISK, block_bytes, None).unwrap(),
            DiskType::Differencing => {
                model.copy_from_slice(below);
                let of_parent = footer(DiskType::Fixed, DISK, b"qem2");
                let file = [below, zerocopy::IntoBytes::as_bytes(&of_parent)].concat();
                let file: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("parent.vhd", &file));
                create_small(&storage, DISK, block_bytes, Some(&of_parent)).unwrap();
                parent = Some(file);
            }
        }
        let image = open_chain(&storage, parent.as_ref());
        model.resize(index(image.virtual_size_bytes()), 0);
        Self { storage, below: parent, image, model }
    }

    fn apply(&mut self, step: &Step) {
        let size = self.model.len() as u64;
        let cut = |at: u64, len: u64| at.min(size)..(at + len).min(size);
        match *step {
            Step::Write { at, len, byte } => {
                let range = cut(at, len);
                self.image.write_at(&vec![byte; index(range.end - range.start)], range.start).unwrap();
                self.model[index(range.start)..index(range.end)].fill(byte);
            }
            Step::Zero { at, len, unmap } => {
                let range = cut(at, len);
                self.image.write_zeroes(range.clone(), unmap).unwrap();
                self.model[index(range.start)..index(range.end)].fill(0);
            }
            Step::Discard { at, len } => {
                let range = cut(at, len);
                let old = self.read();
                self.image.discard(range.clone()).unwrap();
                let new = self.read();
                for (at, (new, old)) in new.iter().zip(&old).enumerate() {
                    let is_inside = range.contains(&(at as u64));
                    assert!(new == old || (is_inside && *new == 0), "byte {at} is {new}, was {old}");
                }
                self.model = new;
            }
            Step::Flush => self.image.flush().unwrap(),
            Step::Reopen => {
                let image = open_chain(&self.storage, self.below.as_ref());
                std::mem::replace(&mut self.image, image).close().unwrap();
                self.image = open_chain(&self.storage, self.below.as_ref());
            }
            Step::Grow { .. } if self.below.is_some() => {
                assert!(self.image.resize(2 * DISK, Preallocation::Off).is_err());
            }
            Step::Grow { sectors } => {
                self.image.resize(size + sectors * 512, Preallocation::Off).unwrap();
                let new = index(self.image.virtual_size_bytes());
                assert!(new >= self.model.len());
                self.model.resize(new, 0);
            }
        }
    }

    fn read(&self) -> Vec<u8> {
        let mut guest = vec![0xee; index(self.image.virtual_size_bytes())];
        self.image.read_at(&mut guest, 0).unwrap();
        guest
    }

    /// Closes it, audits it, and reads it once more.
    fn finish(self) {
        self.image.close().unwrap();
        let layer = open(&self.storage, OpenMode::Check { repair: false }).unwrap();
        let mut told = Vec::new();
        let report = layer.check(Repair::Nothing, &mut |finding| told.push(finding.text)).unwrap();
        assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0), "{told:?}");
        let image = open_chain(&self.storage, self.below.as_ref());
        let mut guest = vec![0; self.model.len()];
        image.read_at(&mut guest, 0).unwrap();
        assert!(guest == self.model, "the disk reads differently when opened again");
    }
}

fn open_chain(storage: &Arc<dyn Storage>, below: Option<&Arc<dyn Storage>>) -> Image {
    let mut layers = vec![open(storage, OpenMode::Write).unwrap()];
    layers.extend(below.map(|below| open(below, OpenMode::Read).unwrap()));
    Image::from_layers(layers).unwrap()
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
        steps in vec(step(), 1..40),
    ) {
        let disk_type = match which {
            0 => DiskType::Fixed,
            1 => DiskType::Dynamic,
            _ => DiskType::Differencing,
        };
        let mut disk = Disk::new(disk_type, 1 << block_bits, &pattern());
        for step in &steps {
            disk.apply(step);
            let read = disk.read();
            let differs = read.iter().zip(&disk.model).position(|(read, model)| read != model);
            prop_assert_eq!(differs, None, "after {:?}", step);
            prop_assert_eq!(read.len(), disk.model.len());
        }
        disk.finish();
    }
}

#[test]
fn sectors_of_a_differencing_disk_come_one_by_one() {
    let disk = Disk::new(DiskType::Differencing, 4096, &pattern());
    disk.image.write_at(&[1; 100], 700).unwrap();
    let mut extents = Vec::new();
    disk.image.map_range(0..4096, &mut extents).unwrap();
    let shown: Vec<(u64, usize)> = extents.iter().map(|extent| (extent.len_bytes, extent.depth)).collect();
    assert_eq!(shown, [(512, 1), (512, 0), (3072, 1)]);
}

#[test]
fn sectors_that_a_dynamic_disk_never_wrote_are_zeroes_whatever_stands_there() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("t.vhd"));
    create_small(&storage, DISK, 4096, None).unwrap();
    // A block as another program may leave it: sectors 1 and 2 are there, and there is old data in all of them.
    let image = open_chain(&storage, None);
    image.write_at(&[7; 4096], 0).unwrap();
    let mut extents = Vec::new();
    image.map_range(0..1, &mut extents).unwrap();
    let Place::Data { at, .. } = extents[0].place else { panic!("{extents:?}") };
    image.close().unwrap();
    storage.write_at(&[0b0110_0000], at.0 - 512).unwrap();

    let image = open_chain(&storage, None);
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
    let writer = disk.image.layers()[0].writer().unwrap();
    let prepared = writer.prepare_write(0..100).unwrap();
    let at = prepared.step().at.0;
    disk.storage.write_at(&[5; 100], at).unwrap();
    drop(prepared);
    assert_eq!(disk.read(), disk.model);
    // Its place is given out again, and reads as zeroes around what is written there.
    let prepared = writer.prepare_write(8192..8192 + 10).unwrap();
    assert_eq!(prepared.step().at.0, at);
    drop(prepared);
    let storage = Arc::clone(&disk.storage);
    disk.finish();
    assert_eq!(storage.len_bytes().unwrap(), before, "the file is as long as it was");
}

#[test]
fn threads_share_sectors_and_blocks() {
    let disk = Disk::new(DiskType::Differencing, 4096, &pattern());
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        for thread in 0..4_u8 {
            let (image, barrier) = (&disk.image, &barrier);
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
    let guest = disk.read();
    let wanted = (0..DISK).map(|at| (at % 512 / 128 + 1).to_le_bytes()[0]);
    assert!(guest.iter().copied().eq(wanted));
    Disk { model: guest, ..disk }.finish();
}
