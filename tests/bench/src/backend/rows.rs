//! Loads on virtio devices.

use std::{io, path::Path};

use blk_backend::bench::{Job, Limit, Pattern, VhostOptions, VhostTarget, run};

use img_bench::{by_turns, print, say};

use crate::{
    Bench, against,
    images::{Kind, Layer},
    median,
    servers::{Server, Serving, Side},
};

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) pattern: Pattern,
    pub(crate) block_bytes: u64,
    pub(crate) depth: u32,
    /// Requests of a run, on an image that is made anew for it. Without, it is over after some time.
    pub(crate) count: Option<u64>,
    pub(crate) direct: bool,
    /// Of requests a second of CPU time, ours to theirs.
    pub(crate) target: f64,
    /// Of median latencies, ours to theirs.
    pub(crate) target_p50: Option<f64>,
}

pub(crate) const ROW: Row = Row {
    name: "",
    kind: Kind::Raw,
    pattern: Pattern::RandRead,
    block_bytes: 4096,
    depth: 32,
    count: None,
    direct: false,
    target: 1.0,
    target_p50: None,
};

const ROWS: &[Row] = &[
    Row { name: "randread, raw", target: 2.2, ..ROW },
    Row { name: "randread, qcow2", kind: Kind::Qcow2, target: 2.2, ..ROW },
    Row { name: "randwrite, raw", pattern: Pattern::RandWrite, target: 2.0, ..ROW },
    Row { name: "randwrite, qcow2", kind: Kind::Qcow2, pattern: Pattern::RandWrite, target: 2.2, ..ROW },
    Row { name: "randread, depth 1, raw", depth: 1, target: 2.0, target_p50: Some(0.6), ..ROW },
    Row { name: "randread, chain of 33", kind: Kind::Chain, target: 10.0, ..ROW },
    Row {
        name: "read 64 KiB in order, raw",
        pattern: Pattern::Read,
        block_bytes: 64 << 10,
        target: 1.6,
        ..ROW
    },
    Row {
        name: "read 1 MiB in order, raw",
        pattern: Pattern::Read,
        block_bytes: 1 << 20,
        target: 1.2,
        ..ROW
    },
    Row {
        name: "allocating randwrite, fresh qcow2",
        kind: Kind::EmptyLarge,
        pattern: Pattern::RandWrite,
        count: Some(16_000),
        target: 8.0,
        ..ROW
    },
    Row {
        name: "allocating randwrite, overlay",
        kind: Kind::Overlay,
        pattern: Pattern::RandWrite,
        count: Some(6_000),
        target: 2.0,
        ..ROW
    },
    Row {
        name: "allocating write 64 KiB, fresh qcow2",
        kind: Kind::Empty,
        pattern: Pattern::Write,
        block_bytes: 64 << 10,
        count: Some(8_000),
        target: 1.4,
        ..ROW
    },
    Row { name: "randread, raw, direct", direct: true, target: 1.6, ..ROW },
];

/// What one run came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    pub(crate) per_cpu_second: f64,
    per_second: f64,
    p50_us: f64,
    memory_mib: f64,
}

pub(crate) fn print_table(bench: &Bench, memory: &Path, disk: &Path) -> io::Result<()> {
    let rows: Vec<_> = ROWS.iter().filter(|row| row.name.contains(&bench.only)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    print(
        "| load | I/O per CPU-s, ours | qemu-storage-daemon | ratio (target) | IOPS, ours | theirs | p50 µs, ours | theirs | ratio (target) | MiB, ours | theirs |",
    );
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for row in rows {
        say(row.name);
        let directory = if row.direct { disk } else { memory };
        let (ours, theirs) = measure_pairs(bench, directory, row)?;
        let of = |runs: &[Figures], what: fn(&Figures) -> f64| median(runs.iter().map(what).collect());
        let ratio = |what: fn(&Figures) -> f64| {
            median(ours.iter().zip(&theirs).map(|(ours, theirs)| what(ours) / what(theirs)).collect())
        };
        let p50 = ratio(|run| run.p50_us);
        let p50 = match row.target_p50 {
            Some(target) => format!("{p50:.2} ({target}){}", if p50 <= target { "" } else { " ✗" }),
            None => format!("{p50:.2}"),
        };
        print(&format!(
            "| {} | {:.0} | {:.0} | {} | {:.0} | {:.0} | {:.0} | {:.0} | {p50} | {:.1} | {:.1} |",
            row.name,
            of(&ours, |run| run.per_cpu_second),
            of(&theirs, |run| run.per_cpu_second),
            against(ratio(|run| run.per_cpu_second), Some(row.target)),
            of(&ours, |run| run.per_second),
            of(&theirs, |run| run.per_second),
            of(&ours, |run| run.p50_us),
            of(&theirs, |run| run.p50_us),
            of(&ours, |run| run.memory_mib),
            of(&theirs, |run| run.memory_mib),
        ));
    }
    print("");
    Ok(())
}

/// Runs of both, by turns, also at being first.
fn measure_pairs(bench: &Bench, directory: &Path, row: &Row) -> io::Result<(Vec<Figures>, Vec<Figures>)> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut layers = row.kind.make(directory)?;
    for run in 0..bench.runs {
        for side in by_turns(run, Side::Theirs, Side::Ours) {
            if row.count.is_some() {
                layers = row.kind.make(directory)?;
            }
            let figures = measure(bench, directory, row, side, &layers, 1)?;
            if side == Side::Ours { ours.push(figures) } else { theirs.push(figures) }
        }
    }
    Ok((ours, theirs))
}

