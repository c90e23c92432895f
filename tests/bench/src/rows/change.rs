//! What makes images, and changes them in place.

use super::{ROW, Row};
use crate::bare::Bare;

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "create, small",
        commands: &["create -q -f qcow2 {o} 10G"],
        times: 40,
        target: (0.25, 0.4),
        ..ROW
    },
    Row {
        name: "resize, small",
        before: &["create -q -f qcow2 {o} 10G"],
        commands: &["resize -q -f qcow2 {o} +1G"],
        times: 20,
        target: (0.25, 0.4),
        ..ROW
    },
    Row {
        name: "create 4 TiB preallocation=metadata",
        commands: &["create -q -f qcow2 -o preallocation=metadata {o} {huge}"],
        target: (0.05, 0.06),
        ..ROW
    },
    Row {
        name: "resize, 4 TiB",
        needs: &["huge.qcow2"],
        copies: &[("huge.qcow2", "{o}")],
        commands: &["resize -q -f qcow2 {o} +1T"],
        proof: Some("check -q -f qcow2 {o}"),
        target: (0.1, 0.1),
        ..ROW
    },
    Row {
        name: "amend to compat=0.10, 4 TiB",
        needs: &["huge.qcow2"],
        copies: &[("huge.qcow2", "{o}")],
        commands: &["amend -f qcow2 -o compat=0.10 {o}"],
        proof: Some("check -q -f qcow2 {o}"),
        target: (0.1, 0.1),
        ..ROW
    },
    Row {
        name: "amend to refcount_bits=32, 4 TiB",
        needs: &["huge.qcow2"],
        copies: &[("huge.qcow2", "{o}")],
        commands: &["amend -f qcow2 -o refcount_bits=32 {o}"],
        proof: Some("check -q -f qcow2 {o}"),
        target: (0.1, 0.1),
        ..ROW
    },
    Row {
        name: "bitmap --add, 4 TiB",
        needs: &["huge.qcow2"],
        copies: &[("huge.qcow2", "{o}")],
        commands: &["bitmap -f qcow2 --add {o} one"],
        proof: Some("check -q -f qcow2 {o}"),
        target: (0.1, 0.1),
        ..ROW
    },
    Row {
        name: "bitmap --add --merge --clear --remove, 4 TiB",
        needs: &["huge.qcow2"],
        copies: &[("huge.qcow2", "{o}")],
        commands: &[
            "bitmap -f qcow2 --add {o} one",
            "bitmap -f qcow2 --add --merge one {o} two",
            "bitmap -f qcow2 --clear {o} one",
            "bitmap -f qcow2 --remove {o} one",
        ],
        proof: Some("check -q -f qcow2 {o}"),
        target: (0.1, 0.1),
        ..ROW
    },
    Row {
        name: "snapshot -c, 4 TiB",
        needs: &["huge.qcow2"],
        copies: &[("huge.qcow2", "{o}")],
        commands: &["snapshot -c one {o}"],
        target: (0.06, 0.06),
        ..ROW
    },
    Row {
        name: "snapshot -a, 4 TiB",
        needs: &["huge-snapshot.qcow2"],
        copies: &[("huge-snapshot.qcow2", "{o}")],
        commands: &["snapshot -a one {o}"],
        target: (0.06, 0.06),
        ..ROW
    },
    Row {
        name: "snapshot -d, 4 TiB",
        needs: &["huge-snapshot.qcow2"],
        copies: &[("huge-snapshot.qcow2", "{o}")],
        commands: &["snapshot -d one {o}"],
        target: (0.06, 0.06),
        ..ROW
    },
    Row {
        name: "commit",
        needs: &["overlay.qcow2"],
        copies: &[("plain.qcow2", "below.qcow2"), ("overlay.qcow2", "{o}")],
        commands: &["commit -q -f qcow2 {o}"],
        proof: Some(concat!(
            "compare below.qcow2 ",
            r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"overlay.qcow2","#,
            r#""backing":{"driver":"qcow2","file":{"driver":"file","filename":"plain.qcow2"}}}"#,
        )),
        bare: Some(Bare::Copy("overlay.qcow2")),
        target: (0.4, 0.4),
        ..ROW
    },
    Row {
        name: "rebase, two branches of a chain",
        needs: &["branch.qcow2", "chain100.qcow2"],
        copies: &[("branch.qcow2", "{o}")],
        commands: &["rebase -q -f qcow2 -b chain100-16.qcow2 -F qcow2 {o}"],
        proof: Some("compare branch.qcow2 {o}"),
        target: (0.4, 0.4),
        ..ROW
    },
    Row {
        name: "rebase, another base",
        needs: &["branch.qcow2", "os.raw"],
        copies: &[("branch.qcow2", "{o}")],
        commands: &["rebase -q -f qcow2 -b os.raw -F raw {o}"],
        proof: Some("compare branch.qcow2 {o}"),
        target: (0.4, 0.4),
        ..ROW
    },
];
