//! Guest writes: prepare (where the bytes will live), commit (the map points there), abort.
//!
//! A write to clusters that are there goes over them and changes no table; it takes no lock but those of the
//! caches. Any other write is prepared under the state lock: its clusters are set aside, its guest range is in
//! flight, and whoever wants one of those clusters waits until it has landed.
//!
//! The L2 table that a commit lacks is set aside behind the data, as the reference lays files out.

use std::ops::Range;

use super::{
    alloc::{State, Write},
    layer::QedLayer,
    table::{Cluster, ENTRY_BYTES, PIECE_BYTES},
};
use crate::{
    Error, Result,
    format::{
        Attempt, Backing, Below, HostFile, HostOffset, LayerWriter, PreparedWrite, WritePlan, WriteStep,
        WriteToken,
    },
    storage::Preallocation,
};

/// The token of every write in place: it ends without a trace.
const IN_PLACE: u64 = u64::MAX;

impl QedLayer {
    fn prepare(&self, guest: Range<u64>) -> Result<(u64, WritePlan)> {
        self.check_writable()?;
        self.know_tables()?;
        if let Some(plan) = self.in_place(&guest)? {
            return Ok((IN_PLACE, plan));
        }
        let mut state = self.state();
        let first = self.map.geometry.cluster_start(guest.start);
        while state.in_flight.overlaps(&(first..guest.start + 1)) {
            state = self.landed.wait(state);
        }
        // Someone else's write may have made the cluster meanwhile.
        if let Some(plan) = self.in_place(&guest)? {
            return Ok((IN_PLACE, plan));
        }
        self.make_room(&mut state)?;
        self.prepare_locked(&mut state, guest)
    }

    /// The plan of a write over what is there; `None` when the first cluster is not.
    fn in_place(&self, guest: &Range<u64>) -> Result<Option<WritePlan>> {
        let geometry = self.map.geometry;
        let mut host_start = None;
        let mut at = guest.start;
        while at < guest.end {
            let Cluster::Data(host) = self.cluster_now(at)? else { break };
            let host = host + geometry.in_cluster(at);
            if host != *host_start.get_or_insert(host) + (at - guest.start) {
                break;
            }
            at = (geometry.cluster_start(at) + geometry.cluster_bytes()).min(guest.end);
        }
        let Some(host) = host_start else { return Ok(None) };
        let guest_bytes = guest.start..at;
        self.check_overlap(&(host..host + (at - guest.start)))?;
        Ok(Some(WritePlan::in_place(guest_bytes, HostFile::IMAGE, HostOffset(host))))
    }

    /// A write over what is there, from memory alone; any other is for who may wait.
    fn try_in_place(
        &self,
        guest: &Range<u64>,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        self.check_writable()?;
        let known = steps.len();
        let over =
            WriteStep::over_what_is_there(guest, steps, |found| self.map.map_cached(guest.clone(), found))?;
        let is_free = |step: &WriteStep| self.is_known_free(&step.host_bytes());
        let can = over == Some(true) && steps[known..].iter().all(is_free);
        Ok(if can { Attempt::Done(None) } else { Attempt::Blocks })
    }

    /// What the tables say of a guest offset.
    fn cluster_now(&self, guest: u64) -> Result<Cluster> {
        match self.map.table(self.map.geometry.l1_index(guest))? {
            Some(table) => self.map.cluster(table, guest),
            None => Ok(Cluster::Unallocated),
        }
    }

    /// Prepares a write whose first cluster is neither in flight nor there.
    fn prepare_locked(&self, state: &mut State, guest: Range<u64>) -> Result<(u64, WritePlan)> {
        let geometry = self.map.geometry;
        let cluster = geometry.cluster_bytes();
        self.before_changing_tables()?;

        // The longest prefix of clusters that are not there, within one L2 table.
        let first = geometry.cluster_start(guest.start);
        let limit = guest.end.min(geometry.end_of_table(geometry.l1_index(first)));
        let mut end = (first + cluster).min(limit);
        while end < limit
            && !state.in_flight.overlaps(&(end..end + 1))
            && !matches!(self.cluster_now(end)?, Cluster::Data(_))
        {
            end = (end + cluster).min(limit);
        }
        let clusters = first..end.next_multiple_of(cluster);
        let len = clusters.end - clusters.start;
        let host = self.allocate(state, len >> geometry.cluster_bits)?;
        let step = WriteStep {
            guest_bytes: guest.start..end,
            file: HostFile::IMAGE,
            at: HostOffset(host + (guest.start - first)),
            fill_before_bytes: guest.start - first,
            fill_after_bytes: clusters.end - end,
            maps: clusters.clone(),
        };
        // What is left out behind the end of the file reads as zeroes, once the file is that long.
        let plan = WritePlan { step, fill_is_zeroed: host >= self.file().len_bytes()? };
        Ok((state.begin(Write { clusters, host }), plan))
    }

    fn commit(&self, token: u64) -> Result<()> {
        if token == IN_PLACE {
            return Ok(());
        }
        let mut state = self.state();
        let write = state.end(token);
        let mut linked = 0;
        let result = self.check_writable().and_then(|()| self.link(&mut state, &write, &mut linked));
        if result.is_err() {
            // The first ones are on the map, and stay.
            let len = write.clusters.end - write.clusters.start;
            self.release(&mut state, write.host + linked..write.host + len);
        }
        self.landed.notify_all();
        result
    }

    fn abort(&self, token: u64) {
        if token == IN_PLACE {
            return;
        }
        let mut state = self.state();
        let write = state.end(token);
        self.release(&mut state, write.host..write.host + (write.clusters.end - write.clusters.start));
        self.landed.notify_all();
    }

