//! Images over layers in memory against a flat model, from one thread and from many.

use std::{
    sync::{Arc, atomic::Ordering},
    thread,
};

use proptest::{collection::vec, prelude::*};

use super::{
    Image, ImageExtent,
    testing::{CLUSTER, FakeLayer, deflate},
};
use crate::{
    format::{Driver, Layer, OpenContext, OpenMode, OptionSet, Place, raw::Raw},
    storage::{MemoryStorage, Preallocation, Storage},
};

const DISK: u64 = 8 * CLUSTER;

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, length: u64, byte: u8 },
    Zero { at: u64, length: u64, unmap: bool },
    Discard { at: u64, length: u64 },
    Compressed { cluster: u64, byte: u8 },
    Resize { size: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..DISK, 1..3 * CLUSTER);
    prop_oneof![
        4 => (range.clone(), any::<u8>()).prop_map(|((at, length), byte)| Step::Write { at, length, byte }),
        2 => (range.clone(), any::<bool>()).prop_map(|((at, length), unmap)| Step::Zero { at, length, unmap }),
        1 => range.prop_map(|(at, length)| Step::Discard { at, length }),
        2 => (0..8u64, any::<u8>()).prop_map(|(cluster, byte)| Step::Compressed { cluster, byte }),
        1 => (1..=10u64).prop_map(|sectors| Step::Resize { size: sectors * CLUSTER }),
        1 => (1..=4000u64).prop_map(|size| Step::Resize { size }),
    ]
}

/// Bytes that differ from each other, so that a shifted copy shows.
fn pattern(byte: u8, length: u64) -> Vec<u8> {
    (0..length).map(|n| byte.wrapping_add((n % 13).to_le_bytes()[0])).collect()
}

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

fn apply(image: &Image, model: &mut Vec<u8>, step: &Step, granule: u64) {
    let size = image.virtual_size_bytes();
    let cut = |at: u64, length: u64| at.min(size)..(at + length).min(size);
    match *step {
        Step::Write { at, length, byte } => {
            let range = cut(at, length);
            let bytes = pattern(byte, range.end - range.start);
            image.write_at(&bytes, range.start).unwrap();
            model[index(range.start)..index(range.end)].copy_from_slice(&bytes);
        }
        Step::Zero { at, length, unmap } => {
            let range = cut(at, length);
            image.write_zeroes(range.clone(), unmap).unwrap();
            model[index(range.start)..index(range.end)].fill(0);
        }
        Step::Discard { at, length } => {
            let range = cut(at, length);
            image.discard(range.clone()).unwrap();
            let start = range.start.next_multiple_of(granule);
            let end = if range.end == size { size } else { range.end - range.end % granule };
            if start < end {
                model[index(start)..index(end)].fill(0);
            }
        }
        Step::Compressed { cluster, byte } => {
            let range = cluster * CLUSTER..(cluster + 1) * CLUSTER;
            if granule == CLUSTER && range.end <= size {
                let bytes = pattern(byte, CLUSTER);
                image.write_compressed(&deflate(&bytes), range.start).unwrap();
                model[index(range.start)..index(range.end)].copy_from_slice(&bytes);
            }
        }
        Step::Resize { size } => {
            image.resize(size, Preallocation::Off).unwrap();
            model.truncate(index(size));
            model.resize(index(image.virtual_size_bytes()), 0);
        }
    }
}

fn read_all(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; index(image.virtual_size_bytes())];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// The map covers the disk without gaps.
fn check_map(image: &Image) {
    let mut extents: Vec<ImageExtent> = Vec::new();
    image.map_range(0..image.virtual_size_bytes(), &mut extents).unwrap();
    let mut at = 0;
    for extent in &extents {
        assert_eq!(extent.guest_offset, at);
        assert!(extent.len_bytes > 0 && extent.depth < image.layers().len());
        at = extent.end();
    }
    assert_eq!(at, image.virtual_size_bytes());
}

