//! Copies of whole disks, and of a part of one.

use super::{Bare, ROW, Row};

pub(super) const ROWS: &[Row] = &[
    Row {
        name: "convert raw→qcow2",
        needs: &["os.raw"],
        commands: &["convert -f raw -O qcow2 os.raw {o}"],
        proof: Some("compare os.raw {o}"),
        bare: Some(Bare::Copy("os.raw")),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert qcow2→raw",
        needs: &["plain.qcow2"],
        commands: &["convert -f qcow2 -O raw plain.qcow2 {o}"],
        proof: Some("compare os.raw {o}"),
        bare: Some(Bare::Copy("plain.qcow2")),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert qcow2→qcow2",
        needs: &["plain.qcow2"],
        commands: &["convert -f qcow2 -O qcow2 plain.qcow2 {o}"],
        proof: Some("compare os.raw {o}"),
        bare: Some(Bare::Copy("plain.qcow2")),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert raw→raw",
        needs: &["os.raw"],
        commands: &["convert -f raw -O raw os.raw {o}"],
        proof: Some("compare os.raw {o}"),
        bare: Some(Bare::Copy("os.raw")),
        target: (0.4, 0.4),
        ..ROW
    },
    Row {
        name: "convert -c zlib",
        needs: &["os.raw"],
        commands: &["convert -c -f raw -O qcow2 os.raw {o}"],
        proof: Some("compare os.raw {o}"),
        target: (0.27, 0.14),
        ..ROW
    },
    Row {
        name: "convert -c zstd",
        needs: &["os.raw"],
        commands: &["convert -c -f raw -O qcow2 -o compression_type=zstd os.raw {o}"],
        proof: Some("compare os.raw {o}"),
        target: (0.6, 0.33),
        ..ROW
    },
    Row {
        name: "zlib qcow2→raw",
        needs: &["zlib.qcow2"],
        commands: &["convert -f qcow2 -O raw zlib.qcow2 {o}"],
        proof: Some("compare os.raw {o}"),
        target: (0.45, 0.4),
        ..ROW
    },
    Row {
        name: "zstd qcow2→raw",
        needs: &["zstd.qcow2"],
        commands: &["convert -f qcow2 -O raw zstd.qcow2 {o}"],
        proof: Some("compare os.raw {o}"),
        target: (0.5, 0.4),
        ..ROW
    },
    Row {
        name: "convert raw→vmdk",
        needs: &["os.raw"],
        commands: &["convert -f raw -O vmdk os.raw {o}"],
        proof: Some("compare os.raw {o}"),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert vmdk→raw",
        needs: &["plain.vmdk"],
        commands: &["convert -f vmdk -O raw plain.vmdk {o}"],
        proof: Some("compare os.raw {o}"),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert raw→vpc",
        needs: &["os.raw"],
        commands: &["convert -f raw -O vpc os.raw {o}"],
        proof: Some("compare -f raw -F vpc os.raw {o}"),
        bare: Some(Bare::Copy("os.raw")),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert vpc→raw",
        needs: &["plain.vpc"],
        commands: &["convert -f vpc -O raw plain.vpc {o}"],
        proof: Some("compare os.raw {o}"),
        bare: Some(Bare::Copy("plain.vpc")),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert raw→qed",
        needs: &["os.raw"],
        commands: &["convert -f raw -O qed os.raw {o}"],
        proof: Some("compare -f raw -F qed os.raw {o}"),
        bare: Some(Bare::Copy("os.raw")),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert qed→raw",
        needs: &["plain.qed"],
        commands: &["convert -f qed -O raw plain.qed {o}"],
        proof: Some("compare os.raw {o}"),
        bare: Some(Bare::Copy("plain.qed")),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "dd",
        needs: &["os.raw"],
        commands: &["dd -f raw -O raw bs=1M count={data_mib} if=os.raw of={o}"],
        proof: Some(concat!(
            "compare ",
            r#"json:{"driver":"raw","size":{data},"file.driver":"file","file.filename":"os.raw"} "#,
            r#"json:{"driver":"raw","file.driver":"file","file.filename":"output"}"#,
        )),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert raw→streamOptimized",
        needs: &["os.raw"],
        commands: &["convert -f raw -O vmdk -o subformat=streamOptimized os.raw {o}"],
        proof: Some("compare os.raw {o}"),
        target: (0.25, 0.13),
        ..ROW
    },
    Row {
        name: "streamOptimized→raw",
        needs: &["stream.vmdk"],
        commands: &["convert -f vmdk -O raw stream.vmdk {o}"],
        proof: Some("compare os.raw {o}"),
        target: (0.45, 0.25),
        ..ROW
    },
    Row {
        name: "fragmented→raw",
        needs: &["fragmented.qcow2"],
        commands: &["convert -f qcow2 -O raw fragmented.qcow2 {o}"],
        proof: Some("compare fragmented.qcow2 {o}"),
        target: (0.4, 0.35),
        ..ROW
    },
    Row {
        name: "chain of 32→raw",
        needs: &["chain32.qcow2"],
        commands: &["convert -f qcow2 -O raw chain32.qcow2 {o}"],
        proof: Some("compare chain32.qcow2 {o}"),
        target: (0.4, 0.35),
        ..ROW
    },
    Row {
        name: "chain of 100→raw",
        needs: &["chain100.qcow2"],
        commands: &["convert -f qcow2 -O raw chain100.qcow2 {o}"],
        proof: Some("compare chain100.qcow2 {o}"),
        target: (0.4, 0.35),
        ..ROW
    },
    Row {
        name: "snapshot→raw",
        needs: &["snapshots.qcow2"],
        commands: &["convert -f qcow2 -l s25 -O raw snapshots.qcow2 {o}"],
        target: (0.4, 0.35),
        ..ROW
    },
];
