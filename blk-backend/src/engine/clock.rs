//! CPU time of a thread or process, as others read it: they themselves pay nothing for that.
#![allow(unsafe_code)]

use std::{io, mem::MaybeUninit, time::Duration};

/// The CPU time that a thread has spent since this was made on it.
#[derive(Debug)]
pub(crate) struct ThreadClock {
    clock: libc::clockid_t,
    began: Duration,
}

impl ThreadClock {
    /// That of the calling thread, from now on.
    pub(crate) fn start() -> Self {
        let mut clock = 0;
        // SAFETY: the calling thread lives, and `clock` is ours.
        let failed = unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) };
        assert_eq!(failed, 0, "every thread that lives has a clock");
        Self { clock, began: read_clock(clock).expect("the calling thread lives") }
    }

    /// What it has spent. The thread lives.
    pub(crate) fn spent(&self) -> Duration {
        read_clock(self.clock).map_or(Duration::ZERO, |now| now.saturating_sub(self.began))
    }
}

/// What a clock says.
///
/// # Errors
/// When its thread or process is gone.
pub(crate) fn read_clock(clock: libc::clockid_t) -> io::Result<Duration> {
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: `time` is ours; the kernel fills it when it returns 0.
    let time = unsafe {
        if libc::clock_gettime(clock, time.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        time.assume_init()
    };
    // CPU time is never negative, and nanoseconds are below 10^9.
    Ok(Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn others_see_what_a_thread_spends_and_not_what_they_spend() {
        let (give, take) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                give.send(ThreadClock::start()).expect("somebody waits");
                let own = ThreadClock::start();
                while own.spent() < Duration::from_millis(5) {
                    std::hint::spin_loop();
                }
                give.send(own).expect("somebody waits");
                // The end of the other is the sign.
                ends.recv().ok();
            });
            let clock: ThreadClock = take.recv().expect("it is made");
            take.recv().expect("it has spent");
            let spent = clock.spent();
            assert!(spent >= Duration::from_millis(5), "{spent:?}");
            let own = ThreadClock::start();
            while own.spent() < spent {
                std::hint::spin_loop();
            }
            assert!(clock.spent() < spent * 2, "the thread sleeps, and this one worked");
            drop(end);
        });
    }
}
