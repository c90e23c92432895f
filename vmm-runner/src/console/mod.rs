//! The user's end of the serial port.

mod pty;

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::{fd::AsFd, unix::net::UnixListener},
    path::PathBuf,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use blk_backend::control::listen_unix;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::{
    Error, Result,
    devices::{Console, SerialPort},
    machine::{End, RunControl},
};

/// What ends the machine when it is typed: control-A, then x. Twice control-A types one.
const ESCAPE: u8 = 1;

/// When the system has no descriptors left, accepting is tried again after this.
const BREATH: Duration = Duration::from_millis(100);

/// Where the serial port leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ConsoleConfig {
    /// The terminal.
    #[default]
    Stdio,
    /// A new pseudo terminal, whose name is printed. While nobody has it open, output is lost.
    Pty,
    /// A socket that listens; one client at a time.
    Unix(PathBuf),
    /// A file; nothing is typed.
    File(PathBuf),
    /// Nowhere.
    Off,
}

impl FromStr for ConsoleConfig {
    type Err = String;

    /// `stdio`, `pty`, `off`, `unix:PATH`, `file:PATH`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty),
            None if text == "off" => Ok(Self::Off),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("the serial port leads to stdio, pty, off, unix:PATH or file:PATH".to_owned()),
        }
    }
}

/// An opened console: where the guest's bytes go, and where the user's come from. Lives as long as the runner,
/// over resets of the machine.
pub struct OpenConsole {
    output: Output,
    input: Option<Input>,
    port: Arc<Mutex<Option<Attached>>>,
    /// Restores the terminal when dropped.
    _raw: Option<RawTerminal>,
    _socket: Option<Socket>,
}

/// The machine that what is typed goes to.
struct Attached {
    serial: Arc<SerialPort>,
    control: Arc<RunControl>,
}

impl fmt::Debug for OpenConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenConsole").finish_non_exhaustive()
    }
}

type Output = Arc<Mutex<Box<dyn Write + Send>>>;
type Input = Box<dyn FnOnce(Arc<Mutex<Option<Attached>>>) + Send>;

impl OpenConsole {
    /// Opens it. A terminal is raw from now on, until this is dropped.
    ///
    /// # Errors
    /// When a file, socket or pseudo terminal cannot be made.
    pub fn open(config: &ConsoleConfig) -> Result<Self> {
        let mut socket = None;
        let (output, input, raw): (Box<dyn Write + Send>, Option<Input>, _) = match config {
            ConsoleConfig::Stdio => {
                let raw = RawTerminal::enter()?;
                let watches = raw.is_some();
                let input: Input = Box::new(move |port| read_all(&mut io::stdin(), &port, watches));
                // Not the standard library's: that one goes on when a processor is kicked out of it.
                let stdout = io::stdout().as_fd().try_clone_to_owned();
                let stdout = stdout.map_err(Error::host("the standard output"))?;
                (Box::new(File::from(stdout)), Some(input), raw)
            }
            ConsoleConfig::Pty => {
                let (screen, mut keyboard, name) = pty::open()?;
                announce(&format!("serial port on {}", name.display()));
                let input: Input = Box::new(move |port| read_all(&mut keyboard, &port, false));
                (Box::new(screen), Some(input), None)
            }
            ConsoleConfig::Unix(path) => {
                let listener = listen_unix(path).map_err(Error::file(path))?;
                socket = Some(Socket(path.clone()));
                let client = Arc::new(Mutex::new(None::<Box<dyn Write + Send>>));
                let to_client = Arc::clone(&client);
                let input: Input = Box::new(move |port| serve(&listener, &to_client, &port));
                (Box::new(ToClient(client)), Some(input), None)
            }
            ConsoleConfig::File(path) => {
                let file =
                    OpenOptions::new().append(true).create(true).open(path).map_err(Error::file(path))?;
                (Box::new(file), None, None)
            }
            ConsoleConfig::Off => (Box::new(io::sink()), None, None),
        };
        Ok(Self {
            output: Arc::new(Mutex::new(output)),
            input,
            port: Arc::default(),
            _raw: raw,
            _socket: socket,
        })
    }

    /// A writer for the serial port of a machine.
    #[must_use]
    pub fn writer(&self) -> Console {
        Box::new(Shared(Arc::clone(&self.output)))
    }

