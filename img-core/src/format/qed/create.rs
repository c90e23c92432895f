//! New images: the options, the reference's checks in its words, and the bytes.
//!
//! 1. L1, which is all zeroes, and the backing file name;
//! 2. flush;
//! 3. the header, behind which everything it names is durable: a file with a header is a whole image;
//! 4. flush.

use zerocopy::IntoBytes as _;

use super::{
    geometry::Geometry,
    header::{CLUSTER_BYTES, HEADER_BYTES, Header, TABLE_CLUSTERS},
};
use crate::{
    Error, Result,
    format::{
        CreateRequest, FILE_OPTIONS, OptionDescription,
        OptionKind::{Size, Text},
        file_preallocation,
    },
    storage::{Flush, Storage},
    text,
};

/// See [`Driver::create_options`](crate::format::Driver::create_options).
pub(super) static CREATE_OPTIONS: &[OptionDescription] = &[
    OptionDescription::new("size", Size, "Virtual disk size"),
    OptionDescription::new("backing_file", Text, "File name of a base image"),
    OptionDescription::new("backing_fmt", Text, "Image format of the base image"),
    OptionDescription::new("cluster_size", Size, "Cluster size (in bytes)").or("65536"),
    OptionDescription::new("table_size", Size, "L1/L2 table size (in clusters)"),
];

const DEFAULT_CLUSTER_BYTES: u64 = 65536;
const DEFAULT_TABLE_CLUSTERS: u64 = 4;
/// Zeroes are written in pieces of this size.
const ZEROES_BYTES: u64 = 1 << 20;

/// Makes a new image on `storage`, which is empty.
///
/// # Errors
/// [`Error::Invalid`] in the reference's words for options that are refused.
pub(super) fn create(storage: &dyn Storage, request: &CreateRequest<'_>) -> Result<()> {
    request.options.check_names(&[CREATE_OPTIONS, FILE_OPTIONS])?;
    // The file begins empty, as its length is what is allocated: space set aside for it before, as this option
    // asks, would be given back at once. So does the reference; what it refuses is refused.
    file_preallocation(request.options)?;
    let geometry = geometry(request)?;
    let header = Header::new(geometry, request.virtual_size_bytes, request.backing.clone())?;
    if storage.len_bytes()? != 0 {
        // The file's length is what is allocated: a device has one that cannot be changed.
        return Err(Error::Invalid("Cannot resize device files".to_owned()));
    }
    // 1. As the reference writes them: the space of L1 is taken.
    let end = header.l1_offset + geometry.table_bytes();
    let zeroes = vec![0; usize::try_from(ZEROES_BYTES.min(geometry.table_bytes())).expect("at most 1 MiB")];
    let mut at = header.l1_offset;
    while at < end {
        storage.write_at(&zeroes, at)?;
        at += zeroes.len() as u64; // both are powers of two
    }
    if let Some(backing) = &header.backing {
        storage.write_at(&text::to_bytes(&backing.name), HEADER_BYTES as u64)?;
    }
    // 2.
    storage.flush(Flush::Data)?;
    // 3.
    storage.write_at(header.encode().as_bytes(), 0)?;
    // 4.
    storage.flush(Flush::Data)
}

/// The options, checked as the reference checks them, in its order.
fn geometry(request: &CreateRequest<'_>) -> Result<Geometry> {
    let options = request.options;
    let cluster_bytes = options.size("cluster_size")?.unwrap_or(DEFAULT_CLUSTER_BYTES);
    let table_clusters = options.size("table_size")?.unwrap_or(DEFAULT_TABLE_CLUSTERS);
    if !cluster_bytes.is_power_of_two() || !CLUSTER_BYTES.contains(&cluster_bytes) {
        return Err(Error::Invalid(format!(
            "QED cluster size must be within range [{}, {}] and power of 2",
            CLUSTER_BYTES.start(),
            CLUSTER_BYTES.end()
        )));
    }
    if !table_clusters.is_power_of_two() || !TABLE_CLUSTERS.contains(&table_clusters) {
        return Err(Error::Invalid(format!(
            "QED table size must be within range [{}, {}] and power of 2",
            TABLE_CLUSTERS.start(),
            TABLE_CLUSTERS.end()
        )));
    }
    let geometry = Geometry {
        cluster_bits: cluster_bytes.trailing_zeros(),
        table_bits: table_clusters.trailing_zeros(),
    };
    // The reference counts in 64 bits: where the tables could root 2^64 bytes and more it finds room for none,
    // and would not open such an image.
    let most = u64::try_from(geometry.max_virtual_bytes()).unwrap_or(0);
    if request.virtual_size_bytes > most {
        return Err(Error::Invalid(format!(
            "QED image size must be a non-zero multiple of cluster size and less than {most} bytes"
        )));
    }
    Ok(geometry)
}
