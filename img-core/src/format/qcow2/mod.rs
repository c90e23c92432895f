//! qcow2: QEMU's copy-on-write format, versions 2 and 3 (QEMU `docs/interop/qcow2.rst`).
//!
//! Guest clusters are found through two levels of tables (L1, L2); host clusters are counted in refcount blocks found
//! through the refcount table. Rooms: `header` and `entry` are the bytes on disk, `geometry` the sizes that follow,
//! `map` the question where a byte lives, `alloc` and `refcount` where new bytes go, `flush` the order that keeps every
//! crash harmless, `front` and `front_reader` images in pipes, `snapshot`, `bitmap`, `create`, `check` the rest.

mod alloc;
mod amend;
mod backing;
mod bitmap;
mod bitmap_store;
mod bitmap_track;
mod check;
mod commit;
mod compressed;
mod counted_once;
mod counts;
mod create;
mod create_layout;
mod create_write;
mod details;
mod details_luks;
mod entry;
mod expand;
mod extension;
mod feature;
mod flush;
mod front;
mod front_places;
mod front_reader;
mod geometry;
mod head;
mod header;
mod layer;
mod lease;
mod map;
mod measure;
mod options;
mod overlap;
mod places;
mod plane;
mod refcount;
mod refcount_width;
mod resize;
mod runtime;
mod snapshot;
mod snapshot_counts;
mod snapshot_table;
mod snapshot_tree;
mod uses;
mod write;
mod zero;

#[cfg(test)]
mod bitmap_tests;
#[cfg(test)]
mod block_tests;
#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod header_tests;
#[cfg(test)]
mod layer_tests;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod raw_data_tests;
#[cfg(test)]
mod snapshot_tests;

use std::{path::Path, sync::Arc};

use super::{
    CreateRequest, Driver, FrontReader, FrontRequest, FrontWriter, Layer, MeasureRequest, Measured,
    OpenContext, OptionDescription, Outline, Reference, ReferenceKind, look_alone,
};
use crate::{
    Result,
    storage::{Storage, StreamStorage},
};

/// The qcow2 format.
#[derive(Debug)]
pub struct Qcow2;

impl Driver for Qcow2 {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn probe(&self, head: &[u8], _name: &Path) -> u8 {
        if head.starts_with(b"QFI\xfb") { 100 } else { 0 }
    }

    fn create_options(&self) -> &'static [OptionDescription] {
        options::CREATE_OPTIONS
    }

    fn amend_options(&self) -> &'static [OptionDescription] {
        options::AMEND_OPTIONS
    }

    fn create(&self, storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()> {
        create::create(storage, request)
    }

    fn open(&self, storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(layer::Qcow2Layer::open(storage, context)?))
    }

    fn outline(&self, storage: Arc<dyn Storage>) -> Result<Outline> {
        let layer = look_alone(|context| layer::Qcow2Layer::open(storage, context))?;
        let data_file = layer.data_file_name();
        let mut outline = Outline::of(Arc::new(layer));
        outline.references.extend(data_file.map(|name| Reference { kind: ReferenceKind::DataFile, name }));
        Ok(outline)
    }

    fn front_writer(&self, request: &FrontRequest<'_>) -> Result<Box<dyn FrontWriter>> {
        Ok(Box::new(front::Qcow2Front::new(request)?))
    }

    fn front_reader(&self, stream: Arc<StreamStorage>) -> Result<Box<dyn FrontReader>> {
        Ok(Box::new(front_reader::Qcow2Stream::new(stream)?))
    }

    fn has_backing(&self) -> bool {
        true
    }

    fn can_compress(&self) -> bool {
        true
    }

    fn can_check(&self) -> bool {
        true
    }

    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        measure::measure(request)
    }
}
