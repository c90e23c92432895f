//! Streams: written front to back, read by their tables and by their markers.

use std::io::Write as _;

use zerocopy::IntoBytes as _;

use super::{
    super::header::{RawMarker, marker},
    Folder, read_all,
};
use crate::{
    format::{OpenMode, Place},
    storage::Preallocation,
};

const GRAIN: u64 = 65536;
/// Four tables, the last grain in part.
const DISK_BYTES: u64 = 3 * 512 * GRAIN + 5 * GRAIN + 512;

fn zlib(byte: u8) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(1));
    encoder.write_all(&[byte; 65536]).expect("in memory");
    encoder.finish().expect("in memory")
}

/// The grains that are written, in order.
const GRAINS: [u64; 7] = [0, 1, 511, 512, 1535, 1536, 3 * 512 + 5];

fn stream() -> Folder {
    let folder = Folder::default();
    folder.create(DISK_BYTES, &[("subformat", "streamOptimized")], None).expect("made");
    let image = folder.image("d.vmdk", OpenMode::Write);
    for (byte, grain) in (1..).zip(GRAINS) {
        image.write_compressed(&zlib(byte), grain * GRAIN).expect("written");
    }
    image.close().expect("closed");
    folder
}

fn assert_reads(folder: &Folder) {
    let image = folder.image("d.vmdk", OpenMode::Read);
    let mut extents = Vec::new();
    image.map_range(0..DISK_BYTES, &mut extents).expect("a map");
    let encoded = extents.iter().filter(|extent| matches!(extent.place, Place::Encoded { .. })).count();
    assert_eq!(encoded, GRAINS.len());
    for (byte, grain) in (1..=255_u8).zip(GRAINS) {
        let len = usize::try_from(GRAIN.min(DISK_BYTES - grain * GRAIN)).expect("small");
        let mut bytes = vec![0; len];
        image.read_at(&mut bytes, grain * GRAIN).expect("readable");
        assert!(bytes.iter().all(|found| *found == byte), "grain {grain}");
    }
    let mut bytes = [1; 512];
    image.read_at(&mut bytes, 2 * GRAIN).expect("readable");
    assert_eq!(bytes, [0; 512]);
}

#[test]
fn a_stream_is_read_by_its_tables() {
    assert_reads(&stream());
}

/// Something was appended to it, or its footer is damaged: the markers still say where everything is.
#[test]
fn a_stream_without_its_footer_is_read_by_its_markers() {
    let folder = stream();
    let storage = folder.file("d.vmdk").expect("there");
    let len = storage.len_bytes().expect("a length");
    storage.write_at(&[0xaa; 512], len).expect("written");
    assert_reads(&folder);
}

#[test]
fn a_stream_that_breaks_off_is_refused_wherever_it_does() {
    let len = stream().file("d.vmdk").expect("there").len_bytes().expect("a length");
    for cut in (65536..len).step_by(512) {
        let folder = stream();
        let storage = folder.file("d.vmdk").expect("there");
        storage.resize(cut, Preallocation::Off).expect("cut");
        let error = folder.open("d.vmdk", OpenMode::Read).expect_err("incomplete").to_string();
        assert!(error.contains("the stream is not complete"), "{cut}: {error}");
    }
}

/// The markers stand one behind the other, each table behind its grains, and the end is the end.
#[test]
fn a_stream_holds_markers_from_front_to_back() {
    let folder = stream();
    let storage = folder.file("d.vmdk").expect("there");
    let (mut at, mut kinds) = (65536, Vec::new());
    loop {
        let mut sector = [0; 512];
        storage.read_at(&mut sector, at).expect("readable");
        let word = |from: usize| u32::from_le_bytes(sector[from..from + 4].try_into().expect("four"));
        let (value, size, kind) = (u64::from(word(0)), u64::from(word(8)), word(12));
        if size > 0 {
            kinds.push(format!("grain {}", value / 128));
            at += (12 + size).next_multiple_of(512);
            continue;
        }
        kinds.push(match kind {
            marker::END_OF_STREAM => break,
            marker::GRAIN_TABLE => "table".to_owned(),
            marker::GRAIN_DIRECTORY => "directory".to_owned(),
            _ => "footer".to_owned(),
        });
        at += 512 + value * 512;
    }
    assert_eq!(at + 512, storage.len_bytes().expect("a length"));
    assert_eq!(
        kinds.join(", "),
        "grain 0, grain 1, grain 511, table, grain 512, table, grain 1535, table, grain 1536, grain 1541, \
         table, directory, footer"
    );
}

#[test]
fn a_stream_is_written_once_and_in_order() {
    let folder = stream();
    let layer = folder.open("d.vmdk", OpenMode::Write).expect("opens");
    let refused = layer.writer().expect("writable").prepare_compressed(5 * GRAIN, 100).map(drop);
    assert!(refused.expect_err("complete").to_string().contains("complete"));

    let folder = Folder::default();
    folder.create(DISK_BYTES, &[("subformat", "streamOptimized")], None).expect("made");
    let image = folder.image("d.vmdk", OpenMode::Write);
    image.write_compressed(&zlib(1), 600 * GRAIN).expect("written");
    let late = image.write_compressed(&zlib(2), 0).expect_err("too late").to_string();
    assert!(late.contains("in order"), "{late}");
    let twice = image.write_compressed(&zlib(2), 600 * GRAIN).expect_err("twice").to_string();
    assert!(twice.contains("overwriting"), "{twice}");
    let plain = image.write_at(&[1; 65536], 700 * GRAIN).expect_err("plain").to_string();
    assert!(plain.contains("uncompressed"), "{plain}");
    // A grain that was announced and not written leaves a hole: such a stream does not become complete.
    let writer = image.layers()[0].writer().expect("writable");
    drop(writer.prepare_compressed(601 * GRAIN, 100).expect("prepared"));
    assert!(image.flush().expect_err("a hole").to_string().contains("announced"));
}

/// Tables in front, as the reference makes them: grains are added behind those that are there.
#[test]
fn compressed_grains_are_added_where_tables_stand_in_front() {
    let folder = Folder::default();
    folder.create(DISK_BYTES, &[("subformat", "streamOptimized")], None).expect("made");
    let storage = folder.file("d.vmdk").expect("there");
    let len = storage.len_bytes().expect("a length");
    storage.resize(len + 512, Preallocation::Off).expect("grown: no longer empty");
    for (byte, grain) in (1..).zip(GRAINS) {
        let image = folder.image("d.vmdk", OpenMode::Write);
        image.write_compressed(&zlib(byte), grain * GRAIN).expect("written");
        image.close().expect("closed");
    }
    assert_reads(&folder);
}

#[test]
fn a_footer_for_another_disk_is_refused() {
    let folder = stream();
    let storage = folder.file("d.vmdk").expect("there");
    let footer_at = storage.len_bytes().expect("a length") - 1024;
    storage.write_at(&[1, 2, 3], footer_at + 12).expect("written");
    let error = folder.open("d.vmdk", OpenMode::Read).expect_err("another disk").to_string();
    assert!(error.contains("footer"), "{error}");
}

#[test]
fn an_empty_disk_makes_no_stream() {
    let folder = Folder::default();
    folder.create(DISK_BYTES, &[("subformat", "streamOptimized")], None).expect("made");
    folder.image("d.vmdk", OpenMode::Write).close().expect("closed");
    let small = read_all(&folder.image("d.vmdk", OpenMode::Read));
    assert!(small.iter().all(|byte| *byte == 0));
    assert_eq!(RawMarker::new(marker::END_OF_STREAM, 0).as_bytes(), [0; 512]);
}
