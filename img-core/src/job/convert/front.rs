//! Copying into a pipe: metadata first, so the source's map is walked before its data, and nothing of the data is
//! kept meanwhile.
//!
//! Where a table stands in front of compressed clusters, their sizes have to be known first: they are compressed
//! twice, once for their sizes. The sizes of the first [`KEPT_SIZES`] are kept from the survey; behind them, each
//! table's clusters are compressed once more. A source that changes in between is found out, as sizes differ.

use super::{
    ConvertOptions, Salvaged,
    copy::MAX_CONVERT_THREADS,
    packed::{Packed, Packing},
    plan::{Class, Cut, Piece, Pieces, Plan, Rules},
    source::{OnSalvaged, Sources},
};
use crate::{
    Error, JobStep, Result,
    format::{FrontWriter, LookAhead},
    image::Image,
    job::{
        Progress,
        compress::Compressor,
        cores,
        ordered::{Ticket, in_order, lock},
        status::OnLost,
        throttle::Throttle,
    },
    storage::Pipe,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

/// How much a thread reads at once, unless a unit is larger.
const PIECE_BYTES: u64 = 256 << 10;

/// The buffers of all threads together.
const BUFFERS_BYTES: u64 = 16 << 20;

/// Sizes that are kept from the survey: 8 MiB of them, 128 GiB of data in clusters of 64 KiB. Few in tests, so that
/// both ways are taken.
const KEPT_SIZES: usize = if cfg!(test) { 16 } else { 2 << 20 };

/// Copies `sources`, one behind the other, into `pipe` as `writer` lays them out.
///
/// Takes at most 16 MiB for buffers, 16 MiB for the plan and 8 MiB for sizes, and what the images' own caches and the
/// writer take. Options that speak of a target that is there already are not looked at.
///
/// # Errors
/// As [`convert`](super::convert). What the pipe got until then is no image.
pub fn convert_to_pipe(
    sources: &[Image],
    mut writer: Box<dyn FrontWriter>,
    pipe: &mut Pipe,
    options: &ConvertOptions,
    salvaged: &(dyn Fn(Salvaged, &Error) + Sync),
    progress: &dyn Progress,
) -> Result<()> {
    let sources = Sources::new(sources)?;
    let on_lost = |source: usize, offset_bytes: u64, error: &Error| {
        salvaged(Salvaged { source, offset_bytes, step: JobStep::Map }, error);
    };
    let on_lost: Option<OnLost<'_>> = if options.salvage { Some(&on_lost) } else { None };
    let rules = Rules { target_backing_bytes: None, join: true, on_lost, marks: None };
    let plan = Plan::new(&sources, rules, Some(writer.unit_bytes()))?;
    let compress = writer.codec().map(|how| (how, options.level));
    if let Some((how, level)) = compress {
        // A level that does not exist is refused before anything is written.
        Compressor::check_level(how, level)?;
    }
    let look_ahead = writer.look_ahead();
    let table_bytes = match look_ahead {
        LookAhead::Tables(bytes) => bytes,
        LookAhead::Nothing | LookAhead::Units => u64::MAX,
    };
    let unit_bytes = writer.unit_bytes();
    let walk = || Walk::new(&plan, PIECE_BYTES.max(unit_bytes).min(table_bytes));
    let to_copy = walk().data_bytes()?;
    let rounds = if compress.is_some() && look_ahead != LookAhead::Nothing { 2 } else { 1 };
    let feed = Feed {
        sources: &sources,
        packing: Packing {
            unit_bytes: usize::try_from(unit_bytes).expect("at most 2 MiB"),
            compress,
            drops_zeroes: compress.is_some(),
        },
        threads: threads(options, PIECE_BYTES.max(unit_bytes)),
        throttle: options.rate_bytes.map(Throttle::new),
        on_salvaged: if options.salvage { Some(salvaged) } else { None },
        progress,
        total: to_copy * rounds, // below 2^64: a disk is below 2^63
        done: AtomicU64::new(0),
    };
    progress.advance(0, feed.total);

    let mut kept = Kept::default();
    if look_ahead != LookAhead::Nothing {
        feed.sizes(&mut walk(), u64::MAX, &mut |guest, stored_bytes| {
            kept.push(guest, stored_bytes, table_bytes);
            writer.survey(guest, stored_bytes)
        })?;
    }
    writer.head(pipe)?;
    let (mut ahead, mut data, mut units) = (walk(), walk(), Vec::new());
    while let Some(first) = data.peek()? {
        let end = (first.start / table_bytes + 1).saturating_mul(table_bytes);
        let has_table = matches!(look_ahead, LookAhead::Tables(_));
        if has_table {
            units.clear();
            if end <= kept.complete_to {
                ahead.each_unit(end, unit_bytes, &mut |guest| {
                    units.push((guest, kept.take()?));
                    Ok(())
                })?;
            } else {
                feed.sizes(&mut ahead, end, &mut |guest, stored_bytes| {
                    units.push((guest, stored_bytes));
                    Ok(())
                })?;
            }
            writer.table(&units, pipe)?;
        }
        let mut announced = units.iter();
        feed.units(&mut data, end, &mut |guest, stored| {
            let unit = (guest, u32::try_from(stored.len()).expect("a unit is small"));
            if has_table && announced.next() != Some(&unit) {
                return Err(changed(guest));
            }
            if stored.is_empty() { Ok(()) } else { writer.unit(guest, stored, pipe) }
        })?;
    }
    writer.finish(pipe)?;
    pipe.flush()
}

fn changed(guest: u64) -> Error {
    Error::Invalid(format!("the source changed at byte {guest} while it was read"))
}

/// As many threads as were asked for or pay, whose buffers keep to their limit.
fn threads(options: &ConvertOptions, piece_bytes: u64) -> usize {
    // Each has a buffer for what is read and one for what it is compressed to.
    let most = usize::try_from(BUFFERS_BYTES / (2 * piece_bytes)).expect("at most 32").max(1);
    options.threads.unwrap_or_else(|| cores() + 1).clamp(1, MAX_CONVERT_THREADS).min(most)
}

/// The sizes of the first units.
#[derive(Default)]
struct Kept {
    sizes: Vec<u32>,
    taken: usize,
    /// Those of all units before this guest byte are here.
    complete_to: u64,
}

impl Kept {
    fn push(&mut self, guest: u64, stored_bytes: u32, table_bytes: u64) {
        if self.sizes.len() < KEPT_SIZES {
            self.sizes.push(stored_bytes);
            self.complete_to = u64::MAX;
        } else if self.complete_to == u64::MAX {
            self.complete_to = guest / table_bytes * table_bytes;
        }
    }

    fn take(&mut self) -> Result<u32> {
        let size = self.sizes.get(self.taken).copied();
        self.taken += 1;
        size.ok_or_else(|| Error::Invalid("the source's map changed while it was read".to_owned()))
    }
}

/// The pieces of a plan that hold data, in order.
struct Walk<'a> {
    pieces: Pieces<'a>,
    cut_bytes: u64,
    peeked: Option<Piece>,
}

