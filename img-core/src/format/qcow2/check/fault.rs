//! What an audit can find, in the reference's words, and where the words go.

use std::fmt;

use super::{
    super::super::{CheckReport, Finding},
    Mode,
};

/// Lines that one audit prints at most. A crafted file of a few kilobytes can deserve more of them than
/// anyone can read or any disk can hold; what follows is counted and not printed.
const MAX_LINES: u64 = 10_000_000;

/// One thing that is wrong with a table entry or a region. Small, so that many can be told quickly; the
/// text is made when it is printed. Numbers print as C's `%lx` and `%#lx` do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A referenced region ends a cluster or more behind the end of the file.
    PastEnd { offset: u64, bytes: u64 },
    /// A cluster is referenced more often than its reference count can say.
    Overflow { offset: u64 },
    /// Reserved bits of an L1 entry.
    L1Reserved { word: u64 },
    /// An L1 entry whose offset is inside a cluster.
    TableUnaligned { offset: u64 },
    /// Reserved bits of an L2 entry.
    L2Reserved { word: u64 },
    /// A compressed cluster with the copied flag.
    CompressedCopied { offset: u64 },
    /// A compressed cluster in an image with an external data file.
    CompressedExternal { index: usize, word: u64 },
    /// A compressed cluster with subclusters.
    CompressedSubclusters { index: usize, word: u64 },
    /// A subcluster that is both allocated and zero.
    SubclusterConflict { offset: u64 },
    /// A preallocated zero cluster whose offset is inside a cluster; can be repaired.
    ReservedUnaligned { offset: u64 },
    /// A data cluster whose offset is inside a cluster.
    DataUnaligned { offset: u64 },
    /// Allocated subclusters without a cluster.
    UnallocatedSubclusters,
    /// Internal snapshots beside an external data file.
    ExternalSnapshots { count: usize },
    /// A snapshot's L1 table begins inside a cluster.
    SnapshotUnaligned { id: String, name: String, offset: u64 },
    /// A snapshot's L1 table is too large.
    SnapshotTooLarge { id: String, name: String, entries: u32 },
    /// Reserved bits of a refcount table entry.
    BlockReserved { index: usize },
    /// A refcount table entry whose offset is inside a cluster.
    BlockUnaligned { index: usize },
    /// A refcount block behind the end of the file; repaired by growing it.
    BlockOutside { index: usize },
    /// A refcount block that is also used for something else.
    BlockShared { index: usize, references: u64 },
    /// The copied flag of an L1 entry disagrees with the count of its table.
    TableCopied { index: usize, word: u64, count: u64 },
    /// The copied flag of an L2 entry disagrees with the count of its cluster.
    DataCopied { word: u64, count: u64 },
    /// A version 3 snapshot without its 64-bit sizes.
    SnapshotIncomplete { index: usize },
}