    /// What is typed goes to this machine from now on.
    ///
    /// # Errors
    /// When the host has no thread.
    pub fn attach(&mut self, serial: &Arc<SerialPort>, control: &Arc<RunControl>) -> Result<()> {
        let attached = Attached { serial: Arc::clone(serial), control: Arc::clone(control) };
        *self.port.lock().unwrap_or_else(PoisonError::into_inner) = Some(attached);
        if let Some(input) = self.input.take() {
            let port = Arc::clone(&self.port);
            // It waits in a read for good; the process ends without it.
            thread::Builder::new()
                .name("console".to_owned())
                .spawn(move || input(port))
                .map_err(Error::host("a thread for the console"))?;
        }
        Ok(())
    }
}

/// Says something to the user beside the guest's output.
fn announce(text: &str) {
    // A standard error that is gone leaves nobody to tell.
    drop(writeln!(io::stderr(), "vmm-runner: {text}"));
}

struct Shared(Output);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match output.write(bytes).and_then(|written| output.flush().map(|()| written)) {
            // A processor that waits for a slow reader was kicked: it is to be held, or to end. Whoever is told of an
            // interruption would try again.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(io::ErrorKind::WouldBlock.into()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

/// Output to whoever is connected, or to nobody.
struct ToClient(Arc<Mutex<Option<Box<dyn Write + Send>>>>);

impl Write for ToClient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match client.as_mut().map_or(Ok(bytes.len()), |client| client.write(bytes)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                *client = None;
                Ok(bytes.len())
            }
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn serve(
    listener: &UnixListener,
    client: &Mutex<Option<Box<dyn Write + Send>>>,
    port: &Mutex<Option<Attached>>,
) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else {
            // No descriptors are left, say: who connects waits in the queue of the socket.
            thread::sleep(BREATH);
            continue;
        };
        if let Ok(writer) = stream.try_clone() {
            *client.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(writer));
            read_all(&mut stream, port, false);
            *client.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

/// Types what is read, until it ends. With `watches` the escape ends the machine.
fn read_all(input: &mut dyn Read, port: &Mutex<Option<Attached>>, watches: bool) {
    let mut bytes = [0; 256];
    let mut is_escaped = false;
    loop {
        let count = match input.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let mut typed = Vec::with_capacity(count);
        for &byte in &bytes[..count] {
            match (is_escaped, byte) {
                (false, ESCAPE) if watches => is_escaped = true,
                (true, b'x') => {
                    if let Some(attached) = &*port.lock().unwrap_or_else(PoisonError::into_inner) {
                        attached.control.end(End::Quit);
                    }
                    return;
                }
                _ => {
                    is_escaped = false;
                    typed.push(byte);
                }
            }
        }
        // Typing waits for the guest, and must not hold up a reset meanwhile.
        let serial = port
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|attached| Arc::clone(&attached.serial));
        if let Some(serial) = serial {
            serial.type_bytes(&typed);
        }
    }
}

/// A socket in the file system, which is removed when this is dropped.
#[derive(Debug)]
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        // Somebody else may have taken it away.
        fs::remove_file(&self.0).ok();
    }
}

/// The terminal in raw mode; as it was when this is dropped.
#[derive(Debug)]
struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` where the input is no terminal.
    fn enter() -> Result<Option<Self>> {
        let stdin = io::stdin();
        let Ok(before) = tcgetattr(&stdin) else { return Ok(None) };
        let mut raw = before.clone();
        raw.make_raw();
        // Lines of the runner itself still start at the left.
        raw.output_modes |= rustix::termios::OutputModes::OPOST | rustix::termios::OutputModes::ONLCR;
        tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(Error::host("a raw terminal"))?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        tcsetattr(io::stdin(), OptionalActions::Now, &self.0).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_are_named_or_refused() {
        let parse = |text: &str| text.parse::<ConsoleConfig>();
        assert_eq!(parse("stdio"), Ok(ConsoleConfig::Stdio));
        assert_eq!(parse("unix:/run/a:b"), Ok(ConsoleConfig::Unix("/run/a:b".into())));
        assert_eq!(parse("file:log"), Ok(ConsoleConfig::File("log".into())));
        for bad in ["", "tty", "unix", "unix:", "file:"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
