//! vpc: Virtual PC's and Hyper-V's VHD ("Virtual Hard Disk Image Format Specification", version 1.0, Microsoft
//! 2006).
//!
//! A footer describes the disk. Fixed disks are their data and the footer; in dynamic ones a table names the blocks
//! that are there, each with a bitmap of its sectors in front; a differencing disk is a dynamic one whose other sectors
//! are its parent's. Rooms: `footer`, `header`, `locator` are the bytes on disk, `geometry` the size that follows,
//! `map` and `bitmap` the question where a byte lives, `alloc`, `write` and `flush` what changes and in which order,
//! `front` and `front_reader` disks in pipes, `parent` the identity of the disk below, `fixed`, `resize`, `create`,
//! `check` the rest.

mod alloc;
mod bitmap;
mod check;
mod create;
mod details;
mod fixed;
mod flush;
mod footer;
mod front;
mod front_reader;
mod geometry;
mod header;
mod layer;
mod locator;
mod map;
mod parent;
mod places;
mod resize;
mod write;

#[cfg(test)]
mod tests;

use std::{path::Path, sync::Arc};

use footer::{COOKIE, Copies, DiskType, SizeRule};

use super::{
    Beyond, CreateRequest, Driver, FrontReader, FrontRequest, FrontWriter, Layer, OpenContext,
    OptionDescription, OptionSet,
};
use crate::{
    Error, Result,
    storage::{Storage, StreamStorage},
};

/// The VHD format, by the reference's name.
#[derive(Debug)]
pub struct Vpc;

impl Driver for Vpc {
    fn name(&self) -> &'static str {
        "vpc"
    }

    fn probe(&self, head: &[u8], _name: &Path) -> u8 {
        if head.starts_with(&COOKIE) { 100 } else { 0 }
    }

    /// The footer of a fixed disk. What a guest wrote at the front of such a disk speaks for nothing, and the
    /// footer of a disk of another type says the same as its copy at the front.
    fn probe_tail(&self, tail: &[u8], file_bytes: u64) -> bool {
        footer::ends_fixed_disk(tail, file_bytes)
    }

    fn create_options(&self) -> &'static [OptionDescription] {
        create::CREATE_OPTIONS
    }

    fn create(&self, storage: &Arc<dyn Storage>, request: &CreateRequest<'_>) -> Result<()> {
        create::create(storage, request)
    }

    fn open(&self, storage: Arc<dyn Storage>, context: &OpenContext<'_>) -> Result<Arc<dyn Layer>> {
        let rule = size_rule(context.options)?;
        let copies = Copies::read(&*storage)?;
        let footer = copies.choose(storage.path())?;
        if footer.disk_type == DiskType::Fixed {
            return Ok(Arc::new(fixed::FixedLayer::open(storage, context.mode, rule, footer)?));
        }
        Ok(Arc::new(layer::SparseLayer::open(storage, context.mode, rule, &copies, footer)?))
    }

    fn has_backing(&self) -> bool {
        true
    }

    fn can_stand_on(&self, below: &str) -> bool {
        below == self.name()
    }

    fn can_compress(&self) -> bool {
        false
    }

    fn can_check(&self) -> bool {
        true
    }

    fn front_writer(&self, request: &FrontRequest<'_>) -> Result<Box<dyn FrontWriter>> {
        front::new(request)
    }

    fn front_reader(&self, stream: Arc<StreamStorage>) -> Result<Box<dyn FrontReader>> {
        front_reader::new(stream)
    }

    fn beyond_reference(&self) -> Beyond {
        Beyond { backing: true, check: true, repair: true, resize: true }
    }
}

/// The runtime option.
fn size_rule(options: &OptionSet) -> Result<SizeRule> {
    if let Some((name, _)) = options.iter().find(|(name, _)| *name != "force_size_calc") {
        return Err(Error::Invalid(format!("Block format 'vpc' does not support the option '{name}'")));
    }
    match options.get("force_size_calc") {
        None => Ok(SizeRule::Creator),
        Some("chs") => Ok(SizeRule::Chs),
        Some("current_size") => Ok(SizeRule::CurrentSize),
        Some(other) => Err(Error::Invalid(format!("Invalid size calculation mode: '{other}'"))),
    }
}
