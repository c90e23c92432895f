//! What was written to a pipe is an image that audits clean and reads as its source.

use std::{
    io,
    sync::{Arc, Mutex},
};

use proptest::prelude::*;

use super::convert_to_pipe;
use crate::{
    Error,
    format::{FrontRequest, OpenContext, OpenMode, OptionSet, Repair, registry},
    image::Image,
    job::{Unwatched, convert::ConvertOptions, ordered::lock, testing::noise},
    storage::{MemoryStorage, Pipe, Storage},
};

/// Bytes that went through a pipe.
#[derive(Clone, Default)]
struct Caught(Arc<Mutex<Vec<u8>>>);

impl io::Write for Caught {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open(storage: Arc<dyn Storage>, format: &str, mode: OpenMode) -> Image {
    let context = OpenContext {
        mode,
        options: &OptionSet::new(),
        open_file: &|name, _| Err(Error::Invalid(format!("{name} is not to be opened"))),
    };
    let driver = registry::by_name(format).expect("every build has it");
    Image::from_layers(vec![driver.open(storage, &context).expect("opens")]).expect("one layer")
}

/// A raw disk of 4 KiB blocks: holes, zeroes that are stored, noise, and what shrinks.
fn disk(blocks: &[u8]) -> Arc<dyn Storage> {
    let storage = MemoryStorage::new("source");
    storage.resize(blocks.len() as u64 * 4096, crate::storage::Preallocation::Off).expect("memory grows");
    for (index, kind) in blocks.iter().enumerate() {
        let block: Vec<u8> = match kind {
            0..=3 => continue,
            4 => vec![0; 4096],
            5..=7 => (0..4096).map(|at| (at / 64 + index).to_le_bytes()[0]).collect(),
            _ => noise(u32::try_from(index).expect("few blocks"), 4096),
        };
        storage.write_at(&block, index as u64 * 4096).expect("memory takes it");
    }
    Arc::new(storage)
}

fn options(list: &str) -> OptionSet {
    let mut options = OptionSet::new();
    for (name, value) in list.split(',').filter_map(|option| option.split_once('=')) {
        options.set(name, value);
    }
    options
}

fn catch(source: &Arc<dyn Storage>, format: &str, list: &str, compress: bool, threads: usize) -> Vec<u8> {
    let sources = [open(Arc::clone(source), "raw", OpenMode::Read)];
    let request = FrontRequest {
        virtual_size_bytes: sources[0].virtual_size_bytes(),
        options: &options(list),
        compress,
    };
    let driver = registry::by_name(format).expect("every build has it");
    let writer = driver.front_writer(&request).expect("can be laid out");
    let caught = Caught::default();
    let mut pipe = Pipe::new(Box::new(caught.clone()), "pipe");
    let options = ConvertOptions { threads: Some(threads), compress, ..ConvertOptions::default() };
    convert_to_pipe(&sources, writer, &mut pipe, &options, &|_, error| panic!("{error}"), &Unwatched)
        .expect("the pipe takes it");
    let bytes = lock(&caught.0).clone();
    assert_eq!(bytes.len() as u64, pipe.written_bytes());
    bytes
}

const LAYOUTS: &[(&str, &str, bool)] = &[
    ("raw", "", false),
    ("vpc", "force_size=on", false),
    ("vpc", "force_size=on,subformat=fixed", false),
    ("vmdk", "subformat=streamOptimized", true),
    ("qcow2", "cluster_size=512,refcount_bits=64", false),
    ("qcow2", "cluster_size=512,refcount_bits=1", true),
    ("qcow2", "cluster_size=4096,refcount_bits=2,compression_type=zstd", true),
    ("qcow2", "cluster_size=16384,extended_l2=on", true),
    ("qcow2", "compat=0.10", true),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn what_was_caught_is_the_disk(
        blocks in prop::collection::vec(0_u8..12, 1..300),
        layout in 0..LAYOUTS.len(),
    ) {
        let (format, list, compress) = LAYOUTS[layout];
        let source = disk(&blocks);
        let caught = catch(&source, format, list, compress, 3);
        let alone = catch(&source, format, list, compress, 1);
        if format == "qcow2" || format == "raw" {
            prop_assert!(caught == alone, "the same bytes at any number of threads");
        }
        let caught: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("caught", &caught));
        let image = open(Arc::clone(&caught), format, OpenMode::Read);
        prop_assert_eq!(image.virtual_size_bytes(), source.len_bytes().expect("memory"));
        let mut found = vec![0; blocks.len() * 4096];
        let mut expected = found.clone();
        image.read_at(&mut found, 0).expect("readable");
        source.read_at(&mut expected, 0).expect("readable");
        prop_assert!(found == expected);
        if format != "raw" && !list.contains("fixed") {
            let image = open(caught, format, OpenMode::Check { repair: false });
            let report = image.check(Repair::Nothing, &mut |finding| panic!("{}", finding.text)).expect("checks");
            prop_assert_eq!((report.corruptions, report.leaks, report.check_errors), (0, 0, 0));
        }
    }
}

/// Small clusters and wide counts make spans of 32 KiB: the head fills several, and blocks stand between clusters.
#[test]
fn spans_end_inside_the_head_and_inside_the_data() {
    let blocks: Vec<u8> = (0..4096_u32).map(|at| if at % 3 == 0 { 9 } else { 0 }).collect();
    let source = disk(&blocks);
    let caught = catch(&source, "qcow2", "cluster_size=512,refcount_bits=64", false, 2);
    let caught: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("caught", &caught));
    let image = open(caught, "qcow2", OpenMode::Check { repair: false });
    let report = image.check(Repair::Nothing, &mut |finding| panic!("{}", finding.text)).expect("checks");
    assert_eq!((report.corruptions, report.leaks), (0, 0));
}
