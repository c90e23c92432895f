//! What a lane knows of the blocks in which files are written past the page cache.

use std::{
    io::{IoSlice, IoSliceMut},
    ops::Range,
    path::Path,
    sync::Arc,
};

use img_core::{
    Result,
    format::{CreateRequest, OpenContext, OpenMode, OptionSet, registry},
    image::Image,
    storage::{Flush, Identity, Limits, MemoryStorage, Preallocation, Storage},
};

use crate::engine::course::Direct;

/// Memory that says it is written in blocks.
#[derive(Debug)]
struct Blocks {
    memory: MemoryStorage,
    block_bytes: u32,
}

impl Storage for Blocks {
    fn path(&self) -> &Path {
        self.memory.path()
    }
    fn len_bytes(&self) -> Result<u64> {
        self.memory.len_bytes()
    }
    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        self.memory.read_vectored_at(bufs, at_bytes)
    }
    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        self.memory.write_vectored_at(bufs, at_bytes)
    }
    fn flush(&self, what: Flush) -> Result<()> {
        self.memory.flush(what)
    }
    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.memory.resize(len_bytes, preallocation)
    }
    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        self.memory.preallocate(range_bytes, preallocation)
    }
    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        self.memory.punch_hole(range_bytes)
    }
    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        self.memory.write_zeroes(range_bytes, may_unmap)
    }
    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>> {
        self.memory.next_allocated(from_bytes)
    }
    fn allocated_bytes(&self) -> Result<u64> {
        self.memory.allocated_bytes()
    }
    fn identity(&self) -> Option<Identity> {
        self.memory.identity()
    }
    fn limits(&self) -> Limits {
        Limits { alignment_bytes: self.block_bytes, ..self.memory.limits() }
    }
    fn is_writable(&self) -> bool {
        true
    }
}

fn blocks(name: &str, block_bytes: u32) -> Arc<dyn Storage> {
    Arc::new(Blocks { memory: MemoryStorage::new(name), block_bytes })
}

/// A qcow2 image whose guest bytes are in a file of their own.
fn image(image_block_bytes: u32, data_block_bytes: u32) -> Image {
    let driver = registry::by_name("qcow2").expect("a known format");
    let (storage, data) = (blocks("image", image_block_bytes), blocks("data", data_block_bytes));
    let open_file = |_: &str, _: OpenMode| Ok(Arc::clone(&data));
    let mut options = OptionSet::new();
    options.set("data_file", "data");
    let request = CreateRequest {
        virtual_size_bytes: 1 << 20,
        backing: None,
        options: &options,
        open_file: &open_file,
    };
    driver.create(&storage, &request).expect("a fresh image");
    let options = OptionSet::new();
    let context = OpenContext { mode: OpenMode::Write, options: &options, open_file: &open_file };
    let layer = driver.open(storage, &context).expect("it was just made");
    Image::from_layers(vec![layer]).expect("one layer")
}

/// The blocks of the file that holds the guest's bytes count, also where the image's own has smaller ones or none.
#[test]
fn changes_enter_in_the_largest_blocks_of_all_files() {
    let unit = |image_block_bytes, data_block_bytes| {
        Direct::of(&image(image_block_bytes, data_block_bytes)).map(Direct::unit_bytes)
    };
    assert_eq!(unit(1, 1), None);
    assert_eq!(unit(1, 4096), Some(4096));
    assert_eq!(unit(512, 4096), Some(4096));
    assert_eq!(unit(4096, 512), Some(4096));
}
