//! The options that say what moves a guest's bytes, and how eagerly it looks for work.

use blk_backend::engine::{EngineChoice, LaneOptions, Poll, ring_support};

use super::Failure;

/// Engine
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct EngineArgs {
    /// What moves the bytes: io_uring, threads, or auto, which is io_uring where the host allows it
    #[arg(long, value_name = "auto|io_uring|threads", default_value = "auto", value_parser = engine)]
    pub(crate) engine: EngineChoice,
    /// Look for work before sleeping: off, for N microseconds, or adaptive[:N], as long as it pays and up to N; without
    /// it the queues of vhost-user devices adapt, and NBD connections do not look
    #[arg(long, value_name = "off|N|adaptive[:N]")]
    poll: Option<Poll>,
}

impl EngineArgs {
    /// The lanes of NBD connections. Their clients keep them busy, or come too seldom: polling costs more than it brings.
    pub(crate) fn lane_options(self) -> LaneOptions {
        LaneOptions { poll: self.poll.unwrap_or(Poll::Off), engine: self.engine, ..LaneOptions::default() }
    }

    /// How the queues of devices poll. A driver that waits for each of its requests saves two thirds of the latency.
    pub(crate) fn device_poll(self) -> Poll {
        self.poll.unwrap_or(Poll::ADAPTIVE)
    }

    /// Tells when threads take the place of `io_uring`, and why. Called where lanes will be made: behind the fences.
    ///
    /// # Errors
    /// When `io_uring` was asked for and there is none.
    pub(crate) fn announce(self) -> Result<(), Failure> {
        let why = match self.engine {
            EngineChoice::Threads => return Ok(()),
            EngineChoice::Auto | EngineChoice::Ring => match ring_support() {
                Ok(()) => return Ok(()),
                Err(why) => why,
            },
        };
        if self.engine == EngineChoice::Ring {
            return Err(Failure::new(format_args!("there is no io_uring to use: {why}")));
        }
        super::warn(&format!("threads serve the requests, as there is no io_uring to use: {why}"));
        Ok(())
    }
}

fn engine(name: &str) -> Result<EngineChoice, String> {
    EngineChoice::from_name(name).ok_or_else(|| "expected auto, io_uring or threads".to_owned())
}