impl<'a> Walk<'a> {
    fn new(plan: &'a Plan<'a>, cut_bytes: u64) -> Self {
        Self { pieces: plan.pieces(), cut_bytes, peeked: None }
    }

    fn peek(&mut self) -> Result<Option<Piece>> {
        while self.peeked.is_none_or(|piece| piece.class != Class::Data) {
            self.peeked = self.pieces.next(Cut::At(self.cut_bytes), |class| class == Class::Data)?;
            if self.peeked.is_none() {
                return Ok(None);
            }
        }
        Ok(self.peeked)
    }

    /// The next piece, unless it begins at `end` or behind it.
    fn next_before(&mut self, end: u64) -> Result<Option<Piece>> {
        let piece = self.peek()?.filter(|piece| piece.start < end);
        if piece.is_some() {
            self.peeked = None;
        }
        Ok(piece)
    }

    fn each_unit(
        &mut self,
        end: u64,
        unit_bytes: u64,
        found: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        while let Some(piece) = self.next_before(end)? {
            let mut guest = piece.start;
            while guest < piece.start + piece.len {
                found(guest)?;
                guest += unit_bytes;
            }
        }
        Ok(())
    }

    fn data_bytes(mut self) -> Result<u64> {
        let mut sum = 0;
        while let Some(piece) = self.next_before(u64::MAX)? {
            sum += piece.len;
        }
        Ok(sum)
    }
}

