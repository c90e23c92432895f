//! Internal snapshots as a table and as JSON.

use std::fmt::Write as _;

use img_core::{format::SnapshotInfo, text::to_bytes};
use jiff::{Timestamp, tz::TimeZone};
use serde_json::{Value, json};

use crate::size::Human;

/// The table that `snapshot -l` and `info` print.
pub(crate) fn table(snapshots: &[SnapshotInfo]) -> String {
    let zone = TimeZone::system();
    let mut text = String::from("Snapshot list:\n");
    row(&mut text, ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        row(
            &mut text,
            [
                &snapshot.id,
                &snapshot.name,
                &Human(snapshot.vm_state_bytes).to_string(),
                &date(snapshot.date.0, &zone),
                &clock(snapshot.vm_clock_nsec),
                &snapshot.icount.map(|icount| icount.to_string()).unwrap_or_default(),
            ],
        );
    }
    text
}

fn row(text: &mut String, [id, tag, size, date, clock, icount]: [&str; 6]) {
    // As in C, columns count bytes, not characters.
    let [id, tag] = [(id, 7), (tag, 16)].map(|(word, width)| {
        let missing = usize::saturating_sub(width, to_bytes(word).len());
        format!("{word}{}", " ".repeat(missing))
    });
    writeln!(text, "{id} {tag} {size:>8} {date:>19} {clock:>15} {icount:>10}")
        .expect("a String takes everything");
}

/// Local time, as users read it.
fn date(seconds: u32, zone: &TimeZone) -> String {
    let at = Timestamp::from_second(i64::from(seconds)).expect("32 bits of seconds are a date");
    at.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

fn clock(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds / 1_000_000;
    let seconds = milliseconds / 1000;
    format!("{:04}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60, milliseconds % 1000)
}

/// One snapshot as `info --output=json` shows it.
pub(crate) fn json(snapshot: &SnapshotInfo) -> Value {
    const NSEC_PER_SEC: u64 = 1_000_000_000;
    let mut object = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_bytes,
        "date-sec": snapshot.date.0,
        "date-nsec": snapshot.date.1,
        "vm-clock-sec": snapshot.vm_clock_nsec / NSEC_PER_SEC,
        "vm-clock-nsec": snapshot.vm_clock_nsec % NSEC_PER_SEC,
    });
    if let Some(icount) = snapshot.icount {
        object["icount"] = icount.into();
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_where_the_reference_has_them() {
        let mut text = String::new();
        row(&mut text, ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
        row(&mut text, ["1", "s1", "0 B", "2026-11-21 12:32:17", "0000:00:00.000", "0"]);
        assert_eq!(
            text,
            "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT\n\
             1       s1                    0 B 2026-11-21 12:32:17  0000:00:00.000          0\n"
        );
        assert_eq!(date(1_795_264_337, &TimeZone::UTC), "2026-11-21 12:32:17");
        assert_eq!(clock(3_723_004_000_000), "0001:02:03.004");
    }
}
