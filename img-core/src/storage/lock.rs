//! QEMU's image locking protocol: what a process does with a file, and what it lets others do.

/// How an opened file is used towards other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Nothing is locked and nothing is probed (`-U`).
    Nothing,
    /// Metadata is looked at, data is not read (`info`): others may not resize or write.
    Inspect,
    /// Data is read; others may read and share, not write.
    Read,
    /// Data is written: exclusive.
    Write,
    /// The file is being created and formatted.
    Create,
}
