//! Two results side by side.

use std::io::{self, Write};

use serde_json::Value;

use super::report::SCHEMA;

/// Prints the ratios of two results that [`to_json`](super::to_json) made: `b` to `a`, for each kind of request that
/// both have.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] for what is not such a result; those of `out`.
pub fn compare(a: &Value, b: &Value, out: &mut dyn Write) -> io::Result<()> {
    for result in [a, b] {
        if result["schema"] != SCHEMA {
            let found = &result["schema"];
            return Err(invalid(format!("not a result: \"schema\" is {found}, not \"{SCHEMA}\"")));
        }
    }
    if a["job"] != b["job"] {
        writeln!(out, "The jobs differ: A {}\n                 B {}", a["job"], b["job"])?;
    }
    writeln!(out, "{:8} {:>16} {:>14} {:>14} {:>8}", "", "", "A", "B", "B/A")?;
    for op in list(&a["ops"])? {
        let Some(other) = list(&b["ops"])?.iter().find(|other| other["op"] == op["op"]) else { continue };
        let name = op["op"].as_str().unwrap_or("?");
        let mut rows = vec![("IOPS", per(op, &a["elapsed-seconds"])?, per(other, &b["elapsed-seconds"])?)];
        if let (Some(a), Some(b)) = (backend_cpu(a), backend_cpu(b)) {
            rows.push(("IO per CPU-s", per(op, a)?, per(other, b)?));
        }
        rows.extend([
            ("mean µs", micro(&op["latency-ns"]["mean"])?, micro(&other["latency-ns"]["mean"])?),
            ("p50 µs", percentile(op, "50")?, percentile(other, "50")?),
            ("p99 µs", percentile(op, "99")?, percentile(other, "99")?),
            ("p99.9 µs", percentile(op, "99.9")?, percentile(other, "99.9")?),
        ]);
        for (what, a, b) in rows {
            let ratio = if a > 0.0 { format!("{:.3}", b / a) } else { "-".to_owned() };
            writeln!(out, "{name:8} {what:>16} {a:>14.1} {b:>14.1} {ratio:>8}")?;
        }
    }
    Ok(())
}

fn per(op: &Value, seconds: &Value) -> io::Result<f64> {
    Ok(number(&op["requests"])? / number(seconds)?.max(f64::EPSILON))
}

/// CPU seconds of whoever did the work, where they are known. Results that do not say are of an image in the process
/// of the load generator.
fn backend_cpu(result: &Value) -> Option<&Value> {
    match result.get("backend-cpu-seconds") {
        Some(Value::Null) => None,
        Some(seconds) => Some(seconds),
        None => result.get("cpu-seconds"),
    }
}

fn percentile(op: &Value, name: &str) -> io::Result<f64> {
    micro(&op["latency-ns"]["percentiles"][name])
}

fn micro(ns: &Value) -> io::Result<f64> {
    Ok(number(ns)? / 1000.0)
}

fn number(value: &Value) -> io::Result<f64> {
    value.as_f64().ok_or_else(|| invalid(format!("not a result: {value} stands where a number should")))
}

fn list(value: &Value) -> io::Result<&Vec<Value>> {
    value.as_array().ok_or_else(|| invalid("not a result: it has no list \"ops\"".to_owned()))
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
