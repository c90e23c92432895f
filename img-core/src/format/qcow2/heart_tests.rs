//! The heart of the driver against a flat model and against the reference: map, write, zero, flush, resize.

use std::{ops::Range, path::Path, process::Command, sync::Arc};

use super::{Qcow2, layer::Qcow2Layer};
use crate::{
    Result,
    format::{Codec, Driver, Extent, Layer, OpenContext, OpenMode, OptionSet, Place},
    storage::{FileOptions, Storage},
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
        Codec::Deflate => {
            let mut inflate = flate2::Decompress::new(false);
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

fn text(path: &Path) -> &str {
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
        let mut steps =
            vec!["write -P 1 3k 100k", "write -P 2 1M 1M", "write -c -P 3 2M 2M", "discard 1M 512k"];
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
