//! Every rule of the header and of the tables, broken alone.

use std::sync::Arc;

use zerocopy::IntoBytes as _;

use super::{create_small, footer, open};
use crate::{
    Error, Result,
    format::{Layer, OpenMode, Repair, vpc::footer::DiskType},
    image::Image,
    storage::{MemoryStorage, Storage},
};

const DISK: u64 = 16 << 10;
/// Where the header stands.
const HEADER: u64 = 512;
/// Where the table stands, of four entries.
const TABLE: u64 = 1536;

/// A dynamic disk of four blocks of 4 KiB, of which the first two are there.
fn image() -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("t.vhd"));
    create_small(&storage, DISK, 4096, None).unwrap();
    let disk = Image::from_layers(vec![open(&storage, OpenMode::Write).unwrap()]).unwrap();
    disk.write_at(&[7; 8192], 0).unwrap();
    disk.close().unwrap();
    storage
}

/// Changes bytes of the header and makes its sum right.
fn patch_header(storage: &Arc<dyn Storage>, at: u64, bytes: &[u8]) {
    let mut header = super::RawHeader::empty();
    storage.read_at(header.as_mut_bytes(), HEADER).unwrap();
    header.as_mut_bytes()[usize::try_from(at).unwrap()..][..bytes.len()].copy_from_slice(bytes);
    storage.write_at(header.summed().as_bytes(), HEADER).unwrap();
}

/// Changes bytes of both copies of the footer and makes their sums right.
fn patch_footers(storage: &Arc<dyn Storage>, at: usize, bytes: &[u8]) {
    let mut sector = [0; 512];
    storage.read_at(&mut sector, 0).unwrap();
    sector[at..at + bytes.len()].copy_from_slice(bytes);
    let footer = crate::format::vpc::footer::RawFooter::from_sector(&sector).summed();
    let end = storage.len_bytes().unwrap() - 512;
    storage.write_at(footer.as_bytes(), 0).unwrap();
    storage.write_at(footer.as_bytes(), end).unwrap();
}

fn refusal(storage: &Arc<dyn Storage>, mode: OpenMode) -> String {
    open(storage, mode).expect_err("refused").to_string()
}

fn audit(storage: &Arc<dyn Storage>, repair: Repair) -> Result<(u64, u64, Vec<String>)> {
    let layer = open(storage, OpenMode::Check { repair: repair != Repair::Nothing })?;
    let mut told = Vec::new();
    let report = layer.check(repair, &mut |finding| told.push(finding.text))?;
    Ok((report.corruptions, report.leaks, told))
}

#[test]
fn fields_of_the_header_have_their_limits() {
    for (at, bytes, field) in [
        (0, &b"cxsparsf"[..], "header.cookie"),
        (16, &0_u64.to_be_bytes(), "header.table_offset"),
        (16, &600_u64.to_be_bytes(), "header.table_offset"),
        (16, &513_u64.to_be_bytes(), "header.table_offset"),
        (16, &(1_u64 << 63).to_be_bytes(), "header.table_offset"),
        (16, &u64::MAX.to_be_bytes(), "header.table_offset"),
        (24, &0x0002_0000_u32.to_be_bytes(), "header.version"),
        (28, &3_u32.to_be_bytes(), "header.max_table_entries"),
        (28, &100_000_u32.to_be_bytes(), "header.table_offset"),
        (28, &u32::MAX.to_be_bytes(), "a table of 4294967295 blocks"),
        (32, &0_u32.to_be_bytes(), "header.block_size"),
        (32, &256_u32.to_be_bytes(), "header.block_size"),
        (32, &3072_u32.to_be_bytes(), "header.block_size"),
        (32, &512_u32.to_be_bytes(), "header.max_table_entries"),
    ] {
        let storage = image();
        patch_header(&storage, at, bytes);
        for mode in [OpenMode::Inspect, OpenMode::Read, OpenMode::Write] {
            let text = refusal(&storage, mode);
            assert!(text.contains(field), "{at} {bytes:x?}: {text}");
        }
    }
}

#[test]
fn fields_of_the_footer_have_their_limits() {
    for (at, bytes, field) in [
        (12, &0x0002_0000_u32.to_be_bytes()[..], "footer.version"),
        (16, &0_u64.to_be_bytes(), "footer.data_offset"),
        (16, &u64::MAX.to_be_bytes(), "footer.data_offset"),
        (16, &(1_u64 << 40).to_be_bytes(), "footer.data_offset"),
        (16, &513_u64.to_be_bytes(), "header.cookie"),
        (48, &(0xff00_0001_u64 * 512).to_be_bytes(), "a disk of 4278190081 sectors"),
        (48, &u64::MAX.to_be_bytes(), "a disk of"),
        (60, &7_u32.to_be_bytes(), "disk type 7"),
        (60, &2_u32.to_be_bytes(), "footer.disk_type"),
    ] {
        let storage = image();
        patch_footers(&storage, at, bytes);
        let text = refusal(&storage, OpenMode::Read);
        assert!(text.contains(field), "{at} {bytes:x?}: {text}");
    }
}

