//! Compressed clusters: packed byte by byte into host clusters, as the reference packs them.
//!
//! A host cluster counts one reference for every compressed cluster that touches it. The next one starts
//! where the last one ended, in the same host cluster; it may run on into the following host cluster
//! only when that one is the next to be allocated.

use super::{
    alloc::State,
    layer::Qcow2Layer,
    refcount::Counted,
    write::{Write, WriteKind},
};
use crate::{
    Error, Result,
    format::{HostFile, HostOffset, WritePlan, WriteToken},
};

impl Qcow2Layer {
    pub(super) fn prepare_packed(&self, guest: u64, stored_bytes: u32) -> Result<(WriteToken, WritePlan)> {
        self.check_writable()?;
        let geometry = self.geometry;
        let cluster = geometry.cluster_bytes();
        if geometry.external_data {
            return Err(Error::unsupported(self.path(), "a compressed cluster with an external data file"));
        }
        if stored_bytes == 0 || u64::from(stored_bytes) >= cluster || geometry.in_cluster(guest) != 0 {
            return Err(Error::Invalid(format!(
                "{}: {stored_bytes} bytes at {guest:#x} are not a compressed cluster",
                self.path().display()
            )));
        }
        let (token, at) = self.change_map(Some(guest..guest + cluster), true, |state| {
            self.before_allocating(state)?;
            self.table_for_writing(state, geometry.l1_index(guest))?;
            let at = self.allocate_bytes(state, u64::from(stored_bytes))?;
            let kind = WriteKind::Compressed { stored_bytes };
            let token = state.begin(Write { clusters: guest..guest + cluster, host: at, kind, also: None });
            Ok((token, at))
        })?;
        let plan = WritePlan::in_place(guest..guest + cluster, HostFile::IMAGE, HostOffset(at));
        Ok((token, plan))
    }

    /// Sets `bytes` (less than a cluster) aside and counts every cluster they touch.
    fn allocate_bytes(&self, state: &mut State, bytes: u64) -> Result<u64> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_bytes();
        let mut offset = state.free_byte;
        if offset != 0 && self.refcount(offset)? == geometry.refcount_max() {
            offset = 0;
        }
        let mut room = if offset == 0 { 0 } else { cluster - geometry.in_cluster(offset) };
        loop {
            if offset == 0 || room < bytes {
                let new = self.find_free(state, 1)? << geometry.cluster_bits;
                self.check_overlap(&(new..new + cluster), None)?;
                if new + cluster > 1 << geometry.compressed_offset_bits() {
                    return Err(Error::unsupported(
                        self.path(),
                        format_args!("a compressed cluster at host offset {new:#x}"),
                    ));
                }
                self.note_allocated(new + cluster);
                if offset == 0 || offset.next_multiple_of(cluster) != new {
                    offset = new;
                    room = cluster;
                } else {
                    room += cluster;
                }
            }
            if self.count_up(state, self.clusters_of(&(offset..offset + bytes)))? == Counted::Done {
                break;
            }
            offset = 0;
        }
        let end = offset + bytes;
        state.free_byte = if geometry.in_cluster(end) == 0 { 0 } else { end };
        Ok(offset)
    }
}
