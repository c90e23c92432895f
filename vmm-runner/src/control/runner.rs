//! A run: one machine after the other, held, continued and ended from outside.
//!
//! Lock order: `changing` before `state`. `state` is held for moments only; `changing` for as long as it takes to hold
//! a machine, which is as long as its slowest request.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use blk_backend::control::{Nodes, Subscribers};
use serde_json::json;

use crate::{
    Result,
    drive::Drive,
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
            Self::Shutdown => "shutdown",
        }
    }

    /// Whether the guest is held, and may go on.
    #[must_use]
    pub const fn is_held(self) -> bool {
        matches!(self, Self::Paused)
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
}

/// What is controlled.
#[derive(Debug, Default)]
pub struct Runner {
    pub(super) nodes: Nodes,
    pub(super) subscribers: Subscribers,
    /// Held while a machine is held, continued, or exchanged.
    changing: Mutex<()>,
    state: Mutex<State>,
}

impl Runner {
    /// A run with these disks, which are called `disk0` and so on.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn new(drives: &[Drive]) -> Result<Arc<Self>> {
        let runner = Self::default();
        for (index, drive) in drives.iter().enumerate() {
            runner.nodes.add(&format!("disk{index}"), drive.disk(), drive.cache())?;
        }
        Ok(Arc::new(runner))
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
        let _one = self.change();
        let machine = {
            let mut state = self.state();
            if state.status != Status::Running {
                return Ok(());
            }
            state.status = Status::Paused;
            state.machine.clone()
        };
        let held = machine.map_or(Ok(()), |machine| machine.pause());
        self.subscribers.emit("STOP", None);
        held
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
