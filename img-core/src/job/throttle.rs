//! Writing no faster than asked (`-r`).

use std::time::{Duration, Instant};

use crate::{job::ordered::lock, sync::Mutex};

/// How long one nap lasts at most, so that cancelling is noticed.
const NAP: Duration = Duration::from_millis(50);

/// Lets so many bytes a second pass, all threads together.
#[derive(Debug)]
pub(super) struct Throttle {
    bytes_per_second: u64,
    /// When the bytes let through so far are paid for.
    paid_at: Mutex<Instant>,
}

impl Throttle {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), paid_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be written, or until `is_stopped`.
    pub(super) fn pass(&self, bytes: u64, is_stopped: impl Fn() -> bool) {
        let cost = Duration::from_nanos(
            u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second))
                .unwrap_or(u64::MAX),
        );
        let start = {
            let mut paid_at = lock(&self.paid_at);
            let start = (*paid_at).max(Instant::now());
            *paid_at = start.checked_add(cost).unwrap_or(start);
            start
        };
        while !is_stopped() {
            let left = start.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(NAP));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_bytes_wait_for_earlier_ones_unless_stopped() {
        let throttle = Throttle::new(1000);
        let begin = Instant::now();
        throttle.pass(30, || false);
        throttle.pass(1_000_000, || false);
        assert!(begin.elapsed() >= Duration::from_millis(30), "the second waits for the first");
        throttle.pass(1, || true);
        assert!(begin.elapsed() < Duration::from_secs(100), "whoever is stopped does not wait");
    }
}
