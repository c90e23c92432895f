//! Making changes durable, in the order that keeps every crash harmless.
//!
//! Before the first change of a table since the image was opened the need-check bit is set, durably. Guest data
//! is written by others before a commit refers to it. A *drain* then takes these steps; a crash between any two
//! leaves clusters that nobody names at worst:
//!
//! 1. **data, length, new tables**: the file reaches to the end of every cluster that a table names, and L2
//!    tables that L1 does not name yet are written. Then a sync, which makes the guest data durable too.
//! 2. **references**: changed slices of L2 tables that L1 names, and of L1. Then a sync.
//!
//! So data is durable before the L2 entry that names it, and an L2 table before the L1 entry that names it.
//! Where step 2 has nothing to write there is one sync, and so there is after references that depend on
//! nothing new. [`QedLayer::finish`] drains, cuts off what writes that did not happen had set aside at the end,
//! syncs, and then clears the bit.

use super::{alloc::State, header::feature, layer::QedLayer};
use crate::{
    Result,
    storage::{Flush, Preallocation},
};

impl QedLayer {
    /// Makes all changes durable.
    pub(super) fn drain(&self) -> Result<()> {
        self.drain_locked(&mut self.state())
    }

    /// A drain by whoever holds the state.
    pub(super) fn drain_locked(&self, state: &mut State) -> Result<()> {
        self.check_writable()?;
        let file = self.file();
        let (l1, l2) = (&self.map.l1, &self.map.l2);
        let references = l1.is_dirty(|_| true) || l2.is_dirty(|_| true);
        // 1. data, length, new tables
        if file.len_bytes()? < state.used_end_bytes {
            // To the end of all that is set aside: a prepared write may land behind what the tables name while the
            // length is being set, and must not be cut off.
            file.resize(self.map.end(), Preallocation::Off)?;
        }
        let (new_tables, table_bytes) = (&state.new_tables, self.map.geometry.table_bytes());
        let is_new = |at: u64| {
            let table = new_tables.range(..=at).next_back();
            table.is_some_and(|table| at < table + table_bytes)
        };
        l2.write_back(file, is_new, |_| Ok(()))?;
        if state.barrier && references {
            file.flush(Flush::Data)?;
        }
        // 2. references
        l2.write_back(file, |_| true, |_| Ok(()))?;
        l1.write_back(file, |_| true, |_| Ok(()))?;
        file.flush(Flush::Data)?;
        state.new_tables.clear();
        state.barrier = false;
        Ok(())
    }

    /// The last drain, after which the image needs no check.
    pub(super) fn finish(&self) -> Result<()> {
        let mut state = self.state();
        self.drain_locked(&mut state)?;
        let file = self.file();
        let end = self.map.end();
        if state.has_loose_end && file.len_bytes()? > end {
            file.resize(end, Preallocation::Off)?;
            file.flush(Flush::Data)?;
        }
        if self.header().features & feature::NEED_CHECK != 0 {
            self.update_header(|header| header.features &= !feature::NEED_CHECK)?;
        }
        Ok(())
    }

    /// Everything in memory is in the file, for an audit that looks there.
    pub(super) fn settle(&self) -> Result<()> {
        self.drain()
    }
}
