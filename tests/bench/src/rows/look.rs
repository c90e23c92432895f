//! What only looks at images.

use super::{Bare, ROW, Row};

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "info, small",
        before: &["create -q -f qcow2 {o} 10G"],
        commands: &["info {o}"],
        times: 40,
        target: (0.25, 0.4),
        ..ROW
    },
    Row {
        name: "check, fragmented",
        needs: &["fragmented.qcow2"],
        commands: &["check -q -f qcow2 fragmented.qcow2"],
        times: 5,
        target: (0.3, 0.2),
        ..ROW
    },
    Row {
        name: "check, 50 snapshots",
        needs: &["snapshots.qcow2"],
        commands: &["check -q -f qcow2 snapshots.qcow2"],
        times: 5,
        target: (0.3, 0.2),
        ..ROW
    },
    Row {
        name: "check, 4 TiB",
        needs: &["huge.qcow2"],
        commands: &["check -q -f qcow2 huge.qcow2"],
        target: (0.3, 0.2),
        ..ROW
    },
    Row {
        name: "map, 4 TiB",
        needs: &["huge.qcow2"],
        commands: &["map --output=json huge.qcow2"],
        target: (0.04, 0.03),
        ..ROW
    },
    Row {
        name: "map, chain of 100",
        needs: &["chain100.qcow2"],
        commands: &["map --output=json chain100.qcow2"],
        target: (0.1, 0.1),
        ..ROW
    },
    Row {
        name: "measure, 4 TiB",
        needs: &["huge.qcow2"],
        commands: &["measure -O qcow2 huge.qcow2"],
        target: (0.04, 0.03),
        ..ROW
    },
    Row {
        name: "measure, chain of 100",
        needs: &["chain100.qcow2"],
        commands: &["measure -O qcow2 chain100.qcow2"],
        target: (0.1, 0.1),
        ..ROW
    },
    Row {
        name: "info --backing-chain, chain of 100",
        needs: &["chain100.qcow2"],
        commands: &["info --backing-chain chain100.qcow2"],
        times: 5,
        target: (0.3, 0.1),
        ..ROW
    },
    Row {
        name: "compare raw with qcow2",
        needs: &["os.raw", "plain.qcow2"],
        commands: &["compare -f raw -F qcow2 os.raw plain.qcow2"],
        bare: Some(Bare::Read(&["os.raw", "plain.qcow2"])),
        target: (0.55, 0.3),
        ..ROW
    },
    Row {
        name: "compare raw with zstd qcow2",
        needs: &["os.raw", "zstd.qcow2"],
        commands: &["compare -f raw -F qcow2 os.raw zstd.qcow2"],
        target: (0.45, 0.2),
        ..ROW
    },
];
