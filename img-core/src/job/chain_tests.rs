//! Commit and rebase over chains in memory: what a guest reads stays what it was.

use std::sync::Arc;

use proptest::{collection::vec, prelude::*};

use super::{
    Unwatched,
    commit::{CommitOptions, commit},
    rebase::{rebase, set_backing},
};
use crate::{
    format::{Backing, CreateRequest, Layer, OpenContext, OpenMode, OptionSet, registry},
    image::Image,
    storage::{MemoryStorage, Storage},
};

const CLUSTER: u64 = 4096;

/// What is done to a layer: a range that is written with one value, or zeroed.
type Run = (u64, u64, u8);

/// A layer of a chain: its size in sectors, and what it holds.
#[derive(Clone, Debug)]
struct Made {
    sectors: u64,
    runs: Vec<Run>,
}

fn made() -> impl Strategy<Value = Made> {
    let run = (0..40 * CLUSTER, 1..6 * CLUSTER, 0..4_u8);
    (1..320_u64, vec(run, 0..6)).prop_map(|(sectors, runs)| Made { sectors, runs })
}

fn qcow2() -> &'static dyn crate::format::Driver {
    registry::by_name("qcow2").unwrap()
}

fn open(storage: &Arc<dyn Storage>, mode: OpenMode) -> Arc<dyn Layer> {
    let options = OptionSet::new();
    let open_file = |_: &str, _: OpenMode| unreachable!("no other files are named");
    qcow2()
        .open(Arc::clone(storage), &OpenContext { mode, options: &options, open_file: &open_file })
        .unwrap()
}

/// A layer on a chain of others, top first.
fn make(made: &Made, below: &[Arc<dyn Storage>]) -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("layer.qcow2"));
    let mut options = OptionSet::new();
    options.set("cluster_size", CLUSTER.to_string());
    let backing = (!below.is_empty()).then(|| name("below"));
    let request = CreateRequest {
        virtual_size_bytes: made.sectors * 512,
        backing,
        options: &options,
        open_file: &|_, _| unreachable!("no other files are named"),
    };
    qcow2().create(&storage, &request).unwrap();
    let image = chain(&storage, OpenMode::Write, below);
    for &(at, len, byte) in &made.runs {
        let size = image.virtual_size_bytes();
        let range = at.min(size)..(at + len).min(size);
        if byte == 0 {
            image.write_zeroes(range, true).unwrap();
        } else {
            let bytes = vec![byte; usize::try_from(range.end - range.start).unwrap()];
            image.write_at(&bytes, range.start).unwrap();
        }
    }
    image.close().unwrap();
    storage
}

fn name(text: &str) -> Backing {
    Backing { name: text.to_owned(), format: Some("qcow2".to_owned()) }
}

fn chain(top: &Arc<dyn Storage>, mode: OpenMode, below: &[Arc<dyn Storage>]) -> Image {
    let below = below.iter().map(|storage| open(storage, OpenMode::Read));
    Image::from_layers(std::iter::once(open(top, mode)).chain(below).collect()).unwrap()
}

fn read(image: &Image) -> Vec<u8> {
    let mut guest = vec![0xee; usize::try_from(image.virtual_size_bytes()).unwrap()];
    image.read_at(&mut guest, 0).unwrap();
    guest
}

proptest! {
    /// Over whatever other chain, or none, and compressed or not.
    #[test]
    fn a_rebased_overlay_reads_as_before(
        [base, middle, top, other, under_other] in [made(), made(), made(), made(), made()],
        onto in 0..4_u8,
        compress in any::<bool>(),
    ) {
        let base = make(&base, &[]);
        let middle = make(&middle, &[Arc::clone(&base)]);
        let top = make(&top, &[Arc::clone(&middle), Arc::clone(&base)]);
        let new = match onto {
            0 => vec![],
            1 => vec![Arc::clone(&base)],
            2 => vec![make(&other, &[])],
            _ => {
                let under = make(&under_other, &[]);
                vec![make(&other, &[Arc::clone(&under)]), under]
            }
        };
        let image = chain(&top, OpenMode::Write, &[middle, base]);
        let guest = read(&image);
        let new_image = new.split_first().map(|(first, below)| chain(first, OpenMode::Read, below));
        rebase(&image, new_image.as_ref(), compress, &Unwatched).unwrap();
        prop_assert!(read(&image) == guest, "over the old chain");
        set_backing(&image, new_image.is_some().then(|| name("new")).as_ref()).unwrap();
        image.close().unwrap();
        let image = chain(&top, OpenMode::Read, &new);
        prop_assert_eq!(image.layers()[0].backing().is_some(), !new.is_empty());
        prop_assert!(read(&image) == guest, "over the new chain");
    }

    /// From any number of layers into the one below them.
    #[test]
    fn a_committed_overlay_is_in_its_base(
        [base, middle, top] in [made(), made(), made()],
        both in any::<bool>(),
    ) {
        let base = make(&base, &[]);
        let middle = make(&middle, &[Arc::clone(&base)]);
        let top = make(&top, &[Arc::clone(&middle), Arc::clone(&base)]);
        let guest = read(&chain(&top, OpenMode::Read, &[Arc::clone(&middle), Arc::clone(&base)]));
        let (above, target, below) = match both {
            true => (vec![Arc::clone(&middle)], &base, vec![]),
            false => (vec![], &middle, vec![Arc::clone(&base)]),
        };
        let overlay = chain(&top, OpenMode::Write, &above);
        let into = chain(target, OpenMode::Write, &below);
        commit(&overlay, &into, CommitOptions::default(), &Unwatched).unwrap();
        let committed = read(&into);
        prop_assert!(committed.len() >= guest.len());
        prop_assert!(committed[..guest.len()] == guest);
        into.close().unwrap();
        if !both {
            prop_assert!(overlay.make_empty().unwrap());
            overlay.close().unwrap();
            let empty = chain(&top, OpenMode::Read, &[]);
            let mut extents = Vec::new();
            empty.map_range(0..empty.virtual_size_bytes(), &mut extents).unwrap();
            prop_assert!(extents.iter().all(|extent| extent.reads_as_zeroes()), "{:?}", extents);
            prop_assert!(read(&chain(&top, OpenMode::Read, &[Arc::clone(&middle), base])) == guest);
        }
    }
}
