//! Copying an image that comes out of a pipe: once through, in the order in which its bytes come.
//!
//! Into an image, where any order will do unless its clusters are compressed; or into another pipe, where the layout
//! must not have to know anything beforehand, and the source must come in guest order. One thread at a time takes the
//! next batch out of the stream; batches are decoded, and compressed for the target, on all cores, and written in the
//! order in which they came.

use std::ops::Range;

use super::{
    copy::MAX_CONVERT_THREADS,
    stream_sink::{Parts, Sink},
};
use crate::{
    Error, Result,
    format::{Codec, FrontReader, FrontRun, FrontWriter, Place},
    image::{Image, decode_unit},
    job::{
        Progress, cores,
        ordered::{Ticket, in_order},
        throttle::Throttle,
    },
    storage::{Pipe, Storage as _, StreamStorage},
};

/// How many guest bytes a thread takes out of the stream at once, unless one unit has more: enough that handing on
/// does not count, and mostly in the cache of its core still when they are written.
const BATCH_BYTES: usize = 256 << 10;

/// The buffers of all threads together.
const BUFFERS_BYTES: u64 = 24 << 20;

/// What a thread holds, in batches: what was stored (up to twice of what it stands for), what that decodes to, the
/// units that this makes, what these are compressed to, and a unit of which only a part is wanted.
const BATCHES_A_THREAD: u64 = 6;

/// Threads beyond the number of cores, that have work while others wait for the stream or for their turn.
const SPARE_THREADS: usize = 1;

/// How to copy out of a stream.
#[derive(Clone, Copy, Debug)]
pub struct StreamOptions {
    /// The guest bytes that there have to be, neither more nor less, where the source does not say itself.
    pub expected_bytes: Option<u64>,
    /// Runs of zeroes at least this long (a multiple of 512) become holes; 0 writes everything.
    pub sparse_bytes: u64,
    /// Write compressed clusters.
    pub compress: bool,
    /// Compression level, or the format's default.
    pub level: Option<i32>,
    /// Threads, or as many as pay.
    pub threads: Option<usize>,
    /// Bytes per second, if limited.
    pub rate_bytes: Option<u64>,
}

/// Where the bytes of a stream go.
pub enum StreamTarget<'a> {
    /// A new image, which reads as zeroes. It grows where the source does not say how large it will be.
    Image(&'a Image),
    /// Another pipe.
    Pipe(Box<dyn FrontWriter>, &'a mut Pipe),
}

/// Copies the image that `reader` reads from `stream`. The target is the same at any number of threads.
///
/// Takes at most 16 MiB for what is kept of the stream's start and as much of what passed last, 24 MiB for buffers, and
/// what the reader keeps of the map.
///
/// # Errors
/// [`Error::Corrupt`] for a stream that is damaged or breaks off: the target is then no image. [`Error::Job`] with the
/// place; [`Error::Cancelled`]; [`Error::Invalid`] when the target needs to know more, or another order. Of several
/// that fail, the first in the order of the stream is told.
pub fn convert_stream(
    stream: &StreamStorage,
    mut reader: Box<dyn FrontReader>,
    target: StreamTarget<'_>,
    options: &StreamOptions,
    progress: &dyn Progress,
) -> Result<()> {
    let size = reader.virtual_size_bytes().or(options.expected_bytes);
    let sink = Sink::new(target, options)?;
    let unit_bytes = reader.unit_bytes().max(sink.unit_bytes());
    let mut incoming = Incoming {
        stream,
        reader: &mut *reader,
        sorts: sink.takes_in_order(),
        runs: Vec::new(),
        next: 0,
        has_ended: false,
        failed: None,
        size,
        end: 0,
        done: 0,
        throttle: options.rate_bytes.map(Throttle::new),
        progress,
    };
    in_order(
        threads(options, unit_bytes),
        &mut |hands: &mut Hands| incoming.take_batch(&mut hands.batch),
        &|ticket: &Ticket<'_, 2>, told: Told, hands: &mut Hands| {
            let Hands { batch, parts, unit } = hands;
            // What came before a damaged unit is written before that is told, as if there were one thread.
            let decoded = batch.decode(stream, unit);
            if sink.takes_in_order() {
                ticket.in_turn(0, || sink.gather(&batch.pieces, &batch.bytes, parts))?;
            }
            sink.prepare(&batch.pieces, &batch.bytes, parts)?;
            ticket.in_turn(1, || {
                sink.write(&batch.bytes, parts, told.end)?;
                decoded?;
                progress.advance(told.done, size.unwrap_or(told.done).max(told.done));
                Ok(())
            })?;
            Ok(())
        },
    )?;
    let end = incoming.end;
    reader.finish()?;
    if let Some(expected) = options.expected_bytes.filter(|_| reader.virtual_size_bytes().is_none())
        && end != expected
    {
        return Err(Error::corrupt(
            stream.path(),
            "stream",
            end,
            format_args!("{expected} bytes of disk"),
            "the end of the stream: the image is not complete",
        ));
    }
    sink.finish(size.unwrap_or(end))
}

