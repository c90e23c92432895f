//! Clients of control sockets.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::command::Run;

/// The release of the QEMU project's own client (`qemu.qmp`, from PyPI) that is used.
const CLIENT: &str = "qemu.qmp==0.0.6";

/// Whatever a client waits for comes before this, or not at all.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client of a control socket.
#[derive(Debug)]
pub struct Monitor {
    /// What it says.
    pub lines: BufReader<UnixStream>,
    /// Events that came while a reply was waited for, and nobody took.
    pub events: Vec<Value>,
}

impl Monitor {
    /// Connects to a socket; whoever listens there may only be about to.
    ///
    /// # Panics
    /// When nobody does.
    #[must_use]
    pub fn connect(socket: &Path) -> Self {
        let began = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > PATIENCE => panic!("{}: {error}", socket.display()),
                Err(_) => std::thread::yield_now(),
            }
        };
        let mut monitor = Self::over(stream);
        let greeting = monitor.line();
        assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64(), "{greeting}");
        assert_eq!(greeting["QMP"]["capabilities"], json!([]));
        monitor
    }

    /// A client that has not been greeted yet.
    ///
    /// # Panics
    /// When the socket is broken.
    #[must_use]
    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        Self { lines: BufReader::new(stream), events: Vec::new() }
    }

    /// A client that may give commands.
    #[must_use]
    pub fn negotiated(socket: &Path) -> Self {
        let mut monitor = Self::connect(socket);
        monitor.success("qmp_capabilities", json!({}));
        monitor
    }

    /// The next line.
    ///
    /// # Panics
    /// When the other side hung up.
    pub fn line(&mut self) -> Value {
        let mut line = String::new();
        assert_ne!(self.lines.read_line(&mut line).expect("a line in time"), 0, "it hung up");
        serde_json::from_str(&line).expect("JSON")
    }

    /// Sends a text, whatever it is.
    ///
    /// # Panics
    /// When the other side hung up.
    pub fn send(&mut self, text: &str) {
        self.lines.get_mut().write_all(text.as_bytes()).expect("it reads");
    }

    /// The reply to a text; events that come before are kept.
    pub fn say(&mut self, text: &str) -> Value {
        self.send(text);
        loop {
            let value = self.line();
            if value.get("event").is_none() {
                return value;
            }
            self.events.push(value);
        }
    }

    /// The reply to a command.
    pub fn call(&mut self, name: &str, arguments: Value) -> Value {
        self.say(&json!({"execute": name, "arguments": arguments}).to_string())
    }

    /// What a command returns.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn success(&mut self, name: &str, arguments: Value) -> Value {
        let mut reply = self.call(name, arguments);
        assert!(reply.get("return").is_some(), "{name}: {reply}");
        reply["return"].take()
    }

    /// Why a command fails.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn failure(&mut self, name: &str, arguments: Value) -> String {
        let reply = self.call(name, arguments);
        assert_eq!(reply["error"]["class"], "GenericError", "{reply}");
        reply["error"]["desc"].as_str().expect("a text").to_owned()
    }

    /// The next event of a name, those of other names being skipped: its data.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            let mut event = if self.events.is_empty() { self.line() } else { self.events.remove(0) };
            if event["event"] == name {
                return event["data"].take();
            }
        }
    }
}

/// A Python that has the QEMU project's own client: `$IMG_QMP_PYTHON`, or one made beside the tests' programs.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn python() -> PathBuf {
    if let Some(python) = std::env::var_os("IMG_QMP_PYTHON") {
        return python.into();
    }
    let test = std::env::current_exe().expect("a running program has a path");
    let profile_directory = test.ancestors().nth(2).expect("cargo runs tests from target/PROFILE/deps");
    let environment = profile_directory.join("qmp-client");
    let python = environment.join("bin/python");
    let has_client =
        || Command::new(&python).args(["-c", "import qemu.qmp"]).output().is_ok_and(|it| it.status.success());
    if !has_client() {
        let run = |program: &Path, arguments: &[&str]| {
            Run::new(program, Path::new("/")).args(arguments).output().success();
        };
        let path = environment.to_str().expect("the tests' own paths are UTF-8");
        run(Path::new("python3"), &["-m", "venv", path]);
        run(&python, &["-m", "pip", "install", "--quiet", "--disable-pip-version-check", CLIENT]);
    }
    python
}

/// Whether a value is of a type of the schema that `query-qmp-schema` told.
///
/// # Errors
/// What does not fit.
///
/// # Panics
/// When the schema is none.
pub fn conforms(value: &Value, name: &str, schema: &[Value]) -> Result<(), String> {
    let of = schema.iter().find(|entry| entry["name"] == *name).ok_or(format!("no type {name}"))?;
    let wrong = || Err(format!("{value} is no {of}"));
    match of["meta-type"].as_str().expect("a schema") {
        "builtin" => match of["json-type"].as_str().expect("a schema") {
            "string" if value.is_string() => Ok(()),
            "int" if value.is_i64() || value.is_u64() => Ok(()),
            "boolean" if value.is_boolean() => Ok(()),
            "value" => Ok(()),
            _ => wrong(),
        },
        "enum" if of["values"].as_array().expect("a schema").contains(value) => Ok(()),
        "array" => {
            let Some(values) = value.as_array() else { return wrong() };
            let element = of["element-type"].as_str().expect("a schema");
            values.iter().try_for_each(|value| conforms(value, element, schema))
        }
        "object" => {
            let Some(object) = value.as_object() else { return wrong() };
            let members = of["members"].as_array().expect("a schema");
            for member in members {
                match object.get(member["name"].as_str().expect("a schema")) {
                    Some(value) => conforms(value, member["type"].as_str().expect("a schema"), schema)?,
                    None if member.get("default").is_some() => {}
                    None => return wrong(),
                }
            }
            let known = |key: &str| members.iter().any(|member| member["name"] == *key);
            if object.keys().all(|key| known(key)) { Ok(()) } else { wrong() }
        }
        _ => wrong(),
    }
}
