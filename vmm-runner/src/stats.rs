//! What a run records of itself: when it got where, how often the guest left to this program, what its disks did.

use std::{
    io::{self, Write},
    sync::{Arc, OnceLock},
    time::Instant,
};

use blk_backend::engine::OpKind;
use serde_json::{Map, Value, json};

use crate::{devices::Console, drive::Drive, machine::ExitCounts};

/// The moments of a run. Made when the process starts.
#[derive(Debug)]
pub struct Timeline {
    began: Instant,
    spoke: Arc<OnceLock<Instant>>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { began: Instant::now(), spoke: Arc::default() }
    }
}

impl Timeline {
    /// A console that notes the guest's first byte.
    #[must_use]
    pub fn watching(&self, console: Console) -> Console {
        Box::new(Watched { console, spoke: Arc::clone(&self.spoke) })
    }

    /// All of it, with exits and disks, as one object. Times are in milliseconds since the process began.
    #[must_use]
    pub fn report(&self, exits: &ExitCounts, drives: &[Drive]) -> Value {
        let since =
            |moment: Option<Instant>| moment.map(|moment| (moment - self.began).as_secs_f64() * 1000.0);
        let init = exits.init();
        let mut counts = counted(&exits.by_reason());
        counts["to_init"] = init.map_or(Value::Null, |init| counted(&init.by_reason));
        json!({
            "timeline_ms": {
                "entered": since(exits.entered()),
                "first_byte": since(self.spoke.get().copied()),
                "init": since(init.map(|init| init.at)),
                "ended": self.began.elapsed().as_secs_f64() * 1000.0,
            },
            "exits": counts,
            "disks": drives.iter().map(disk).collect::<Vec<_>>(),
        })
    }
}

/// Exits, all and by reason.
fn counted(by_reason: &[(&str, u64)]) -> Value {
    let total: u64 = by_reason.iter().map(|(_, count)| count).sum();
    let reasons: Map<String, Value> =
        by_reason.iter().map(|&(name, count)| (name.to_owned(), count.into())).collect();
    json!({ "total": total, "by_reason": reasons })
}

fn disk(drive: &Drive) -> Value {
    let stats = drive.disk().stats();
    let mut operations = Map::new();
    for (kind, one) in OpKind::ALL.into_iter().zip(&stats.ops) {
        let counts = json!({
            "done": one.done, "failed": one.failed, "bytes": one.bytes, "nanoseconds": one.nanoseconds,
        });
        operations.insert(kind.name().to_owned(), counts);
    }
    json!({
        "path": drive.name().to_string_lossy(),
        "operations": operations,
        "handed_over": stats.handed_over,
        "misses": stats.misses,
        "depth_max": stats.depth_max,
        "system_calls": stats.enters,
    })
}

struct Watched {
    console: Console,
    spoke: Arc<OnceLock<Instant>>,
}

impl Write for Watched {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.spoke.get_or_init(Instant::now);
        self.console.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.console.flush()
    }
}