/// Reads pieces, and compresses their units, on all cores.
struct Feed<'a> {
    sources: &'a Sources<'a>,
    packing: Packing,
    threads: usize,
    throttle: Option<Throttle>,
    on_salvaged: OnSalvaged<'a>,
    progress: &'a dyn Progress,
    total: u64,
    done: AtomicU64,
}

/// What a thread keeps between pieces.
#[derive(Default)]
struct Hands {
    read: Vec<u8>,
    packed: Packed,
}

/// Told of the units in order: guest byte and stored bytes, none for a unit of zeroes.
type Sink<'s> = dyn FnMut(u64, &[u8]) -> Result<()> + Send + 's;

impl Feed<'_> {
    /// The stored sizes of the units before `end`.
    fn sizes(
        &self,
        walk: &mut Walk<'_>,
        end: u64,
        found: &mut (dyn FnMut(u64, u32) -> Result<()> + Send),
    ) -> Result<()> {
        let fits = "a unit is small";
        if self.packing.compress.is_none() {
            let unit_bytes = u32::try_from(self.packing.unit_bytes).expect(fits);
            return walk.each_unit(end, unit_bytes.into(), &mut |guest| found(guest, unit_bytes));
        }
        self.units(walk, end, &mut |guest, stored| found(guest, u32::try_from(stored.len()).expect(fits)))
    }

    /// The units before `end`.
    fn units(&self, walk: &mut Walk<'_>, end: u64, sink: &mut Sink<'_>) -> Result<()> {
        let sink = Mutex::new(sink);
        let mut next = |_: &mut Hands| {
            if self.progress.is_cancelled() { Err(Error::Cancelled) } else { walk.next_before(end) }
        };
        in_order(self.threads, &mut next, &|ticket: &Ticket<'_, 1>, piece, hands: &mut Hands| {
            if let Some(throttle) = &self.throttle {
                throttle.pass(piece.len, || ticket.is_late());
            }
            self.prepare(piece, hands)?;
            ticket.in_turn(0, || self.hand_on(piece, hands, &mut **lock(&sink)))?;
            Ok(())
        })
    }

    fn prepare(&self, piece: Piece, hands: &mut Hands) -> Result<()> {
        let len = usize::try_from(piece.len).expect("a piece is small");
        hands.read.resize(len, 0);
        self.sources.read(&mut hands.read, piece.start, self.on_salvaged)?;
        // The last unit of a disk is stored as a whole.
        hands.read.resize(len.next_multiple_of(self.packing.unit_bytes), 0);
        hands.packed.pack(&hands.read, self.packing)
    }

    fn hand_on(&self, piece: Piece, hands: &Hands, sink: &mut Sink<'_>) -> Result<()> {
        let units = (piece.start..).step_by(self.packing.unit_bytes);
        for (guest, stored) in units.zip(hands.packed.stored(&hands.read)) {
            sink(guest, stored.bytes())?;
        }
        let done = self.done.fetch_add(piece.len, Ordering::Relaxed) + piece.len;
        self.progress.advance(done.min(self.total), self.total);
        Ok(())
    }
}