    /// Makes the map point at the bytes of a write. `linked` counts the bytes for which it does, of which there
    /// may be some when a table cannot be read again.
    fn link(&self, state: &mut State, write: &Write, linked: &mut u64) -> Result<()> {
        let cluster = self.map.geometry.cluster_bytes();
        let table = self.table_for_writing(state, write.clusters.start)?;
        state.barrier = true;
        let mut guest = write.clusters.start;
        while guest < write.clusters.end {
            self.set_entry(table, guest, Cluster::Data(write.host + *linked))?;
            *linked += cluster;
            state.used_end_bytes = state.used_end_bytes.max(write.host + *linked);
            guest += cluster;
        }
        Ok(())
    }

    /// Changes what the table at `table` says of a guest cluster.
    pub(super) fn set_entry(&self, table: u64, guest: u64, cluster: Cluster) -> Result<()> {
        let at = table + self.map.geometry.l2_index(guest) * ENTRY_BYTES;
        self.map.l2.update(self.file(), at, |bytes, within| {
            bytes[within..within + 8].copy_from_slice(&cluster.entry().to_le_bytes());
        })
    }

    /// Host offset of the L2 table for a guest offset, made where there is none.
    pub(super) fn table_for_writing(&self, state: &mut State, guest: u64) -> Result<u64> {
        let geometry = self.map.geometry;
        let l1_index = geometry.l1_index(guest);
        if let Some(table) = self.map.table(l1_index)? {
            return Ok(table);
        }
        let host = self.take_place(state, geometry.table_clusters())?;
        let table = host.start;
        // Before the map reaches it: whoever finds that an entry may name the place finds, behind that, what stands
        // there.
        self.note_table(table);
        self.map.reach(host.end);
        let made = self.empty_table(&host).and_then(|()| {
            self.map.l1.update(self.file(), self.map.l1_entry_at(l1_index), |bytes, within| {
                bytes[within..within + 8].copy_from_slice(&table.to_le_bytes());
            })
        });
        if let Err(error) = made {
            self.map.l2.forget(host.clone());
            self.forget_table(table);
            self.release(state, host);
            return Err(error);
        }
        state.new_tables.insert(table);
        // L1 must not name it before it is durable, also where it holds zeroes alone: something else may stand there.
        state.barrier = true;
        state.used_end_bytes = state.used_end_bytes.max(host.end);
        Ok(table)
    }

    /// A table of zeroes: in memory, to be written whole, where that is little; else as a hole.
    fn empty_table(&self, host: &Range<u64>) -> Result<()> {
        if host.end - host.start <= PIECE_BYTES {
            self.map.l2.fill_with_zeroes(host.clone());
            return Ok(());
        }
        self.file().write_zeroes(host.clone(), true)
    }

    /// Drains before more is changed in memory than is kept there.
    pub(super) fn make_room(&self, state: &mut State) -> Result<()> {
        if self.map.l2.dirty_bytes() >= self.dirty_limit_bytes { self.drain_locked(state) } else { Ok(()) }
    }
}

impl LayerWriter for QedLayer {
    fn set_backing(&self, backing: Option<&Backing>) -> Result<()> {
        self.check_writable()?;
        self.drain()?;
        self.record_backing(backing)
    }

    fn prepare_write(&self, guest_bytes: Range<u64>) -> Result<PreparedWrite<'_>> {
        let (token, plan) = self.prepare(guest_bytes)?;
        Ok(PreparedWrite::new(self, WriteToken(token), plan))
    }

    fn prepare_compressed(&self, _guest_offset: u64, _stored_bytes: u32) -> Result<PreparedWrite<'_>> {
        Err(Error::unsupported(self.path(), "a compressed cluster in a qed image"))
    }

    fn try_prepare_write(
        &self,
        guest_bytes: Range<u64>,
        _below: &dyn Fn(Range<u64>) -> Below,
        steps: &mut Vec<WriteStep>,
    ) -> Result<Attempt<Option<WriteToken>>> {
        self.try_in_place(&guest_bytes, steps)
    }

    fn commit_write(&self, token: WriteToken) -> Result<()> {
        self.commit(token.0)
    }

    fn abort_write(&self, token: WriteToken) {
        self.abort(token.0);
    }

    fn zero_granularity_bytes(&self) -> u64 {
        self.map.geometry.cluster_bytes()
    }

    fn write_zeroes(&self, guest_bytes: Range<u64>, may_unmap: bool) -> Result<bool> {
        self.zero(guest_bytes, may_unmap)?;
        Ok(true)
    }

    fn discard(&self, guest_bytes: Range<u64>) -> Result<()> {
        self.discard_range(guest_bytes)
    }

    fn flush(&self) -> Result<()> {
        self.drain()
    }

    fn prepare_growth(&self, virtual_size_bytes: u64) -> Result<bool> {
        self.reach_behind(virtual_size_bytes)?;
        Ok(true)
    }

    /// The last cluster may be there in part only: its writer died before a flush.
    fn keep_off_what_is_there(&self, keeps_off: bool) -> Result<()> {
        if keeps_off {
            self.map.reach(self.file().len_bytes()?.next_multiple_of(self.map.geometry.cluster_bytes()));
        }
        Ok(())
    }

    fn resize(&self, virtual_size_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.change_size(virtual_size_bytes, preallocation)
    }

    fn grow_mapped(&self, _virtual_size_bytes: u64) -> Result<()> {
        Err(Error::Invalid("Unsupported preallocation mode 'metadata'".to_owned()))
    }

    fn close(&self) -> Result<()> {
        self.finish()
    }
}
