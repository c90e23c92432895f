//! Options of an opened image, by the reference's names.

use super::{geometry::Geometry, overlap::Classes};
use crate::{Error, Result, format::OptionSet};

/// Default bound of the L2 cache.
const L2_CACHE_BYTES: u64 = 32 << 20;
/// Default bound of the refcount cache, as large as needed so that long sequential writes seldom drain.
const REFCOUNT_CACHE_BYTES: u64 = 1 << 20;
/// Slices are this long unless clusters are smaller or the user wants otherwise.
const SLICE_BYTES: u64 = 4096;
/// Each cache can hold at least this many slices.
const MIN_SLICES: u64 = 4;

/// What the options say.
#[derive(Clone, Debug)]
pub(super) struct Runtime {
    pub(super) l2_cache_bytes: u64,
    pub(super) refcount_cache_bytes: u64,
    pub(super) l2_slice_bytes: u64,
    pub(super) slice_bytes: u64,
    /// Overrides the image's own lazy refcounts flag.
    pub(super) lazy_refcounts: Option<bool>,
    pub(super) overlap: Classes,
    /// Freed host space is given back for discards of the user.
    pub(super) discard_requests: bool,
    /// ... for what snapshots alone referred to.
    pub(super) discard_snapshots: bool,
    /// ... for what is freed otherwise.
    pub(super) discard_other: bool,
    /// A discard keeps the cluster and its place.
    pub(super) discard_no_unref: bool,
}

impl Runtime {
    /// Reads the options.
    ///
    /// # Errors
    /// [`Error::Invalid`] for unknown options and impossible values.
    pub(super) fn parse(options: &OptionSet, geometry: Geometry) -> Result<Self> {
        let cluster = geometry.cluster_bytes();
        let slice_bytes = SLICE_BYTES.min(cluster);
        let mut runtime = Self {
            l2_cache_bytes: L2_CACHE_BYTES,
            refcount_cache_bytes: REFCOUNT_CACHE_BYTES,
            l2_slice_bytes: slice_bytes,
            slice_bytes,
            lazy_refcounts: options.switch("lazy-refcounts")?,
            overlap: Classes::parse(options)?,
            discard_requests: options.switch("pass-discard-request")?.unwrap_or(true),
            discard_snapshots: options.switch("pass-discard-snapshot")?.unwrap_or(true),
            discard_other: options.switch("pass-discard-other")?.unwrap_or(true),
            discard_no_unref: options.switch("discard-no-unref")?.unwrap_or(false),
        };
        for (name, _) in options.iter() {
            let known = matches!(
                name,
                "lazy-refcounts"
                    | "pass-discard-request"
                    | "pass-discard-snapshot"
                    | "pass-discard-other"
                    | "discard-no-unref"
                    | "l2-cache-size"
                    | "refcount-cache-size"
                    | "cache-size"
                    | "l2-cache-entry-size"
                    | "cache-clean-interval"
            );
            if !known && !Classes::is_option(name) {
                return Err(Error::Invalid(format!(
                    "Block format 'qcow2' does not support the option '{name}'"
                )));
            }
        }
        if runtime.discard_no_unref && geometry.version < 3 {
            return Err(Error::Invalid(
                "discard-no-unref is only supported since qcow2 version 3".to_owned(),
            ));
        }
        runtime.cache_sizes(options, cluster)?;
        Ok(runtime)
    }

    /// `cache-size` is shared out: what one of the caches was given is taken from it, and with neither
    /// given the refcount cache gets its minimum and L2 the rest, as L2 serves every request.
    fn cache_sizes(&mut self, options: &OptionSet, cluster: u64) -> Result<()> {
        let total = options.size("cache-size")?;
        let l2 = options.size("l2-cache-size")?;
        let refcounts = options.size("refcount-cache-size")?;
        // Tables stay in the caches, within their bounds, until others need the room.
        if let Some(text) = options.get("cache-clean-interval")
            && text.parse::<u64>().map_err(|_| not_a_number("cache-clean-interval"))? != 0
        {
            return Err(Error::Invalid(
                "Option 'cache-clean-interval' is not supported yet, except for 0".to_owned(),
            ));
        }
        if let Some(entry) = options.size("l2-cache-entry-size")? {
            if !entry.is_power_of_two() || entry < 512 || entry > cluster {
                return Err(Error::Invalid(format!(
                    "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
                )));
            }
            self.l2_slice_bytes = entry;
        }
        if let Some(total) = total {
            if l2.is_some() && refcounts.is_some() {
                return Err(Error::Invalid(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
                        .to_owned(),
                ));
            }
            if l2.is_some_and(|l2| l2 > total) {
                return Err(Error::Invalid("l2-cache-size may not exceed cache-size".to_owned()));
            }
            if refcounts.is_some_and(|refcounts| refcounts > total) {
                return Err(Error::Invalid("refcount-cache-size may not exceed cache-size".to_owned()));
            }
            let least = MIN_SLICES * self.slice_bytes;
            self.refcount_cache_bytes =
                refcounts.unwrap_or_else(|| l2.map_or(least.min(total), |l2| total - l2));
            self.l2_cache_bytes = l2.unwrap_or(total - self.refcount_cache_bytes);
        } else {
            self.l2_cache_bytes = l2.unwrap_or(L2_CACHE_BYTES);
            self.refcount_cache_bytes = refcounts.unwrap_or(REFCOUNT_CACHE_BYTES);
        }
        self.l2_cache_bytes = self.l2_cache_bytes.max(MIN_SLICES * self.l2_slice_bytes);
        self.refcount_cache_bytes = self.refcount_cache_bytes.max(MIN_SLICES * self.slice_bytes);
        Ok(())
    }
}

fn not_a_number(name: &str) -> Error {
    Error::Invalid(format!("Parameter '{name}' expects a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, value: &str) -> Result<Runtime> {
        let mut options = OptionSet::new();
        options.set(name, value);
        let geometry = Geometry {
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            extended_l2: false,
            external_data: false,
        };
        Runtime::parse(&options, geometry)
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        assert!(parse("cache-clean-interval", "0").is_ok());
        let refused = parse("cache-clean-interval", "600").expect_err("not done").to_string();
        assert_eq!(refused, "Option 'cache-clean-interval' is not supported yet, except for 0");
        assert!(parse("cache-clean-interval", "soon").is_err());
        assert!(parse("no-such-option", "1").is_err());
    }
}
