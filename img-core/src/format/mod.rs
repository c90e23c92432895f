//! Formats: what a layer is, whatever its file looks like.
//!
//! A [`Layer`] is one opened image file. It answers questions about the map from guest bytes to host
//! bytes ([`Layer::map_range`]) and changes that map ([`LayerWriter`]). It does not move guest data: the
//! [`image`](crate::image) above it does. Each format is a folder here with a [`Driver`], and
//! [`registry`] is the only place that knows their names.

mod dirty;
mod extent;
mod front;
mod halt;
mod host_file;
mod in_flight;
mod layer;
mod measure;
mod options;
pub mod registry;
mod table_cache;
#[cfg(test)]
mod table_cache_tests;
mod two_levels;
mod waiters;
mod write;

pub mod null;
pub mod qcow2;
pub mod qed;
pub mod raw;
pub mod vmdk;
pub mod vpc;

pub use dirty::{BitmapInfo, Bitmaps, DirtyMap, MAX_MAP_BYTES, NewBitmap};
pub use extent::{Codec, Extent, HostFile, HostOffset, Place};
pub use front::{FrontReader, FrontRequest, FrontRun, FrontWriter, LookAhead};
use host_file::{file_preallocation, first_block, refuse_file_options};
pub use layer::{
    Backing, Beyond, CheckReport, CheckWatch, CompressedWrites, CreateRequest, Driver, Finding, HostUse,
    Layer, Lease, LeaseToken, MissingTable, OpenContext, OpenFile, OpenMode, Outline, Reference,
    ReferenceKind, Repair, SnapshotInfo, Snapshots,
};
use layer::{look_alone, unwatched};
pub use measure::{MeasureRequest, MeasureSource, Measured};
pub use options::{
    FILE_OPTIONS, OptionDescription, OptionKind, OptionSet, SizeError, parse_number, parse_size, split_list,
};
pub use write::{
    Amended, Attempt, Below, Frame, LayerWriter, Mapping, PreparedWrite, WritePlan, WriteStep, WriteToken,
};
