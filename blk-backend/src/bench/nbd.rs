//! An export behind an NBD URI: each queue is a connection of its own.

use std::{
    fmt, io,
    os::fd::AsFd as _,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{
    cpu::CpuClock,
    noise::Noise,
    run::BenchError,
    target::{Done, Facts, Shape, Target, TargetQueue},
};
use crate::{
    nbd::client::{Connection, ExportInfo, Kind, NbdUri, Negotiated},
    request::Op,
};

/// The longest trim: a length of 32 bits, of whole sectors.
const MOST_TRIM_BYTES: u64 = u32::MAX as u64 / 512 * 512;

/// An export.
pub struct NbdTarget {
    uri: NbdUri,
    info: ExportInfo,
    /// Queues that were not begun yet.
    connections: Vec<Mutex<Option<Negotiated>>>,
    clock: Option<CpuClock>,
}

impl fmt::Debug for NbdTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdTarget").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl NbdTarget {
    /// Connects to the server of `uri`, once for each of `queues`. Its CPU time is that of `backend`, or of whoever
    /// listens at a unix socket.
    ///
    /// # Errors
    /// [`BenchError`]: `uri` is none, nobody is there, it does not do its part, or several connections are more than
    /// it has.
    pub fn connect(uri: &str, queues: u32, backend: Option<CpuClock>) -> Result<Self, BenchError> {
        let uri: NbdUri = uri.parse().map_err(BenchError::Job)?;
        let failed = |error| failure(&uri, &error);
        let first = Negotiated::connect(&uri).map_err(failed)?;
        let info = first.info;
        if queues > 1 && !info.can_multi_conn() {
            return Err(BenchError::Job(format!(
                "{queues} queues, and the server of {uri} does not say that several connections see one disk \
                 (CAN_MULTI_CONN)"
            )));
        }
        let clock = match (backend, &uri.server) {
            (Some(clock), _) => Some(clock),
            (None, server) if server.is_unix() => CpuClock::of_peer(first.as_fd())?,
            (None, _) => None,
        };
        let mut connections = vec![Mutex::new(Some(first))];
        for _ in 1..queues {
            connections.push(Mutex::new(Some(Negotiated::connect(&uri).map_err(failed)?)));
        }
        Ok(Self { uri, info, connections, clock })
    }
}

impl Target for NbdTarget {
    fn facts(&self) -> Facts {
        Facts {
            size_bytes: self.info.size_bytes,
            read_only: self.info.is_read_only(),
            most_queues: (
                u32::try_from(self.connections.len()).unwrap_or(u32::MAX),
                "no more were connected",
            ),
            most_block_bytes: self.info.most_payload_bytes.into(),
            can_flush: self.info.can_flush(),
            most_discard_bytes: if self.info.can_trim() { MOST_TRIM_BYTES } else { 0 },
        }
    }

    fn queue<'a>(&'a self, number: u32, shape: &Shape) -> Result<Box<dyn TargetQueue + 'a>, BenchError> {
        let least = self.info.least_block_bytes as usize;
        if !shape.block_bytes.is_multiple_of(least) {
            let found = shape.block_bytes;
            return Err(BenchError::Job(format!("{}: blocks of {found} bytes, not of {least}", self.uri)));
        }
        let place = self.connections.get(number as usize);
        let negotiated = place.and_then(|place| place.lock().unwrap_or_else(PoisonError::into_inner).take());
        let negotiated = negotiated.expect("each queue is made once");
        let mut noise = Noise::new(shape.seed);
        let mut memory = vec![vec![0; shape.block_bytes]; shape.depth];
        memory.iter_mut().for_each(|block| noise.fill(block));
        Ok(Box::new(ConnectionQueue { uri: &self.uri, connection: Connection::new(negotiated, memory) }))
    }

    fn backend_cpu(&self) -> Result<Option<Duration>, BenchError> {
        self.clock.map(|clock| clock.now()).transpose()
    }
}

struct ConnectionQueue<'a> {
    uri: &'a NbdUri,
    connection: Connection,
}

impl TargetQueue for ConnectionQueue<'_> {
    fn submit(&mut self, slot: usize, op: Op, offset: u64, len_bytes: u64) -> Result<(), BenchError> {
        let kind = match op {
            Op::Read => Kind::Read,
            Op::Write { fua: false } => Kind::Write,
            Op::Flush => Kind::Flush,
            Op::Discard { fua: false } => Kind::Trim,
            _ => return Err(BenchError::Job(format!("a load has no {op:?}"))),
        };
        let len = u32::try_from(len_bytes)
            .map_err(|_| BenchError::Job(format!("a request of {len_bytes} bytes")))?;
        self.connection.submit(slot, kind, offset, len);
        Ok(())
    }

    fn wait(&mut self, until: Option<Instant>, done: &mut Vec<Done>) -> Result<(), BenchError> {
        self.connection.exchange(until, done).map_err(|error| failure(self.uri, &error))
    }

    fn fill(&mut self, slot: usize, bytes: &[u8]) {
        self.connection.memory_mut(slot)[..bytes.len()].copy_from_slice(bytes);
    }

    fn copy(&self, slot: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.connection.memory(slot)[..bytes.len()]);
    }
}

/// What went wrong with the server, in a load's words.
fn failure(uri: &NbdUri, error: &io::Error) -> BenchError {
    let text = format!("{uri}: {error}");
    match error.kind() {
        io::ErrorKind::InvalidData => BenchError::Protocol(text),
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::NotFound => BenchError::Gone(text),
        kind => BenchError::System(io::Error::new(kind, text)),
    }
}
