//! The opened image against a flat model and against the reference: map, write, zero, flush, resize.

use std::{
    collections::BTreeMap,
    ops::Range,
    path::Path,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
};

use proptest::prelude::*;

use super::{Qcow2, entry::Cluster, layer::Qcow2Layer};
use crate::{
    Result,
    format::{Codec, Driver, Extent, Layer, LayerWriter, OpenContext, OpenMode, OptionSet, Place, Repair},
    storage::{FileOptions, MemoryStorage, Preallocation, Storage, testing::CrashRecorder},
};

/// Opens an image without an external data file.
pub(super) fn open(storage: &Arc<dyn Storage>, mode: OpenMode, options: &OptionSet) -> Result<Qcow2Layer> {
    let context = OpenContext { mode, options, open_file: &|name, _| panic!("no file '{name}' to open") };
    Qcow2Layer::open(Arc::clone(storage), &context)
}

/// Guest bytes as the layer has them; what it does not say reads as zeroes.
pub(super) fn read(layer: &dyn Layer, guest: Range<u64>) -> Vec<u8> {
    let mut extents: Vec<Extent> = Vec::new();
    layer.map_range(guest.clone(), &mut extents).expect("the map can be read");
    let mut bytes = Vec::new();
    for extent in extents {
        let len = usize::try_from(extent.len_bytes).expect("test images are small");
        let start = bytes.len();
        bytes.resize(start + len, 0);
        match extent.place {
            Place::Unallocated | Place::Zero { .. } => {}
            Place::Data { file, at, .. } => {
                layer.file(file).expect("it exists").read_at(&mut bytes[start..], at.0).expect("readable");
            }
            Place::Encoded { file, at, stored_bytes, decoded_bytes, skip_bytes, how } => {
                let mut stored = vec![0; stored_bytes as usize];
                layer.file(file).expect("it exists").read_at(&mut stored, at.0).expect("readable");
                let decoded = decode(&stored, decoded_bytes as usize, how);
                bytes[start..].copy_from_slice(&decoded[skip_bytes as usize..skip_bytes as usize + len]);
            }
        }
    }
    assert_eq!(bytes.len() as u64, guest.end - guest.start, "the extents cover the range exactly");
    bytes
}

fn decode(stored: &[u8], decoded_bytes: usize, how: Codec) -> Vec<u8> {
    let mut decoded = vec![0; decoded_bytes];
    match how {
        Codec::Deflate | Codec::Zlib => {
            let mut inflate = flate2::Decompress::new(how == Codec::Zlib);
            inflate.decompress(stored, &mut decoded, flate2::FlushDecompress::Finish).expect("valid");
        }
        Codec::Zstd => {
            use std::io::Read;
            zstd::stream::read::Decoder::new(stored).expect("valid").read_exact(&mut decoded).expect("valid");
        }
    }
    decoded
}

/// Runs a program of the reference.
pub(super) fn reference(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("the reference is installed");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("a plain name")
}

