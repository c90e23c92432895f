//! How long a lane looks for work before it sleeps.

use std::{str::FromStr, time::Duration};

/// The longest that anybody polls: who waits for longer has slept cheaper.
const MOST: Duration = Duration::from_millis(10);

/// The most of [`Poll::ADAPTIVE`].
const ADAPTIVE_MOST: Duration = Duration::from_micros(32);

/// What adapting begins with.
const FIRST: Duration = Duration::from_micros(4);

/// How a lane polls before it sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Poll {
    /// Not at all.
    #[default]
    Off,
    /// So long, each time.
    For(Duration),
    /// As long as it pays: longer where work comes soon after the lane slept, not at all where it does not.
    Adaptive {
        /// The longest.
        most: Duration,
    },
}

impl Poll {
    /// Adaptive, up to about what falling asleep and being woken cost.
    pub const ADAPTIVE: Self = Self::Adaptive { most: ADAPTIVE_MOST };
}

impl FromStr for Poll {
    type Err = String;

    /// `off`, a number of microseconds, `adaptive`, or `adaptive:MICROSECONDS`.
    fn from_str(text: &str) -> Result<Self, String> {
        let microseconds = |text: &str| {
            let time = Duration::from_micros(text.parse().ok()?);
            (time <= MOST).then_some(time)
        };
        let poll = match text {
            "off" => Some(Self::Off),
            "adaptive" => Some(Self::ADAPTIVE),
            _ => match text.strip_prefix("adaptive:") {
                Some(most) => microseconds(most).map(|most| Self::Adaptive { most }),
                None => microseconds(text).map(Self::For),
            },
        };
        poll.ok_or_else(|| {
            format!("expected off, adaptive, adaptive:N or N microseconds, up to {}", MOST.as_micros())
        })
    }
}

/// How long one lane polls, as it stands.
#[derive(Debug)]
pub(super) struct Poller {
    poll: Poll,
    span: Duration,
}

impl Poller {
    pub(super) fn new(poll: Poll) -> Self {
        let span = if let Poll::For(span) = poll { span } else { Duration::ZERO };
        Self { poll, span }
    }

    /// How long to poll now.
    pub(super) fn span(&self) -> Duration {
        self.span
    }

    /// Whether [`Self::slept`] wants to be told.
    pub(super) fn adapts(&self) -> bool {
        matches!(self.poll, Poll::Adaptive { .. })
    }

    /// Polling found nothing, and the lane slept so long until there was something.
    pub(super) fn slept(&mut self, slept: Duration) {
        let Poll::Adaptive { most } = self.poll else { return };
        self.span = if self.span + slept <= most {
            // A longer look would have found it.
            (self.span * 2).max(FIRST).min(most)
        } else {
            let half = self.span / 2;
            if half < FIRST { Duration::ZERO } else { half }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(microseconds: u64) -> Duration {
        Duration::from_micros(microseconds)
    }

    #[test]
    fn options_are_read() {
        for (text, poll) in [
            ("off", Poll::Off),
            ("0", Poll::For(us(0))),
            ("30", Poll::For(us(30))),
            ("adaptive", Poll::Adaptive { most: us(32) }),
            ("adaptive:200", Poll::Adaptive { most: us(200) }),
        ] {
            assert_eq!(text.parse(), Ok(poll));
        }
        for text in ["", "on", "-1", "10001", "adaptive:", "adaptive:99999999999999999999"] {
            assert!(text.parse::<Poll>().is_err(), "{text}");
        }
    }

    #[test]
    fn polling_grows_while_work_comes_soon_and_ends_when_it_does_not() {
        let mut poller = Poller::new(Poll::Adaptive { most: us(50) });
        assert_eq!(poller.span(), us(0), "nobody polls before it is known to pay");
        let spans: Vec<_> = (0..6)
            .map(|_| {
                poller.slept(us(10));
                poller.span()
            })
            .collect();
        // Having looked for 50 microseconds and slept for 10, it would have taken more than the most.
        assert_eq!(spans, [4, 8, 16, 32, 50, 25].map(us));
        let spans: Vec<_> = (0..4)
            .map(|_| {
                poller.slept(us(1_000));
                poller.span()
            })
            .collect();
        assert_eq!(spans, [us(25) / 2, us(25) / 4, us(0), us(0)]);
    }

    #[test]
    fn a_fixed_time_stays() {
        for (poll, span) in [(Poll::Off, us(0)), (Poll::For(us(30)), us(30))] {
            let mut poller = Poller::new(poll);
            poller.slept(us(1));
            assert_eq!((poller.span(), poller.adapts()), (span, false));
        }
    }
}
