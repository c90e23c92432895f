//! QMP on a unix socket: a greeting, capabilities, then commands and events (QEMU `docs/interop/qmp-spec.rst`).
//!
//! Whoever can connect can do everything. Several clients may; each has a thread.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::{Map, Value, json};

use super::{
    command::{Arguments, CommandError, Outcome},
    framer::{Framer, TooLong},
    general::{self, CAPABILITIES},
    listen::ControlAddress,
    service::{Service, Subscriber},
};
use crate::accept::Acceptor;

/// Clients at once.
const MAX_SESSIONS: usize = 16;

/// A client that does not read what it is told for so long is sent away.
const WRITE_TIME: Duration = Duration::from_secs(5);

/// The control socket of a service; it is closed when this is dropped.
pub struct Qmp<S: Service> {
    shared: Arc<Shared<S>>,
    acceptor: Option<Acceptor>,
}

struct Shared<S> {
    service: Arc<S>,
    sessions: Mutex<HashMap<u64, Arc<Session>>>,
    ended: Condvar,
    next: AtomicU64,
}

impl<S: Service> Qmp<S> {
    /// Listens.
    ///
    /// # Errors
    /// When the socket cannot be made, or is not in the file system.
    pub fn start(address: &ControlAddress, service: Arc<S>) -> io::Result<Self> {
        if !address.is_unix() {
            // Any program of this host, of any user, could connect.
            return Err(io::Error::new(io::ErrorKind::Unsupported, "QMP needs a unix socket"));
        }
        let shared = Arc::new(Shared {
            service,
            sessions: Mutex::default(),
            ended: Condvar::new(),
            next: AtomicU64::new(1),
        });
        let for_acceptor = Arc::clone(&shared);
        let (acceptor, _) = address.accept(move |fd| admit(&for_acceptor, fd))?;
        Ok(Self { shared, acceptor: Some(acceptor) })
    }
}

