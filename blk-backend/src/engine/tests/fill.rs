//! Writes to a part of a cluster that is new, shared or below: what is around the guest's bytes comes along, and no
//! thread is asked for it.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use img_core::{
    format::{HostFile, OpenMode, Repair},
    image::{Image, ImageName, OpenOptions},
};

use super::client::{Client, directories, image};
use crate::{
    disk::{Disk, DiskOptions},
    engine::{EngineChoice, ring_support},
    request::{Errno, Op},
};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 16 * MIB;
const CLUSTER: usize = 65_536;

fn open(dir: &Path, name: &str, options: &[(&str, &str)], backing: Option<&str>) -> Arc<Disk> {
    let name = image(dir, name, "qcow2", options, DISK_BYTES, backing);
    let options = DiskOptions { format: Some("qcow2".to_owned()), ..DiskOptions::default() };
    Disk::open(&name, &options).expect("it was just made")
}

/// Bytes that say where they belong.
fn pattern() -> Vec<u8> {
    (0..DISK_BYTES / 8).flat_map(|at| at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// A disk and what it is to read as.
struct Modelled {
    client: Client,
    model: Vec<u8>,
}

impl Modelled {
    /// `model` is what is read now; the tables are read, the one that is written into is made.
    fn new(disk: &Arc<Disk>, model: Vec<u8>) -> Self {
        let mut this = Self { client: Client::new(disk, EngineChoice::Ring), model };
        this.compare();
        this.write(15 << 20, CLUSTER);
        this.write(14 << 20, CLUSTER);
        this.compare();
        this
    }

    fn write(&mut self, at: usize, length: usize) {
        let bytes: Vec<u8> =
            (0..length).map(|byte| u8::try_from((at + byte) % 251).expect("small") | 1).collect();
        assert_eq!(self.client.write(at as u64, &bytes), Ok(()), "{at:#x}");
        self.model[at..at + length].copy_from_slice(&bytes);
    }

    fn compare(&mut self) {
        for at in (0..self.model.len()).step_by(1 << 20) {
            let found = self.client.read(at as u64, 1 << 20).expect("read");
            let expected = &self.model[at..at + (1 << 20)];
            if found != expected {
                let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
                panic!("byte {:#x} is wrong", at + wrong.unwrap_or_default());
            }
        }
    }

    /// Writes to parts of clusters that were not written to, with as many under way as the lane takes, and tells by how
    /// much the disk's count of requests that were given to workers grew.
    fn write_parts(&mut self, disk: &Disk) -> u64 {
        let before = disk.stats().handed_over;
        let first = 1 << 20;
        // At the start, in the middle and at the end of a cluster; over a border; with both ends in part.
        for (index, (from, length)) in
            [(0, 4096), (8192, 512), (CLUSTER - 4096, 4096), (CLUSTER - 512, 1024), (1000, 3 * CLUSTER)]
                .into_iter()
                .enumerate()
        {
            self.write(first + index * 8 * CLUSTER + from, length);
        }
        let tags: Vec<u64> = (0..16)
            .map(|index: u8| {
                let at = (6 << 20) + usize::from(index) * (CLUSTER + 2048);
                self.model[at..at + 2048].fill(index);
                self.client.submit_write(at as u64, &[index; 2048])
            })
            .collect();
        for tag in tags {
            assert_eq!(self.client.wait(tag).0, Ok(()));
        }
        let handed_over = disk.stats().handed_over - before;
        self.compare();
        handed_over
    }
}

#[test]
fn what_the_layers_below_hold_comes_along() {
    if ring_support().is_err() {
        return;
    }
    for dir in directories() {
        for options in [&[][..], &[("extended_l2", "on")]] {
            let dir = tempfile::tempdir_in(dir.path()).expect("a directory");
            let base = open(dir.path(), "base", &[], None);
            let mut model = pattern();
            // A part that reads as zeroes below, and has to be zero above.
            model[3 << 20..(3 << 20) + 3 * CLUSTER].fill(0);
            for (at, piece) in (0u64..).zip(model.chunks(1 << 20)) {
                assert_eq!(Client::new(&base, EngineChoice::Ring).write(at << 20, piece), Ok(()));
            }
            base.image().write_zeroes(3 * MIB..3 * MIB + 3 * CLUSTER as u64, true).expect("zeroed");
            base.close().expect("closed");
            drop(base);

            let disk = open(dir.path(), "disk", options, Some("base"));
            let mut disk_and_model = Modelled::new(&disk, model);
            assert_eq!(disk_and_model.write_parts(&disk), 0, "{options:?}");
            disk_and_model.write(3 << 20, 512);
            disk_and_model.write((3 << 20) + CLUSTER + 512, 512);
            disk_and_model.compare();
            drop(disk_and_model);
            disk.close().expect("closed");
        }
    }
}

/// The bytes are a snapshot's as well, and stay what they are there.
#[test]
fn what_a_snapshot_shares_comes_along() {
    if ring_support().is_err() {
        return;
    }
    for dir in directories() {
        let disk = open(dir.path(), "disk", &[], None);
        let model = pattern();
        for (at, piece) in (0u64..).zip(model.chunks(1 << 20)) {
            assert_eq!(Client::new(&disk, EngineChoice::Ring).write(at << 20, piece), Ok(()));
        }
        disk.snapshot_create("s", (1, 0)).expect("taken");
        let mut disk_and_model = Modelled::new(&disk, model.clone());
        assert_eq!(disk_and_model.write_parts(&disk), 0);
        drop(disk_and_model);
        let snapshots = disk.image();
        let view = snapshots.layers()[0].snapshots().expect("it has some").view("s").expect("it is there");
        let view = Image::from_layers(vec![view]).expect("a disk");
        let mut found = vec![0; model.len()];
        view.read_at(&mut found, 0).expect("read");
        assert!(found == model, "the snapshot has changed");
        drop((view, snapshots));
        disk.close().expect("closed");
    }
}

/// Where a cluster was another's before, or is kept for this place, zeroes are written around the bytes.
#[test]
fn what_the_host_held_before_does_not_show() {
    if ring_support().is_err() {
        return;
    }
    for dir in directories() {
        let disk = open(dir.path(), "disk", &[], None);
        let mut client = Client::new(&disk, EngineChoice::Ring);
        assert_eq!(client.write(0, &vec![0xaa; 8 << 20]), Ok(()));
        let zeroes = Op::WriteZeroes { may_unmap: false, fast_only: false, fua: false };
        assert_eq!(client.change(zeroes, 0, 2 * MIB), Ok(()));
        assert_eq!(client.change(Op::Discard { fua: false }, 2 * MIB, 2 * MIB), Ok(()));
        assert_eq!(client.change(Op::Flush, 0, 0), Ok(()));
        drop(client);
        let mut model = vec![0; usize::try_from(DISK_BYTES).expect("small")];
        model[4 << 20..8 << 20].fill(0xaa);
        let mut disk_and_model = Modelled::new(&disk, model);
        let before = disk.stats().handed_over;
        for at in [4096, (1 << 20) - 512, (2 << 20) + 100, (3 << 20) + 65_000] {
            disk_and_model.write(at, 2048);
        }
        assert_eq!(disk.stats().handed_over - before, 0);
        disk_and_model.compare();
        drop(disk_and_model);
        disk.close().expect("closed");
    }
}

/// A disk over a base that holds 8 MiB of data, and what it reads as.
fn over_a_written_base(dir: &Path) -> (Arc<Disk>, Vec<u8>) {
    let base = open(dir, "base", &[], None);
    assert_eq!(Client::new(&base, EngineChoice::Ring).write(0, &vec![5; 8 << 20]), Ok(()));
    base.close().expect("closed");
    drop(base);
    let mut model = vec![0; usize::try_from(DISK_BYTES).expect("small")];
    model[..8 << 20].fill(5);
    (open(dir, "disk", &[], Some("base")), model)
}

/// A file below the top that has ended meanwhile reads as zeroes from there on, also around what is written.
#[test]
fn behind_the_end_of_a_file_below_there_are_zeroes() {
    if ring_support().is_err() {
        return;
    }
    for dir in directories() {
        let (disk, model) = over_a_written_base(dir.path());
        let mut client = Modelled::new(&disk, model).client;
        let file = std::fs::File::options().write(true).open(dir.path().join("base")).expect("it is there");
        let length = file.metadata().expect("a file").len();
        file.set_len(length / 2).expect("cut");
        let before = disk.stats().handed_over;
        client.write((6 << 20) + 4096, &[7; 512]).expect("written");
        assert_eq!(disk.stats().handed_over, before);
        let mut expected = vec![0; CLUSTER];
        expected[4096..4608].fill(7);
        assert!(client.read(6 << 20, CLUSTER).expect("read") == expected);
    }
}

/// A layer below that cannot be read costs the writes that need it, and nothing else: what they had reserved is free
/// again.
#[test]
fn a_layer_below_that_fails_costs_those_writes_alone() {
    if ring_support().is_err() {
        return;
    }
    for dir in directories() {
        let (disk, model) = over_a_written_base(dir.path());
        // All tables are in memory; the lane that comes next knows no files yet.
        let model = Modelled::new(&disk, model).model;
        let mended = Unreadable::of(&disk);
        let mut broken = Modelled { client: Client::new(&disk, EngineChoice::Ring), model };
        let before = disk.stats().handed_over;
        for _ in 0..2 {
            let tags = [(1 << 20) + 4096, (3 << 20) - 512, 5 << 20]
                .map(|at| broken.client.submit_write(at, &[9; 1024]));
            broken.write(2 << 20, CLUSTER);
            broken.write((15 << 20) + 512, 512);
            for tag in tags {
                assert_eq!(broken.client.wait(tag).0, Err(Errno::BADF));
            }
        }
        // Nothing of it has to be read, and nobody who failed is in the way.
        broken.write(1 << 20, CLUSTER);
        assert_eq!(disk.stats().handed_over, before);
        drop(mended);
        let mut whole = Modelled { client: Client::new(&disk, EngineChoice::Ring), model: broken.model };
        whole.write((3 << 20) - 512, 1024);
        whole.compare();
        drop((whole, broken.client));
        disk.close().expect("closed");
        drop(disk);
        let name = ImageName::from_path(dir.path().join("disk").to_str().expect("plain names"));
        let options = OpenOptions::new(OpenMode::Check { repair: false });
        let image = Image::open(&name, &options).expect("it opens");
        let report = image.check(Repair::Nothing, &mut |_| {}).expect("checked");
        assert_eq!((report.corruptions, report.check_errors, report.leaks), (0, 0, 0));
    }
}

/// The first layer below the top of a disk cannot be read until this is dropped, except by lanes that have its file
/// already.
struct Unreadable {
    image: Arc<Image>,
    file: OwnedFd,
}

impl Unreadable {
    fn of(disk: &Disk) -> Self {
        let image = disk.image();
        let file = Self::fd(&image).try_clone_to_owned().expect("a descriptor");
        let write_only = tempfile::tempdir().expect("a directory");
        let write_only = std::fs::File::create(write_only.path().join("file")).expect("a file");
        Self::replace(&image, write_only.as_fd());
        Self { image, file }
    }

    fn fd(image: &Image) -> BorrowedFd<'_> {
        image.storage(1, HostFile::IMAGE).and_then(|storage| storage.as_fd()).expect("a file")
    }

    #[allow(unsafe_code, reason = "a descriptor that belongs to somebody else becomes another file")]
    fn replace(image: &Image, by: BorrowedFd<'_>) {
        // SAFETY: it stays open all the time, and its owner takes what it reads for no more than bytes.
        let done = unsafe { libc::dup2(by.as_raw_fd(), Self::fd(image).as_raw_fd()) };
        assert!(done >= 0);
    }
}

impl Drop for Unreadable {
    fn drop(&mut self) {
        Self::replace(&self.image, self.file.as_fd());
    }
}
