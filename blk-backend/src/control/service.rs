//! What a process has to be so that QMP can control it.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{
    command::{Command, Event},
    nodes::Nodes,
};

/// A process that is controlled: its commands, its events, its disks, and who listens to it.
pub trait Service: Sized + Send + Sync + 'static {
    /// Name and version of the program, as the greeting tells them.
    const PACKAGE: &'static str;

    /// All commands, in groups.
    const COMMANDS: &'static [&'static [Command<Self>]];

    /// All events.
    const EVENTS: &'static [Event];

    /// Its disks.
    fn nodes(&self) -> &Nodes;

    /// Who is told of events.
    fn subscribers(&self) -> &Subscribers;

    /// Tells the user something that no client can be told.
    fn log(&self, text: &str);
}

/// Who is told of events.
pub(super) trait Subscriber: Send + Sync {
    fn tell(&self, event: &Value);
}

/// The clients that are told of events.
#[derive(Default)]
pub struct Subscribers(Mutex<Vec<(u64, Arc<dyn Subscriber>)>>);

impl fmt::Debug for Subscribers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscribers").finish_non_exhaustive()
    }
}

impl Subscribers {
    pub(super) fn add(&self, id: u64, subscriber: Arc<dyn Subscriber>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((id, subscriber));
    }

    pub(super) fn remove(&self, id: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(known, _)| *known != id);
    }

    /// Tells all clients that something happened. `data` is `None` for an event that has none.
    pub fn emit(&self, event: &str, data: Option<Value>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut event = json!({
            "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
            "event": event,
        });
        if let Some(data) = data {
            event["data"] = data;
        }
        // Not under the lock: a client that reads slowly holds nobody else up.
        let subscribers = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        subscribers.iter().for_each(|(_, subscriber)| subscriber.tell(&event));
    }
}