impl<S: Service> Drop for Qmp<S> {
    fn drop(&mut self) {
        drop(self.acceptor.take());
        let mut sessions = self.shared.sessions();
        // A command under way is finished and answered; nothing more is heard.
        sessions.values().for_each(|session| session.hang_up(Shutdown::Read));
        while !sessions.is_empty() {
            sessions = self.shared.ended.wait(sessions).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<S> Shared<S> {
    fn sessions(&self) -> MutexGuard<'_, HashMap<u64, Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the thread of a client.
fn admit<S: Service>(shared: &Arc<Shared<S>>, fd: OwnedFd) {
    let stream = UnixStream::from(fd);
    if shared.sessions().len() >= MAX_SESSIONS || stream.set_write_timeout(Some(WRITE_TIME)).is_err() {
        return;
    }
    let id = shared.next.fetch_add(1, Ordering::Relaxed);
    let session = Arc::new(Session { stream, writing: Mutex::new(()) });
    shared.sessions().insert(id, Arc::clone(&session));
    let ends = Ends { shared: Arc::clone(shared), id };
    let spawned = thread::Builder::new().name(format!("qmp-{id}")).spawn(move || {
        // A client that is gone needs no answer.
        serve(&*ends.shared.service, id, &session).ok();
        session.hang_up(Shutdown::Both);
    });
    if let Err(error) = spawned {
        shared.service.log(&format!("a control client could not be served: {error}"));
    }
}

/// Takes a client off the lists, however its thread ends.
struct Ends<S: Service> {
    shared: Arc<Shared<S>>,
    id: u64,
}

impl<S: Service> Drop for Ends<S> {
    fn drop(&mut self) {
        self.shared.service.subscribers().remove(self.id);
        self.shared.sessions().remove(&self.id);
        self.shared.ended.notify_all();
    }
}

/// A client.
struct Session {
    stream: UnixStream,
    /// Held while a line is written: replies and events do not mix.
    writing: Mutex<()>,
}

impl Session {
    fn say(&self, value: &Value) -> io::Result<()> {
        let _whole = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = value.to_string();
        line.push_str("\r\n");
        (&self.stream).write_all(line.as_bytes())
    }

    fn hang_up(&self, how: Shutdown) {
        // It may be gone already.
        self.stream.shutdown(how).ok();
    }
}

impl Subscriber for Session {
    fn tell(&self, event: &Value) {
        if self.say(event).is_err() {
            self.hang_up(Shutdown::Both);
        }
    }
}

fn serve<S: Service>(service: &S, id: u64, session: &Arc<Session>) -> io::Result<()> {
    session.say(&json!({"QMP": {"version": general::version::<S>(), "capabilities": []}}))?;
    let mut framer = Framer::default();
    let mut negotiated = false;
    let mut bytes = [0; 4096];
    loop {
        loop {
            let text = match framer.next() {
                Ok(Some(text)) => text,
                Ok(None) => break,
                Err(TooLong) => {
                    return session
                        .say(&failure(None, &CommandError::new("JSON parse error, command is too long")));
                }
            };
            let (reply, now_negotiated) = answer(service, &text, negotiated);
            if now_negotiated && !negotiated {
                negotiated = true;
                let subscriber: Arc<dyn Subscriber> = Arc::<Session>::clone(session);
                service.subscribers().add(id, subscriber);
            }
            session.say(&reply)?;
        }
        match (&session.stream).read(&mut bytes)? {
            0 => return Ok(()),
            len => framer.push(&bytes[..len]),
        }
    }
}

/// The reply to a text, and whether negotiation is over with it.
fn answer<S: Service>(service: &S, text: &[u8], negotiated: bool) -> (Value, bool) {
    let value: Value = match serde_json::from_slice(text) {
        Ok(value) => value,
        Err(error) => {
            let text = format!("JSON parse error, {error}");
            return (failure(None, &CommandError::new(text)), negotiated);
        }
    };
    let id = value.get("id").cloned();
    let outcome = Call::parse(&value).and_then(|call| {
        if negotiated {
            return Ok((call.run(service)?, true));
        }
        if call.name != CAPABILITIES {
            let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(CommandError::not_found(text));
        }
        Ok((call.negotiate()?, true))
    });
    match outcome {
        Ok((value, negotiated)) => (with_id(json!({"return": value}), id), negotiated),
        Err(error) => (failure(id, &error), negotiated),
    }
}

fn failure(id: Option<Value>, error: &CommandError) -> Value {
    with_id(json!({"error": {"class": error.class, "desc": error.text}}), id)
}

fn with_id(mut reply: Value, id: Option<Value>) -> Value {
    if let Some(id) = id {
        reply["id"] = id;
    }
    reply
}

/// A command as a client writes it.
struct Call<'a> {
    name: &'a str,
    arguments: Option<&'a Map<String, Value>>,
}

impl<'a> Call<'a> {
    fn parse(value: &'a Value) -> Result<Self, CommandError> {
        let Value::Object(object) = value else {
            return Err(CommandError::new("QMP input must be a JSON object"));
        };
        if let Some(unknown) =
            object.keys().find(|key| !matches!(key.as_str(), "execute" | "arguments" | "id"))
        {
            return Err(CommandError::new(format!("QMP input member '{unknown}' is unexpected")));
        }
        let name = match object.get("execute") {
            None => return Err(CommandError::new("QMP input lacks member 'execute'")),
            Some(Value::String(name)) => name,
            Some(_) => return Err(CommandError::new("QMP input member 'execute' must be a string")),
        };
        let arguments = match object.get("arguments") {
            None => None,
            Some(Value::Object(arguments)) => Some(arguments),
            Some(_) => return Err(CommandError::new("QMP input member 'arguments' must be an object")),
        };
        Ok(Self { name, arguments })
    }

    fn run<S: Service>(&self, service: &S) -> Outcome {
        let command =
            S::COMMANDS.iter().copied().flatten().find(|command| command.name == self.name).ok_or_else(
                || CommandError::not_found(format!("The command {} has not been found", self.name)),
            )?;
        let none = Map::new();
        let arguments = self.arguments.unwrap_or(&none);
        // The shapes of objects want a value; a copy of some arguments costs nothing beside the command.
        command.arguments.check("", &Value::Object(arguments.clone())).map_err(CommandError::new)?;
        (command.run)(service, &Arguments(arguments))
    }

    /// No capability exists that could be enabled.
    fn negotiate(&self) -> Outcome {
        let none = Map::new();
        let arguments = self.arguments.unwrap_or(&none);
        general::CAPABILITIES_ARGUMENTS
            .check("", &Value::Object(arguments.clone()))
            .map_err(CommandError::new)?;
        match Arguments(arguments).texts("enable").first() {
            None => Ok(json!({})),
            Some(wanted) => Err(CommandError::new(format!("Capability {wanted} not available"))),
        }
    }
}
