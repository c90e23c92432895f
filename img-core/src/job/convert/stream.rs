//! Copying an image that comes out of a pipe: once through, in the order in which its bytes come.
//!
//! Into an image, where any order will do unless its clusters are compressed; or into another pipe, where the layout
//! must not have to know anything beforehand, and the source must come in guest order. What comes is decoded and
//! written by one thread; a filter at the other end of the pipe is another.

use super::{
    pieces::{self, Sparseness},
    target::{Reserved, Target, write_error},
};
use crate::{
    Error, Result,
    format::{Codec, FrontReader, FrontRun, FrontWriter, LookAhead, Place},
    image::{Image, decode_unit},
    job::{Progress, compress::Compressor, throttle::Throttle},
    storage::{Pipe, Preallocation, Storage as _, StreamStorage},
    zeroes::is_zero,
};

/// How much is read and written at once, at most.
const PIECE_BYTES: usize = 1 << 20;

/// Disks end on a sector.
const SECTOR_BYTES: u64 = 512;

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

/// Copies the image that `reader` reads from `stream`.
///
/// Takes at most 16 MiB for what is kept of the stream's start and as much of what passed last, buffers for a few pieces,
/// and what the reader keeps of the map.
///
/// # Errors
/// [`Error::Corrupt`] for a stream that is damaged or breaks off: the target is then no image. [`Error::Job`] with the
/// place; [`Error::Cancelled`]; [`Error::Invalid`] when the target needs to know more, or another order.
pub fn convert_stream(
    stream: &StreamStorage,
    mut reader: Box<dyn FrontReader>,
    target: StreamTarget<'_>,
    options: &StreamOptions,
    progress: &dyn Progress,
) -> Result<()> {
    let size = reader.virtual_size_bytes().or(options.expected_bytes);
    let mut sink = Sink::new(target, options)?;
    let throttle = options.rate_bytes.map(Throttle::new);
    let (mut runs, mut bytes, mut stored) = (Vec::new(), Vec::new(), Vec::new());
    let (mut done, mut end) = (0_u64, 0_u64);
    loop {
        runs.clear();
        reader.next(&mut runs)?;
        if runs.is_empty() {
            break;
        }
        if sink.takes_in_order() {
            // What is packed a little behind its neighbours is still there.
            runs.sort_by_key(|run| run.guest_offset);
        }
        for run in runs.iter().flat_map(|run| pieces_of(*run)) {
            if progress.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let run_end = run.guest_offset + run.len_bytes;
            if let Some(size) = size.filter(|size| run_end > *size) {
                return Err(Error::Invalid(format!(
                    "{}: there is more than the {size} bytes that were announced",
                    stream.path().display()
                )));
            }
            if let Some(throttle) = &throttle {
                throttle.pass(run.len_bytes, || false);
            }
            read(stream, run, &mut stored, &mut bytes)?;
            sink.put(run.guest_offset, &bytes)?;
            (done, end) = (done + run.len_bytes, end.max(run_end));
            progress.advance(done, size.unwrap_or(done).max(done));
        }
    }
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

/// A run in parts that fit a buffer. Encoded units are small, and stay whole.
fn pieces_of(run: FrontRun) -> impl Iterator<Item = FrontRun> {
    let step = match run.place {
        Place::Encoded { .. } => run.len_bytes.max(1),
        _ => PIECE_BYTES as u64,
    };
    (0..run.len_bytes.div_ceil(step)).map(move |index| {
        let skip = index * step;
        FrontRun {
            guest_offset: run.guest_offset + skip,
            len_bytes: step.min(run.len_bytes - skip),
            place: run.place.advanced(skip),
        }
    })
}

/// Fills `bytes` with the guest bytes of a piece.
fn read(stream: &StreamStorage, run: FrontRun, stored: &mut Vec<u8>, bytes: &mut Vec<u8>) -> Result<()> {
    bytes.resize(usize::try_from(run.len_bytes).expect("a piece fits a buffer"), 0);
    match run.place {
        Place::Data { at, .. } => stream.read_at(bytes, at.0),
        Place::Encoded { at, stored_bytes, decoded_bytes, skip_bytes, how, .. } => {
            // The bound of the stored length may reach past the end of the stream.
            let there = stream.available(at.0, stored_bytes as usize)?;
            stored.resize(there, 0);
            stream.read_at(stored, at.0)?;
            let mut unit = vec![0; decoded_bytes as usize];
            decode_unit(stream, how, stored, at.0, &mut unit)?;
            let len = bytes.len();
            bytes.copy_from_slice(&unit[skip_bytes as usize..][..len]);
            Ok(())
        }
        Place::Zero { .. } | Place::Unallocated => {
            bytes.fill(0);
            Ok(())
        }
    }
}

/// The target, and the unit that is being gathered for it.
struct Sink<'a> {
    form: Form<'a>,
    sparse_bytes: u64,
    /// Guest byte of the unit that is gathered, and its bytes.
    unit: Option<(u64, Vec<u8>)>,
    unit_bytes: u64,
    /// Where what came so far ends.
    seen_to: u64,
    compressor: Option<(Compressor, Codec)>,
}

