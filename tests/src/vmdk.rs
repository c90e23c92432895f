//! VMDKs in memory: the kinds that no tool here writes, byte by byte, and small ones of all kinds for fuzzing.
//!
//! Sources: VMware's technical note "Virtual Disk Format 5.0" for the hosted and COWD extents. seSparse has no
//! public specification; the layout is the one its readers agree on, and the reference is asked whether it
//! reads the same from it (`vmdk_kinds_that_are_only_read.rs`).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use img_core::{
    Error, Result,
    format::{CreateRequest, Driver, OpenContext, OpenMode, OptionSet, registry},
    image::Image,
    storage::{MemoryStorage, Storage},
};

/// The VMDK driver.
///
/// # Panics
/// Never: every build has it.
#[must_use]
pub fn driver() -> &'static dyn Driver {
    registry::by_name("vmdk").expect("every build has vmdk")
}

/// A descriptor of one extent.
#[must_use]
pub fn descriptor(create_type: &str, extent_line: &str) -> Vec<u8> {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"{create_type}\"\n\n\
         # Extent description\n{extent_line}\n\n# The Disk Data Base\n#DDB\nddb.adapterType = \"lsilogic\"\n"
    )
    .into_bytes()
}

fn words(bytes: &mut [u8], at: usize, words: &[u32]) {
    for (word, place) in words.iter().zip(bytes[at..].chunks_mut(4)) {
        place.copy_from_slice(&word.to_le_bytes());
    }
}

fn long(bytes: &mut [u8], at: usize, word: u64) {
    bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
}

/// A COWD extent of 4098 sectors in grains of one, and what a guest reads from it: sector 1 is full of 7, the
/// last one full of 9.
///
/// Header at sector 0, directory of two entries at 4, tables of 32 sectors at 8 and 41, grains at 40 and 73.
#[must_use]
pub fn cowd() -> (Vec<u8>, Vec<u8>) {
    const SECTORS: u32 = 4098;
    let mut bytes = vec![0; 74 * 512];
    bytes[..4].copy_from_slice(b"COWD");
    // version, flags, disk sectors, grain, directory's sector and entries, next free sector.
    words(&mut bytes, 4, &[1, 3, SECTORS, 1, 4, 2, 74]);
    words(&mut bytes, 4 * 512, &[8, 41]);
    words(&mut bytes, 8 * 512 + 4, &[40]);
    words(&mut bytes, 41 * 512 + 4, &[73]);
    bytes[40 * 512..41 * 512].fill(7);
    bytes[73 * 512..74 * 512].fill(9);
    let mut guest = vec![0; SECTORS as usize * 512];
    guest[512..1024].fill(7);
    let last = guest.len() - 512;
    guest[last..].fill(9);
    (bytes, guest)
}

/// A seSparse extent of 16 MiB and 4 KiB, and what a guest reads from it: grains that are written, in and out of
/// order, never written, unmapped, and zero.
///
/// Constant header at sector 0, volatile header at 1, directory at 2, two tables of 64 sectors at 8, grains from
/// 136 on.
#[must_use]
pub fn sesparse() -> (Vec<u8>, Vec<u8>) {
    const GRAINS: u64 = 4097;
    const TABLES: usize = 8 * 512;
    const DATA: usize = 136 * 512;
    let mut bytes = vec![0; DATA + 4 * 4096];
    for (at, word) in [
        (0, 0xcafe_babe),
        (8, 0x2_0000_0001), // version 2.1
        (16, GRAINS * 8),   // capacity
        (24, 8),            // sectors of a grain
        (32, 64),           // sectors of a table
        (80, 1),            // volatile header: sector, sectors
        (88, 1),
        (128, 2), // directory
        (136, 1),
        (144, 8), // tables
        (152, 128),
        (192, 136), // grains
        (200, 32),
        (512, 0xcafe_cafe), // volatile header
        (2 * 512, 0x1000_0000_0000_0000),
        (2 * 512 + 8, 0x1000_0000_0000_0001),
        (TABLES + 8, 0x3000_0000_0000_0000),
        (TABLES + 16, 0x3002_0000_0000_0000),
        (TABLES + 24, 0x3001_0000_0000_0000),
        (TABLES + 32, 0x2000_0000_0000_0000),
        (TABLES + 40, 0x1000_0000_0000_0000),
        (TABLES + 64 * 512, 0x3003_0000_0000_0000),
    ] {
        long(&mut bytes, at, word);
    }
    let mut guest = vec![0; 4097 * 4096];
    for (grain, place, byte) in [(1, 0, 1), (2, 2, 2), (3, 1, 3), (4096, 3, 4)] {
        bytes[DATA + place * 4096..][..4096].fill(byte);
        guest[grain * 4096..][..4096].fill(byte);
    }
    (bytes, guest)
}

/// The files of an image, in memory. The first one, `d.vmdk`, is the image.
#[derive(Debug, Default)]
pub struct Files(Mutex<HashMap<String, Arc<dyn Storage>>>);

impl Files {
    /// Puts a file there.
    ///
    /// # Panics
    /// When another thread panicked here.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let storage = Arc::new(MemoryStorage::from_bytes(name, bytes));
        self.0.lock().expect("no panic").insert(name.to_owned(), storage);
    }

    /// All bytes of a file.
    ///
    /// # Panics
    /// When there is no file of that name.
    #[must_use]
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let storage = self.get(name).expect("a file of the test");
        let mut bytes = vec![0; usize::try_from(storage.len_bytes().expect("a length")).expect("small")];
        storage.read_at(&mut bytes, 0).expect("memory is readable");
        bytes
    }

    fn get(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let missing = || Error::Invalid(format!("no file '{name}'"));
        self.0.lock().expect("no panic").get(name).cloned().ok_or_else(missing)
    }

    fn make(&self, name: &str) -> Arc<dyn Storage> {
        let mut files = self.0.lock().expect("no panic");
        let empty = || Arc::new(MemoryStorage::new(name)) as Arc<dyn Storage>;
        Arc::clone(files.entry(name.to_owned()).or_insert_with(empty))
    }

    /// A new image of that `subformat`.
    ///
    /// # Panics
    /// When it is refused.
    #[must_use]
    pub fn create(subformat: &str, size_bytes: u64, zeroed_grains: bool) -> Self {
        let files = Self::default();
        let mut options = OptionSet::new();
        options.set("subformat", subformat);
        options.set("zeroed_grain", if zeroed_grains { "on" } else { "off" });
        let open_file = |name: &str, _| Ok(files.make(name));
        let request = CreateRequest {
            virtual_size_bytes: size_bytes,
            backing: None,
            options: &options,
            open_file: &open_file,
        };
        driver().create(&files.make("d.vmdk"), &request).expect("made");
        files
    }

    /// Opens the image.
    ///
    /// # Errors
    /// As [`Driver::open`].
    pub fn open(&self, mode: OpenMode) -> Result<Image> {
        let open_file = |name: &str, _| self.get(name);
        let context = OpenContext { mode, options: &OptionSet::new(), open_file: &open_file };
        Image::from_layers(vec![driver().open(self.get("d.vmdk")?, &context)?])
    }
}