pub(crate) fn measure(
    bench: &Bench,
    directory: &Path,
    row: &Row,
    side: Side,
    layers: &[Layer],
    queues: u32,
) -> io::Result<Figures> {
    let serving = Serving { direct: row.direct, queues };
    let server = Server::device(bench, directory, side, layers, serving)?;
    let job = Job {
        pattern: row.pattern,
        read_percent: 100,
        block_bytes: row.block_bytes,
        depth: row.depth,
        queues,
        rate: None,
        flush_every: None,
        limit: Limit { time: row.count.is_none().then_some(bench.time), requests: row.count },
        seed: 1,
    };
    let clock = Some(server.clock()?);
    let target = VhostTarget::connect(&directory.join("socket"), &job, VhostOptions::default(), clock)
        .map_err(io::Error::other)?;
    let result = run(&target, &job, None).map_err(io::Error::other)?;
    let [op] = &result.ops[..] else { return Err(io::Error::other("a load of more than one kind")) };
    let requests = op.latency_ns.len() as f64;
    let cpu = result.backend_cpu.ok_or_else(|| io::Error::other("nobody knows what it cost"))?;
    Ok(Figures {
        per_cpu_second: requests / cpu.as_secs_f64(),
        per_second: requests / result.elapsed.as_secs_f64(),
        p50_us: op.latency_ns.value_at_quantile(0.5) as f64 / 1000.0,
        memory_mib: server.memory_kib()? as f64 / 1024.0,
    })
}

/// Pairs of runs for each that the rows have, where the difference of the two is small.
const MORE_PAIRS: u32 = 4;

/// What the map of a format costs: the same file, in the same memory, as what it is and as the bytes it is made of.
pub(crate) fn print_map(bench: &Bench, directory: &Path) -> io::Result<()> {
    const NAME: &str = "qcow2 to raw";
    if !NAME.contains(&bench.only) {
        return Ok(());
    }
    say(NAME);
    print("| randread, one file as qcow2 and as raw | I/O per CPU-s, qcow2 | raw | ratio (target) |");
    print("| --- | ---: | ---: | ---: |");
    let row = Row { kind: Kind::Qcow2, ..ROW };
    let as_qcow2 = row.kind.make(directory)?;
    let as_raw: Vec<Layer> = as_qcow2.iter().map(|layer| Layer::new(&layer.file, "raw")).collect();
    for (side, whose, target) in [(Side::Ours, "ours", Some(0.95)), (Side::Theirs, "theirs", None)] {
        let (mut mapped, mut plain) = (Vec::new(), Vec::new());
        for run in 0..bench.runs * MORE_PAIRS {
            for is_mapped in by_turns(run, true, false) {
                let layers = if is_mapped { &as_qcow2 } else { &as_raw };
                let figures = measure(bench, directory, &row, side, layers, 1)?.per_cpu_second;
                if is_mapped { mapped.push(figures) } else { plain.push(figures) }
            }
        }
        let ratio = median(mapped.iter().zip(&plain).map(|(mapped, plain)| mapped / plain).collect());
        let (mapped, plain) = (median(mapped), median(plain));
        print(&format!("| {whose} | {mapped:.0} | {plain:.0} | {} |", against(ratio, target)));
    }
    print("");
    Ok(())
}

/// What a second queue brings.
pub(crate) fn print_scaling(bench: &Bench, directory: &Path) -> io::Result<()> {
    const NAME: &str = "two queues";
    if !NAME.contains(&bench.only) {
        return Ok(());
    }
    say(NAME);
    print("| randread, two queues to one | IOPS, one | two | ratio (target) | I/O per CPU-s, ratio |");
    print("| --- | ---: | ---: | ---: | ---: |");
    for (kind, name) in [(Kind::Raw, "raw"), (Kind::Qcow2, "qcow2")] {
        let layers = kind.make(directory)?;
        for (side, whose, target) in [(Side::Ours, "ours", Some(1.7)), (Side::Theirs, "theirs", None)] {
            let (mut one, mut two) = (Vec::new(), Vec::new());
            for _ in 0..bench.runs {
                let row = Row { kind, ..ROW };
                one.push(measure(bench, directory, &row, side, &layers, 1)?);
                two.push(measure(bench, directory, &row, side, &layers, 2)?);
            }
            let of = |runs: &[Figures]| median(runs.iter().map(|run| run.per_second).collect());
            let ratio = |what: fn(&Figures) -> f64| {
                median(one.iter().zip(&two).map(|(one, two)| what(two) / what(one)).collect())
            };
            print(&format!(
                "| {name}, {whose} | {:.0} | {:.0} | {} | {:.2} |",
                of(&one),
                of(&two),
                against(ratio(|run| run.per_second), target),
                ratio(|run| run.per_cpu_second),
            ));
        }
    }
    print("");
    Ok(())
}
