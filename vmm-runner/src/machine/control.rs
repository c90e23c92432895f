//! Starting, holding and ending the processors of a machine.

use std::{
    collections::BTreeMap,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use vmm_sys_util::signal::{Killable, SIGRTMIN};

/// How often processors that are slow to leave the guest are kicked: a call of the host that one of them waits in may
/// have begun just behind the kick.
const KICK_AGAIN: Duration = Duration::from_millis(10);

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The user, or a control connection, ended it.
    Quit,
    /// The guest cannot go on; says why.
    Failed(String),
}

#[derive(Debug, Default)]
struct State {
    is_paused: bool,
    end: Option<End>,
    /// Processors that do not run the guest now.
    held: usize,
    /// Processors there are.
    processors: usize,
    /// Their threads, by number, as they begin.
    threads: BTreeMap<u32, i32>,
}

/// What the processors of one machine obey. A processor looks at [`Self::is_quiet`] after each exit and waits here
/// when it is not.
#[derive(Debug, Default)]
pub struct RunControl {
    /// Something is asked for: a pause, or the end.
    wants: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    kicks: Mutex<Vec<JoinHandle<()>>>,
}

impl RunControl {
    /// Whether nothing is asked for. What a processor reads after each exit.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        !self.wants.load(Ordering::Acquire)
    }

    /// Waits while the machine is paused, after `held` was called. Returns false when it has ended. Called by
    /// processors.
    #[must_use]
    pub fn may_run(&self, held: impl FnOnce()) -> bool {
        if self.is_quiet() {
            return true;
        }
        let mut state = self.lock();
        if state.is_paused {
            held();
        }
        state.held += 1;
        self.changed.notify_all();
        while state.is_paused && state.end.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.held -= 1;
        state.end.is_none()
    }

    /// Ends the machine. The first reason counts.
    pub fn end(&self, why: End) {
        {
            let mut state = self.lock();
            state.end.get_or_insert(why);
            self.wants.store(true, Ordering::Release);
            self.changed.notify_all();
        }
        self.kick();
    }

    /// Holds all processors and returns when none runs the guest. Not called by a processor.
    pub fn pause(&self) {
        {
            let mut state = self.lock();
            state.is_paused = true;
            self.wants.store(true, Ordering::Release);
        }
        loop {
            self.kick();
            let state = self.lock();
            let runs = |state: &mut State| state.held < state.processors && state.end.is_none();
            let waited = self.changed.wait_timeout_while(state, KICK_AGAIN, runs);
            if !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out() {
                return;
            }
        }
    }

    /// Lets the processors go on.
    pub fn resume(&self) {
        let mut state = self.lock();
        state.is_paused = false;
        if state.end.is_none() {
            self.wants.store(false, Ordering::Release);
        }
        self.changed.notify_all();
    }

    /// Whether the machine is held.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.lock().is_paused
    }

    /// Why it ended, once it has.
    #[must_use]
    pub fn ended(&self) -> Option<End> {
        self.lock().end.clone()
    }

    /// Waits for the end.
    pub fn wait(&self) -> End {
        let mut state = self.lock();
        loop {
            if let Some(end) = &state.end {
                return end.clone();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the threads of the processors, which have not all begun.
    pub(super) fn adopt(&self, threads: Vec<JoinHandle<()>>) {
        *self.kicks.lock().unwrap_or_else(PoisonError::into_inner) = threads;
        // What was asked for before they could be told.
        if !self.is_quiet() {
            self.kick();
        }
    }

    /// A processor's thread has begun.
    pub(super) fn begins(&self, processor: u32, thread: i32) {
        self.lock().threads.insert(processor, thread);
    }

    /// Number and thread id of each processor that has begun.
    #[must_use]
    pub fn threads(&self) -> Vec<(u32, i32)> {
        self.lock().threads.iter().map(|(processor, thread)| (*processor, *thread)).collect()
    }

    /// Says how many processors will come to [`Self::may_run`].
    pub(super) fn expect_processors(&self, count: usize) {
        self.lock().processors = count;
    }

    /// Waits for the threads of the processors, after the end.
    pub(super) fn join(&self) {
        let threads = std::mem::take(&mut *self.kicks.lock().unwrap_or_else(PoisonError::into_inner));
        // Who ended the machine may come to its kick only now, and find nobody.
        kick(&threads);
        for thread in threads {
            // One that panicked has said so, and ended the machine.
            drop(thread.join());
        }
    }

    /// Makes each processor leave the guest, or not enter it.
    fn kick(&self) {
        kick(&self.kicks.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kick(threads: &[JoinHandle<()>]) {
    for thread in threads {
        // A thread that has ended needs no kick.
        thread.kill(SIGRTMIN()).ok();
    }
}
