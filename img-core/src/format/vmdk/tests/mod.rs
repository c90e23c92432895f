//! The opened image against a flat model, power cuts, hostile files, and the kinds that no tool here writes.

mod crash;
mod hostile;
mod kinds;
mod model;
mod resize;
mod stream;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use zerocopy::{
    IntoBytes,
    little_endian::{U16, U32, U64},
};

use super::header::{MAGIC, NEWLINES, RawHeader};
use crate::{
    Error, Result,
    format::{Backing, CreateRequest, Driver as _, Layer, OpenContext, OpenMode, OptionSet, raw::Raw},
    image::{Image, flat_model::read_all},
    storage::{MemoryStorage, Storage},
};

/// The files of a folder, in memory.
#[derive(Debug, Default)]
struct Folder(Mutex<HashMap<String, Arc<dyn Storage>>>);

impl Folder {
    fn put(&self, name: &str, storage: Arc<dyn Storage>) {
        self.0.lock().expect("no panic").insert(name.to_owned(), storage);
    }

    fn file(&self, name: &str) -> Result<Arc<dyn Storage>> {
        let missing = || Error::Invalid(format!("no file '{name}'"));
        self.0.lock().expect("no panic").get(name).cloned().ok_or_else(missing)
    }

    /// An empty file where there is none, or what is there.
    fn new_file(&self, name: &str) -> Arc<dyn Storage> {
        let mut files = self.0.lock().expect("no panic");
        let empty = || Arc::new(MemoryStorage::new(name)) as Arc<dyn Storage>;
        Arc::clone(files.entry(name.to_owned()).or_insert_with(empty))
    }

    /// Makes an image called `d.vmdk`.
    fn create(&self, size: u64, options: &[(&str, &str)], backing: Option<&str>) -> Result<()> {
        let mut set = OptionSet::new();
        for (name, value) in options {
            set.set(*name, *value);
        }
        let name = if backing.is_some() { "child.vmdk" } else { "d.vmdk" };
        let open_file = |name: &str, mode: OpenMode| match mode {
            OpenMode::Write => Ok(self.new_file(name)),
            _ => self.file(name),
        };
        let request = CreateRequest {
            virtual_size_bytes: size,
            backing: backing.map(|name| Backing { name: name.to_owned(), format: Some("vmdk".to_owned()) }),
            options: &set,
            open_file: &open_file,
        };
        super::Vmdk.create(&self.new_file(name), &request)
    }

    fn open(&self, name: &str, mode: OpenMode) -> Result<Arc<dyn Layer>> {
        self.open_with(name, mode, &OptionSet::new())
    }

    fn open_with(&self, name: &str, mode: OpenMode, options: &OptionSet) -> Result<Arc<dyn Layer>> {
        let open_file = |name: &str, _| self.file(name);
        super::Vmdk.open(self.file(name)?, &OpenContext { mode, options, open_file: &open_file })
    }

    /// The image as a disk.
    fn image(&self, name: &str, mode: OpenMode) -> Image {
        let layer = self.open(name, mode).unwrap_or_else(|error| panic!("{error}"));
        Image::from_layers(vec![layer]).expect("one layer")
    }
}

fn raw_layer(bytes: &[u8]) -> Arc<dyn Layer> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("below.raw", bytes));
    let context = OpenContext {
        mode: OpenMode::Read,
        options: &OptionSet::new(),
        open_file: &|name, _| panic!("no file '{name}' to open"),
    };
    Raw.open(storage, &context).expect("raw")
}

/// The smallest hosted sparse extent worth testing: tables of 512 bytes for 512 KiB each.
#[derive(Clone, Copy, Debug)]
struct Craft {
    sectors: u64,
    /// Every other table is there already, in both directories.
    with_tables: bool,
    redundant: bool,
    zeroed_grains: bool,
    has_parent: bool,
}

const CRAFT_GRAIN_SECTORS: u64 = 8;
const CRAFT_TABLE_ENTRIES: u32 = 128;
const CRAFT_DIRECTORY_SECTOR: u64 = 4;
const CRAFT_REDUNDANT_SECTOR: u64 = 5;
const CRAFT_TABLES_SECTOR: u64 = 8;

impl Craft {
    fn bytes(self) -> Vec<u8> {
        let tables = self.sectors.div_ceil(CRAFT_GRAIN_SECTORS * u64::from(CRAFT_TABLE_ENTRIES));
        let overhead_sectors = (CRAFT_TABLES_SECTOR + 2 * tables).next_multiple_of(CRAFT_GRAIN_SECTORS);
        let flags = 1 | u32::from(self.redundant) << 1 | u32::from(self.zeroed_grains) << 2;
        let header = RawHeader {
            magic: MAGIC,
            version: U32::new(if self.zeroed_grains { 2 } else { 1 }),
            flags: U32::new(flags),
            capacity_sectors: U64::new(self.sectors),
            grain_sectors: U64::new(CRAFT_GRAIN_SECTORS),
            descriptor_sector: U64::new(1),
            descriptor_sectors: U64::new(3),
            table_entries: U32::new(CRAFT_TABLE_ENTRIES),
            redundant_directory_sector: U64::new(CRAFT_REDUNDANT_SECTOR),
            directory_sector: U64::new(CRAFT_DIRECTORY_SECTOR),
            overhead_sectors: U64::new(overhead_sectors),
            unclean_shutdown: 0,
            newline_test: NEWLINES,
            compress_algorithm: U16::new(0),
            padding: [0; 433],
        };
        let mut bytes = header.as_bytes().to_vec();
        let hint = if self.has_parent { "parentFileNameHint=\"below\"\n" } else { "" };
        bytes.extend_from_slice(
            format!("version=1\nCID=00000001\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n{hint}")
                .as_bytes(),
        );
        bytes.resize(usize::try_from(overhead_sectors * 512).expect("small"), 0);
        let mut put = |sector: u64, index: u64, entry: u64| {
            let at = usize::try_from(sector * 512 + index * 4).expect("small");
            bytes[at..at + 4].copy_from_slice(&u32::try_from(entry).expect("small").to_le_bytes());
        };
        if self.with_tables {
            for table in (0..tables).step_by(2) {
                put(CRAFT_DIRECTORY_SECTOR, table, CRAFT_TABLES_SECTOR + table);
                put(CRAFT_REDUNDANT_SECTOR, table, CRAFT_TABLES_SECTOR + tables + table);
            }
        }
        bytes
    }
}
