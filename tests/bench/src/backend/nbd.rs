//! Loads of other programs' NBD clients.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
};

use img_bench::{by_turns, print, say};

use crate::{
    Bench, against,
    images::Kind,
    median,
    servers::{Server, Side},
};

/// What the server is to reach: the same work in that part of the reference's CPU time.
const TARGET: f64 = 1.5;

/// One line of the table: a client's command. `URI` stands for the export.
struct Row {
    name: &'static str,
    kind: Kind,
    read_only: bool,
    command: &'static [&'static str],
}

const ROWS: &[Row] = &[
    Row {
        name: "qemu-img bench, 4 KiB reads, raw",
        kind: Kind::Raw,
        read_only: false,
        command: &[
            "qemu-img", "bench", "-f", "raw", "-c", "100000", "-d", "32", "-s", "4096", "-S", "69632", "URI",
        ],
    },
    Row {
        name: "qemu-img bench, 4 KiB reads, qcow2",
        kind: Kind::Qcow2,
        read_only: false,
        command: &[
            "qemu-img", "bench", "-f", "raw", "-c", "100000", "-d", "32", "-s", "4096", "-S", "69632", "URI",
        ],
    },
    Row {
        name: "qemu-img bench, 4 KiB writes, qcow2",
        kind: Kind::Qcow2,
        read_only: false,
        command: &[
            "qemu-img", "bench", "-w", "-f", "raw", "-c", "100000", "-d", "32", "-s", "4096", "-S", "69632",
            "URI",
        ],
    },
    Row {
        name: "nbdcopy to null, raw",
        kind: Kind::Raw,
        read_only: false,
        command: &["nbdcopy", "URI", "null:"],
    },
    Row {
        name: "nbdcopy to null, qcow2",
        kind: Kind::Qcow2,
        read_only: false,
        command: &["nbdcopy", "URI", "null:"],
    },
    Row {
        name: "nbdcopy to null, qcow2, read-only",
        kind: Kind::Qcow2,
        read_only: true,
        command: &["nbdcopy", "URI", "null:"],
    },
    Row {
        name: "nbdcopy from a file, qcow2",
        kind: Kind::Empty,
        read_only: false,
        command: &["nbdcopy", "source", "URI"],
    },
];

pub(crate) fn print_table(bench: &Bench, directory: &Path) -> io::Result<()> {
    let rows: Vec<_> = ROWS.iter().filter(|row| row.name.contains(&bench.only)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let source = directory.join("source");
    Kind::Raw.make(directory)?;
    std::fs::rename(directory.join("disk"), source)?;
    print("| NBD client | CPU s of the server, ours | qemu-nbd | theirs/ours (target) |");
    print("| --- | ---: | ---: | ---: |");
    for row in rows {
        say(row.name);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for run in 0..bench.runs {
            for side in by_turns(run, Side::Theirs, Side::Ours) {
                let seconds = measure(bench, directory, row, side)?;
                if side == Side::Ours { ours.push(seconds) } else { theirs.push(seconds) }
            }
        }
        let ratio = median(ours.iter().zip(&theirs).map(|(ours, theirs)| theirs / ours).collect());
        let (ours, theirs) = (median(ours), median(theirs));
        print(&format!("| {} | {ours:.3} | {theirs:.3} | {} |", row.name, against(ratio, Some(TARGET))));
    }
    Ok(())
}

/// CPU seconds of the server.
fn measure(bench: &Bench, directory: &Path, row: &Row, side: Side) -> io::Result<f64> {
    let layers = row.kind.make(directory)?;
    let layer = layers.last().expect("an image has a layer");
    let server = Server::export(bench, directory, side, layer, row.read_only)?;
    let clock = server.clock()?;
    let before = clock.now().map_err(io::Error::other)?;
    let uri = format!("nbd+unix:///?socket={}", directory.join("socket").display());
    let words = row.command.iter().map(|word| if *word == "URI" { uri.as_str() } else { word });
    let words: Vec<&str> = words.collect();
    let status = Command::new(words[0])
        .args(&words[1..])
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()?;
    if !status.success() {
        return Err(io::Error::other(format!("{words:?}: {status}")));
    }
    let after = clock.now().map_err(io::Error::other)?;
    Ok((after - before).as_secs_f64())
}