/// As many threads as were asked for or pay, whose buffers keep to their limit.
fn threads(options: &StreamOptions, unit_bytes: u64) -> usize {
    let batch_bytes = unit_bytes.max(BATCH_BYTES as u64);
    let most = usize::try_from(BUFFERS_BYTES / (BATCHES_A_THREAD * batch_bytes)).expect("at most 16").max(1);
    options.threads.unwrap_or_else(|| cores() + SPARE_THREADS).clamp(1, MAX_CONVERT_THREADS).min(most)
}

/// What a thread keeps between batches.
#[derive(Default)]
struct Hands {
    batch: Batch,
    parts: Parts,
    unit: Vec<u8>,
}

/// What came out of the stream at once.
#[derive(Default)]
struct Batch {
    pieces: Vec<Piece>,
    /// The guest bytes of all pieces.
    bytes: Vec<u8>,
    /// Stored bytes that are still to be decoded.
    stored: Vec<u8>,
}

/// A run of guest bytes.
pub(super) struct Piece {
    pub(super) guest: u64,
    /// Where they stand in the batch.
    pub(super) bytes: Range<usize>,
    encoded: Option<Encoded>,
}

/// How the bytes of a piece come to be.
struct Encoded {
    at: u64,
    /// Where they stand in the batch's stored bytes.
    stored: Range<usize>,
    decoded_bytes: u32,
    skip_bytes: u32,
    how: Codec,
}

/// How far the stream has come with a batch.
struct Told {
    /// Where the guest bytes that have come end.
    end: u64,
    /// How many there were.
    done: u64,
}

/// The stream, as it is taken apart.
struct Incoming<'a> {
    stream: &'a StreamStorage,
    reader: &'a mut dyn FrontReader,
    /// Whether guest order counts: what is packed a little behind its neighbours is still there.
    sorts: bool,
    runs: Vec<FrontRun>,
    /// The first of them that is not taken.
    next: usize,
    has_ended: bool,
    /// What stopped a batch that had begun.
    failed: Option<Error>,
    /// The disk's, where it is known.
    size: Option<u64>,
    end: u64,
    done: u64,
    throttle: Option<Throttle>,
    progress: &'a dyn Progress,
}