#[test]
fn a_fixed_disk_ends_before_its_footer() {
    let file = [vec![0; 1024], footer(DiskType::Fixed, 4096, b"qem2").as_bytes().to_vec()].concat();
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("t.vhd", &file));
    assert!(refusal(&storage, OpenMode::Read).contains("footer.current_size"));
}

#[test]
fn blocks_lie_inside_the_file_and_apart() {
    for (block, sector, opens, why) in [
        (2, u32::MAX - 1, false, "is not inside the file"),
        (2, 0, true, "overlaps the footer's copy"),
        (2, 1, true, "overlaps the header"),
        (2, 3, true, "overlaps the block allocation table"),
        (2, 5, true, "overlaps another block"),
        (1, 4, true, "overlaps another block"),
    ] {
        let storage = image();
        storage.write_at(&u32::to_be_bytes(sector), TABLE + 4 * block).unwrap();
        // Reading answers, or names the entry; writing is refused either way.
        match open(&storage, OpenMode::Read) {
            Ok(layer) => {
                assert!(opens, "sector {sector}");
                let image = Image::from_layers(vec![layer]).unwrap();
                image.read_at(&mut vec![0; 16 << 10], 0).unwrap();
            }
            Err(error) => assert!(!opens && error.to_string().contains("block allocation table"), "{error}"),
        }
        let before = storage_bytes(&storage);
        assert!(refusal(&storage, OpenMode::Write).contains("block allocation table"));
        let (corruptions, _, told) = audit(&storage, Repair::All).unwrap();
        assert!(corruptions > 0 && told.iter().any(|text| text.contains(why)), "{sector}: {told:?}");
        assert!(storage_bytes(&storage) == before, "what cannot be mended is left alone");
    }
}

fn storage_bytes(storage: &Arc<dyn Storage>) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len_bytes().unwrap()).unwrap()];
    storage.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn damaged_copies_are_told_and_mended() {
    type Damage = fn(&Arc<dyn Storage>);
    let front: Damage = |storage| storage.write_at(&[0; 512], 0).unwrap();
    let back: Damage = |storage| storage.write_at(&[0; 512], storage.len_bytes().unwrap() - 512).unwrap();
    let sum: Damage = |storage| storage.write_at(&[1], HEADER + 36).unwrap();
    for (damage, is_corrupt) in [(front, true), (back, false), (sum, true)] {
        let storage = image();
        damage(&storage);
        let mut guest = vec![0; 8192];
        Image::from_layers(vec![open(&storage, OpenMode::Read).unwrap()])
            .unwrap()
            .read_at(&mut guest, 0)
            .unwrap();
        assert!(guest.iter().all(|byte| *byte == 7), "the other copy is enough");
        let (corruptions, leaks, _) = audit(&storage, Repair::Nothing).unwrap();
        assert_eq!((corruptions > 0, leaks > 0), (is_corrupt, !is_corrupt));
        audit(&storage, Repair::All).unwrap();
        assert_eq!(audit(&storage, Repair::Nothing).unwrap(), (0, 0, Vec::new()));
    }
    // Opening for writing mends the copies of the footer, and no more.
    for damage in [front, back] {
        let storage = image();
        damage(&storage);
        let layer = open(&storage, OpenMode::Write).unwrap();
        layer.writer().unwrap().close().unwrap();
        let (corruptions, _, told) = audit(&storage, Repair::Nothing).unwrap();
        assert_eq!(corruptions, 0, "{told:?}");
    }
    let storage = image();
    sum(&storage);
    assert!(refusal(&storage, OpenMode::Write).contains("header.checksum"));
}

#[test]
fn locators_that_lead_outside_are_passed_over_unless_they_are_all() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("t.vhd"));
    create_small(&storage, DISK, 4096, Some(&footer(DiskType::Fixed, DISK, b"qem2"))).unwrap();
    let locators = 576;
    let name = |storage: &Arc<dyn Storage>| -> Result<String> {
        let layer: Arc<dyn Layer> = open(storage, OpenMode::Read)?;
        Ok(layer.backing().expect("a differencing disk").name.clone())
    };
    assert_eq!(name(&storage).unwrap(), "parent.vhd");
    patch_header(&storage, locators + 16, &u64::MAX.to_be_bytes());
    assert_eq!(name(&storage).unwrap(), "parent.vhd", "by the second one");
    // It would lead into a block once the file has grown: nothing is written then.
    assert!(refusal(&storage, OpenMode::Write).contains("header.parent_locators"));
    assert_eq!(audit(&storage, Repair::Nothing).unwrap().0, 1);
    patch_header(&storage, locators + 24 + 8, &u32::MAX.to_be_bytes());
    let error = name(&storage).unwrap_err();
    assert!(matches!(error, Error::Corrupt { structure: "header.parent_locators", .. }), "{error}");
}
