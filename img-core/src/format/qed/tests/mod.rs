//! The opened image against a flat model, against the reference, and against hostile tables.

mod hostile;
mod model;
mod order;
mod reference;
mod threads;

use std::sync::Arc;

use super::{geometry::Geometry, header::Header, layer::QedLayer};
use crate::{
    Result,
    format::{CheckReport, CreateRequest, Driver as _, Layer, OpenMode, OptionSet, Repair},
    storage::Storage,
};

/// Makes an image on `storage`.
fn create(storage: &Arc<dyn Storage>, geometry: Geometry, virtual_size_bytes: u64) {
    let mut options = OptionSet::new();
    options.set("cluster_size", geometry.cluster_bytes().to_string());
    options.set("table_size", geometry.table_clusters().to_string());
    let request = CreateRequest {
        virtual_size_bytes,
        backing: None,
        options: &options,
        open_file: &|name, _| panic!("no file '{name}' to open"),
    };
    super::Qed.create(storage, &request).expect("created");
}

/// Opens it with an L2 cache of a few slices.
fn open(storage: &Arc<dyn Storage>, mode: OpenMode) -> Result<QedLayer> {
    QedLayer::open_with_cache(Arc::clone(storage), mode, 16 << 10)
}

/// What an audit of the closed image says.
fn audit(storage: &Arc<dyn Storage>, repair: Repair) -> CheckReport {
    let mode = OpenMode::Check { repair: repair != Repair::Nothing };
    open(storage, mode).expect("opens").check(repair, &mut |_| {}).expect("an audit")
}

/// The header as it is in the file.
fn header(storage: &Arc<dyn Storage>) -> Header {
    Header::read(&**storage).expect("a header")
}
