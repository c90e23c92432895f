//! Histories of a disk against a flat model: whatever the history, the disk reads as a run of bytes that was changed
//! in the same way.

use std::ops::Range;

use proptest::prelude::*;

use super::Image;
use crate::storage::Preallocation;

/// What happens to a disk.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Write(Range<u64>, u8),
    Zero(Range<u64>, bool),
    Discard(Range<u64>),
    /// A write that is prepared and given up.
    Prepare(Range<u64>),
    /// By so many sectors.
    Grow(u64),
    Flush,
    Reopen,
    /// The image is flushed and dropped, not closed.
    Crash,
}

/// What histories are made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Histories {
    /// Of the new disk; changes lie inside.
    pub(crate) disk_bytes: u64,
    /// Half of the changes begin on multiples of so many bytes, and half have such a length.
    pub(crate) unit_bytes: u64,
    /// How many sectors the disk grows by at once, at most; 0 for formats that do not grow.
    pub(crate) grows_by_sectors: u64,
    /// Whether an image that was not closed can be gone on with.
    pub(crate) crashes: bool,
}

impl Histories {
    /// A range of the disk, not empty.
    pub(crate) fn range(self) -> impl Strategy<Value = Range<u64>> {
        let Self { disk_bytes, unit_bytes, .. } = self;
        let start =
            prop_oneof![0..disk_bytes, (0..disk_bytes / unit_bytes).prop_map(move |unit| unit * unit_bytes)];
        let most = disk_bytes / unit_bytes / 4;
        let len = prop_oneof![1..7 * unit_bytes, (1..most.max(2)).prop_map(move |units| units * unit_bytes)];
        (start, len).prop_map(move |(start, len)| start..(start + len).min(disk_bytes))
    }

    /// Up to 40 steps.
    pub(crate) fn steps(self) -> impl Strategy<Value = Vec<Step>> {
        let mut kinds = vec![
            (6, (self.range(), 1..=255_u8).prop_map(|(range, byte)| Step::Write(range, byte)).boxed()),
            (3, (self.range(), any::<bool>()).prop_map(|(range, unmap)| Step::Zero(range, unmap)).boxed()),
            (1, self.range().prop_map(Step::Discard).boxed()),
            (1, self.range().prop_map(Step::Prepare).boxed()),
            (1, Just(Step::Flush).boxed()),
            (1, Just(Step::Reopen).boxed()),
        ];
        if self.grows_by_sectors > 0 {
            kinds.push((1, (1..=self.grows_by_sectors).prop_map(Step::Grow).boxed()));
        }
        if self.crashes {
            kinds.push((1, Just(Step::Crash).boxed()));
        }
        prop::collection::vec(prop::strategy::Union::new_weighted(kinds), 1..40)
    }
}

/// An image that a history happens to.
pub(crate) trait UnderTest {
    /// Opens it, with what is below, for writing.
    fn open(&self) -> Image;

    /// Looks at the image that was just closed.
    fn closed(&self) {}

    /// Looks at the image that was dropped.
    fn crashed(&self) {}

    /// Looks at the image that was opened behind that.
    fn opened_after_crash(&self) {}

    /// Whether this one is among those that grow.
    fn can_grow(&self) -> bool {
        true
    }
}

/// Lets `steps` happen to an image that reads as `model`, and closes it. Gives the disk back.
///
/// # Panics
/// When a step is refused, or the disk reads differently behind it.
pub(crate) fn live_through(disk: &dyn UnderTest, mut model: Vec<u8>, steps: &[Step]) -> Vec<u8> {
    let mut image = disk.open();
    for step in steps {
        image = live(disk, image, &mut model, step);
        let read = read_all(&image);
        if read != model {
            let differs = read.iter().zip(&model).position(|(read, model)| read != model);
            panic!("byte {differs:?} of {} (the model has {}) after {step:?}", read.len(), model.len());
        }
    }
    image.close().expect("closed");
    disk.closed();
    assert!(read_all(&disk.open()) == model, "the disk reads differently when opened again");
    model
}

fn live(disk: &dyn UnderTest, image: Image, model: &mut Vec<u8>, step: &Step) -> Image {
    match step {
        Step::Write(range, byte) => {
            let bytes = &mut model[part(range)];
            bytes.fill(*byte);
            image.write_at(bytes, range.start).expect("written");
        }
        Step::Zero(range, unmap) => {
            model[part(range)].fill(0);
            image.write_zeroes(range.clone(), *unmap).expect("zeroed");
        }
        Step::Discard(range) => {
            // What is there becomes zeroes; what is not stays.
            image.discard(range.clone()).expect("discarded");
            let now = read_all(&image);
            for at in part(range) {
                assert!(now[at] == 0 || now[at] == model[at], "{at:#x} after {step:?}");
                model[at] = now[at];
            }
        }
        Step::Prepare(range) => {
            let writer = image.layers()[0].writer().expect("writable");
            drop(writer.prepare_write(range.clone()).expect("prepared"));
        }
        Step::Grow(sectors) => {
            let size = model.len() as u64 + sectors * 512;
            let grown = image.resize(size, Preallocation::Off);
            assert_eq!(grown.is_ok(), disk.can_grow(), "{grown:?}");
            if disk.can_grow() {
                // Some formats have no such size, and take a larger one.
                assert!(image.virtual_size_bytes() >= size);
                model.resize(usize_of(image.virtual_size_bytes()), 0);
            }
        }
        Step::Flush => image.flush().expect("flushed"),
        Step::Reopen => {
            image.close().expect("closed");
            disk.closed();
            return disk.open();
        }
        Step::Crash => {
            image.flush().expect("flushed");
            drop(image);
            disk.crashed();
            let image = disk.open();
            disk.opened_after_crash();
            return image;
        }
    }
    image
}

/// All of the disk.
pub(crate) fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; usize_of(image.virtual_size_bytes())];
    image.read_at(&mut bytes, 0).expect("readable");
    bytes
}

fn part(range: &Range<u64>) -> Range<usize> {
    usize_of(range.start)..usize_of(range.end)
}

fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("small")
}
