//! Zeroes without writing them, and discard.
//!
//! | the cluster was | zeroes | discard |
//! | --- | --- | --- |
//! | unallocated | a zero cluster | untouched |
//! | zero | untouched | untouched |
//! | data | zeroes in place, a hole where the host's space may go | a hole in place |
//!
//! A data cluster keeps its place whatever happens to it: nothing on disk could say that the place is free, and
//! an audit would call it leaked.

use std::ops::Range;

use super::{alloc::State, layer::QedLayer, table::Cluster};
use crate::{
    Result,
    format::{Extent, HostOffset, Place},
};

impl QedLayer {
    pub(super) fn zero(&self, guest: Range<u64>, may_unmap: bool) -> Result<()> {
        self.check_writable()?;
        self.know_tables()?;
        for host in self.say_zero(&guest)? {
            self.check_overlap(&host)?;
            self.file().write_zeroes(host, may_unmap)?;
        }
        Ok(())
    }

    /// A host that cannot give space back leaves the bytes as they are: a discard is a wish.
    pub(super) fn discard_range(&self, guest: Range<u64>) -> Result<()> {
        self.check_writable()?;
        if !self.file().limits().can_punch {
            return Ok(());
        }
        self.know_tables()?;
        for host in self.places(&guest)? {
            self.check_overlap(&host)?;
            // The last cluster may stand behind the end of the file still, where there is nothing to give back.
            let end = host.end.min(self.file().len_bytes()?);
            if host.start < end {
                self.file().punch_hole(host.start..end)?;
            }
        }
        Ok(())
    }

    /// Makes what is unallocated in a range zero, and returns where the rest stands.
    fn say_zero(&self, guest: &Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut at = guest.start;
        let mut places = Vec::new();
        while at < guest.end {
            let geometry = self.map.geometry;
            let part = at..guest.end.min(geometry.end_of_table(geometry.l1_index(at)));
            let mut state = self.state();
            while state.in_flight.overlaps(&part) {
                state = self.landed.wait(state);
            }
            self.make_room(&mut state)?;
            self.say_zero_in_table(&mut state, &part)?;
            places.extend(self.places(&part)?);
            at = part.end;
        }
        Ok(places)
    }

    fn say_zero_in_table(&self, state: &mut State, guest: &Range<u64>) -> Result<()> {
        let cluster = self.map.geometry.cluster_bytes();
        let mut extents: Vec<Extent> = Vec::new();
        self.map.map_range(guest.clone(), &mut extents)?;
        let mut at = guest.start;
        for Extent { len_bytes, place } in extents {
            let end = at + len_bytes;
            if place == Place::Unallocated {
                self.before_changing_tables()?;
                let table = self.table_for_writing(state, at)?;
                while at < end {
                    self.make_room(state)?;
                    self.set_entry(table, at, Cluster::Zero)?;
                    at += cluster;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Where the data of a range stands in the file, run by run.
    pub(super) fn places(&self, guest: &Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut extents: Vec<Extent> = Vec::new();
        self.map.map_range(guest.clone(), &mut extents)?;
        Ok(extents
            .into_iter()
            .filter_map(|extent| match extent.place {
                Place::Data { at: HostOffset(at), .. } => Some(at..at + extent.len_bytes),
                _ => None,
            })
            .collect())
    }
}
