//! The result of a job: a table for people, JSON for programs.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::{job::Job, run::RunResult};

/// What `schema` says in JSON results. Members may be added under the same name; none changes its meaning.
pub const SCHEMA: &str = "blk-backend-bench-1";

/// The percentiles that are shown.
pub(super) const PERCENTILES: [f64; 5] = [50.0, 90.0, 99.0, 99.9, 99.99];

/// Prints a table.
///
/// # Errors
/// Those of `out`.
pub fn write_table(job: &Job, result: &RunResult, out: &mut dyn Write) -> io::Result<()> {
    let seconds = result.elapsed.as_secs_f64().max(f64::EPSILON);
    writeln!(
        out,
        "{}: blocks of {} bytes, depth {}, queues {}; {seconds:.2} s, CPU {:.2} s here, {} in the backend",
        job.pattern.name(),
        job.block_bytes,
        job.depth,
        job.queues,
        result.cpu.as_secs_f64(),
        result.backend_cpu.map_or("unknown".to_owned(), |cpu| format!("{:.2} s", cpu.as_secs_f64()))
    )?;
    write!(out, "{:8} {:>10} {:>10} {:>10} {:>9}", "", "requests", "IOPS", "MiB/s", "mean µs")?;
    for percentile in PERCENTILES {
        write!(out, " {:>9}", format!("p{percentile}"))?;
    }
    writeln!(out, " {:>9}", "max µs")?;
    let micro = |ns: f64| ns / 1000.0;
    for op in &result.ops {
        let latency = &op.latency_ns;
        let count = latency.len();
        write!(
            out,
            "{:8} {count:>10} {:>10.0} {:>10.1} {:>9.1}",
            op.name,
            count as f64 / seconds,
            op.bytes as f64 / f64::from(1 << 20) / seconds,
            micro(latency.mean())
        )?;
        for percentile in PERCENTILES {
            write!(out, " {:>9.1}", micro(latency.value_at_percentile(percentile) as f64))?;
        }
        writeln!(out, " {:>9.1}", micro(latency.max() as f64))?;
    }
    let total: u64 = result.ops.iter().map(|op| op.latency_ns.len()).sum();
    write!(out, "{total} requests")?;
    if let Some(cpu) = result.backend_cpu {
        let cpu = cpu.as_secs_f64().max(f64::EPSILON);
        write!(out, ", {:.0} a second of the backend's CPU time", total as f64 / cpu)?;
    }
    writeln!(out)?;
    match result.verified_blocks {
        Some(blocks) => writeln!(out, "verified: {blocks} blocks read again after the last flush"),
        None => Ok(()),
    }
}

/// The result as JSON; see [`SCHEMA`]. A histogram is a list of recorded values and how often each was met.
#[must_use]
pub fn to_json(target: &str, job: &Job, result: &RunResult) -> Value {
    let ops = result.ops.iter().map(|op| {
        let latency = &op.latency_ns;
        let counts = latency.iter_recorded();
        let counts = counts.map(|step| json!([step.value_iterated_to(), step.count_since_last_iteration()]));
        let percentiles = PERCENTILES
            .map(|percentile| (percentile.to_string(), json!(latency.value_at_percentile(percentile))));
        json!({
            "op": op.name,
            "requests": latency.len(),
            "bytes": op.bytes,
            "latency-ns": {
                "mean": latency.mean(),
                "min": latency.min(),
                "max": latency.max(),
                "percentiles": serde_json::Map::from_iter(percentiles),
                "histogram": {
                    "significant-digits": latency.sigfig(),
                    "counts": counts.collect::<Vec<_>>(),
                },
            },
        })
    });
    json!({
        "schema": SCHEMA,
        "target": target,
        "job": {
            "pattern": job.pattern.name(),
            "read-percent": job.read_percent,
            "block-bytes": job.block_bytes,
            "depth": job.depth,
            "queues": job.queues,
            "rate": job.rate,
            "flush-every": job.flush_every,
            "seconds": job.limit.time.map(|time| time.as_secs_f64()),
            "requests": job.limit.requests,
            "seed": job.seed,
        },
        "elapsed-seconds": result.elapsed.as_secs_f64(),
        "cpu-seconds": result.cpu.as_secs_f64(),
        "backend-cpu-seconds": result.backend_cpu.map(|cpu| cpu.as_secs_f64()),
        "verified-blocks": result.verified_blocks,
        "interrupted": result.interrupted,
        "ops": ops.collect::<Vec<_>>(),
    })
}
