//! What becomes of a request that the host failed: the guest is told, or is not told, or waits until somebody has seen
//! to it.

use crate::request::Errno;

/// What a device does with requests that fail, as `werror` and `rerror` say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// Tell the guest.
    #[default]
    Report,
    /// Tell the guest that all is well.
    Ignore,
    /// Keep the request, and hold the queue.
    Stop,
    /// [`Stop`](Self::Stop) where the host has no space, [`Report`](Self::Report) otherwise.
    StopWithoutSpace,
}

impl OnError {
    /// By QEMU's names.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "report" => Self::Report,
            "ignore" => Self::Ignore,
            "stop" => Self::Stop,
            "enospc" => Self::StopWithoutSpace,
            _ => return None,
        })
    }

    /// What it means for one failure.
    #[must_use]
    pub fn action(self, errno: Errno) -> Action {
        match self {
            Self::Report => Action::Report,
            Self::Ignore => Action::Ignore,
            Self::Stop => Action::Stop,
            Self::StopWithoutSpace if errno == Errno::NOSPC => Action::Stop,
            Self::StopWithoutSpace => Action::Report,
        }
    }
}

/// What was done with a request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The guest is told.
    Report,
    /// The guest is told that all is well.
    Ignore,
    /// The request is kept, and its queue takes nothing more off its ring, until the queue is
    /// [resumed](crate::in_process::QueueThread::resume): then the request is done again from its start.
    Stop,
}

impl Action {
    /// QEMU's word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Ignore => "ignore",
            Self::Stop => "stop",
        }
    }
}

/// A request that the host failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Whether it was a read; writes, discards, zeroes and flushes are not.
    pub is_read: bool,
    /// Why.
    pub errno: Errno,
    /// What was done.
    pub action: Action,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lack_of_space_stops_by_the_last_one() {
        let on_error = OnError::from_name("enospc").expect("a name");
        assert_eq!(on_error.action(Errno::NOSPC), Action::Stop);
        assert_eq!(on_error.action(Errno::IO), Action::Report);
        assert_eq!(OnError::from_name("auto"), None);
    }
}
