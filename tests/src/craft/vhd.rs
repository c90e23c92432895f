//! VHD images made byte by byte from the specification ("Virtual Hard Disk Image Format Specification", version
//! 1.0), as the programs of several vendors lay them out. Nothing here uses the library.
//!
//! No tool at hand makes differencing disks; these stand for those that Hyper-V, Virtual Server, XenServer and
//! VirtualBox made. What differs between them: who is named as the creator (and so which size counts), which
//! names of the parent are recorded and how, what else stands in the file, and where blocks begin.

use super::Crafted;

/// Bytes of a sector, and of a footer.
pub const SECTOR: usize = 512;
/// Guest bytes of a block of a differencing disk.
pub const BLOCK: usize = 2 << 20;

/// The unique id of every parent made here.
pub const PARENT_ID: [u8; 16] = *b"parent-disk-id-1";
/// When every parent says it was made, in seconds since 2000.
pub const PARENT_TIME: u32 = 500_000_000;

/// Where things stand in [`small`].
pub mod place {
    /// The header; the footer's copy is in front of it.
    pub const HEADER: usize = 512;
    /// The table, of four entries.
    pub const TABLE: usize = 1536;
    /// The bitmap of block 0, which is the first one on the disk.
    pub const BITMAP: usize = 2048;
    /// The name of the parent.
    pub const NAME: usize = TABLE + 64;
}

/// A disk of four blocks of 4 KiB, as no program makes them: the first one is there, with sectors 0 to 6. `kind` is
/// 3 or 4, as in [`footer`].
#[must_use]
pub fn small(kind: u32) -> Crafted {
    let footer = footer(kind, 16 << 10, (1, 4, 17), *b"qem2", *b"Wi2k", *b"a-small-vhd-disk");
    let mut bytes = vec![0; 6656];
    put(&mut bytes, 0, &footer);
    put(&mut bytes, place::HEADER, b"cxsparse");
    put(&mut bytes, place::HEADER + 16, &(place::TABLE as u64).to_be_bytes());
    put(&mut bytes, place::HEADER + 24, &0x0001_0000_u32.to_be_bytes());
    put(&mut bytes, place::HEADER + 28, &4_u32.to_be_bytes());
    put(&mut bytes, place::HEADER + 32, &4096_u32.to_be_bytes());
    put(&mut bytes, place::HEADER + 576, b"MacX");
    put(&mut bytes, place::HEADER + 576 + 8, &15_u32.to_be_bytes());
    put(&mut bytes, place::HEADER + 576 + 16, &(place::NAME as u64).to_be_bytes());
    put(&mut bytes, place::TABLE, &[0xff; SECTOR]);
    put(&mut bytes, place::NAME, b"file://./parent");
    put(&mut bytes, place::TABLE, &4_u32.to_be_bytes());
    bytes[place::BITMAP] = 0b1111_1110;
    bytes[place::BITMAP + SECTOR..].fill(0x5a);
    bytes.extend(footer);
    summed(Crafted { bytes })
}

/// The same with right sums in the copies of the footer and in the header, where they are.
#[must_use]
pub fn summed(mut image: Crafted) -> Crafted {
    let end = image.bytes.len().saturating_sub(SECTOR);
    for (start, len, at) in [(0, SECTOR, 64), (end, SECTOR, 64), (place::HEADER, 2 * SECTOR, 36)] {
        let Some(part) = image.bytes.get_mut(start..start + len) else { continue };
        if part.starts_with(b"conectix") || part.starts_with(b"cxsparse") {
            put(part, at, &[0; 4]);
            let sum = checksum(part);
            put(part, at, &sum.to_be_bytes());
        }
    }
    image
}

/// A parent locator.
#[derive(Clone, Debug)]
pub struct Locator {
    /// "Platform Code".
    pub code: [u8; 4],
    /// The name as it stands in the file.
    pub name: Vec<u8>,
    /// "Platform Data Space", which the specification counts in sectors and most programs in bytes.
    pub space: u32,
}

