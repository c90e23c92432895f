//! Images that are laid out front to back, so that they can be written to a pipe and read from one.
//!
//! Writing: the job tells a [`FrontWriter`] which units of the disk hold data and how large each is stored, as far
//! as the layout has to know it beforehand; then metadata goes first, and the units follow in guest order.
//! Nothing is written twice and nothing is kept that grows with the data.

use super::{Codec, OptionSet};
use crate::{Result, storage::Pipe};

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
