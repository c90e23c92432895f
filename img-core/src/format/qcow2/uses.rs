//! What the clusters of the image file are used for, beside the guest's data.

use std::sync::PoisonError;

use super::{geometry::refcount_get, layer::Qcow2Layer, overlap::Kind};
use crate::{Result, format::HostUse};

impl Qcow2Layer {
    /// Tells every structure, and every cluster of the file that is counted as free. A cluster is told once, unless
    /// the image is damaged.
    pub(super) fn visit_uses(&self, visit: &mut dyn FnMut(HostUse, std::ops::Range<u64>)) -> Result<()> {
        self.know_places()?;
        let bits = self.geometry.cluster_bits;
        self.places.read().unwrap_or_else(PoisonError::into_inner).visit(&mut |kind, clusters| {
            let what = match kind {
                Kind::MainHeader | Kind::ActiveL1 | Kind::ActiveL2 => HostUse::Tables,
                Kind::RefcountTable | Kind::RefcountBlock => HostUse::Refcounts,
                Kind::SnapshotTable | Kind::InactiveL1 | Kind::InactiveL2 => HostUse::Snapshots,
                Kind::BitmapDirectory => HostUse::Other,
            };
            visit(what, clusters.start << bits..clusters.end << bits);
        });
        let file_bytes = self.image_file().len_bytes()?;
        let order = self.geometry.refcount_order;
        self.visit_refcounts(self.clusters_of(&(0..file_bytes)), |clusters, counts| {
            let Some((bytes, first)) = counts else {
                visit(HostUse::Free, clusters.start << bits..clusters.end << bits);
                return true;
            };
            for (at, cluster) in clusters.enumerate() {
                if refcount_get(bytes, order, first + at) == 0 {
                    visit(HostUse::Free, cluster << bits..(cluster + 1) << bits);
                }
            }
            true
        })
    }
}
