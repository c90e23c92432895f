//! QED: the QEMU enhanced disk format (QEMU `docs/interop/qed_spec.rst`).
//!
//! Guest clusters are found through two levels of tables (L1, L2) of one size each; there are no reference
//! counts, and the file's length says what is allocated. Rooms: `header` is the bytes on disk, `geometry` the
//! sizes that follow, `map` the question where a byte lives, `alloc` and `write` where new bytes go, `zero`
//! zeroes and discards, `flush` the order that keeps every crash harmless, `check`, `create`, `resize` the rest.

mod alloc;
mod check;
mod cluster_set;
mod create;
mod flush;
mod geometry;
mod header;
mod layer;
mod map;
mod resize;
mod table;
mod tables;
mod write;
mod zero;

#[cfg(test)]
mod tests;

use std::{path::Path, sync::Arc};

use super::{CreateRequest, Driver, FrontReader, Layer, OpenContext, OptionDescription, front::LayerFront};
use crate::{
    Result,
    storage::{Storage, StreamStorage},
};

/// The QED format.
#[derive(Debug)]
pub struct Qed;

impl Driver for Qed {
    fn name(&self) -> &'static str {
        "qed"
    }

    fn probe(&self, head: &[u8], _name: &Path) -> u8 {
        if head.starts_with(&header::MAGIC) { 100 } else { 0 }
    }

    fn create_options(&self) -> &'static [OptionDescription] {
        create::CREATE_OPTIONS
    }

    fn create(&self, storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()> {
        create::create(&**storage, request)
    }

    fn open(&self, storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(layer::QedLayer::open(storage, context)?))
    }

    fn front_reader(&self, stream: Arc<StreamStorage>) -> Result<Box<dyn FrontReader>> {
        Ok(Box::new(LayerFront::open(self, stream)?))
    }

    fn has_backing(&self) -> bool {
        true
    }

    fn can_compress(&self) -> bool {
        false
    }

    fn can_check(&self) -> bool {
        true
    }
}
