//! Small requests, many of them under way.

use super::{ROW, Row};

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "bench, read",
        needs: &["fragmented.qcow2"],
        commands: &["bench -c 60000 -f qcow2 fragmented.qcow2"],
        target: (0.3, 0.3),
        ..ROW
    },
    Row {
        name: "bench, write",
        needs: &["fragmented.qcow2"],
        copies: &[("fragmented.qcow2", "{o}")],
        commands: &["bench -w --pattern 7 -c 60000 -f qcow2 {o}"],
        proof: Some("check -q -f qcow2 {o}"),
        target: (0.3, 0.3),
        ..ROW
    },
    Row {
        name: "bench, allocating write",
        needs: &["strided.qcow2"],
        before: &["create -q -f qcow2 {o} 1G"],
        commands: &["bench -w --pattern 7 -c 8000 -S 65536 -f qcow2 {o}"],
        proof: Some("compare strided.qcow2 {o}"),
        target: (0.3, 0.3),
        ..ROW
    },
    Row {
        name: "bench, read, chain of 32",
        needs: &["chain32.qcow2"],
        commands: &["bench -c 30000 -S 69632 -f qcow2 chain32.qcow2"],
        target: (0.12, 0.12),
        ..ROW
    },
];
