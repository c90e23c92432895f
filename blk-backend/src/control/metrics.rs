//! Counters as Prometheus text (exposition format 0.0.4), over HTTP on a unix or loopback socket, and in short at the
//! end.

use std::{
    fmt::Write as _,
    fs::File,
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    time::{ClockId, clock_gettime},
};

use super::{daemon::Daemon, listen::ControlAddress};
use crate::{
    accept::Acceptor,
    engine::{LaneSnapshot, OpKind, OpStats},
    nbd::ListenAddress,
};

/// The longest request that is read.
const MAX_REQUEST_BYTES: usize = 4096;

/// A client that takes longer to ask, or to take a piece of the answer, is sent away: one is served at a time.
const PATIENCE: Duration = Duration::from_secs(2);

/// Upper ends of the latency buckets, in nanoseconds: 1 µs to 16 s, in powers of four.
const LATENCY_BUCKETS: [u64; 13] = {
    let mut ends = [0; 13];
    let mut at = 0;
    while at < 13 {
        ends[at] = 1000 << (2 * at);
        at += 1;
    }
    ends
};

/// The metrics socket of a daemon; it is closed when this is dropped.
pub struct Metrics {
    _acceptor: Acceptor,
    address: ListenAddress,
}

impl Metrics {
    /// Listens.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(address: &ControlAddress, daemon: Arc<Daemon>) -> io::Result<Self> {
        let answer = move |fd: OwnedFd| {
            // A client that is gone needs no answer.
            serve(&daemon, fd).ok();
        };
        let (acceptor, address) = address.accept(answer)?;
        Ok(Self { _acceptor: acceptor, address })
    }

    /// Where it listens; a TCP port of 0 has become the one that was given.
    #[must_use]
    pub fn address(&self) -> &ListenAddress {
        &self.address
    }
}

/// Answers one HTTP request.
fn serve(daemon: &Daemon, fd: OwnedFd) -> io::Result<()> {
    // Bytes go through the descriptor alone; what kind of socket it is does not matter.
    let mut stream = TcpStream::from(fd);
    stream.set_write_timeout(Some(PATIENCE))?;
    let deadline = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < MAX_REQUEST_BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        if poll(&mut [PollFd::new(&stream, PollFlags::IN)], Some(&left))? == 0 {
            return Ok(());
        }
        let mut some = [0; 1024];
        match stream.read(&mut some)? {
            0 => break,
            len => request.extend_from_slice(&some[..len]),
        }
    }
    let (status, body) = if request.starts_with(b"GET /metrics ") || request.starts_with(b"GET / ") {
        ("200 OK", text(daemon))
    } else if request.starts_with(b"GET ") {
        ("404 Not Found", "metrics are at /metrics\n".to_owned())
    } else {
        ("405 Method Not Allowed", "only GET is understood\n".to_owned())
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// CPU time of this process.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Memory that is resident, where the system tells.
fn resident_bytes() -> Option<u64> {
    let mut text = String::new();
    File::open("/proc/self/statm").ok()?.read_to_string(&mut text).ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// A value in the middle of a text being written.
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n").expect("a string");
    }

    fn value(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        writeln!(self.0, "{name}{{{labels}}} {value}").expect("a string");
    }

    fn plain(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.family(name, kind, help);
        writeln!(self.0, "{name} {value}").expect("a string");
    }
}

