//! The header: parsed once into a checked [`Header`], encoded again as a whole.
//!
//! Spec: QEMU `docs/interop/qcow2.rst`, "Header", "Header extensions", "Feature name table". The header
//! cluster holds the fixed fields, the extensions, and behind them the backing file name.
//! [`RawHeader`] has every field in file order; [`Header`] what the rest of the driver works with.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U32, U64},
};

/// The fixed fields, big-endian. Version 2 ends after `snapshots_offset` (72 bytes); version 3 images may
/// end after `header_length` (104 bytes).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawHeader {
    pub(super) magic: [u8; 4],
    pub(super) version: U32,
    pub(super) backing_file_offset: U64,
    pub(super) backing_file_size: U32,
    pub(super) cluster_bits: U32,
    pub(super) size: U64,
    pub(super) crypt_method: U32,
    pub(super) l1_size: U32,
    pub(super) l1_table_offset: U64,
    pub(super) refcount_table_offset: U64,
    pub(super) refcount_table_clusters: U32,
    pub(super) nb_snapshots: U32,
    pub(super) snapshots_offset: U64,
    pub(super) incompatible_features: U64,
    pub(super) compatible_features: U64,
    pub(super) autoclear_features: U64,
    pub(super) refcount_order: U32,
    pub(super) header_length: U32,
    pub(super) compression_type: u8,
    pub(super) padding: [u8; 7],
}
const _: () = assert!(size_of::<RawHeader>() == 112);
