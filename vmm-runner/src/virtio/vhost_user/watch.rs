//! The thread that notices when a backend goes, waits for the next one, and passes on what it tells.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use blk_backend::virtio::config::WRITEBACK_AT_BYTES;
use rustix::{
    event::{PollFd, PollFlags, poll},
    time::Timespec,
};

use super::{
    Active, Shared, State,
    link::{Link, LinkError, Requests},
};
use crate::{Error, Result};

/// How long to wait before the next try to connect.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What happened.
enum Event {
    /// The device goes away.
    Stop,
    /// The backend is gone.
    Gone,
    /// A queue is broken.
    Broken,
    /// The backend asks for something.
    Asked,
}

/// Watches until the device is dropped.
pub(super) fn watch(shared: &Shared, mut requests: Option<Requests>) {
    loop {
        match next_event(shared, requests.as_ref()) {
            Ok(Event::Stop) => return,
            Ok(Event::Gone) => match reconnect(shared) {
                Some(next) => requests = next,
                None => return,
            },
            Ok(Event::Broken) => {
                // The counter says no more than that.
                drop(shared.broken.read());
                shared.tell("the backend cannot go on with a queue; the guest must reset the device");
                shared.notify(|notifier| notifier.needs_reset());
            }
            Ok(Event::Asked) => {
                let handled = requests.as_mut().map(Requests::handle_request).transpose();
                if let Err(error) = handled {
                    shared.tell(&format!("what the backend asks is not understood: {error}"));
                    // It may be the middle of a message: nothing more can be read.
                    requests = None;
                }
                refresh_config(shared);
            }
            Err(error) => {
                shared.tell(&format!("it is watched no more: {error}"));
                return;
            }
        }
    }
}

fn next_event(shared: &Shared, requests: Option<&Requests>) -> Result<Event> {
    let stream = match &shared.lock().link {
        Some(link) => link.stream().try_clone().map_err(Error::host("a socket"))?,
        None => return Ok(Event::Gone),
    };
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut fds = vec![
        PollFd::from_borrowed_fd(borrow(&shared.stop), PollFlags::IN),
        // Answers are read by who asked; only the end of the connection is of interest.
        PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::RDHUP),
        PollFd::from_borrowed_fd(borrow(&shared.broken), PollFlags::IN),
    ];
    if let Some(requests) = requests {
        fds.push(PollFd::from_borrowed_fd(borrow(requests), PollFlags::IN));
    }
    loop {
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(Error::host("wait for a backend")(error)),
            Ok(_) => {}
        }
        let happened: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        return Ok(match happened[..] {
            [stop, ..] if !stop.is_empty() => Event::Stop,
            [_, stream, ..] if stream.intersects(gone) => Event::Gone,
            [_, _, broken, ..] if !broken.is_empty() => Event::Broken,
            _ => Event::Asked,
        });
    }
}

fn borrow(fd: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as its owner lives, which is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Waits for the next backend and lets it go on. `None` when the device goes away meanwhile.
fn reconnect(shared: &Shared) -> Option<Option<Requests>> {
    shared.lock().link = None;
    shared.tell("the backend is gone; the guest's requests wait for the next one");
    let mut last_error = String::new();
    loop {
        let mut fds = [PollFd::from_borrowed_fd(borrow(&shared.stop), PollFlags::IN)];
        match poll(&mut fds, Some(&RETRY)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return None,
            Err(error) => {
                shared.tell(&format!("no backend is waited for any more: {error}"));
                return None;
            }
        }
        match Link::connect(&shared.path) {
            Ok((link, requests)) => match go_on(shared, link) {
                Ok(()) => return Some(requests),
                Err(error) => tell_once(shared, &mut last_error, &error),
            },
            // Nobody listens yet.
            Err(LinkError::Lost(_)) => {}
            Err(error) => tell_once(shared, &mut last_error, &error),
        }
    }
}

fn tell_once(shared: &Shared, last: &mut String, error: &LinkError) {
    let text = error.to_string();
    if *last != text {
        shared.tell(&format!("a backend is there that cannot go on: {text}"));
        *last = text;
    }
}

/// Starts on the new connection what the driver has started.
fn go_on(shared: &Shared, mut link: Link) -> std::result::Result<(), LinkError> {
    if link.queues < u64::from(shared.queues) {
        let text = format!("it has {} queues, and the guest {}", link.queues, shared.queues);
        return Err(LinkError::Refused(text));
    }
    let missing = shared.offered.without(link.offered);
    if missing.0 != 0 {
        return Err(LinkError::Refused(format!("it does not offer the features {missing:#x}")));
    }
    let (is_lost, has_changed) = {
        let mut state = shared.lock();
        if let Some(value) = state.writeback {
            link.write_config(WRITEBACK_AT_BYTES, value)?;
        }
        let config = shared.adapted(link.config()?);
        let State { active, inflight, is_paused, .. } = &mut *state;
        let is_lost = inflight.is_none() && active.as_ref().is_some_and(Active::has_requests);
        if is_lost {
            *active = None;
        } else if let (Some(active), false) = (active, *is_paused) {
            link.start(active, &shared.broken, inflight).inspect_err(|_| link.shut_down())?;
        }
        state.link = Some(link);
        (is_lost, std::mem::replace(&mut state.config, config) != config)
    };
    if is_lost {
        shared.tell("a backend is back; which requests the one before had ended it did not say: the guest must reset the device");
        shared.notify(|notifier| notifier.needs_reset());
    } else {
        shared.tell("a backend is back");
    }
    if has_changed {
        shared.notify(|notifier| notifier.config_changed());
    }
    Ok(())
}

/// Takes the configuration over, where the backend said that it changed.
fn refresh_config(shared: &Shared) {
    {
        let mut state = shared.lock();
        let Some(link) = state.link.as_mut().filter(|link| link.config_changed()) else { return };
        match link.config() {
            Ok(config) => state.config = shared.adapted(config),
            Err(error) => {
                link.shut_down();
                drop(state);
                return shared.tell(&format!("its configuration cannot be read: {error}"));
            }
        }
    }
    shared.notify(|notifier| notifier.config_changed());
}
