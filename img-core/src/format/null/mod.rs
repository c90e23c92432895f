//! Null: the protocols `null-co` and `null-aio` where a format is expected, as the reference has it.
//!
//! There is no file, and so nothing to parse, to probe or to make: the bytes are those of a
//! [storage](crate::storage) that keeps nothing, which lies under this layer as it may lie under `raw`.

use std::{path::Path, sync::Arc};

use super::{
    CreateRequest, Driver, FrontReader, FrontRequest, FrontWriter, Layer, MeasureRequest, Measured,
    OpenContext, OptionDescription, raw::RawLayer,
};
use crate::{
    Error, Result,
    storage::{Storage, StreamStorage},
};

/// One of the two protocols; they differ in how the reference runs them, and in nothing that can be seen.
#[derive(Debug)]
pub struct Null {
    protocol: &'static str,
}

/// `null-co`.
pub static NULL_CO: Null = Null { protocol: "null-co" };

/// `null-aio`.
pub static NULL_AIO: Null = Null { protocol: "null-aio" };

impl Null {
    fn not_made(&self) -> Error {
        Error::Invalid(format!("Format driver '{}' does not support image creation", self.protocol))
    }
}

impl Driver for Null {
    fn name(&self) -> &'static str {
        self.protocol
    }

    fn probe(&self, _head: &[u8], _name: &Path) -> u8 {
        0
    }

    fn can_create(&self) -> bool {
        false
    }

    fn create_options(&self) -> &'static [OptionDescription] {
        &[]
    }

    fn create(&self, _storage: &Arc<dyn Storage>, _request: &CreateRequest<'_>) -> Result<()> {
        Err(self.not_made())
    }

    fn open(&self, storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Arc<dyn Layer>> {
        if storage.protocol() != self.protocol {
            return Err(Error::Invalid(format!(
                "The only allowed filename for this driver is '{}://'",
                self.protocol
            )));
        }
        if let Some((name, _)) = context.options.iter().next() {
            return Err(Error::Invalid(format!(
                "Block protocol '{}' doesn't support the option '{name}'",
                self.protocol
            )));
        }
        let layer = RawLayer::open(storage, context.mode, context.options)?;
        let driver: &'static dyn Driver =
            if self.protocol == NULL_CO.protocol { &NULL_CO } else { &NULL_AIO };
        Ok(Arc::new(layer.called(driver)))
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

    fn measure(&self, _request: &MeasureRequest<'_>) -> Result<Measured> {
        Err(self.not_made())
    }

    fn front_writer(&self, _request: &FrontRequest<'_>) -> Result<Box<dyn FrontWriter>> {
        Err(self.not_made())
    }

    fn front_reader(&self, stream: Arc<StreamStorage>) -> Result<Box<dyn FrontReader>> {
        Err(Error::unsupported(stream.path(), format_args!("a stream of {} bytes", self.protocol)))
    }
}
