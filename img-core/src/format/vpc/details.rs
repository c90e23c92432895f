//! What `info` says beside the size.

use serde_json::{Value, json};

use super::{
    footer::{DiskType, RawFooter},
    header::Header,
    parent::id_text,
};

/// The details of a differencing disk. The reference has none for disks of the other types.
pub(super) fn details(disk_type: DiskType, footer: &RawFooter, header: &Header) -> Option<Value> {
    if disk_type != DiskType::Differencing {
        return None;
    }
    Some(json!({
        "type": "vpc",
        "data": {
            "subformat": "differencing",
            "unique-id": id_text(&footer.unique_id),
            "parent-unique-id": id_text(&header.raw.parent_unique_id),
            "parent-timestamp": header.raw.parent_timestamp.get(),
        },
    }))
}
