//! What a lane knows of the blocks in which files are written past the page cache.

use std::sync::Arc;

use img_core::{
    format::{CreateRequest, OpenContext, OpenMode, OptionSet, registry},
    image::Image,
    storage::{MemoryStorage, Storage},
};

use crate::engine::course::Direct;

/// A qcow2 image whose guest bytes are in a file of their own.
fn image(image_block_bytes: u32, data_block_bytes: u32) -> Image {
    let driver = registry::by_name("qcow2").expect("a known format");
    let file = |name: &str, block_bytes| -> Arc<dyn Storage> {
        Arc::new(MemoryStorage::new(name).aligned_to(block_bytes))
    };
    let (storage, data) = (file("image", image_block_bytes), file("data", data_block_bytes));
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