/// All metrics.
fn text(daemon: &Daemon) -> String {
    let disks: Vec<(String, LaneSnapshot)> =
        daemon.disks().into_iter().map(|(name, disk)| (escaped(&name), disk.stats())).collect();
    let mut page = Page(String::new());
    operations(&mut page, &disks);
    latencies(&mut page, &disks);
    type Number = (&'static str, &'static str, &'static str, fn(&LaneSnapshot) -> u64);
    let numbers: [Number; 9] = [
        ("blk_queue_depth", "gauge", "Requests under way.", |of| of.depth),
        ("blk_queue_depth_max", "gauge", "The most requests that were under way in one lane.", |of| {
            of.depth_max
        }),
        ("blk_worker_handovers_total", "counter", "Requests given to a worker.", |of| of.handed_over),
        ("blk_map_misses_total", "counter", "Of them, because tables were not in memory.", |of| of.misses),
        ("blk_table_reads_total", "counter", "Pieces of tables that lanes have read themselves.", |of| {
            of.table_reads
        }),
        ("blk_parked_total", "counter", "Requests that waited for the clusters of another.", |of| of.parked),
        ("blk_sleeps_total", "counter", "Times that a lane slept.", |of| of.sleeps),
        ("blk_poll_hits_total", "counter", "Times that polling found work before a sleep.", |of| {
            of.poll_hits
        }),
        ("blk_enters_total", "counter", "Calls of the kernel to submit or to wait.", |of| of.enters),
    ];
    for (name, kind, help, number) in numbers {
        page.family(name, kind, help);
        for (disk, counted) in &disks {
            page.value(name, &format!("disk=\"{disk}\""), number(counted));
        }
    }
    lanes(&mut page, daemon);
    if let Some(server) = daemon.server() {
        let counts = server.counts();
        page.plain("blk_nbd_connections", "gauge", "NBD connections.", counts.connections);
        page.plain("blk_nbd_accepted_total", "counter", "NBD connections accepted.", counts.accepted);
        let help = "NBD connections ended for a broken rule.";
        page.plain("blk_nbd_violations_total", "counter", help, counts.violations);
    }
    let cpu = cpu_time().as_secs_f64();
    page.plain("process_cpu_seconds_total", "counter", "User and system CPU time spent in seconds.", cpu);
    if let Some(bytes) = resident_bytes() {
        page.plain("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", bytes);
    }
    page.0
}

/// The lanes that are there, and what lanes spend.
fn lanes(page: &mut Page, daemon: &Daemon) {
    let disks: Vec<_> = daemon.disks().into_iter().map(|(name, disk)| (escaped(&name), disk)).collect();
    const LANE: &str = "blk_lane_cpu_seconds_total";
    page.family(LANE, "counter", "CPU time of the thread of a lane that is there.");
    for (disk, lane) in
        disks.iter().flat_map(|(name, disk)| disk.lane_reports().into_iter().map(move |lane| (name, lane)))
    {
        let labels = format!("disk=\"{disk}\",lane=\"{}\",engine=\"{}\"", lane.number, lane.engine.name());
        page.value(LANE, &labels, lane.cpu.as_secs_f64());
    }
    const ALL: &str = "blk_lanes_cpu_seconds_total";
    page.family(ALL, "counter", "CPU time of the threads of all lanes, those that are gone included.");
    for (name, disk) in &disks {
        page.value(ALL, &format!("disk=\"{name}\""), disk.lanes_cpu().as_secs_f64());
    }
}

fn operations(page: &mut Page, disks: &[(String, LaneSnapshot)]) {
    type Family = (&'static str, &'static str, fn(&OpStats) -> u64);
    let families: [Family; 3] = [
        ("blk_operations_total", "Requests that ended well.", |of| of.done),
        ("blk_failed_operations_total", "Requests that ended with an error.", |of| of.failed),
        ("blk_bytes_total", "Guest bytes of requests that ended well.", |of| of.bytes),
    ];
    for (name, help, number) in families {
        page.family(name, "counter", help);
        for (disk, counted) in disks {
            for kind in OpKind::ALL {
                let labels = format!("disk=\"{disk}\",op=\"{}\"", kind.name());
                page.value(name, &labels, number(counted.op(kind)));
            }
        }
    }
}

fn latencies(page: &mut Page, disks: &[(String, LaneSnapshot)]) {
    const NAME: &str = "blk_latency_seconds";
    page.family(NAME, "histogram", "From submission to answer.");
    for (disk, counted) in disks {
        for kind in OpKind::ALL {
            let of = counted.op(kind);
            let labels = format!("disk=\"{disk}\",op=\"{}\"", kind.name());
            for end in LATENCY_BUCKETS {
                // A bucket of the lane that reaches over the end is counted in the next one.
                let below: u64 =
                    of.latency.buckets().take_while(|(to, _)| *to <= end).map(|(_, count)| count).sum();
                let end = Duration::from_nanos(end).as_secs_f64();
                page.value(&format!("{NAME}_bucket"), &format!("{labels},le=\"{end}\""), below);
            }
            page.value(&format!("{NAME}_bucket"), &format!("{labels},le=\"+Inf\""), of.done);
            page.value(&format!("{NAME}_sum"), &labels, Duration::from_nanos(of.nanoseconds).as_secs_f64());
            page.value(&format!("{NAME}_count"), &labels, of.done);
        }
    }
}

/// A label's value: backslashes, quotes and newlines are escaped.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// The metrics in short, a line each: for the log at the end.
#[must_use]
pub fn summary(daemon: &Daemon) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, disk) in daemon.disks() {
        let counted = disk.stats();
        for kind in OpKind::ALL {
            let of = counted.op(kind);
            if of.done + of.failed == 0 {
                continue;
            }
            let [p50, p99, worst] =
                [0.5, 0.99, 1.0].map(|share| of.latency.quantile(share).unwrap_or_default().as_micros());
            lines.push(format!(
                "{name}: {} {}: {} bytes, {} failed, latency p50 {p50} us, p99 {p99} us, at most {worst} us",
                of.done,
                kind.name(),
                of.bytes,
                of.failed,
            ));
        }
        lines.push(format!(
            "{name}: depth up to {}, {} given to workers ({} misses), {} parked",
            counted.depth_max, counted.handed_over, counted.misses, counted.parked
        ));
    }
    lines.push(format!("CPU time {:.3} s", cpu_time().as_secs_f64()));
    lines
}
