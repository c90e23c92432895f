//! A storage whose chosen operation waits until the test lets it go on.

use std::{
    fmt,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use super::interpose::{Hook, Interposed, Request, delegate_storage};
use crate::{Result, storage::Storage};

/// `inner` with gates in front of operations that a test chooses.
#[derive(Debug)]
pub struct Gated {
    storage: Interposed<Gates>,
}

/// One gate: the first operation that it was made for stops there until it opens. Dropping it opens it,
/// so a test that fails does not hang.
#[derive(Debug)]
#[must_use = "a gate opens when it is dropped"]
pub struct Gate {
    post: Arc<Post>,
}

#[derive(Debug, Default)]
struct Gates {
    posts: Mutex<Vec<Arc<Post>>>,
}

struct Post {
    stops: Box<dyn Fn(&Request) -> bool + Send + Sync>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// Nobody has come yet.
    Closed,
    /// An operation waits.
    Reached(Request),
    /// Everybody may pass.
    Open,
}

impl Gated {
    /// All gates open.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { storage: Interposed { inner, hook: Gates::default() } }
    }

    /// Stops the next operation for which `stops` is true. Others pass, also while one waits.
    pub fn close(&self, stops: impl Fn(&Request) -> bool + Send + Sync + 'static) -> Gate {
        let post = Arc::new(Post {
            stops: Box::new(stops),
            state: Mutex::new(State::Closed),
            changed: Condvar::new(),
        });
        self.storage.hook.posts().push(Arc::clone(&post));
        Gate { post }
    }
}

delegate_storage!(Gated);

impl Gate {
    /// Waits until an operation stands at the gate, and says which.
    ///
    /// # Panics
    /// When the gate was [opened](Self::let_pass) instead.
    pub fn wait_until_reached(&self) -> Request {
        self.wait().expect("nobody opened the gate before an operation came")
    }

    /// Waits until an operation stands at the gate, and says which; `None` when the gate [opens](Self::let_pass), as
    /// whoever could have come has ended.
    pub fn wait(&self) -> Option<Request> {
        let mut state = self.post.state();
        loop {
            match &*state {
                State::Closed => {}
                State::Reached(request) => return Some(request.clone()),
                State::Open => return None,
            }
            state = self.post.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens the gate for good.
    pub fn let_pass(&self) {
        *self.post.state() = State::Open;
        self.post.changed.notify_all();
    }

    /// Whether an operation stands at the gate now.
    pub fn is_reached(&self) -> bool {
        matches!(&*self.post.state(), State::Reached(_))
    }

    /// Lets the operation go on.
    pub fn open(self) {
        drop(self);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.let_pass();
    }
}

impl Gates {
    fn posts(&self) -> MutexGuard<'_, Vec<Arc<Post>>> {
        self.posts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Post {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hook for Gates {
    fn before(&self, _path: &Path, request: &Request) -> Result<()> {
        let stopped_at = {
            let mut posts = self.posts();
            posts.retain(|post| *post.state() != State::Open);
            posts
                .iter()
                .find(|post| *post.state() == State::Closed && (post.stops)(request))
                .cloned()
                .inspect(|post| {
                    // Taken under the lock of the list: exactly one operation stops at a gate.
                    *post.state() = State::Reached(request.clone());
                    post.changed.notify_all();
                })
        };
        if let Some(post) = stopped_at {
            let mut state = post.state();
            while *state != State::Open {
                state = post.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Post {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Post").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{
        MemoryStorage,
        testing::{Operation, Request},
    };

    #[test]
    fn the_chosen_operation_waits_and_others_pass() -> Result<()> {
        let memory = Arc::new(MemoryStorage::new("m"));
        let gated = Gated::new(memory.clone());
        let gate =
            gated.close(|request| request.operation == Operation::Write && request.range_bytes.start == 5);
        std::thread::scope(|scope| {
            let held = scope.spawn(|| gated.write_at(b"held", 5));
            assert_eq!(gate.wait_until_reached(), Request { operation: Operation::Write, range_bytes: 5..9 });
            gated.write_at(b"passes", 0)?;
            assert_eq!(memory.to_vec(), b"passes");
            gated.write_at(b"P", 5)?; // the gate has its operation: the next one passes
            gate.open();
            held.join().expect("no panic")
        })?;
        assert_eq!(memory.to_vec(), b"passeheld");
        Ok(())
    }
}