impl Fault {
    /// The line, beginning with `Repairing` instead of `ERROR` where the reference says so of what it is
    /// about to repair.
    pub(super) fn text(&self, repairing: bool) -> String {
        let verb = if repairing { "Repairing" } else { "ERROR" };
        match self {
            Self::PastEnd { offset, bytes } => format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: \
                 offset 0x{offset:x} size 0x{bytes:x}"
            ),
            Self::Overflow { offset } => format!(
                "ERROR: overflow cluster offset=0x{offset:x}\n\
                 Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a \
                 clean copy if the image cannot be opened for writing"
            ),
            Self::L1Reserved { word } => format!("ERROR found L1 entry with reserved bits set: {word:x}"),
            Self::TableUnaligned { offset } => {
                format!("ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
            }
            Self::L2Reserved { word } => format!("ERROR found l2 entry with reserved bits set: {word:x}"),
            Self::CompressedCopied { offset } => {
                format!("ERROR: coffset=0x{offset:x}: copied flag must never be set for compressed clusters")
            }
            Self::CompressedExternal { index, word } => {
                format!("ERROR compressed cluster {index} with data file, entry=0x{word:x}")
            }
            Self::CompressedSubclusters { index, word } => format!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry=0x{word:x}"
            ),
            Self::SubclusterConflict { offset } => format!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ),
            Self::ReservedUnaligned { offset } => format!(
                "{verb} offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
            ),
            Self::DataUnaligned { offset } => {
                format!("ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted.")
            }
            Self::UnallocatedSubclusters => {
                "ERROR: Unallocated cluster has non-zero subcluster allocation map".to_owned()
            }
            Self::ExternalSnapshots { count } => format!("ERROR {count} snapshots in image with data file"),
            Self::SnapshotUnaligned { id, name, offset } => format!(
                "ERROR snapshot {id} ({name}) l1_offset={}: L1 table is not cluster aligned; \
                 snapshot table entry corrupted",
                Alternate(*offset)
            ),
            Self::SnapshotTooLarge { id, name, entries } => format!(
                "ERROR snapshot {id} ({name}) l1_size={}: L1 table is too large; snapshot table entry corrupted",
                Alternate(u64::from(*entries))
            ),
            Self::BlockReserved { index } => {
                format!("ERROR refcount table entry {index} has reserved bits set")
            }
            Self::BlockUnaligned { index } => {
                format!("ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
            }
            Self::BlockOutside { index } => format!("{verb} refcount block {index} is outside image"),
            Self::BlockShared { index, references } => {
                format!("ERROR refcount block {index} refcount={references}")
            }
            Self::TableCopied { index, word, count } => {
                format!("{verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={word:x} refcount={count}")
            }
            Self::DataCopied { word, count } => {
                format!("{verb} OFLAG_COPIED data cluster: l2_entry={word:x} refcount={count}")
            }
            Self::SnapshotIncomplete { index } => {
                format!("{verb} snapshot table entry {index} is incomplete")
            }
        }
    }
}

/// C's `%#lx`: no prefix before a zero.
pub(super) struct Alternate(pub(super) u64);

impl fmt::Display for Alternate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { f.write_str("0") } else { write!(f, "{:#x}", self.0) }
    }
}

/// Takes lines and keeps the counts of an audit.
pub(super) struct Teller<'a> {
    out: &'a mut dyn FnMut(Finding),
    mode: Mode,
    lines: u64,
    has_signalled: bool,
    /// The counts so far.
    pub(super) report: CheckReport,
}

impl<'a> Teller<'a> {
    /// `mode` is what the whole audit may repair.
    pub(super) fn new(out: &'a mut dyn FnMut(Finding), mode: Mode) -> Self {
        Self { out, mode, lines: 0, has_signalled: false, report: CheckReport::default() }
    }

    /// Prints a line.
    pub(super) fn line(&mut self, text: String) {
        self.lines += 1;
        if self.lines <= MAX_LINES {
            (self.out)(Finding { text, with_program_name: false });
        } else if self.lines == MAX_LINES + 1 {
            let text = "Too many findings; the rest is counted and not listed".to_owned();
            (self.out)(Finding { text, with_program_name: false });
        }
    }

    /// Prints a line that the reference prints with its name in front.
    pub(super) fn error(&mut self, text: String) {
        self.lines += 1;
        (self.out)(Finding { text, with_program_name: true });
    }

    /// Tells once of a corruption that would keep the image from being used.
    pub(super) fn signal_corruption(&mut self, what: &str) {
        if !self.has_signalled {
            self.has_signalled = true;
            self.line(if self.mode.repairs() {
                format!(
                    "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
                )
            } else {
                format!(
                    "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
                )
            });
        }
    }

    /// Whether [`Self::signal_corruption`] was called.
    pub(super) fn has_signalled(&self) -> bool {
        self.has_signalled
    }

    /// Adds the counts of one part of the audit to those of another.
    pub(super) fn add(&mut self, other: &CheckReport) {
        let report = &mut self.report;
        report.check_errors += other.check_errors;
        report.corruptions += other.corruptions;
        report.leaks += other.leaks;
        report.corruptions_fixed += other.corruptions_fixed;
        report.leaks_fixed += other.leaks_fixed;
        report.image_end_offset = other.image_end_offset;
        report.total_clusters = other.total_clusters;
        report.allocated_clusters = other.allocated_clusters;
        report.fragmented_clusters = other.fragmented_clusters;
        report.compressed_clusters = other.compressed_clusters;
    }

    /// Prints a fault that stays, and counts it.
    pub(super) fn corruption(&mut self, fault: &Fault) {
        self.report.corruptions += 1;
        self.line(fault.text(false));
    }
}
