//! The journal of a verified run: what was flushed, kept in a file for whoever looks at the disk after a crash.
//!
//! A header, then a record after each flush, each appended by one write, so that the death of the load generator
//! leaves at most the last one cut off. Integers are little-endian.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use super::stamp::SECTOR_BYTES;

/// How a journal begins; the last byte is its version.
const MAGIC: [u8; 8] = *b"blkjrnl\x01";

/// The kind of a record: a list of [`RawDurable`].
const DURABLE: u32 = 1;
/// The kind of a record without a list: the run came to its end, and all that it wrote was flushed.
const FINISHED: u32 = 2;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    run_id: U64,
    block_bytes: U64,
    size_bytes: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    kind: U32,
    /// Entries behind it.
    count: U32,
    /// CRC-32 (IEEE) of `kind`, `count` and the entries.
    crc: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDurable {
    block: U64,
    generation: U64,
}

/// A write that was answered before a flush which was answered, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Durable {
    pub(super) block: u64,
    pub(super) generation: u64,
}

/// A journal that is being written.
#[derive(Debug)]
pub(super) struct JournalWriter {
    /// There is one once the run has begun: until then the journal of an earlier run stays what it is.
    file: Option<File>,
    path: PathBuf,
}

impl JournalWriter {
    /// A journal to be.
    pub(super) fn new(path: &Path) -> Self {
        Self { file: None, path: path.to_owned() }
    }

    /// Makes the file, or makes it anew.
    pub(super) fn begin(&mut self, run_id: u64, block_bytes: u64, size_bytes: u64) -> io::Result<()> {
        self.file = Some(File::create(&self.path).map_err(|error| named(&self.path, &error))?);
        let header = RawHeader {
            magic: MAGIC,
            run_id: run_id.into(),
            block_bytes: block_bytes.into(),
            size_bytes: size_bytes.into(),
        };
        self.write(header.as_bytes())
    }

    pub(super) fn note(&mut self, durable: &[Durable]) -> io::Result<()> {
        let entry = |durable: &Durable| RawDurable {
            block: durable.block.into(),
            generation: durable.generation.into(),
        };
        self.record(DURABLE, &durable.iter().map(entry).collect::<Vec<_>>())
    }

    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.record(FINISHED, &[])
    }

    fn record(&mut self, kind: u32, entries: &[RawDurable]) -> io::Result<()> {
        let count = u32::try_from(entries.len()).map_err(io::Error::other)?;
        let crc = checksum(kind, count, entries.as_bytes());
        let record = RawRecord { kind: kind.into(), count: count.into(), crc: crc.into() };
        self.write(&[record.as_bytes(), entries.as_bytes()].concat())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let file = self.file.as_mut().expect("the run has begun");
        file.write_all(bytes).map_err(|error| named(&self.path, &error))
    }
}

/// What a journal says.
#[derive(Debug)]
pub struct Journal {
    pub(super) run_id: u64,
    /// Of whole sectors.
    pub(super) block_bytes: u64,
    /// Bytes of the disk at that time.
    pub(super) size_bytes: u64,
    /// By block, which is on the disk: the newest generation that was flushed.
    pub(super) flushed: BTreeMap<u64, u64>,
    /// Whether nothing was written that was not flushed.
    pub(super) finished: bool,
}

impl Journal {
    /// Bytes of a block: a multiple of 512.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Reads the journal at `path`. A last record that was cut off is left out.
    ///
    /// # Errors
    /// Those of the file; [`io::ErrorKind::InvalidData`] for what is not a journal.
    pub fn read(path: &Path) -> io::Result<Self> {
        let bytes = fs::read(path).map_err(|error| named(path, &error))?;
        Self::parse(&bytes)
            .map_err(|why| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", path.display())))
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (header, mut rest) = RawHeader::ref_from_prefix(bytes)
            .map_err(|_| format!("{} bytes are no journal of a verified run", bytes.len()))?;
        let mut this = Self {
            run_id: header.run_id.get(),
            block_bytes: header.block_bytes.get(),
            size_bytes: header.size_bytes.get(),
            flushed: BTreeMap::new(),
            finished: false,
        };
        if header.magic != MAGIC {
            return Err("no journal of a verified run: it does not begin like one".to_owned());
        }
        if this.block_bytes == 0 || !this.block_bytes.is_multiple_of(SECTOR_BYTES as u64) {
            return Err(format!("header: blocks of {} bytes are not of whole sectors", this.block_bytes));
        }
        let blocks = this.size_bytes / this.block_bytes;
        while let Ok((record, behind)) = RawRecord::ref_from_prefix(rest) {
            let at = bytes.len() - rest.len();
            let (kind, count) = (record.kind.get(), record.count.get());
            let Ok((entries, behind)) = <[RawDurable]>::ref_from_prefix_with_elems(behind, count as usize)
            else {
                break;
            };
            if record.crc.get() != checksum(kind, count, entries.as_bytes()) {
                return Err(format!("the record at byte {at:#x} does not have its checksum"));
            }
            match kind {
                DURABLE => {}
                FINISHED => this.finished = true,
                other => return Err(format!("the record at byte {at:#x} is of kind {other}, not 1 or 2")),
            }
            for entry in entries {
                let (block, generation) = (entry.block.get(), entry.generation.get());
                if block >= blocks {
                    return Err(format!("the record at byte {at:#x} names block {block} of {blocks}"));
                }
                let known = this.flushed.entry(block).or_default();
                *known = generation.max(*known);
            }
            rest = behind;
        }
        Ok(this)
    }
}

fn checksum(kind: u32, count: u32, entries: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&kind.to_le_bytes());
    hasher.update(&count.to_le_bytes());
    hasher.update(entries);
    hasher.finalize()
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> Vec<u8> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("journal");
        let mut journal = JournalWriter::new(&path);
        journal.begin(7, 4096, 1 << 20).expect("written");
        let durable = |block, generation| Durable { block, generation };
        journal.note(&[durable(3, 2), durable(255, 1)]).expect("written");
        // Flushes may be answered in any order.
        journal.note(&[durable(3, 1)]).expect("written");
        journal.finish().expect("written");
        fs::read(&path).expect("read")
    }

    #[test]
    fn a_journal_says_what_was_written() {
        let journal = Journal::parse(&written()).expect("a journal");
        assert_eq!((journal.run_id, journal.block_bytes, journal.size_bytes), (7, 4096, 1 << 20));
        assert_eq!(journal.flushed, BTreeMap::from([(3, 2), (255, 1)]));
        assert!(journal.finished);
    }

    #[test]
    fn what_is_cut_off_is_left_out_and_what_is_wrong_is_refused() {
        let bytes = written();
        for len in 32..bytes.len() {
            let journal = Journal::parse(&bytes[..len]).expect("a journal");
            assert!(!journal.finished);
            assert_eq!(journal.flushed.len(), if len < 32 + 12 + 32 { 0 } else { 2 }, "{len}");
        }
        for (at, what) in [(0, "does not begin"), (17, "whole sectors"), (33, "checksum"), (50, "checksum")] {
            let mut broken = bytes.clone();
            broken[at] ^= 1;
            let error = Journal::parse(&broken).expect_err("a bit is wrong");
            assert!(error.contains(what), "{at}: {error}");
        }
        assert!(Journal::parse(&bytes[..31]).is_err());
        let mut small = bytes;
        small[24..32].copy_from_slice(&(255_u64 * 4096).to_le_bytes());
        assert!(Journal::parse(&small).expect_err("a block is outside").contains("block 255 of 255"));
    }
}
