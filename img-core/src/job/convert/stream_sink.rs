//! Where the bytes of a stream go: an image, as they come; or units in guest order, compressed or in a pipe.
//!
//! What a thread read and decoded is cut into units in its turn ([`Sink::gather`]), packed beside the others
//! ([`Packed`]), and written in its turn again ([`Sink::write`]).

use std::ops::Range;

use super::{
    packed::{Packed, Packing, Stored},
    pieces::{self, Sparseness},
    stream::{Piece, StreamOptions, StreamTarget},
};
use crate::{
    Error, Result,
    format::{FrontWriter, LookAhead},
    image::Image,
    job::{
        compress::Compressor,
        ordered::lock,
        target::{Reserved, Target, write_error},
    },
    storage::{Pipe, Preallocation},
    sync::Mutex,
};

/// Disks end on a sector.
const SECTOR_BYTES: u64 = 512;

/// See the module.
pub(super) struct Sink<'a> {
    form: Mutex<Form<'a>>,
    /// The unit that is not known to be complete.
    open: Mutex<Units>,
    packing: Packing,
    sparse_bytes: u64,
    /// Units are gathered, and come in order.
    gathers: bool,
}

enum Form<'a> {
    /// Pieces are written as they come.
    Plain(&'a Image),
    /// Whole clusters, compressed.
    Compressed(&'a Image, Target<'a>),
    Pipe(Box<dyn FrontWriter>, &'a mut Pipe),
}

/// What a thread keeps of what it is about to write.
#[derive(Default)]
pub(super) struct Parts {
    /// Guest bytes, and where they stand in the batch: where nothing is gathered.
    plain: Vec<(u64, Range<usize>)>,
    scratch: Vec<pieces::Piece>,
    units: Units,
    packed: Packed,
}

/// Units of the disk, one behind the other.
#[derive(Default)]
struct Units {
    guests: Vec<u64>,
    bytes: Vec<u8>,
}

impl<'a> Sink<'a> {
    pub(super) fn new(target: StreamTarget<'a>, options: &StreamOptions) -> Result<Self> {
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
                         --spool DIR keeps the source in a file in DIR while it is converted; or write to a file"
                            .to_owned(),
                    ));
                }
                writer.head(pipe)?;
                let (unit_bytes, how) = (writer.unit_bytes(), writer.codec());
                (Form::Pipe(writer, pipe), unit_bytes, how)
            }
        };
        if let Some(how) = how {
            // A level that does not exist is refused before anything is written.
            Compressor::check_level(how, options.level)?;
        }
        let packing = Packing {
            unit_bytes: usize::try_from(unit_bytes).expect("at most 64 MiB"),
            compress: how.map(|how| (how, options.level)),
            drops_zeroes: options.sparse_bytes > 0,
        };
        let gathers = !matches!(form, Form::Plain(_));
        let open = Mutex::default();
        Ok(Self { form: Mutex::new(form), open, packing, sparse_bytes: options.sparse_bytes, gathers })
    }

    /// Whether bytes have to come in guest order.
    pub(super) fn takes_in_order(&self) -> bool {
        self.gathers
    }

    /// Guest bytes that are held until all of them have come.
    pub(super) fn unit_bytes(&self) -> u64 {
        if self.gathers { self.packing.unit_bytes as u64 } else { 0 }
    }

    /// First step, in turn: what of the pieces, whose bytes stand in `bytes`, makes whole units.
    pub(super) fn gather(&self, pieces: &[Piece], bytes: &[u8], parts: &mut Parts) -> Result<()> {
        let units = &mut parts.units;
        units.clear();
        let mut open = lock(&self.open);
        std::mem::swap(&mut *open, units);
        for piece in pieces {
            units.add(piece.guest, &bytes[piece.bytes.clone()], self.packing.unit_bytes)?;
        }
        // More may come for the last one.
        if let Some(last) = units.guests.pop() {
            let at = units.guests.len() * self.packing.unit_bytes;
            open.guests.push(last);
            open.bytes.extend_from_slice(&units.bytes[at..]);
            units.bytes.truncate(at);
        }
        Ok(())
    }

    /// Second step: what has to be written, and how.
    pub(super) fn prepare(&self, pieces: &[Piece], bytes: &[u8], parts: &mut Parts) -> Result<()> {
        if self.gathers {
            return parts.packed.pack(&parts.units.bytes, self.packing);
        }
        parts.plain.clear();
        for piece in pieces {
            // Pieces begin on sectors; the end of a disk need not.
            if self.sparse_bytes == 0 || !piece.guest.is_multiple_of(SECTOR_BYTES) {
                parts.plain.push((piece.guest, piece.bytes.clone()));
                continue;
            }
            let (bytes, unit) = (&bytes[piece.bytes.clone()], self.packing.unit_bytes as u64);
            Sparseness { run_bytes: self.sparse_bytes }.pieces(bytes, piece.guest, &mut parts.scratch);
            pieces::widen(&mut parts.scratch, unit, bytes.len(), piece.guest);
            let from = piece.bytes.start;
            let data = parts.scratch.iter().filter(|part| part.is_data);
            parts.plain.extend(
                data.map(|part| (piece.guest + part.start as u64, from + part.start..from + part.end)),
            );
        }
        Ok(())
    }

    /// Third step, in turn: writes it. The disk reaches to `end` at least.
    pub(super) fn write(&self, bytes: &[u8], parts: &Parts, end: u64) -> Result<()> {
        match &mut *lock(&self.form) {
            Form::Plain(image) => {
                grow(image, end)?;
                for (guest, range) in &parts.plain {
                    let written = image.write_at(&bytes[range.clone()], *guest);
                    written.map_err(|error| write_error(*guest, error))?;
                }
            }
            Form::Compressed(image, target) => {
                grow(image, end)?;
                for (guest, stored) in parts.stored() {
                    write_cluster(image, target, guest, stored)?;
                }
            }
            Form::Pipe(writer, pipe) => {
                for (guest, stored) in parts.stored() {
                    if !stored.bytes().is_empty() {
                        writer.unit(guest, stored.bytes(), pipe)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The disk is so long.
    pub(super) fn finish(self, size: u64) -> Result<()> {
        let mut parts = Parts { units: std::mem::take(&mut lock(&self.open)), ..Parts::default() };
        self.prepare(&[], &[], &mut parts)?;
        self.write(&[], &parts, size)?;
        match self.form.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Form::Plain(image) => image.flush(),
            Form::Compressed(image, target) => {
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

impl Parts {
    fn stored(&self) -> impl Iterator<Item = (u64, Stored<'_>)> {
        self.units.guests.iter().copied().zip(self.packed.stored(&self.units.bytes))
    }
}

impl Units {
    fn clear(&mut self) {
        self.guests.clear();
        self.bytes.clear();
    }

    /// Adds what stands at `guest`, to the last unit or to new ones.
    fn add(&mut self, guest: u64, bytes: &[u8], unit_bytes: usize) -> Result<()> {
        let (mut at, mut rest) = (guest, bytes);
        while !rest.is_empty() {
            let start = at - at % unit_bytes as u64;
            match self.guests.last() {
                Some(last) if *last == start => {}
                Some(last) if *last > start => {
                    return Err(Error::Invalid(format!(
                        "byte {start} of the disk comes behind byte {last}: this target takes them in order"
                    )));
                }
                _ => {
                    self.guests.push(start);
                    self.bytes.resize(self.guests.len() * unit_bytes, 0);
                }
            }
            let from = usize::try_from(at - start).expect("inside a unit");
            let unit_at = (self.guests.len() - 1) * unit_bytes;
            let unit = &mut self.bytes[unit_at + from..];
            let take = rest.len().min(unit.len());
            unit[..take].copy_from_slice(&rest[..take]);
            rest = &rest[take..];
            at += take as u64;
        }
        Ok(())
    }
}

fn write_cluster(image: &Image, target: &Target<'_>, guest: u64, stored: Stored<'_>) -> Result<()> {
    let mut reserved: Vec<Reserved<'_>> = Vec::new();
    let pass = image.pass();
    match stored {
        Stored::Nothing => return Ok(()),
        Stored::AsItIs(cluster) => {
            let end = (guest + cluster.len() as u64).min(image.virtual_size_bytes());
            target.reserve(&pass, guest..end, 0, &mut reserved)?;
        }
        Stored::Compressed(bytes) => {
            reserved.push(target.reserve_compressed(&pass, guest, 0..bytes.len())?)
        }
    }
    target.write(&pass, stored.bytes(), &mut reserved)
}

/// Makes the disk at least so long, to the end of its last sector. Only disks whose size nobody knew grow.
fn grow(image: &Image, end: u64) -> Result<()> {
    if image.virtual_size_bytes() >= end {
        return Ok(());
    }
    image.resize(end.next_multiple_of(SECTOR_BYTES), Preallocation::Off)
}
