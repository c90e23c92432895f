//! Raw: guest bytes stand in the file at their own offsets.
//!
//! There is nothing to parse: the map is one extent, the whole file. Holes are the storage's affair. A
//! window of the file can be picked with the runtime options `offset` and `size`.
//! `layer` answers, `write` changes, `front` and `front_reader`
//! are for pipes.

pub(super) mod front;
pub(super) mod front_reader;
mod layer;
mod write;

use std::{path::Path, sync::Arc};

pub(in crate::format) use layer::RawLayer;

use super::{
    CreateRequest, Driver, FrontReader, FrontRequest, FrontWriter, Layer, MeasureRequest, Measured,
    OpenContext, OptionDescription, OptionKind, OptionSet, file_preallocation, first_block,
};
use crate::{
    Error, Result,
    storage::{Flush, Preallocation, Storage, StreamStorage},
};

/// Guest disks are whole sectors.
pub(super) const SECTOR_BYTES: u64 = 512;

/// The raw format.
#[derive(Debug)]
pub struct Raw;

/// Refuses runtime options that a raw image does not have.
pub(crate) fn check_options(options: &OptionSet) -> Result<()> {
    match options.iter().find(|(name, _)| !matches!(*name, "offset" | "size")) {
        None => Ok(()),
        Some((name, _)) => {
            Err(Error::Invalid(format!("Block format 'raw' does not support the option '{name}'")))
        }
    }
}

impl Driver for Raw {
    fn name(&self) -> &'static str {
        "raw"
    }

    fn probe(&self, _head: &[u8], _name: &Path) -> u8 {
        1
    }

    fn create_options(&self) -> &'static [OptionDescription] {
        const { &[OptionDescription::new("size", OptionKind::Size, "Virtual disk size")] }
    }

    /// `preallocation` is obeyed here; `nocow` and `extent_size_hint` were set on the file by who made it.
    fn create(&self, storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()> {
        if request.backing.is_some() {
            return Err(Error::Invalid("Backing file not supported for file format 'raw'".to_owned()));
        }
        let preallocation = file_preallocation(request.options)?;
        request.options.check_names(&[super::FILE_OPTIONS])?;
        storage.resize(request.virtual_size_bytes, preallocation)?;
        if preallocation != Preallocation::Full {
            first_block(&**storage, request.virtual_size_bytes)?;
        }
        if preallocation == Preallocation::Full {
            storage.flush(Flush::Data)?;
        }
        Ok(())
    }

    fn open(&self, storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(layer::RawLayer::open(storage, context.mode, context.options)?))
    }

    fn has_backing(&self) -> bool {
        false
    }

    fn can_compress(&self) -> bool {
        false
    }

    fn can_check(&self) -> bool {
        false
    }

    fn front_writer(&self, request: &FrontRequest<'_>) -> Result<Box<dyn FrontWriter>> {
        Ok(Box::new(front::RawFront::new(request)?))
    }

    fn front_reader(&self, stream: Arc<StreamStorage>) -> Result<Box<dyn FrontReader>> {
        Ok(Box::new(front_reader::RawStream { stream, at: 0 }))
    }

    /// Every byte has its place, written or not.
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let bytes = request
            .virtual_size_bytes
            .checked_next_multiple_of(SECTOR_BYTES)
            .ok_or_else(|| Error::Invalid("The image size is too large".to_owned()))?;
        Ok(Measured { required_bytes: bytes, fully_allocated_bytes: bytes, bitmaps_bytes: None })
    }
}
