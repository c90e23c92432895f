//! A run: one machine after the other, held, continued and ended from outside.
//!
//! Lock order: `changing` before `state`. `state` is held for moments only; `changing` for as long as it takes to hold
//! a machine, which is as long as its slowest request.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use blk_backend::{
    control::{IoStatus, Nodes, Subscribers},
    request::Errno,
    virtio::{Action, Failure},
};
use serde_json::json;

use super::failures::{self, Failures};
use crate::{
    Result,
    drive::GuestDisk,
    machine::{End, MachineHandle},
};

/// What a run does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// The guest runs.
    #[default]
    Running,
    /// A client holds it.
    Paused,
    /// It is held because the host failed a request.
    IoError,
    /// It is over.
    Shutdown,
}

impl Status {
    /// QMP's word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::IoError => "io-error",
            Self::Shutdown => "shutdown",
        }
    }

    /// Whether the guest is held, and may go on.
    #[must_use]
    pub const fn is_held(self) -> bool {
        matches!(self, Self::Paused | Self::IoError)
    }
}

/// Who asked from outside for the end of a machine, in QMP's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// A new machine.
    Reset,
    /// None.
    Quit(&'static str),
}

#[derive(Debug, Default)]
struct State {
    status: Status,
    /// `None` before the first machine, between two, and behind the last.
    machine: Option<MachineHandle>,
    asked: Option<Asked>,
    /// How many machines there have been.
    machines: u64,
}

/// A request of a disk that the host failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct FailedRequest {
    /// By its place on the command line.
    pub(super) disk: usize,
    /// The number of the machine that asked.
    pub(super) machine: u64,
    pub(super) failure: Failure,
}

/// What is controlled.
#[derive(Debug, Default)]
pub struct Runner {
    pub(super) nodes: Nodes,
    pub(super) subscribers: Subscribers,
    /// Held while a machine is held, continued, or exchanged.
    changing: Mutex<()>,
    state: Mutex<State>,
    failures: Arc<Failures>,
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.failures.close();
    }
}

impl Runner {
    /// A run with these disks, which are called `disk0` and so on.
    ///
    /// # Errors
    /// When the host has no thread.
    pub fn new(disks: &[GuestDisk]) -> Result<Arc<Self>> {
        let runner = Self::default();
        for (index, disk) in disks.iter().enumerate() {
            // A backend's disk is controlled where the backend is.
            if let Some(drive) = disk.drive() {
                runner.nodes.add(&name(index), drive.disk(), drive.cache())?;
                runner.nodes.set_io_status(&name(index), IoStatus::Ok);
            }
        }
        let runner = Arc::new(runner);
        failures::start(&runner.failures, Arc::downgrade(&runner))?;
        Ok(runner)
    }

    /// Where the queues of the next machine tell of requests of a disk that the host failed. Never waits.
    #[must_use]
    pub fn on_failure(&self) -> Arc<dyn Fn(usize, Failure) + Send + Sync> {
        let failures = Arc::clone(&self.failures);
        let machine = self.state().machines + 1;
        Arc::new(move |disk, failure| failures.add(FailedRequest { disk, machine, failure }))
    }

    /// What it does.
    #[must_use]
    pub fn status(&self) -> Status {
        self.state().status
    }

    /// The machine, where there is one.
    #[must_use]
    pub fn machine(&self) -> Option<MachineHandle> {
        self.state().machine.clone()
    }

    /// Takes a machine that is about to run. Where the run is held, so is the machine, before its first instruction.
    ///
    /// # Errors
    /// As [`MachineHandle::pause`].
    pub fn attach(&self, machine: &MachineHandle) -> Result<()> {
        let _one = self.change();
        let (status, asked) = {
            let mut state = self.state();
            state.machine = Some(machine.clone());
            state.machines += 1;
            if state.asked == Some(Asked::Reset) {
                // There is a new one just now.
                state.asked = None;
            }
            (state.status, state.asked)
        };
        if asked.is_some() {
            machine.end(End::Quit);
        }
        if status.is_held() { machine.pause() } else { Ok(()) }
    }

    /// The machine has ended, and tells clients so. `is_last` where no other follows.
    pub fn detach(&self, end: &End, is_last: bool) {
        let _one = self.change();
        let asked = {
            let mut state = self.state();
            state.machine = None;
            let asked = state.asked;
            if is_last {
                state.status = Status::Shutdown;
            } else {
                state.asked = asked.filter(|asked| *asked != Asked::Reset);
            }
            asked
        };
        let (by_guest, reason) = match (end, asked) {
            (End::PowerOff, _) => (true, "guest-shutdown"),
            (End::Reset, Some(Asked::Reset)) => (false, "host-qmp-system-reset"),
            (End::Reset, _) => (true, "guest-reset"),
            (End::Quit, Some(Asked::Quit(reason))) => (false, reason),
            (End::Quit, _) => (false, "host-ui"),
            (End::Failed(_), _) => (true, "guest-panic"),
        };
        let event = if is_last { "SHUTDOWN" } else { "RESET" };
        self.subscribers.emit(event, Some(json!({"guest": by_guest, "reason": reason})));
    }