/// What the reference writes is read the same, at every shape of image.
#[test]
fn reads_what_the_reference_writes() {
    let dir = tempfile::tempdir().expect("a directory");
    let (image, flat) = (dir.path().join("a.qcow2"), dir.path().join("a.raw"));
    for options in [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,cluster_size=16k,compression_type=zstd",
        "compression_type=zstd,refcount_bits=1",
        "preallocation=metadata,cluster_size=4k",
    ] {
        reference("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, text(&image), "5M"]);
        let mut steps = vec!["write -P 1 3k 100k", "write -P 2 1M 1M", "discard 1M 512k"];
        if !options.contains("preallocation") {
            steps.push("write -c -P 3 2M 2M");
        }
        if options != "compat=0.10" {
            steps.extend([
                "write -z 1536k 64k",
                "write -z -u 2M 64k",
                "write -P 4 2050k 1k",
                "write -z 4M 999k",
            ]);
        }
        let mut args = Vec::new();
        for step in &steps {
            args.extend(["-c", *step]);
        }
        args.push(text(&image));
        reference("qemu-io", &args);
        reference("qemu-img", &["convert", "-O", "raw", text(&image), text(&flat)]);
        let storage: Arc<dyn Storage> = Arc::new(FileOptions::new().open(&image).expect("it opens"));
        let layer = open(&storage, OpenMode::Read, &OptionSet::new()).expect("it opens");
        let size = layer.virtual_size_bytes();
        let expected = std::fs::read(&flat).expect("converted");
        assert!(read(&layer, 0..size) == expected, "{options}: as a whole");
        for start in (0..size).step_by(65_521 * 3) {
            let end = (start + 70_001).min(size);
            let piece = &expected[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()];
            assert!(read(&layer, start..end) == piece, "{options}: {start}..{end}");
        }
        if options.contains("preallocation") {
            assert!(layer.has_sparse_data(), "clusters were preallocated without their space");
        }
        assert_eq!(layer.driver().name(), Qcow2.name());
    }
}

/// Shapes of images, as options of the reference's `create`.
const SHAPES: [&str; 10] = [
    "cluster_size=512",
    "cluster_size=512,compat=0.10",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=1k,refcount_bits=64",
    "cluster_size=4k,refcount_bits=2,lazy_refcounts=on",
    "cluster_size=4k,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=32k,extended_l2=on,refcount_bits=8",
    "cluster_size=64k",
    "cluster_size=512,lazy_refcounts=on",
];
/// Not a multiple of any cluster size but 512.
const DISK_BYTES: u64 = (600 << 10) + 512;

/// A new image of the reference's, in memory. Each shape is made once.
pub(super) fn new_image(shape: &'static str) -> Arc<dyn Storage> {
    static MADE: Mutex<BTreeMap<&str, Vec<u8>>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes = made.entry(shape).or_insert_with(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let image = dir.path().join("a.qcow2");
        let size = DISK_BYTES.to_string();
        reference("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, text(&image), &size]);
        std::fs::read(&image).expect("it was made")
    });
    Arc::new(MemoryStorage::from_bytes("memory.qcow2", bytes))
}

/// Writes guest bytes as the image above a layer does, over nothing below.
pub(super) fn write(layer: &dyn Layer, mut at: u64, mut bytes: &[u8]) -> Result<()> {
    let writer = layer.writer().expect("opened for writing");
    while !bytes.is_empty() {
        let prepared = writer.prepare_write(at..at + bytes.len() as u64)?;
        let (step, is_zeroed) = (prepared.step().clone(), prepared.fill_is_zeroed());
        assert_eq!(step.guest_bytes.start, at);
        let len = usize::try_from(step.guest_bytes.end - at).unwrap();
        let file = layer.file(step.file).expect("it exists");
        let before = padded(layer, at - step.fill_before_bytes..at);
        let after = padded(layer, step.guest_bytes.end..step.guest_bytes.end + step.fill_after_bytes);
        if !(is_zeroed && before.iter().all(|&byte| byte == 0)) {
            file.write_at(&before, step.at.0 - step.fill_before_bytes)?;
        }
        file.write_at(&bytes[..len], step.at.0)?;
        if !(is_zeroed && after.iter().all(|&byte| byte == 0)) {
            file.write_at(&after, step.at.0 + len as u64)?;
        }
        prepared.commit()?;
        at += len as u64;
        bytes = &bytes[len..];
    }
    Ok(())
}

/// Guest bytes, zeroes behind the end of the disk.
fn padded(layer: &dyn Layer, guest: Range<u64>) -> Vec<u8> {
    let end = guest.end.min(layer.virtual_size_bytes());
    let mut bytes = if guest.start < end { read(layer, guest.start..end) } else { Vec::new() };
    bytes.resize(usize::try_from(guest.end - guest.start).unwrap(), 0);
    bytes
}

/// Stores a cluster compressed; false when it does not get smaller.
fn write_compressed(layer: &dyn Layer, at: u64, bytes: &[u8]) -> Result<bool> {
    let mut deflate = flate2::Compress::new(flate2::Compression::fast(), false);
    let mut stored = Vec::with_capacity(bytes.len());
    let status = deflate.compress_vec(bytes, &mut stored, flate2::FlushCompress::Finish).expect("no state");
    if status != flate2::Status::StreamEnd || stored.len() >= bytes.len() {
        return Ok(false);
    }
    let writer = layer.writer().expect("opened for writing");
    let prepared = writer.prepare_compressed(at, u32::try_from(stored.len()).unwrap())?;
    let step = prepared.step();
    layer.file(step.file).expect("it exists").write_at(&stored, step.at.0)?;
    prepared.commit()?;
    Ok(true)
}

/// Compares every reference count, and every copied flag, with the references that are there.
pub(super) fn audit(storage: &Arc<dyn Storage>) {
    let mode = OpenMode::Check { repair: false };
    let layer = open(storage, mode, &OptionSet::new()).expect("it opens");
    let geometry = layer.geometry;
    let cluster = geometry.cluster_bytes();
    let mut expected: BTreeMap<u64, u64> = BTreeMap::new();
    let mut refer = |host: Range<u64>| {
        for cluster in layer.clusters_of(&host) {
            *expected.entry(cluster).or_default() += 1;
        }
    };
    let header = layer.header().clone();
    refer(0..cluster);
    refer(header.l1_offset..header.l1_offset + u64::from(header.l1_entries) * 8);
    let table_bytes = u64::from(header.refcount_table_clusters) * cluster;
    let table = header.refcount_table_offset..header.refcount_table_offset + table_bytes;
    layer
        .scan_words(&table, |_, block| {
            refer(block..block + cluster);
            Ok(())
        })
        .expect("readable");
    refer(table);
    let root = layer.root();
    let mut copied = Vec::new();
    for index in 0..root.l1_entries {
        let entry = layer.map.l1_entry(root, index).expect("readable");
        let Some(table) = layer.map.checked_table(root, index, entry).expect("sound") else { continue };
        refer(table..table + cluster);
        copied.push((table, entry.is_copied()));
        for slot in 0..geometry.l2_entries() {
            let found = layer.map.entry_at(table, slot).expect("readable");
            let guest = (index * geometry.l2_entries() + slot) * cluster;
            match layer.map.checked(found, guest).expect("sound") {
                Cluster::Standard { at }
                | Cluster::Zero { reserved: Some(at) }
                | Cluster::Subclusters { at: Some(at), .. } => {
                    refer(at..at + cluster);
                    copied.push((at, found.entry.is_copied()));
                }
                Cluster::Compressed { at, stored_bytes } => refer(at..at + u64::from(stored_bytes)),
                Cluster::Unallocated | Cluster::Zero { .. } | Cluster::Subclusters { .. } => {}
            }
        }
    }
    let clusters = storage.len_bytes().expect("known").div_ceil(cluster).max(64) * 2;
    for cluster in 0..clusters {
        let expected = expected.remove(&cluster).unwrap_or(0);
        assert_eq!(layer.refcount_of(cluster).expect("readable"), expected, "count of cluster {cluster}");
    }
    assert!(expected.is_empty(), "clusters far behind the end: {expected:?}");
    for (at, copied) in copied {
        assert_eq!(copied, layer.refcount(at).expect("readable") == 1, "copied flag of {at:#x}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: u64, byte: u8 },
    Compress { cluster: u64, byte: u8 },
    Abort { at: u64, len: u64 },
    Zero { at: u64, len: u64, may_unmap: bool },
    Discard { at: u64, len: u64 },
    Flush,
    Reopen,
    Resize { bytes: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..DISK_BYTES;
    let len = prop_oneof![1_u64..3000, 1_u64..100_000];
    prop_oneof![
        6 => (at.clone(), len.clone(), 1_u8..).prop_map(|(at, len, byte)| Step::Write { at, len, byte }),
        2 => (0_u64..1300, 1_u8..).prop_map(|(cluster, byte)| Step::Compress { cluster, byte }),
        1 => (at.clone(), len.clone()).prop_map(|(at, len)| Step::Abort { at, len }),
        2 => (at.clone(), len.clone(), any::<bool>())
            .prop_map(|(at, len, may_unmap)| Step::Zero { at, len, may_unmap }),
        2 => (at, len).prop_map(|(at, len)| Step::Discard { at, len }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => (1..DISK_BYTES * 3 / 1024).prop_map(|half| Step::Resize { bytes: half * 512 }),
    ]
}

/// An image and what it must read as.
struct Pair {
    storage: Arc<dyn Storage>,
    layer: Qcow2Layer,
    model: Vec<u8>,
    options: OptionSet,
}

impl Pair {
    fn new(storage: Arc<dyn Storage>, options: OptionSet) -> Self {
        let layer = open(&storage, OpenMode::Write, &options).expect("it opens");
        let model = vec![0; usize::try_from(layer.virtual_size_bytes()).unwrap()];
        Self { storage, layer, model, options }
    }

    fn range(&self, at: u64, len: u64) -> Range<u64> {
        let size = self.layer.virtual_size_bytes();
        let at = at % size;
        at..(at + len).min(size)
    }

    /// The part of a range that may be zeroed without writing.
    fn aligned(&self, at: u64, len: u64) -> Option<Range<u64>> {
        let range = self.range(at, len);
        let unit = self.layer.zero_granularity_bytes();
        let start = range.start.next_multiple_of(unit);
        let end =
            if range.end == self.layer.virtual_size_bytes() { range.end } else { range.end / unit * unit };
        (start < end).then_some(start..end)
    }

    fn fill(&mut self, range: Range<u64>, byte: u8) {
        self.model[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].fill(byte);
    }

    fn apply(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Write { at, len, byte } => {
                let range = self.range(at, len);
                let bytes = vec![byte; usize::try_from(range.end - range.start).unwrap()];
                write(&self.layer, range.start, &bytes)?;
                self.fill(range, byte);
            }
            Step::Compress { cluster, byte } => {
                let bytes = self.layer.geometry.cluster_bytes();
                let at = cluster * bytes % self.layer.virtual_size_bytes() / bytes * bytes;
                let mut content = vec![byte; usize::try_from(bytes).unwrap()];
                let inside = (self.layer.virtual_size_bytes() - at).min(bytes);
                content[usize::try_from(inside).unwrap()..].fill(0);
                if write_compressed(&self.layer, at, &content)? {
                    self.fill(self.range(at, bytes), byte);
                }
            }
            Step::Abort { at, len } => {
                let range = self.range(at, len);
                let prepared = self.layer.prepare_write(range)?;
                let step = prepared.step();
                let mut now = Vec::new();
                self.layer.map_range(step.guest_bytes.start..step.guest_bytes.start + 1, &mut now)?;
                if !matches!(now[0].place, Place::Data { at, .. } if at == step.at) {
                    // Not in place: nobody sees it.
                    self.layer.file(step.file).unwrap().write_at(b"l", step.at.0)?;
                }
                drop(prepared);
            }
            Step::Zero { at, len, may_unmap } => {
                if let Some(range) = self.aligned(at, len)
                    && LayerWriter::write_zeroes(&self.layer, range.clone(), may_unmap)?
                {
                    self.fill(range, 0);
                }
            }
            Step::Discard { at, len } => {
                if let Some(range) = self.aligned(at, len) {
                    LayerWriter::discard(&self.layer, range.clone())?;
                    let cluster = self.layer.geometry.cluster_bytes();
                    let start = range.start.next_multiple_of(cluster);
                    let is_end = range.end == self.layer.virtual_size_bytes();
                    let end = if is_end { range.end } else { range.end / cluster * cluster };
                    if start < end {
                        self.fill(start..end, 0);
                    }
                }
            }
            Step::Flush => LayerWriter::flush(&self.layer)?,
            Step::Reopen => self.reopen(),
            Step::Resize { bytes } => {
                // Where the old end cuts a cluster, its rest is written by the image above; here it is
                // made to hold zeroes first.
                let old = self.layer.virtual_size_bytes();
                let cluster = self.layer.geometry.cluster_bytes();
                let bytes = if bytes < old { bytes.next_multiple_of(cluster).min(old) } else { bytes };
                LayerWriter::resize(&self.layer, bytes, Preallocation::Off)?;
                self.model.resize(usize::try_from(bytes).unwrap(), 0);
            }
        }
        Ok(())
    }

    fn reopen(&mut self) {
        LayerWriter::close(&self.layer).expect("it can be closed");
        assert!(!self.layer.is_dirty());
        audit(&self.storage);
        self.layer = open(&self.storage, OpenMode::Write, &self.options).expect("it opens again");
    }

    fn compare(&self, when: &dyn std::fmt::Debug) {
        let found = read(&self.layer, 0..self.layer.virtual_size_bytes());
        if let Some(at) = (0..self.model.len()).find(|&at| found[at] != self.model[at]) {
            panic!("after {when:?}: byte {at:#x} is {}, not {}", found[at], self.model[at]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the history, the image reads as the flat model, and each cluster is counted as often as it
    /// is referred to.
    #[test]
    fn image_equals_flat_model(shape in 0..SHAPES.len(), steps in proptest::collection::vec(step(), 1..40)) {
        let mut pair = Pair::new(new_image(SHAPES[shape]), OptionSet::new());
        for step in &steps {
            pair.apply(step).expect("every step is possible");
            pair.compare(step);
        }
        pair.reopen();
        pair.compare(&"the last close");
    }
}

/// Writing the same things in the same order gives the same file as the reference's, byte for byte.
#[test]
fn images_are_laid_out_as_the_reference_does() {
    let dir = tempfile::tempdir().expect("a directory");
    for shape in SHAPES {
        let (theirs, ours) = (dir.path().join("theirs.qcow2"), dir.path().join("ours.qcow2"));
        let size = (4_u64 << 20).to_string();
        reference("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, text(&theirs), &size]);
        std::fs::copy(&theirs, &ours).expect("copied");
        // Whole clusters, so that nothing depends on how the rest of one is filled.
        let writes = [
            (0_u64, 65_536_u64, 1_u8),
            (1 << 20, 65_536 * 3, 2),
            (65_536, 1 << 20, 3),
            (3 << 20, 1 << 20, 4),
        ];
        let mut args = Vec::new();
        for (at, len, byte) in writes {
            args.extend(["-c".to_owned(), format!("write -P {byte} {at} {len}")]);
        }
        args.push(text(&theirs).to_owned());
        reference("qemu-io", &args.iter().map(String::as_str).collect::<Vec<_>>());

        let storage: Arc<dyn Storage> =
            Arc::new(FileOptions::new().write(true).open(&ours).expect("it opens"));
        let layer = open(&storage, OpenMode::Write, &OptionSet::new()).expect("it opens");
        for (at, len, byte) in writes {
            write(&layer, at, &vec![byte; usize::try_from(len).unwrap()]).expect("written");
        }
        LayerWriter::close(&layer).expect("closed");
        drop((layer, storage));
        reference("qemu-img", &["check", "-q", text(&ours)]);
        if std::env::var_os("KEEP").is_some() {
            std::fs::copy(&theirs, "/tmp/qh/theirs.qcow2").unwrap();
            std::fs::copy(&ours, "/tmp/qh/ours.qcow2").unwrap();
        }
        let (theirs, ours) = (std::fs::read(&theirs).unwrap(), std::fs::read(&ours).unwrap());
        let differs = theirs.iter().zip(&ours).position(|(theirs, ours)| theirs != ours);
        assert_eq!((differs, ours.len()), (None, theirs.len()), "{shape}");
    }
}

/// A refcount table that is full gives way to a larger one, where the reference puts it.
#[test]
fn refcount_table_grows() {
    let dir = tempfile::tempdir().expect("a directory");
    for shape in ["cluster_size=512", "cluster_size=512,refcount_bits=64"] {
        let (theirs, ours) = (dir.path().join("theirs.qcow2"), dir.path().join("ours.qcow2"));
        reference("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, text(&theirs), "20M"]);
        std::fs::copy(&theirs, &ours).expect("copied");
        let storage: Arc<dyn Storage> =
            Arc::new(FileOptions::new().write(true).open(&ours).expect("it opens"));
        let layer = open(&storage, OpenMode::Write, &OptionSet::new()).expect("it opens");
        let bytes: Vec<u8> = (0..20 << 20).map(|at: u32| (at >> 12).to_le_bytes()[0]).collect();
        for at in (0..bytes.len()).step_by(1 << 20) {
            write(&layer, at as u64, &bytes[at..at + (1 << 20)]).expect("written");
        }
        assert!(layer.header().refcount_table_clusters > 1);
        LayerWriter::close(&layer).expect("closed");
        drop(layer);
        audit(&storage);
        assert_eq!(reference("qemu-img", &["check", "-q", text(&ours)]), "");
        let layer = open(&storage, OpenMode::Read, &OptionSet::new()).expect("it opens");
        assert!(read(&layer, 0..20 << 20) == bytes, "{shape}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Steps 1 to 4 of a drain, cut short anywhere: the image opens, what was flushed is there, and nothing
    /// worse than leaks is found, or the dirty bit is set and opening repairs.
    #[test]
    fn power_cuts_leave_leaks_only(
        shape in 0..SHAPES.len(),
        steps in proptest::collection::vec(step(), 1..14),
        seed in any::<u64>(),
    ) {
        /// Steps are moved into the start of the disk, so that they meet.
        const ARENA_BYTES: u64 = 96 << 10;
        let recorder = CrashRecorder::new();
        let mut pair = Pair::new(recorder.record(new_image(SHAPES[shape])).unwrap(), OptionSet::new());
        let mut versions = vec![pair.model.clone()];
        recorder.mark(0);
        for step in &steps {
            let step = match step.clone() {
                Step::Write { at, len, byte } => Step::Write { at: at % ARENA_BYTES, len, byte },
                Step::Zero { at, len, may_unmap } => Step::Zero { at: at % ARENA_BYTES, len, may_unmap },
                Step::Discard { at, len } => Step::Discard { at: at % ARENA_BYTES, len },
                Step::Resize { .. } => Step::Flush,
                other => other,
            };
            pair.apply(&step).expect("every step is possible");
            versions.push(pair.model.clone());
            if matches!(step, Step::Flush | Step::Reopen) {
                recorder.mark(versions.len() as u64 - 1);
            }
        }
        for mut state in recorder.states(seed, 40) {
            let storage: Arc<dyn Storage> = Arc::new(state.files.remove(0));
            let mode = OpenMode::Check { repair: false };
            let found = open(&storage, mode, &OptionSet::new()).expect("it opens");
            let report = Layer::check(&found, Repair::Nothing, &mut |_| {}).expect("it can be checked");
            prop_assert!(
                found.is_dirty() || (report.corruptions, report.check_errors) == (0, 0),
                "{:?} in {}",
                report,
                SHAPES[shape]
            );
            let layer = open(&storage, OpenMode::Write, &OptionSet::new()).expect("it opens for writing");
            let bytes = read(&layer, 0..layer.virtual_size_bytes());
            let flushed = usize::try_from(state.mark.unwrap_or(0)).unwrap();
            for at in (0..bytes.len()).filter(|&at| bytes[at] != versions[flushed][at]) {
                let known = versions[flushed..].iter().any(|version| version[at] == bytes[at]);
                prop_assert!(known, "byte {:#x} is {}, which it never was since the flush", at, bytes[at]);
            }
            LayerWriter::close(&layer).expect("it can be closed");
        }
    }
}
