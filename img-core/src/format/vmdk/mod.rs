//! VMDK: VMware's disks, from one file to many ("Virtual Disk Format 5.0", VMware's technical note).
//!
//! A text, the `descriptor`, names extents: files of plain bytes, or sparse ones, whose two levels of tables (`sparse`;
//! headers in `header`, `cowd`, `sesparse`) say where each grain is. `open` decides which files are opened, `layer`
//! answers, `write`, `alloc` and `zero` change and hold the crash order, as does `resize`, `stream` reads and writes
//! the kind that is made front to back (`front` into pipes, `front_reader` from them), `create`, `check`, `repair` and
//! `details` do the rest.

mod alloc;
mod check;
mod cowd;
mod create;
mod descriptor;
mod details;
mod front;
mod front_reader;
mod header;
mod layer;
mod open;
mod options;
mod repair;
mod resize;
mod sesparse;
mod sparse;
mod stream;
mod write;
mod zero;

#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    path::Path,
    sync::Arc,
};

use super::{
    Beyond, CreateRequest, Driver, FrontReader, FrontRequest, FrontWriter, Layer, OpenContext,
    OptionDescription, Outline, front::LayerFront,
};
use crate::{
    Error, Result,
    storage::{Storage, StreamStorage},
};

/// The VMDK format.
#[derive(Debug)]
pub struct Vmdk;

impl Driver for Vmdk {
    fn name(&self) -> &'static str {
        "vmdk"
    }

    fn probe(&self, head: &[u8], _name: &Path) -> u8 {
        let has_magic = head.starts_with(&header::MAGIC) || head.starts_with(&cowd::MAGIC);
        if has_magic || descriptor::is_descriptor(head) { 100 } else { 0 }
    }

    fn create_options(&self) -> &'static [OptionDescription] {
        options::CREATE_OPTIONS
    }

    fn create(&self, storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()> {
        create::create(storage, request)
    }

    fn open(&self, storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Arc<dyn Layer>> {
        Ok(Arc::new(open::open(storage, context)?))
    }

    fn outline(&self, storage: Arc<dyn Storage>) -> Result<Outline> {
        open::outline(storage)
    }

    fn front_writer(&self, request: &FrontRequest<'_>) -> Result<Box<dyn FrontWriter>> {
        Ok(Box::new(front::StreamFront::new(request)?))
    }

    /// By its markers where it has them and its directory comes last; else by tables that stand in front.
    fn front_reader(&self, stream: Arc<StreamStorage>) -> Result<Box<dyn FrontReader>> {
        let mut magic = [0; 4];
        stream.read_at(&mut magic, 0)?;
        if magic == header::MAGIC {
            let (_, header) = header::Header::read(&*stream)?;
            if header.markers && header.compressed && header.directory_at.is_none() {
                return Ok(Box::new(front_reader::MarkerStream::new(stream, header)?));
            }
            if header.directory_at.is_none() {
                return Err(Error::unsupported(
                    stream.path(),
                    "a VMDK whose directory is at its end, in a pipe",
                ));
            }
        }
        Ok(Box::new(LayerFront::open(self, stream)?))
    }

    fn has_backing(&self) -> bool {
        true
    }

    fn can_stand_on(&self, below: &str) -> bool {
        below == self.name()
    }

    fn can_compress(&self) -> bool {
        true
    }

    fn can_check(&self) -> bool {
        true
    }

    fn beyond_reference(&self) -> Beyond {
        Beyond { resize: true, repair: true, ..Beyond::default() }
    }
}

/// The name of an extent as a file beside the descriptor: a colon in it does not make it a protocol.
fn plain_name(name: &str) -> Cow<'_, str> {
    let colon = name.find([':', '/']).is_some_and(|at| name.as_bytes()[at] == b':');
    if colon { Cow::Owned(format!("./{name}")) } else { Cow::Borrowed(name) }
}

/// A number that is another one each time: content ids must differ, and need not be secret.
fn random() -> u32 {
    let bits = RandomState::new().build_hasher().finish();
    u32::try_from(bits >> 32).expect("32 bits")
}