/// A frozen layer of `size` bytes that holds what `steps` wrote, and what a disk of it alone reads as.
fn frozen_layer(size: u64, steps: &[Step], below: &[u8]) -> (Arc<dyn Layer>, Vec<u8>) {
    let layer = Arc::new(FakeLayer::new(size, true));
    let image = Image::from_layers(vec![layer.clone()]).unwrap();
    let mut alone = vec![0; index(size)];
    for step in steps.iter().filter(|step| !matches!(step, Step::Resize { .. })) {
        apply(&image, &mut alone, step, CLUSTER);
    }
    // Where the layer is silent, what is below shows through, up to its own end.
    let mut extents = Vec::new();
    layer.map_range(0..size, &mut extents).unwrap();
    let mut at = 0;
    for extent in &extents {
        if extent.place == Place::Unallocated {
            let silent = alone.iter_mut().enumerate().skip(index(at)).take(index(extent.len_bytes));
            silent.for_each(|(at, byte)| *byte = below.get(at).copied().unwrap_or(0));
        }
        at += extent.len_bytes;
    }
    drop(image);
    let layer = Arc::try_unwrap(layer).unwrap();
    (Arc::new(layer.frozen()), alone)
}

fn raw_image(bytes: u64, options: &[(&str, &str)]) -> Image {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("raw"));
    storage.resize(bytes, Preallocation::Off).unwrap();
    let mut set = OptionSet::new();
    for (name, value) in options {
        set.set(*name, *value);
    }
    let context = OpenContext {
        mode: OpenMode::Write,
        options: &set,
        open_file: &|_, _| unreachable!("raw names no files"),
    };
    Image::from_layers(vec![Raw.open(storage, &context).unwrap()]).unwrap()
}

proptest! {
    /// Whatever the history of a chain with layers of different lengths, it reads as the flat model.
    #[test]
    fn a_chain_equals_the_flat_model(
        lower in vec((1..4000u64, vec(step(), 0..12)), 0..4),
        steps in vec(step(), 1..25),
    ) {
        let (mut layers, mut below): (Vec<Arc<dyn Layer>>, Vec<u8>) = (Vec::new(), Vec::new());
        for (size, steps) in &lower {
            let (layer, alone) = frozen_layer(*size, steps, &below);
            layers.insert(0, layer);
            below = alone;
        }
        layers.insert(0, Arc::new(FakeLayer::new(DISK, true)));
        let image = Image::from_layers(layers).unwrap();
        let mut model = below;
        model.resize(index(DISK), 0);
        prop_assert!(read_all(&image) == model);
        for step in &steps {
            apply(&image, &mut model, step, CLUSTER);
            check_map(&image);
            prop_assert!(read_all(&image) == model, "after {step:?}");
        }
    }

    /// A raw image, and a window of one, read as the flat model.
    #[test]
    fn raw_equals_the_flat_model(steps in vec(step(), 1..25), window in any::<bool>()) {
        let options: &[_] = if window { &[("offset", "1000")] } else { &[] };
        let image = raw_image(DISK + 1000, options);
        let mut model = vec![0; index(image.virtual_size_bytes())];
        for step in &steps {
            apply(&image, &mut model, step, 1);
            check_map(&image);
            prop_assert!(read_all(&image) == model, "after {step:?}");
        }
    }
}

#[test]
fn reads_and_writes_outside_the_disk_are_refused() {
    let image = raw_image(1024, &[]);
    assert!(image.read_at(&mut [0; 2], 1023).is_err());
    assert!(image.write_at(&[0; 2], u64::MAX).is_err());
    assert!(image.write_zeroes(1000..1025, true).is_err());
    assert!(image.discard(1025..1026).is_err());
    let backwards = std::ops::Range { start: 10, end: 5 };
    assert!(image.map_range(backwards, &mut Vec::new()).is_err());
}

/// No cluster begins at the end of a disk, and a disk of no bytes has none at all: the format is not asked.
#[test]
fn compressed_clusters_that_begin_behind_the_disk_are_refused() {
    for size in [0, DISK - CLUSTER / 2, DISK] {
        let image = Image::from_layers(vec![Arc::new(FakeLayer::new(size, true))]).unwrap();
        for at in [size, size.next_multiple_of(CLUSTER), DISK + CLUSTER, u64::MAX] {
            let error = image.write_compressed(&deflate(&[1; 100]), at).unwrap_err().to_string();
            assert!(error.contains(&format!("not inside the disk of {size} bytes")), "{at}: {error}");
        }
    }
}