impl Incoming<'_> {
    /// Takes the next batch; `None` at the end.
    fn take_batch(&mut self, batch: &mut Batch) -> Result<Option<Told>> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        batch.pieces.clear();
        let (mut filled, mut stored) = (0, 0);
        loop {
            match self.take_piece(batch, &mut filled, &mut stored) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) if batch.pieces.is_empty() => return Err(error),
                Err(error) => {
                    self.failed = Some(error);
                    break;
                }
            }
        }
        Ok((!batch.pieces.is_empty()).then_some(Told { end: self.end, done: self.done }))
    }

    /// Takes the next piece if there is one and the batch has room for it.
    fn take_piece(&mut self, batch: &mut Batch, filled: &mut usize, stored: &mut usize) -> Result<bool> {
        let Some(run) = self.peek()? else { return Ok(false) };
        let len = usize::try_from(run.len_bytes).expect("a piece fits a buffer");
        if *filled > 0 && *filled + len > BATCH_BYTES {
            return Ok(false);
        }
        if self.progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let run_end = run.guest_offset + run.len_bytes;
        if let Some(size) = self.size.filter(|size| run_end > *size) {
            return Err(Error::Invalid(format!(
                "{}: there is more than the {size} bytes that were announced",
                self.stream.path().display()
            )));
        }
        if let Some(throttle) = &self.throttle {
            throttle.pass(run.len_bytes, || self.progress.is_cancelled());
        }
        let bytes = *filled..*filled + len;
        let encoded = batch.read(self.stream, run, bytes.clone(), stored)?;
        batch.pieces.push(Piece { guest: run.guest_offset, bytes, encoded });
        *filled += len;
        self.end = self.end.max(run_end);
        self.done += run.len_bytes;
        self.advance(run.len_bytes);
        Ok(true)
    }

    /// The next run, or as much of it as is taken at once. Encoded units stay whole.
    fn peek(&mut self) -> Result<Option<FrontRun>> {
        if self.next == self.runs.len() && !self.has_ended {
            self.runs.clear();
            self.next = 0;
            self.reader.next(&mut self.runs)?;
            self.has_ended = self.runs.is_empty();
            if self.sorts {
                self.runs.sort_by_key(|run| run.guest_offset);
            }
        }
        Ok(self.runs.get(self.next).map(|run| match run.place {
            Place::Encoded { .. } => *run,
            _ => FrontRun { len_bytes: run.len_bytes.min(BATCH_BYTES as u64), ..*run },
        }))
    }

    /// So much of the next run was taken.
    fn advance(&mut self, len_bytes: u64) {
        let run = &mut self.runs[self.next];
        run.guest_offset += len_bytes;
        run.len_bytes -= len_bytes;
        if run.len_bytes == 0 {
            self.next += 1;
        } else {
            run.place = run.place.advanced(len_bytes);
        }
    }
}

impl Batch {
    /// Reads the guest bytes of a run to `range`; or what is stored for them, behind what is there.
    fn read(
        &mut self,
        stream: &StreamStorage,
        run: FrontRun,
        range: Range<usize>,
        stored: &mut usize,
    ) -> Result<Option<Encoded>> {
        if self.bytes.len() < range.end {
            self.bytes.resize(range.end, 0);
        }
        match run.place {
            Place::Data { at, .. } => stream.read_at(&mut self.bytes[range], at.0)?,
            Place::Encoded { at, stored_bytes, decoded_bytes, skip_bytes, how, .. } => {
                // The bound of the stored length may reach past the end of the stream.
                let there = stream.available(at.0, stored_bytes as usize)?;
                let place = *stored..*stored + there;
                if self.stored.len() < place.end {
                    self.stored.resize(place.end, 0);
                }
                stream.read_at(&mut self.stored[place.clone()], at.0)?;
                *stored = place.end;
                return Ok(Some(Encoded { at: at.0, stored: place, decoded_bytes, skip_bytes, how }));
            }
            Place::Zero { .. } | Place::Unallocated => self.bytes[range].fill(0),
        }
        Ok(None)
    }

    /// Decodes what is encoded; from the first unit on that is damaged, there are no pieces any more.
    fn decode(&mut self, stream: &StreamStorage, unit: &mut Vec<u8>) -> Result<()> {
        for (index, piece) in self.pieces.iter().enumerate() {
            let Some(Encoded { at, stored, decoded_bytes, skip_bytes, how }) = &piece.encoded else {
                continue;
            };
            let (bytes, stored) = (&mut self.bytes[piece.bytes.clone()], &self.stored[stored.clone()]);
            let (decoded_len, skip) = (*decoded_bytes as usize, *skip_bytes as usize);
            let decoded = if skip == 0 && decoded_len == bytes.len() {
                decode_unit(stream, *how, stored, *at, bytes)
            } else {
                unit.resize(decoded_len, 0);
                let decoded = decode_unit(stream, *how, stored, *at, unit);
                bytes.copy_from_slice(&unit[skip..][..bytes.len()]);
                decoded
            };
            if decoded.is_err() {
                self.pieces.truncate(index);
                return decoded;
            }
        }
        Ok(())
    }
}