/// A differencing disk.
#[derive(Clone, Debug)]
pub struct Child {
    /// "Creator Application".
    pub creator: [u8; 4],
    /// "Creator Host OS".
    pub host: [u8; 4],
    /// "Current Size".
    pub size: u64,
    /// Cylinders, heads, sectors.
    pub geometry: (u16, u8, u8),
    /// "Parent Unicode Name".
    pub parent_name: String,
    /// "Parent Locator Entry", eight at most.
    pub locators: Vec<Locator>,
    /// XenServer's map of full blocks behind the table.
    pub has_batmap: bool,
    /// The data of blocks begins on multiples of this.
    pub data_alignment: usize,
    /// Blocks, each with the sectors that it holds and the byte in them. All other bytes of a block are 0xdd,
    /// which no guest may see.
    pub blocks: Vec<(u32, Vec<(u32, u8)>)>,
}

/// UTF-16, little-endian, as locators are written.
#[must_use]
pub fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// One's complement of the sum of all bytes ("Checksum"); those of the sum itself are zero.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>()
}

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes[at..at + part.len()].copy_from_slice(part);
}

/// "Hard Disk Footer Format". `kind` is 2 for fixed, 3 for dynamic, 4 for differencing disks.
#[must_use]
pub fn footer(
    kind: u32,
    size: u64,
    geometry: (u16, u8, u8),
    creator: [u8; 4],
    host: [u8; 4],
    id: [u8; 16],
) -> Vec<u8> {
    let mut footer = vec![0; SECTOR];
    put(&mut footer, 0, b"conectix");
    put(&mut footer, 8, &2_u32.to_be_bytes());
    put(&mut footer, 12, &0x0001_0000_u32.to_be_bytes());
    put(&mut footer, 16, &if kind == 2 { u64::MAX } else { 512 }.to_be_bytes());
    put(&mut footer, 24, &PARENT_TIME.to_be_bytes());
    put(&mut footer, 28, &creator);
    put(&mut footer, 32, &0x0006_0001_u32.to_be_bytes());
    put(&mut footer, 36, &host);
    put(&mut footer, 40, &size.to_be_bytes());
    put(&mut footer, 48, &size.to_be_bytes());
    put(&mut footer, 56, &geometry.0.to_be_bytes());
    put(&mut footer, 58, &[geometry.1, geometry.2]);
    put(&mut footer, 60, &kind.to_be_bytes());
    put(&mut footer, 68, &id);
    let sum = checksum(&footer);
    put(&mut footer, 64, &sum.to_be_bytes());
    footer
}

/// A fixed disk with these bytes, which are whole sectors.
///
/// # Panics
/// Never: test disks have a length that fits.
#[must_use]
pub fn fixed(data: &[u8], geometry: (u16, u8, u8), creator: [u8; 4]) -> Vec<u8> {
    let size = u64::try_from(data.len()).expect("a test disk");
    [data, &footer(2, size, geometry, creator, *b"Wi2k", PARENT_ID)].concat()
}

