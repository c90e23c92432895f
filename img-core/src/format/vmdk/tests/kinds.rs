//! COWD and seSparse extents, built byte by byte: no tool here writes them. What the reference reads of the same
//! bytes is in `tests/tests/golden_images_read_as_when_they_were_made.rs`.

use std::sync::Arc;

use super::{Folder, read_all};
use crate::{format::OpenMode, storage::MemoryStorage};

fn describe(folder: &Folder, kind: &str, extents: &str) {
    let text = format!("# Disk DescriptorFile\nversion=1\nCID=12345678\ncreateType=\"{kind}\"\n{extents}");
    folder.put("d.vmdk", Arc::new(MemoryStorage::from_bytes("d.vmdk", text.as_bytes())));
}

fn put_words(bytes: &mut [u8], at: usize, words: &[u32]) {
    for (index, word) in words.iter().enumerate() {
        bytes[at + index * 4..at + index * 4 + 4].copy_from_slice(&word.to_le_bytes());
    }
}

fn put_long(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
}

#[test]
fn a_cowd_extent_is_read_and_not_written() {
    // Header, directory at sector 4, table at sector 8 (32 sectors), a grain of one sector at 40.
    let mut bytes = vec![0; 42 * 512];
    bytes[..4].copy_from_slice(b"COWD");
    put_words(&mut bytes, 4, &[1, 3, 4096 + 2, 1, 4, 2, 41]);
    put_words(&mut bytes, 4 * 512, &[8, 0]);
    put_words(&mut bytes, 8 * 512 + 4, &[40]);
    bytes[40 * 512..41 * 512].fill(7);
    let folder = Folder::default();
    folder.put("x-delta.vmdk", Arc::new(MemoryStorage::from_bytes("x-delta.vmdk", &bytes)));
    describe(&folder, "vmfsSparse", "RW 4098 VMFSSPARSE \"x-delta.vmdk\"\n");
    let disk = read_all(&folder.image("d.vmdk", OpenMode::Read));
    assert_eq!(disk.len(), 4098 * 512);
    assert!(disk.iter().enumerate().all(|(at, byte)| *byte == if at / 512 == 1 { 7 } else { 0 }));
    let refused = folder.open("d.vmdk", OpenMode::Write).expect_err("read only").to_string();
    assert!(refused.contains("writing vmfsSparse extents"), "{refused}");
    for (at, word, expected) in [
        (16, 0, "header.granularity"),
        (24, 1, "header.numGDEntries"),
        (24, u32::MAX, "header.numGDEntries"),
        (20, 0x00ff_ffff, "grain directory"),
    ] {
        let mut broken = bytes.clone();
        put_words(&mut broken, at, &[word]);
        folder.put("x-delta.vmdk", Arc::new(MemoryStorage::from_bytes("x-delta.vmdk", &broken)));
        let error = folder.open("d.vmdk", OpenMode::Read).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

/// Directory at sector 2, tables from 8 on, grains from 80 on.
fn sesparse() -> Vec<u8> {
    let mut bytes = vec![0; (80 + 3 * 8) * 512];
    put_long(&mut bytes, 0, 0xcafe_babe);
    put_long(&mut bytes, 8, 0x2_0000_0001);
    put_long(&mut bytes, 16, 4096 * 8 + 8);
    put_long(&mut bytes, 24, 8);
    put_long(&mut bytes, 32, 64);
    put_long(&mut bytes, 80, 1);
    put_long(&mut bytes, 88, 1);
    put_long(&mut bytes, 128, 2);
    put_long(&mut bytes, 136, 1);
    put_long(&mut bytes, 144, 8);
    put_long(&mut bytes, 152, 64);
    put_long(&mut bytes, 192, 80);
    put_long(&mut bytes, 200, 24);
    put_long(&mut bytes, 512, 0xcafe_cafe);
    put_long(&mut bytes, 2 * 512, 0x1000_0000_0000_0000);
    let table = 8 * 512;
    put_long(&mut bytes, table + 8, 0x3000_0000_0000_0000); // grain 0 of the area
    put_long(&mut bytes, table + 16, 0x3002_0000_0000_0000); // grain 2
    put_long(&mut bytes, table + 24, 0x2000_0000_0000_0000);
    put_long(&mut bytes, table + 32, 0x1000_0000_0000_0000);
    bytes[80 * 512..88 * 512].fill(1);
    bytes[96 * 512..104 * 512].fill(2);
    bytes
}

#[test]
fn an_sesparse_extent_is_read_and_not_written() {
    let folder = Folder::default();
    let put = |bytes: &[u8]| {
        folder.put("x-sesparse.vmdk", Arc::new(MemoryStorage::from_bytes("x-sesparse.vmdk", bytes)));
    };
    put(&sesparse());
    describe(&folder, "seSparse", "RW 32776 SESPARSE \"x-sesparse.vmdk\"\n");
    let disk = read_all(&folder.image("d.vmdk", OpenMode::Read));
    assert_eq!(disk.len(), 32776 * 512);
    for (at, byte) in disk.iter().enumerate() {
        let expected = match at / 4096 {
            1 => 1,
            2 => 2,
            _ => 0,
        };
        assert_eq!(*byte, expected, "{at:#x}");
    }
    let refused = folder.open("d.vmdk", OpenMode::Write).expect_err("read only").to_string();
    assert!(refused.contains("writing seSparse extents"), "{refused}");
    for (at, word, expected) in [
        (8, 1, "seSparse version"),
        (16, u64::MAX, "header.capacity"),
        (24, 16, "header.grain_size"),
        (32, 1, "header.grain_table_size"),
        (40, 1, "seSparse flags"),
        (56, 1, "reserved fields"),
        (80, u64::MAX, "header.volatile_header_offset"),
        (80, 3, "volatile header"),
        (136, 0, "header.grain_dir_size"),
        (136, u64::MAX, "header.grain_dir_size"),
        (128, 1 << 40, "grain directory"),
        (512 + 24, 1, "journal that waits"),
    ] {
        let mut broken = sesparse();
        put_long(&mut broken, at, word);
        put(&broken);
        let error = folder.open("d.vmdk", OpenMode::Read).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    for (at, word, expected) in [
        (2 * 512, 0x2000_0000_0000_0000, "grain directory entry"),
        (2 * 512, 0x1000_0000_ffff_ffff, "grain directory entry"),
        (8 * 512, 0x5000_0000_0000_0000, "grain table entry"),
        (8 * 512, 0x3fff_ffff_ffff_ffff, "grain table entry"),
        (8 * 512, 7, "grain table entry"),
    ] {
        let mut broken = sesparse();
        put_long(&mut broken, at, word);
        put(&broken);
        let image = folder.image("d.vmdk", OpenMode::Read);
        let error = image.read_at(&mut [0; 512], 0).expect_err(expected).to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
