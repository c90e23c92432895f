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

/// The most sleeps before polling is tried again that brought nothing.
const MOST_RESTED: u32 = 256;

/// So often polling has to find something for each time that it does not, to be worth the time.
const FINDS_TO_PAY: u32 = 4;

/// How long one lane polls, as it stands.
#[derive(Debug)]
pub(super) struct Poller {
    poll: Poll,
    span: Duration,
    /// How often polling has found something since it last did not.
    finds: u32,
    /// It is not tried for so many sleeps ...
    rests: u32,
    /// ... and for so many when it brings nothing the next time.
    will_rest: u32,
}

impl Poller {
    pub(super) fn new(poll: Poll) -> Self {
        let span = if let Poll::For(span) = poll { span } else { Duration::ZERO };
        Self { poll, span, finds: 0, rests: 0, will_rest: 1 }
    }

    /// How long to poll now.
    pub(super) fn span(&self) -> Duration {
        self.span
    }

    /// Whether [`Self::slept`] wants to be told.
    pub(super) fn adapts(&self) -> bool {
        matches!(self.poll, Poll::Adaptive { .. })
    }

    /// Polling found something.
    pub(super) fn found(&mut self) {
        self.finds = self.finds.saturating_add(1);
    }

    /// Polling found nothing, and the lane slept so long until there was something.
    pub(super) fn slept(&mut self, slept: Duration) {
        let Poll::Adaptive { most } = self.poll else { return };
        if self.rests > 0 {
            self.rests -= 1;
        } else if self.span < most {
            // A part of the sleep was being woken, on both sides: who looks may find it sooner than that.
            self.span = if slept <= most * 2 {
                (self.span * 2).max(FIRST).min(most)
            } else {
                Some(self.span / 2).filter(|half| *half >= FIRST).unwrap_or_default()
            };
        } else if std::mem::take(&mut self.finds) >= FINDS_TO_PAY {
            self.will_rest = 1;
        } else {
            self.span = Duration::ZERO;
            self.rests = self.will_rest;
            self.will_rest = (self.will_rest * 2).min(MOST_RESTED);
        }
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

    /// What it is after each of some sleeps, in microseconds.
    fn spans(poller: &mut Poller, sleeps: &[u64]) -> Vec<u128> {
        let span = |sleep: &u64| {
            poller.slept(us(*sleep));
            poller.span().as_micros()
        };
        sleeps.iter().map(span).collect()
    }

    #[test]
    fn polling_grows_while_work_comes_soon_and_ends_when_it_does_not() {
        let mut poller = Poller::new(Poll::Adaptive { most: us(50) });
        assert_eq!(poller.span(), us(0), "nobody polls before it is known to pay");
        assert_eq!(spans(&mut poller, &[10, 100, 30, 1000, 1000, 1000]), [4, 8, 16, 8, 4, 0]);
    }

    #[test]
    fn polling_that_finds_nothing_is_tried_ever_less_often() {
        let mut poller = Poller::new(Poll::Adaptive { most: us(16) });
        // Each try ends with the longest look, and a rest.
        for rest in [1, 2, 4] {
            assert_eq!(spans(&mut poller, &[20; 4]), [4, 8, 16, 0]);
            assert_eq!(spans(&mut poller, &vec![20; rest]), vec![0; rest]);
        }
        assert_eq!(spans(&mut poller, &[20; 3]), [4, 8, 16]);
        // Found often enough, but for once.
        (0..FINDS_TO_PAY).for_each(|_| poller.found());
        assert_eq!(spans(&mut poller, &[1000, 1000, 20, 20]), [16, 0, 0, 4]);
        for _ in 0..20 {
            while poller.span() < us(16) {
                poller.slept(us(20));
            }
            poller.slept(us(20));
        }
        assert_eq!(poller.rests, MOST_RESTED);
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
