//! Raw: guest bytes stand in the file at their own offsets.
//!
//! There is nothing to parse: the map is one extent, the whole file. Holes are the storage's affair. A
//! window of the file can be picked with the runtime options `offset` and `size`.
//! `layer` answers, `write` changes.

mod layer;
mod write;

use std::{path::Path, sync::Arc};

use super::{CreateRequest, Driver, Layer, OpenContext, OptionDescription, OptionKind, OptionSet};
use crate::{
    Error, Result,
    storage::{Flush, Preallocation, Storage},
};

/// Guest disks are whole sectors.
pub(super) const SECTOR_BYTES: u64 = 512;

/// The raw format.
#[derive(Debug)]
pub struct Raw;

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
        let preallocation = preallocation(request.options)?;
        request.options.check_names(&[super::FILE_OPTIONS])?;
        storage.resize(request.virtual_size_bytes, preallocation)?;
        if preallocation != Preallocation::Full {
            allocate_first_block(&**storage, request.virtual_size_bytes)?;
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
}

/// A file that was empty gets its first block: with bytes there, how a direct reader must be aligned can be
/// found out by trying. The reference does so, and it shows in the space taken.
fn allocate_first_block(storage: &dyn Storage, len_bytes: u64) -> Result<()> {
    let zeroes = [0; 4096];
    match len_bytes {
        0 => Ok(()),
        1..4096 => storage.write_at(&zeroes[..512], 0),
        4096.. => storage.write_at(&zeroes, 0),
    }
}

/// The option `preallocation` of a new file.
fn preallocation(options: &OptionSet) -> Result<Preallocation> {
    match options.get("preallocation") {
        None | Some("off") => Ok(Preallocation::Off),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some("metadata") => Err(Error::Invalid("Unsupported preallocation mode: metadata".to_owned())),
        Some(other) => Err(Error::Invalid(format!("invalid parameter value: {other}"))),
    }
}