    /// Holds the guest and returns when nothing of it goes on.
    ///
    /// # Errors
    /// As [`MachineHandle::pause`].
    pub fn stop(&self) -> Result<()> {
        self.hold(Status::Paused, |_| true)
    }

    /// Holds the guest where it runs and `is_due` says so.
    fn hold(&self, status: Status, is_due: impl FnOnce(&State) -> bool) -> Result<()> {
        let _one = self.change();
        let machine = {
            let mut state = self.state();
            if state.status != Status::Running || !is_due(&state) {
                return Ok(());
            }
            state.status = status;
            state.machine.clone()
        };
        let held = machine.map_or(Ok(()), |machine| machine.pause());
        // What the images say of themselves is in their files, for whoever copies them.
        let flushed: Vec<_> =
            self.nodes.all().iter().map(|node| node.disk.drained(|| node.disk.image().flush())).collect();
        self.subscribers.emit("STOP", None);
        held?;
        Ok(flushed.into_iter().collect::<img_core::Result<()>>()?)
    }

    /// Tells clients that the host failed a request, and holds the guest where it has to be.
    pub(super) fn failed(&self, request: FailedRequest) {
        let FailedRequest { disk, machine, failure: Failure { is_read, errno, action } } = request;
        let name = name(disk);
        let (operation, has_no_space) = (if is_read { "read" } else { "write" }, errno == Errno::NOSPC);
        let reason = std::io::Error::from(errno).to_string();
        let node = self.nodes.find(&name, "").map(|node| node.layer_name(0)).unwrap_or_default();
        if action == Action::Stop {
            let status = if has_no_space { IoStatus::NoSpace } else { IoStatus::Failed };
            self.nodes.set_io_status(&name, status);
        }
        self.subscribers.emit(
            "BLOCK_IO_ERROR",
            Some(json!({
                "qom-path": format!("/machine/{name}"), "device": name, "node-name": node,
                "operation": operation, "action": action.name(), "nospace": has_no_space, "reason": reason,
            })),
        );
        if action == Action::Stop {
            Self::tell(&format!(
                "{name}: a {operation} failed: {reason}; the guest is held until a client says cont"
            ));
            // The requests of a machine that is no more went with it, and hold no other one.
            let is_here = |state: &State| {
                state.machines == machine
                    && state.machine.as_ref().is_some_and(|machine| !machine.has_ended())
            };
            if let Err(error) = self.hold(Status::IoError, is_here) {
                Self::tell(&error.to_string());
            }
        }
    }

    /// Lets the guest go on.
    ///
    /// # Errors
    /// As [`MachineHandle::resume`].
    pub fn resume(&self) -> Result<()> {
        let _one = self.change();
        let machine = {
            let mut state = self.state();
            if !state.status.is_held() {
                return Ok(());
            }
            state.status = Status::Running;
            state.machine.clone()
        };
        for node in self.nodes.all() {
            self.nodes.set_io_status(&node.name, IoStatus::Ok);
        }
        // Before the first thing that it does then.
        self.subscribers.emit("RESUME", None);
        machine.map_or(Ok(()), |machine| machine.resume())
    }

    /// Exchanges the machine for a new one, which is held where this one is.
    pub fn reset(&self) {
        let mut state = self.state();
        if let Some(machine) = state.machine.clone() {
            state.asked.get_or_insert(Asked::Reset);
            drop(state);
            machine.end(End::Reset);
        }
    }

    /// Ends the run, held or not. `reason` is QMP's word for it.
    pub fn quit(&self, reason: &'static str) {
        let machine = {
            let mut state = self.state();
            state.asked = Some(Asked::Quit(reason));
            state.machine.clone()
        };
        if let Some(machine) = machine {
            machine.end(End::Quit);
        }
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// As [`MachineHandle::press_power_button`].
    pub fn power_down(&self) -> Result<()> {
        if let Some(machine) = self.machine() {
            machine.press_power_button()?;
        }
        self.subscribers.emit("POWERDOWN", None);
        Ok(())
    }

    /// Tells the user something.
    pub(super) fn tell(text: &str) {
        // A standard error that is gone leaves nobody to tell.
        drop(writeln!(io::stderr(), "vmm-runner: {text}"));
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a disk is called, by its place on the command line.
fn name(disk: usize) -> String {
    format!("disk{disk}")
}
