//! Images that are laid out front to back, so that they can be written to a pipe and read from one.
//!
//! Writing: the job tells a [`FrontWriter`] which units of the disk hold data and how large each is stored, as far
//! as the layout has to know it beforehand; then metadata goes first, and the units follow in guest order.
//! Nothing is written twice and nothing is kept that grows with the data.
//!
//! Reading: a [`FrontReader`] says which runs of the stream are which guest bytes, in the order of the stream.

use std::sync::Arc;

use super::{Codec, Driver, Extent, Layer, OpenContext, OpenMode, OptionSet, Place};
use crate::{
    Error, Result,
    storage::{Pipe, Storage, StreamStorage},
};

/// A new image in a pipe.
#[derive(Clone, Copy, Debug)]
pub struct FrontRequest<'a> {
    /// Guest bytes; a multiple of 512.
    pub virtual_size_bytes: u64,
    /// The format's own options, without `size`.
    pub options: &'a OptionSet,
    /// Whether units are to be compressed.
    pub compress: bool,
}

/// What a layout has to know before its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookAhead {
    /// Nothing.
    Nothing,
    /// Which units hold data.
    Units,
    /// The stored size of each unit; and once more, for each run of so many guest bytes, before the first of its
    /// units (a table in front of what it maps).
    Tables(u64),
}

/// Lays an image out. Calls come in this order: [`survey`](Self::survey) for each unit that holds data, unless
/// nothing has to be known; [`head`](Self::head); for each run of a table [`table`](Self::table), then
/// [`unit`](Self::unit) for each of its units; [`finish`](Self::finish). Units always come in guest order.
pub trait FrontWriter: Send {
    /// Guest bytes of a unit, a power of two, 512 at least. The last one of a disk is filled up with zeroes.
    fn unit_bytes(&self) -> u64;

    /// How units are compressed; `None` when they are stored as they are.
    fn codec(&self) -> Option<Codec> {
        None
    }

    /// What has to be known.
    fn look_ahead(&self) -> LookAhead {
        LookAhead::Nothing
    }

    /// The unit at guest byte `guest` will be stored in `stored_bytes`: as it is when that is a whole unit, and not
    /// at all when it is 0.
    ///
    /// # Errors
    /// When the image would be larger than its format allows.
    fn survey(&mut self, guest: u64, stored_bytes: u32) -> Result<()> {
        let (_, _) = (guest, stored_bytes);
        Ok(())
    }

    /// Writes what comes before all data.
    ///
    /// # Errors
    /// When the pipe takes nothing more.
    fn head(&mut self, pipe: &mut Pipe) -> Result<()>;

    /// Writes the table of a run of units, by guest byte and stored size as in [`survey`](Self::survey).
    ///
    /// # Errors
    /// As [`Self::head`].
    fn table(&mut self, units: &[(u64, u32)], pipe: &mut Pipe) -> Result<()> {
        let (_, _) = (units, pipe);
        Ok(())
    }

    /// Writes the stored bytes of the unit at `guest`: as they are when they are a whole unit.
    ///
    /// # Errors
    /// As [`Self::head`]; [`Error::Invalid`](crate::Error::Invalid) for a unit that is not what was announced.
    fn unit(&mut self, guest: u64, stored: &[u8], pipe: &mut Pipe) -> Result<()>;

    /// Writes what comes behind all data.
    ///
    /// # Errors
    /// As [`Self::head`].
    fn finish(&mut self, pipe: &mut Pipe) -> Result<()>;
}

/// A run of guest bytes and where in the stream they stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrontRun {
    /// The first one.
    pub guest_offset: u64,
    /// How many.
    pub len_bytes: u64,
    /// [`Place::Data`] or [`Place::Encoded`], in the image's own file.
    pub place: Place,
}

/// Reads the map of an image in the order in which it comes out of a stream. What no run covers reads as zeroes.
pub trait FrontReader: Send {
    /// Guest bytes; `None` when only the end of the stream tells.
    fn virtual_size_bytes(&self) -> Option<u64>;

    /// Guest bytes of the largest unit that is decoded as a whole; 0 where nothing is encoded. At most 2 MiB.
    fn unit_bytes(&self) -> u64 {
        0
    }

    /// Appends the next runs, in the order of the stream; none when there are no more.
    ///
    /// # Errors
    /// When tables are damaged, or stand behind what they map.
    fn next(&mut self, runs: &mut Vec<FrontRun>) -> Result<()>;

    /// Reads what is left and makes sure that nothing is missing. Called once, when all runs have been read.
    ///
    /// # Errors
    /// [`Error::Corrupt`](crate::Error::Corrupt) when the stream broke off.
    fn finish(&mut self) -> Result<()>;
}

/// No format encodes more than this as a whole.
const MAX_UNIT_BYTES: u64 = 2 << 20;

/// How many units of the map are looked at together: what one table holds in images of the usual shape.
const WINDOW_UNITS: u64 = 8192;

/// Any layer whose tables stand in front of what they map, opened on the stream itself. The map of a window is read,
/// then its data in the order of the stream, then the next window.
pub(super) struct LayerFront {
    layer: Arc<dyn Layer>,
    stream: Arc<StreamStorage>,
    window_bytes: u64,
    at: u64,
}

impl LayerFront {
    /// Opens the image of that driver's format.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an image that is not all of its disk; as [`Driver::open`].
    pub(super) fn open(driver: &dyn Driver, stream: Arc<StreamStorage>) -> Result<Self> {
        let context = OpenContext {
            mode: OpenMode::Read,
            options: &OptionSet::new(),
            open_file: &|name, _| {
                let feature = format!("an image in a pipe whose data is in another file ('{name}')");
                Err(Error::unsupported(stream.path(), feature))
            },
        };
        let layer = driver.open(Arc::clone(&stream) as Arc<dyn Storage>, &context)?;
        if let Some(backing) = layer.backing() {
            let feature = format!("reading an image over a backing file ('{}') from a pipe", backing.name);
            return Err(Error::unsupported(stream.path(), feature));
        }
        let unit = layer.extent_granularity_bytes().map_or(1 << 16, u64::from);
        Ok(Self { layer, stream, window_bytes: unit * WINDOW_UNITS, at: 0 })
    }
}

impl FrontReader for LayerFront {
    fn virtual_size_bytes(&self) -> Option<u64> {
        Some(self.layer.virtual_size_bytes())
    }

    fn unit_bytes(&self) -> u64 {
        self.layer.cluster_size_bytes().map_or(0, u64::from).min(MAX_UNIT_BYTES)
    }

    fn next(&mut self, runs: &mut Vec<FrontRun>) -> Result<()> {
        let size = self.layer.virtual_size_bytes();
        let mut extents = Vec::new();
        while runs.is_empty() && self.at < size {
            let end = self.at.saturating_add(self.window_bytes).min(size);
            extents.clear();
            self.layer.map_range(self.at..end, &mut extents)?;
            let mut guest_offset = self.at;
            for Extent { len_bytes, place } in &extents {
                if matches!(place, Place::Data { .. } | Place::Encoded { .. }) {
                    runs.push(FrontRun { guest_offset, len_bytes: *len_bytes, place: *place });
                }
                guest_offset += len_bytes;
            }
            self.at = end;
        }
        runs.sort_by_key(|run| match run.place {
            Place::Data { at, .. } | Place::Encoded { at, .. } => at.0,
            Place::Zero { .. } | Place::Unallocated => 0,
        });
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.stream.drain().map(drop)
    }
}
