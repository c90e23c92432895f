//! The table: what is measured, on which inputs, and what is to be reached.

/// One line of the table. Commands are words; `{o}` stands for the output that is deleted before each run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    /// Inputs that must be there.
    pub(crate) needs: &'static [&'static str],
    /// Run before each measured run, untimed, with the reference.
    pub(crate) before: &'static [&'static str],
    /// A file copied to `{o}` before each measured run, untimed.
    pub(crate) copy: Option<&'static str>,
    /// The measured commands, one behind the other.
    pub(crate) commands: &'static [&'static str],
    /// How often the commands are repeated within one measured run.
    pub(crate) times: u32,
    /// The output must read as this input afterwards.
    pub(crate) same_as: Option<&'static str>,
    /// Ratios to reach: CPU time, wall clock.
    pub(crate) target: (f64, f64),
}

const ROW: Row = Row {
    name: "",
    needs: &[],
    before: &[],
    copy: None,
    commands: &[],
    times: 1,
    same_as: None,
    target: (1.0, 1.0),
};

/// All rows, in the order of the document.
pub(crate) const ROWS: &[Row] = &[
    Row {
        name: "create, small",
        commands: &["create -q -f qcow2 {o} 10G"],
        times: 40,
        target: (0.25, 0.4),
        ..ROW
    },
    Row {
        name: "info, small",
        before: &["create -q -f qcow2 {o} 10G"],
        commands: &["info {o}"],
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
        name: "convert raw→qcow2",
        needs: &["os.raw"],
        commands: &["convert -f raw -O qcow2 os.raw {o}"],
        same_as: Some("os.raw"),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert qcow2→raw",
        needs: &["plain.qcow2"],
        commands: &["convert -f qcow2 -O raw plain.qcow2 {o}"],
        same_as: Some("os.raw"),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert qcow2→qcow2",
        needs: &["plain.qcow2"],
        commands: &["convert -f qcow2 -O qcow2 plain.qcow2 {o}"],
        same_as: Some("os.raw"),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert raw→raw",
        needs: &["os.raw"],
        commands: &["convert -f raw -O raw os.raw {o}"],
        same_as: Some("os.raw"),
        target: (0.4, 0.4),
        ..ROW
    },
    Row {
        name: "convert -c zlib",
        needs: &["os.raw"],
        commands: &["convert -c -f raw -O qcow2 os.raw {o}"],
        same_as: Some("os.raw"),
        target: (0.27, 0.14),
        ..ROW
    },
    Row {
        name: "convert -c zstd",
        needs: &["os.raw"],
        commands: &["convert -c -f raw -O qcow2 -o compression_type=zstd os.raw {o}"],
        same_as: Some("os.raw"),
        target: (0.6, 0.33),
        ..ROW
    },
    Row {
        name: "zlib qcow2→raw",
        needs: &["zlib.qcow2"],
        commands: &["convert -f qcow2 -O raw zlib.qcow2 {o}"],
        same_as: Some("os.raw"),
        target: (0.45, 0.4),
        ..ROW
    },
    Row {
        name: "zstd qcow2→raw",
        needs: &["zstd.qcow2"],
        commands: &["convert -f qcow2 -O raw zstd.qcow2 {o}"],
        same_as: Some("os.raw"),
        target: (0.5, 0.4),
        ..ROW
    },
    Row {
        name: "convert raw→vmdk",
        needs: &["os.raw"],
        commands: &["convert -f raw -O vmdk os.raw {o}"],
        same_as: Some("os.raw"),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert vmdk→raw",
        needs: &["plain.vmdk"],
        commands: &["convert -f vmdk -O raw plain.vmdk {o}"],
        same_as: Some("os.raw"),
        target: (0.55, 0.5),
        ..ROW
    },
    Row {
        name: "convert raw→streamOptimized",
        needs: &["os.raw"],
        commands: &["convert -f raw -O vmdk -o subformat=streamOptimized os.raw {o}"],
        same_as: Some("os.raw"),
        target: (0.25, 0.13),
        ..ROW
    },
    Row {
        name: "streamOptimized→raw",
        needs: &["stream.vmdk"],
        commands: &["convert -f vmdk -O raw stream.vmdk {o}"],
        same_as: Some("os.raw"),
        target: (0.45, 0.25),
        ..ROW
    },
    Row {
        name: "fragmented→raw",
        needs: &["fragmented.qcow2"],
        commands: &["convert -f qcow2 -O raw fragmented.qcow2 {o}"],
        same_as: Some("fragmented.qcow2"),
        target: (0.4, 0.35),
        ..ROW
    },
    Row {
        name: "chain of 32→raw",
        needs: &["chain32.qcow2"],
        commands: &["convert -f qcow2 -O raw chain32.qcow2 {o}"],
        same_as: Some("chain32.qcow2"),
        target: (0.4, 0.35),
        ..ROW
    },
    Row {
        name: "chain of 100→raw",
        needs: &["chain100.qcow2"],
        commands: &["convert -f qcow2 -O raw chain100.qcow2 {o}"],
        same_as: Some("chain100.qcow2"),
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
    Row {
        name: "snapshot -c, 4 TiB",
        needs: &["huge.qcow2"],
        copy: Some("huge.qcow2"),
        commands: &["snapshot -c one {o}"],
        target: (0.06, 0.06),
        ..ROW
    },
    Row {
        name: "snapshot -a, 4 TiB",
        needs: &["huge-snapshot.qcow2"],
        copy: Some("huge-snapshot.qcow2"),
        commands: &["snapshot -a one {o}"],
        target: (0.06, 0.06),
        ..ROW
    },
    Row {
        name: "snapshot -d, 4 TiB",
        needs: &["huge-snapshot.qcow2"],
        copy: Some("huge-snapshot.qcow2"),
        commands: &["snapshot -d one {o}"],
        target: (0.06, 0.06),
        ..ROW
    },
];