#[test]
fn a_read_only_image_refuses_changes() {
    let image = Image::from_layers(vec![Arc::new(FakeLayer::new(DISK, false))]).unwrap();
    assert!(matches!(image.write_at(&[1], 0), Err(crate::Error::ReadOnly { .. })));
    assert!(image.write_zeroes(0..10, true).is_err());
    assert!(image.resize(DISK * 2, Preallocation::Off).is_err());
    image.flush().unwrap();
    image.close().unwrap();
}

#[test]
fn warm_reads_of_a_deep_chain_ask_no_lower_map() {
    let mut layers: Vec<Arc<FakeLayer>> = Vec::new();
    for depth in 0..100u64 {
        let layer = FakeLayer::new(DISK, true);
        let image = Image::from_layers(vec![Arc::new(layer)]).unwrap();
        if depth < 8 {
            image.write_at(&pattern(depth.to_le_bytes()[0], CLUSTER), depth * CLUSTER).unwrap();
        }
        drop(image);
        layers.insert(0, Arc::new(FakeLayer::new(DISK, depth == 99)));
    }
    let image =
        Image::from_layers(layers.iter().map(|layer| Arc::clone(layer) as Arc<dyn Layer>).collect()).unwrap();
    let asked = || layers[1..].iter().map(|layer| layer.asked.load(Ordering::SeqCst)).collect::<Vec<_>>();
    read_all(&image);
    assert!(asked().iter().all(|times| *times == 1), "{:?}", asked());
    for at in 0..DISK - 100 {
        image.read_at(&mut [0; 100], at).unwrap();
    }
    assert!(asked().iter().all(|times| *times == 1), "{:?}", asked());
}

#[test]
fn many_threads_on_one_image_each_find_what_they_wrote() {
    const THREADS: u64 = 4;
    const STRIPE: u64 = 777; // crosses clusters, and shares them with other threads
    let base = {
        let layer = FakeLayer::new(64 * CLUSTER, true);
        let image = Image::from_layers(vec![Arc::new(layer)]).unwrap();
        image.write_at(&pattern(200, 64 * CLUSTER), 0).unwrap();
        image
    };
    let below = read_all(&base);
    let layers = vec![Arc::new(FakeLayer::new(64 * CLUSTER, true)) as Arc<dyn Layer>, {
        let (layer, _) =
            frozen_layer(64 * CLUSTER, &[Step::Write { at: 0, length: 64 * CLUSTER, byte: 200 }], &[]);
        layer
    }];
    let image = Image::from_layers(layers).unwrap();
    let stripes = 64 * CLUSTER / STRIPE;
    thread::scope(|scope| {
        for mine in 0..THREADS {
            let (image, below) = (&image, &below);
            scope.spawn(move || {
                let mut random = 88_172_645_463_325_252u64 + mine;
                let mut model = below.clone();
                for _ in 0..1500 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let stripe = (random >> 8) % (stripes / THREADS) * THREADS + mine;
                    let start = stripe * STRIPE + (random >> 32) % 300;
                    let length = 1 + (random >> 44) % (STRIPE - 300);
                    let range = index(start)..index(start + length);
                    match random % 8 {
                        0 => {
                            image.write_zeroes(start..start + length, random & 64 == 0).unwrap();
                            model[range].fill(0);
                        }
                        1..4 => {
                            let bytes = pattern(random.to_le_bytes()[5], length);
                            image.write_at(&bytes, start).unwrap();
                            model[range].copy_from_slice(&bytes);
                        }
                        _ => {
                            let mut bytes = vec![0; range.len()];
                            image.read_at(&mut bytes, start).unwrap();
                            assert!(bytes == model[range], "stripe {stripe}");
                        }
                    }
                }
            });
        }
    });
    check_map(&image);
}

#[test]
fn overlapping_writers_leave_only_bytes_that_someone_wrote() {
    let image = Image::from_layers(vec![Arc::new(FakeLayer::new(DISK, true))]).unwrap();
    thread::scope(|scope| {
        for byte in 1..=3u8 {
            let image = &image;
            scope.spawn(move || {
                for round in 0..400u64 {
                    let at = round * 37 % (DISK - 700);
                    image.write_at(&vec![byte; 700], at).unwrap();
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..300 {
                assert!(read_all(&image).iter().all(|byte| *byte <= 3));
            }
        });
    });
}
