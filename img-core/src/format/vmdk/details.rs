//! What `info` says about a VMDK beyond what every image has.

use serde_json::{Map, Value, json};

use super::layer::{GuestExtent, Kind, VmdkLayer};
use crate::{format::HostFile, text};

/// The reference's `format-specific` object, type and data.
pub(super) fn details(layer: &VmdkLayer) -> Value {
    let content = layer.content();
    let extents: Vec<Value> = layer.extents.iter().map(|extent| extent_details(layer, extent)).collect();
    json!({
        "type": "vmdk",
        "data": {
            "create-type": layer.create_type,
            "cid": content.descriptor.cid,
            "parent-cid": content.descriptor.parent_cid,
            "extents": extents,
        },
    })
}

fn extent_details(layer: &VmdkLayer, extent: &GuestExtent) -> Value {
    let name = |file: HostFile| text::from_path(layer.storage(file).path());
    let mut data = Map::new();
    let file = match &extent.kind {
        Kind::Zero => String::new(),
        Kind::Flat { file, .. } => name(*file),
        Kind::Sparse(sparse) => name(sparse.file),
    };
    data.insert("filename".to_owned(), json!(file));
    data.insert("format".to_owned(), json!(extent.type_name));
    data.insert("virtual-size".to_owned(), json!(extent.end_bytes() - extent.start_bytes));
    if let Kind::Sparse(sparse) = &extent.kind {
        data.insert("cluster-size".to_owned(), json!(sparse.grain_bytes));
        if sparse.compressed {
            data.insert("compressed".to_owned(), json!(true));
        }
    }
    Value::Object(data)
}
