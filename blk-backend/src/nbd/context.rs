//! Metadata contexts: which there are, what they are called, which of them a query means.
//!
//! "Metadata querying" of the protocol's document; QEMU's `docs/interop/nbd.rst` for the namespace `qemu`.

use std::sync::Arc;

use super::export::ExportedBitmap;

const ALLOCATION: &str = "base:allocation";
const DEPTH: &str = "qemu:allocation-depth";
const BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";

/// Something that can be asked about ranges of a disk.
#[derive(Clone, Debug)]
pub(super) enum Context {
    /// Whether bytes are stored, and whether they read as zeroes.
    Allocation,
    /// Which layer of the chain stores the bytes: 1 is the top, 0 none.
    Depth,
    /// Whether the bytes changed, as a bitmap has it.
    Bitmap(Arc<ExportedBitmap>),
}

/// A context that a client selected, by the number under which it is answered.
#[derive(Clone, Debug)]
pub(super) struct Selected {
    pub(super) id: u32,
    pub(super) context: Context,
}

impl Context {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Allocation => ALLOCATION.to_owned(),
            Self::Depth => DEPTH.to_owned(),
            Self::Bitmap(bitmap) => format!("{BITMAP_PREFIX}{}", bitmap.name()),
        }
    }

    /// Whether a query of `NBD_OPT_LIST_META_CONTEXT` covers it: by name, or by a namespace with nothing behind it.
    fn is_listed_by(&self, query: &str) -> bool {
        match query {
            "base:" => matches!(self, Self::Allocation),
            "qemu:" => !matches!(self, Self::Allocation),
            BITMAP_PREFIX => matches!(self, Self::Bitmap(_)),
            _ => self.name() == query,
        }
    }
}

/// Those of `all` that the queries of a list request cover; all of them without a query. Queries in namespaces that
/// we do not know are passed over ("the server MUST ignore").
pub(super) fn listed(all: Vec<Context>, queries: &[String]) -> Vec<Context> {
    if queries.is_empty() {
        return all;
    }
    all.into_iter().filter(|context| queries.iter().any(|query| context.is_listed_by(query))).collect()
}

/// Those of `all` that the queries name, with their numbers. Wildcards select nothing.
pub(super) fn selected(all: Vec<Context>, queries: &[String]) -> Vec<Selected> {
    (0..)
        .zip(all)
        .filter(|(_, context)| queries.contains(&context.name()))
        .map(|(id, context)| Selected { id, context })
        .collect()
}

#[cfg(test)]
mod tests {
    use img_core::format::DirtyMap;

    use super::*;

    fn all() -> Vec<Context> {
        let bitmap = |name| {
            let map = DirtyMap::new(1 << 20, 65536).unwrap();
            Context::Bitmap(Arc::new(ExportedBitmap::new(name, map)))
        };
        vec![Context::Allocation, Context::Depth, bitmap("one"), bitmap("two")]
    }

    fn list(queries: &[&str]) -> Vec<String> {
        let queries: Vec<String> = queries.iter().map(|query| (*query).to_owned()).collect();
        listed(all(), &queries).iter().map(Context::name).collect()
    }

    #[test]
    fn lists_know_wildcards() {
        assert_eq!(list(&[]).len(), 4);
        assert_eq!(list(&["base:"]), ["base:allocation"]);
        assert_eq!(list(&["qemu:"]).len(), 3);
        assert_eq!(list(&["qemu:dirty-bitmap:"]), ["qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two"]);
        assert_eq!(list(&["qemu:dirty-bitmap:two", "x-other:thing", "nonsense"]), ["qemu:dirty-bitmap:two"]);
    }

    #[test]
    fn selection_takes_names_alone_and_each_once() {
        let select = |queries: &[&str]| -> Vec<u32> {
            let queries: Vec<String> = queries.iter().map(|query| (*query).to_owned()).collect();
            selected(all(), &queries).iter().map(|selected| selected.id).collect()
        };
        assert!(select(&[]).is_empty());
        assert!(select(&["base:", "qemu:", "qemu:dirty-bitmap:"]).is_empty());
        assert_eq!(select(&["qemu:dirty-bitmap:two", "base:allocation", "base:allocation"]), [0, 3]);
    }
}