impl Child {
    /// The file: footer, header, table, what stands behind it, blocks, footer.
    ///
    /// # Panics
    /// When a number of the description is absurd.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let entries = usize::try_from(self.size).expect("a test disk").div_ceil(BLOCK);
        let footer = footer(4, self.size, self.geometry, self.creator, self.host, *b"child-disk-id-22");
        let table_at = 3 * SECTOR;
        let mut header = vec![0; 2 * SECTOR];
        put(&mut header, 0, b"cxsparse");
        put(&mut header, 8, &u64::MAX.to_be_bytes());
        put(&mut header, 16, &(table_at as u64).to_be_bytes());
        put(&mut header, 24, &0x0001_0000_u32.to_be_bytes());
        put(&mut header, 28, &u32::try_from(entries).expect("few").to_be_bytes());
        put(&mut header, 32, &u32::try_from(BLOCK).expect("2 MiB").to_be_bytes());
        put(&mut header, 40, &PARENT_ID);
        put(&mut header, 56, &PARENT_TIME.to_be_bytes());
        for (index, unit) in self.parent_name.encode_utf16().enumerate() {
            put(&mut header, 64 + 2 * index, &unit.to_be_bytes());
        }
        let mut table = vec![0xff; (entries * 4).next_multiple_of(SECTOR)];
        let mut behind = Vec::new();
        let behind_at = table_at + table.len();
        if self.has_batmap {
            let mut batmap = vec![0; 2 * SECTOR];
            put(&mut batmap, 0, b"tdbatmap");
            put(&mut batmap, 8, &((behind_at + SECTOR) as u64).to_be_bytes());
            put(&mut batmap, 16, &1_u32.to_be_bytes());
            behind.extend(batmap);
        }
        for (index, locator) in self.locators.iter().enumerate() {
            let at = 576 + 24 * index;
            put(&mut header, at, &locator.code);
            put(&mut header, at + 4, &locator.space.to_be_bytes());
            put(&mut header, at + 8, &u32::try_from(locator.name.len()).expect("short").to_be_bytes());
            put(&mut header, at + 16, &((behind_at + behind.len()) as u64).to_be_bytes());
            behind.extend(&locator.name);
            behind.resize(behind.len().next_multiple_of(SECTOR), 0);
        }
        let sum = checksum(&header);
        put(&mut header, 36, &sum.to_be_bytes());
        let mut blocks = Vec::new();
        let blocks_at = behind_at + behind.len();
        for (block, sectors) in &self.blocks {
            // The bitmap of a block of 2 MiB is one sector, in front of the data.
            while !(blocks_at + blocks.len() + SECTOR).is_multiple_of(self.data_alignment) {
                blocks.extend([0; SECTOR]);
            }
            let at = u32::try_from((blocks_at + blocks.len()) / SECTOR).expect("a small file");
            put(&mut table, 4 * *block as usize, &at.to_be_bytes());
            let mut bitmap = vec![0; SECTOR];
            let mut data = vec![0xdd; BLOCK];
            for &(sector, byte) in sectors {
                bitmap[sector as usize / 8] |= 0x80 >> (sector % 8);
                data[sector as usize * SECTOR..][..SECTOR].fill(byte);
            }
            blocks.extend(bitmap);
            blocks.extend(data);
        }
        [footer.clone(), header, table, behind, blocks, footer].concat()
    }
}

/// What each vendor's program makes of a parent called `parent.vhd` in the same folder, by the program's name. The
/// disks have `cylinders` × 4 × 17 sectors.
#[must_use]
pub fn vendors(cylinders: u16) -> Vec<(&'static str, Child)> {
    let size = u64::from(cylinders) * 4 * 17 * 512;
    let blocks = vec![(0, vec![(0, 0xa0), (1, 0xa1), (9, 0xa9), (4095, 0xaf)]), (2, vec![(100, 0xb0)])];
    let child = |creator: &[u8; 4], locators| Child {
        creator: *creator,
        host: *b"Wi2k",
        size,
        geometry: (cylinders, 4, 17),
        parent_name: "parent.vhd".to_owned(),
        locators,
        has_batmap: false,
        data_alignment: SECTOR,
        blocks: blocks.clone(),
    };
    let locator = |code: &[u8; 4], name: Vec<u8>, space| Locator { code: *code, name, space };
    let hyper_v = child(
        b"win ",
        vec![
            locator(b"W2ku", utf16(r"C:\Users\Public\Documents\Hyper-V\parent.vhd"), 512),
            locator(b"W2ru", utf16(r".\parent.vhd"), 512),
        ],
    );
    let virtual_server = child(
        b"vs  ",
        vec![
            locator(b"Wi2r", br".\parent.vhd".to_vec(), 1),
            locator(b"Wi2k", br"\\server\share\parent.vhd".to_vec(), 1),
        ],
    );
    let xen_server = Child {
        host: [0; 4],
        has_batmap: true,
        data_alignment: 4096,
        ..child(
            b"tap\0",
            vec![
                locator(b"MacX", b"file://./parent.vhd".to_vec(), 512),
                locator(b"W2ku", utf16("./parent.vhd"), 512),
                locator(b"W2ru", utf16("./parent.vhd"), 512),
            ],
        )
    };
    let virtual_box = child(b"vbox", vec![locator(b"W2ku", utf16(r"D:\VMs\parent.vhd"), 512)]);
    let name_alone = child(b"vpc ", Vec::new());
    vec![
        ("Hyper-V", hyper_v),
        ("Virtual Server", virtual_server),
        ("XenServer", xen_server),
        ("VirtualBox", virtual_box),
        ("a program that records the bare name", name_alone),
    ]
}
