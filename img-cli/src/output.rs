//! Standard output as C's stdio treats it: in blocks into pipes and files, by lines on a terminal.
//!
//! With standard output and standard error joined, scripts see a command's errors before what it printed.
//! Commands that must be seen at once (`create`'s announcement, progress) flush.

use std::{
    fs::File,
    io::{self, BufWriter, ErrorKind, IsTerminal as _, LineWriter, Write},
    os::fd::AsFd as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use img_core::text::to_bytes;

/// Standard output, shared by the threads of a command.
#[derive(Clone, Debug)]
pub(crate) struct Out(Arc<Mutex<Sink>>);

#[derive(Debug)]
struct Sink {
    stream: Stream,
    /// The first failure that matters; what follows is not written.
    failure: Option<io::Error>,
    /// The reader has gone: not an error, but nothing more is written.
    closed: bool,
}

#[derive(Debug)]
enum Stream {
    Blocks(BufWriter<File>),
    Lines(LineWriter<File>),
    #[cfg(test)]
    Memory(Vec<u8>),
}

impl Out {
    /// The standard output of this process.
    pub(crate) fn stdout() -> io::Result<Self> {
        let stdout = io::stdout();
        let file = File::from(stdout.as_fd().try_clone_to_owned()?);
        let stream = if stdout.is_terminal() {
            Stream::Lines(LineWriter::new(file))
        } else {
            Stream::Blocks(BufWriter::with_capacity(32 * 1024, file))
        };
        Ok(Self::new(stream))
    }

    fn new(stream: Stream) -> Self {
        Self(Arc::new(Mutex::new(Sink { stream, failure: None, closed: false })))
    }

    fn lock(&self) -> MutexGuard<'_, Sink> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prints `text`. A failure is kept for [`Self::finish`].
    pub(crate) fn print(&self, text: impl std::fmt::Display) {
        self.bytes(&to_bytes(&text.to_string()));
    }

    /// Prints `text` and a newline.
    pub(crate) fn line(&self, text: impl std::fmt::Display) {
        self.bytes(&to_bytes(&format!("{text}\n")));
    }

    /// Prints bytes.
    pub(crate) fn bytes(&self, bytes: &[u8]) {
        self.lock().run(|stream| stream.write_all(bytes));
    }

    /// Hands on what was printed so far.
    pub(crate) fn flush(&self) {
        self.lock().run(Write::flush);
    }

    /// Whether printing more makes no sense.
    pub(crate) fn is_closed(&self) -> bool {
        let sink = self.lock();
        sink.closed || sink.failure.is_some()
    }

    /// Hands on the rest.
    ///
    /// # Errors
    /// The first failure of the whole run. A closed pipe is none.
    pub(crate) fn finish(&self) -> io::Result<()> {
        let mut sink = self.lock();
        sink.run(Write::flush);
        sink.failure.take().map_or(Ok(()), Err)
    }

    /// What was printed.
    #[cfg(test)]
    pub(crate) fn memory() -> Self {
        Self::new(Stream::Memory(Vec::new()))
    }

    /// What was printed into [`Self::memory`].
    #[cfg(test)]
    pub(crate) fn text(&self) -> String {
        match &self.lock().stream {
            Stream::Memory(bytes) => String::from_utf8(bytes.clone()).expect("tests print text"),
            _ => unreachable!("only asked of memory"),
        }
    }
}

impl Sink {
    fn run(&mut self, write: impl FnOnce(&mut Stream) -> io::Result<()>) {
        if self.closed || self.failure.is_some() {
            return;
        }
        match write(&mut self.stream) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.closed = true,
            Err(error) => self.failure = Some(error),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Blocks(writer) => writer.write(bytes),
            Self::Lines(writer) => writer.write(bytes),
            #[cfg(test)]
            Self::Memory(memory) => memory.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Blocks(writer) => writer.flush(),
            Self::Lines(writer) => writer.flush(),
            #[cfg(test)]
            Self::Memory(_) => Ok(()),
        }
    }
}

/// Writes a line to standard error. Where that fails there is nobody left to tell.
pub(crate) fn complain(line: impl std::fmt::Display) {
    io::stderr().lock().write_all(&to_bytes(&format!("{line}\n"))).ok();
}
