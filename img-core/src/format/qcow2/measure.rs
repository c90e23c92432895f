//! How large a new qcow2 file would be, counted as the reference counts: every table that a full image needs,
//! and the data clusters that the source has something in.

use super::{
    create_layout::blocks_needed,
    geometry::Geometry,
    header::{CLUSTER_BITS, EXTENDED_L2_MIN_CLUSTER_BITS, MAX_L1_BYTES},
};
use crate::{
    Error, Result,
    format::{BitmapInfo, MeasureRequest, Measured, OptionSet},
};

/// Bytes of a bitmap directory entry before its name ("Bitmap directory entry").
const DIRECTORY_ENTRY_BYTES: u64 = 24;

/// The options that count.
struct Choice {
    geometry: Geometry,
    preallocates_data: bool,
}

/// Measures what is asked for.
///
/// # Errors
/// [`Error::Invalid`] in the reference's words for options that are refused and sizes that are too large.
pub(super) fn measure(request: &MeasureRequest<'_>) -> Result<Measured> {
    let Choice { geometry, preallocates_data } = Choice::parse(request.options)?;
    let cluster = geometry.cluster_bytes();
    let too_large =
        || Error::Invalid("The image size is too large (try using a larger cluster size)".to_owned());
    let virtual_bytes = request.virtual_size_bytes.checked_next_multiple_of(cluster).ok_or_else(too_large)?;
    let l2_tables = (virtual_bytes / cluster).div_ceil(geometry.l2_entries());
    if l2_tables * 8 > MAX_L1_BYTES {
        return Err(too_large());
    }
    let full_bytes = fully_allocated(geometry, virtual_bytes);
    let data_bytes = match &request.source {
        _ if preallocates_data => virtual_bytes,
        None => 0,
        // Nobody knows how much of the source is in the backing file.
        Some(_) if request.has_backing => virtual_bytes,
        Some(source) => (source.bytes_in_units)(cluster)?,
    };
    let bitmaps = request.source.as_ref().and_then(|source| source.bitmaps);
    Ok(Measured {
        required_bytes: full_bytes - virtual_bytes + data_bytes,
        fully_allocated_bytes: full_bytes,
        bitmaps_bytes: bitmaps
            .filter(|_| geometry.version >= 3)
            .map(|bitmaps| bitmaps_bytes(bitmaps, request.virtual_size_bytes, cluster)),
    })
}

/// The header, all L2 tables with the L1 table for them, the data, and what counts all that.
fn fully_allocated(geometry: Geometry, virtual_bytes: u64) -> u64 {
    let cluster = geometry.cluster_bytes();
    let l2_bytes = virtual_bytes.div_ceil(geometry.l2_span_bytes()) * cluster;
    let l1_bytes = (l2_bytes / cluster * 8).next_multiple_of(cluster);
    let counted_bytes = cluster + l2_bytes + l1_bytes + virtual_bytes;
    let blocks = blocks_needed(geometry, counted_bytes / cluster, false);
    let table_clusters = (blocks * 8).div_ceil(cluster);
    counted_bytes + (blocks + table_clusters) * cluster
}

/// All bits of each consistent bitmap, its table, and the directory.
fn bitmaps_bytes(bitmaps: &[BitmapInfo], virtual_bytes: u64, cluster: u64) -> u64 {
    let (mut bytes, mut directory_bytes) = (0, 0);
    for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.inconsistent) {
        let clusters = virtual_bytes.div_ceil(bitmap.granularity_bytes).div_ceil(8).div_ceil(cluster);
        bytes += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory_bytes += (DIRECTORY_ENTRY_BYTES + bitmap.name.len() as u64).next_multiple_of(8);
    }
    bytes + directory_bytes.next_multiple_of(cluster)
}

impl Choice {
    /// Reads the options and makes the reference's checks, in its order. It looks at fewer of them than when an
    /// image is made.
    fn parse(options: &OptionSet) -> Result<Self> {
        let invalid = |text: &str| Err(Error::Invalid(text.to_owned()));
        let extended_l2 = options.switch("extended_l2")?.unwrap_or(false);
        let cluster_bytes = options.size("cluster_size")?.unwrap_or(65536);
        let cluster_bits = cluster_bytes.trailing_zeros();
        if !cluster_bytes.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_bits) {
            return invalid("Cluster size must be a power of two between 512 and 2048k");
        }
        if extended_l2 && cluster_bits < EXTENDED_L2_MIN_CLUSTER_BITS {
            return invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        let version = match options.get("compat") {
            Some("0.10" | "v2") => 2,
            None | Some("1.1" | "v3") => 3,
            Some(other) => return invalid(&format!("Invalid compatibility level: '{other}'")),
        };
        let refcount_bits = options.number("refcount_bits")?.unwrap_or(16);
        if refcount_bits > 64 || !refcount_bits.is_power_of_two() {
            return invalid("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if version < 3 && refcount_bits != 16 {
            return invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use \
                 compat=1.1 or greater)",
            );
        }
        let preallocates_data = match options.get("preallocation") {
            None | Some("off" | "metadata") => false,
            Some("falloc" | "full") => true,
            Some(other) => return invalid(&format!("invalid parameter value: {other}")),
        };
        if let Some((name, _)) = options.iter().find(|(name, _)| name.starts_with("encrypt.")) {
            return invalid(&format!("the option '{name}' is not supported"));
        }
        let refcount_order = refcount_bits.trailing_zeros();
        let geometry = Geometry { version, cluster_bits, refcount_order, extended_l2, external_data: false };
        Ok(Self { geometry, preallocates_data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "Zeroes cost tables only": what the numbers are made of, for the default image of 1 MiB.
    #[test]
    fn a_small_image_is_header_tables_and_data() {
        let measure = |source| {
            let options = OptionSet::new();
            let request =
                MeasureRequest { virtual_size_bytes: 1 << 20, options: &options, has_backing: false, source };
            measure(&request).expect("measured")
        };
        let cluster = 65536;
        let empty = measure(None);
        assert_eq!(empty.required_bytes, 5 * cluster);
        assert_eq!(empty.fully_allocated_bytes, 5 * cluster + (1 << 20));
        let bitmaps = [BitmapInfo {
            name: "a".to_owned(),
            granularity_bytes: 65536,
            enabled: true,
            inconsistent: false,
        }];
        let source =
            crate::format::MeasureSource { bytes_in_units: &|unit| Ok(3 * unit), bitmaps: Some(&bitmaps) };
        let copy = measure(Some(source));
        assert_eq!((copy.required_bytes, copy.bitmaps_bytes), (8 * cluster, Some(3 * cluster)));
    }
}
