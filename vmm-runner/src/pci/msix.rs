//! MSI-X: a table of messages in device memory (PCI Local Bus Specification 3.0, section 6.8.2).

use crate::machine::{Message, MessageInterrupt};

/// Bytes of a table entry: address, data, control.
const ENTRY_BYTES: usize = 16;
/// Entry control: masked.
const MASKED: u32 = 1;
/// Message control: the function uses MSI-X.
pub(crate) const ENABLE: u16 = 1 << 15;
/// Message control: all entries are masked.
pub(crate) const MASK_ALL: u16 = 1 << 14;

/// The table and what it is bound to.
#[derive(Debug)]
pub struct MsixTable {
    entries: Vec<[u32; 4]>,
    vectors: Vec<MessageInterrupt>,
    control: u16,
}

impl MsixTable {
    /// A table with one entry an interrupt, all masked.
    #[must_use]
    pub fn new(vectors: Vec<MessageInterrupt>) -> Self {
        Self { entries: vec![[0, 0, 0, MASKED]; vectors.len()], vectors, control: 0 }
    }

    /// How many entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The interrupt of an entry.
    #[must_use]
    pub fn vector(&self, index: u16) -> Option<&MessageInterrupt> {
        self.vectors.get(usize::from(index))
    }

    /// Takes the enable and mask-all bits of message control. What KVM refuses stays masked, and is told.
    pub fn set_control(&mut self, control: u16) -> crate::Result<()> {
        self.control = control & (ENABLE | MASK_ALL);
        (0..self.entries.len()).try_for_each(|index| self.bind(index))
    }

    /// The enable and mask-all bits.
    #[must_use]
    pub fn control(&self) -> u16 {
        self.control
    }

    /// Reads the table. Accesses are of four or eight bytes, aligned; others read as zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (word, bytes) in words(offset, data.len()).zip(data.chunks_mut(4)) {
            let value = self.entries.get(word / 4).map_or(0, |entry| entry[word % 4]);
            bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
        }
    }

    /// Writes the table.
    ///
    /// # Errors
    /// When KVM refuses a route; the entry is masked then.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> crate::Result<()> {
        for (word, bytes) in words(offset, data.len()).zip(data.chunks_exact(4)) {
            let Some(entry) = self.entries.get_mut(word / 4) else { continue };
            entry[word % 4] = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
            self.bind(word / 4)?;
        }
        Ok(())
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let first = usize::try_from(offset).unwrap_or(usize::MAX).saturating_mul(8);
        for (index, vector) in self.vectors.iter().enumerate() {
            if let Some(bit) = index.checked_sub(first)
                && let Some(byte) = data.get_mut(bit / 8)
            {
                *byte |= u8::from(vector.is_pending()) << (bit % 8);
            }
        }
    }

    fn bind(&self, index: usize) -> crate::Result<()> {
        let [low, high, data, control] = self.entries[index];
        let is_open = self.control & (ENABLE | MASK_ALL) == ENABLE && control & MASKED == 0;
        let message = Message { address: u64::from(high) << 32 | u64::from(low), data };
        self.vectors[index].set(is_open.then_some(message))
    }
}

/// The numbers of the aligned words that an access covers.
fn words(offset: u64, length: usize) -> std::ops::Range<usize> {
    if !offset.is_multiple_of(4) || !length.is_multiple_of(4) {
        return 0..0;
    }
    let first = usize::try_from(offset / 4).unwrap_or(usize::MAX / 4);
    first..first.saturating_add(length / 4)
}

/// Bytes of a table with that many entries.
#[must_use]
pub(crate) fn table_bytes(entries: usize) -> usize {
    entries * ENTRY_BYTES
}