enum Form<'a> {
    /// Pieces are written as they come.
    Plain(&'a Image),
    /// Whole clusters, compressed.
    Compressed(&'a Image, Target<'a>),
    Pipe(Box<dyn FrontWriter>, &'a mut Pipe),
}

impl<'a> Sink<'a> {
    fn new(target: StreamTarget<'a>, options: &StreamOptions) -> Result<Self> {
        let (form, unit_bytes, how) = match target {
            StreamTarget::Image(image) => {
                let target = Target::new(image)?;
                match target.compression(options.compress)? {
                    None => (Form::Plain(image), target.unit_bytes, None),
                    Some(how) => (Form::Compressed(image, target), target.cluster_bytes, Some(how)),
                }
            }
            StreamTarget::Pipe(mut writer, pipe) => {
                if writer.look_ahead() != LookAhead::Nothing {
                    return Err(Error::Invalid(
                        "this format begins with a map of the disk, which a source in a pipe tells too late: \
                         write to a file, or let --spool DIR keep the source"
                            .to_owned(),
                    ));
                }
                writer.head(pipe)?;
                let (unit_bytes, how) = (writer.unit_bytes(), writer.codec());
                (Form::Pipe(writer, pipe), unit_bytes, how)
            }
        };
        let compressor =
            how.map(|how| Compressor::new(how, options.level).map(|made| (made, how))).transpose()?;
        Ok(Self { form, sparse_bytes: options.sparse_bytes, unit: None, unit_bytes, seen_to: 0, compressor })
    }

    fn takes_in_order(&self) -> bool {
        !matches!(self.form, Form::Plain(_))
    }

    fn put(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
        self.seen_to = self.seen_to.max(guest + bytes.len() as u64);
        if let Form::Plain(image) = self.form {
            return self.write(image, guest, bytes);
        }
        let mut at = guest;
        let mut rest = bytes;
        while !rest.is_empty() {
            let start = at / self.unit_bytes * self.unit_bytes;
            self.begin(start)?;
            let from = usize::try_from(at - start).expect("inside a unit");
            let (_, unit) = self.unit.as_mut().expect("begun above");
            let take = rest.len().min(unit.len() - from);
            unit[from..from + take].copy_from_slice(&rest[..take]);
            rest = &rest[take..];
            at += take as u64;
        }
        Ok(())
    }

    /// Makes the unit at `start` the one that is gathered.
    fn begin(&mut self, start: u64) -> Result<()> {
        match &self.unit {
            Some((current, _)) if *current == start => return Ok(()),
            Some((current, _)) if *current > start => {
                return Err(Error::Invalid(format!(
                    "byte {start} of the disk comes behind byte {current}: this target takes them in order"
                )));
            }
            _ => {}
        }
        let mut unit = self.end_unit()?.unwrap_or_default();
        unit.clear();
        unit.resize(usize::try_from(self.unit_bytes).expect("at most 2 MiB"), 0);
        self.unit = Some((start, unit));
        Ok(())
    }

    /// Writes the unit that was gathered, and gives its buffer back.
    fn end_unit(&mut self) -> Result<Option<Vec<u8>>> {
        let Some((guest, unit)) = self.unit.take() else { return Ok(None) };
        if is_zero(&unit) && self.sparse_bytes > 0 {
            return Ok(Some(unit));
        }
        let mut stored = Vec::new();
        if let Some((compressor, how)) = &mut self.compressor {
            stored.resize(Compressor::bound(*how, unit.len()), 0);
            let len = compressor.compress(&unit, &mut stored)?.unwrap_or(0);
            stored.truncate(len);
        }
        match &mut self.form {
            Form::Plain(_) => unreachable!("nothing is gathered for it"),
            Form::Compressed(image, target) => {
                grow(image, self.seen_to)?;
                let mut reserved: Vec<Reserved<'_>> = Vec::new();
                if stored.is_empty() {
                    let end = (guest + self.unit_bytes).min(image.virtual_size_bytes());
                    target.reserve(guest..end, 0, &mut reserved)?;
                    target.write(&unit, &mut reserved)?;
                } else {
                    reserved.push(target.reserve_compressed(guest, 0..stored.len())?);
                    target.write(&stored, &mut reserved)?;
                }
            }
            Form::Pipe(writer, pipe) => {
                writer.unit(guest, if stored.is_empty() { &unit } else { &stored }, pipe)?;
            }
        }
        Ok(Some(unit))
    }

    /// Writes what of a piece is data.
    fn write(&self, image: &Image, guest: u64, bytes: &[u8]) -> Result<()> {
        grow(image, self.seen_to)?;
        let mut parts = vec![pieces::Piece { start: 0, end: bytes.len(), is_data: true }];
        // Pieces begin on sectors; the end of a disk need not.
        if self.sparse_bytes > 0 && guest.is_multiple_of(SECTOR_BYTES) {
            Sparseness { run_bytes: self.sparse_bytes }.pieces(bytes, guest, &mut parts);
            pieces::widen(&mut parts, self.unit_bytes, bytes.len(), guest);
        }
        for part in parts.iter().filter(|part| part.is_data) {
            let at = guest + part.start as u64;
            image.write_at(&bytes[part.start..part.end], at).map_err(|error| write_error(at, error))?;
        }
        Ok(())
    }

    /// The disk is so long.
    fn finish(mut self, size: u64) -> Result<()> {
        self.end_unit()?;
        match self.form {
            Form::Plain(image) => {
                grow(image, size)?;
                image.flush()
            }
            Form::Compressed(image, target) => {
                grow(image, size)?;
                target.pad_to_sector()?;
                image.flush()
            }
            Form::Pipe(mut writer, pipe) => {
                writer.finish(pipe)?;
                pipe.flush()
            }
        }
    }
}

/// Makes the disk at least so long, to the end of its last sector. Only disks whose size nobody knew grow.
fn grow(image: &Image, end: u64) -> Result<()> {
    if image.virtual_size_bytes() >= end {
        return Ok(());
    }
    image.resize(end.next_multiple_of(SECTOR_BYTES), Preallocation::Off)
}
