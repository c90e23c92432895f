//! Raw: guest bytes stand in the file at their own offsets.

use std::{path::Path, sync::Arc};

use super::{CreateRequest, Driver, Layer, OpenContext, OptionDescription, OptionKind};
use crate::{Result, storage::Storage};

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

    fn create(&self, storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()> {
        let _ = (storage, request);
        todo!()
    }

    fn open(&self, storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Arc<dyn Layer>> {
        let _ = (storage, context);
        todo!()
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
