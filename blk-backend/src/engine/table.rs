//! Pieces of tables that a read lacks in memory: the ring reads them, the image keeps them, and the read begins again.
//!
//! A thread that reads the table and then the bytes costs two wake-ups, which is more than both reads where the bytes
//! are in the page cache.

use std::sync::Arc;

use img_core::{
    format::HostOffset,
    image::{Image, TableTicket},
};

use super::{
    fill::Buffer,
    memory::Memory,
    ring::Ring,
    slot::Slot,
    transfer::{Hold, HostRun, Transfers, Way, What},
};

/// The most pieces that are read for one request. Two are what most need that meet a disk for the first time; a
/// request that goes on without an answer has met others who need the memory for their tables.
const MOST_READ: u8 = 8;

impl Transfers {
    /// Begins to read the piece of a table that the map lacks for a read.
    pub(super) fn read_table(
        &mut self,
        ring: &mut Ring,
        image: &Arc<Image>,
        index: u32,
        slot: &mut Slot,
    ) -> Way {
        if slot.tables_read == MOST_READ {
            return Way::Blocks;
        }
        let Some(ticket) = image.missing_table(slot.guest_bytes.clone()) else { return Way::Blocks };
        let (HostOffset(at_bytes), len_bytes) = (ticket.at(), ticket.len_bytes());
        let Some(file) = self.file(ring, image, ticket.depth(), ticket.file()) else { return Way::Blocks };
        let length = usize::try_from(len_bytes).expect("it is 32 bits");
        let Some(buffer) = self.buffers.take(length) else { return Way::Blocks };
        let memory = Memory::Own(buffer.memory());
        if !file.takes(at_bytes, memory, 0, len_bytes) {
            return Way::Blocks;
        }
        self.places.clear();
        slot.lists.clear();
        slot.pending = 0;
        slot.lists.add(memory, 0, len_bytes);
        self.places.push(HostRun { file, at_bytes, len_bytes });
        slot.tables_read += 1;
        slot.hold = Some(Hold::Table(ticket, buffer));
        self.push_all(ring, index, slot, 0, What::Read)
    }
}

impl Buffer {
    /// Gives the piece that was read into it to the image. What is not kept is asked for once more.
    pub(super) fn offer(self, ticket: TableTicket) {
        let length = usize::try_from(ticket.len_bytes()).expect("it is 32 bits");
        ticket.offer(self.memory().copied(length));
    }
}
