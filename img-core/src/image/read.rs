//! Reading guest bytes: ask the map, then move bytes with as few system calls as the map allows.

use std::{cell::RefCell, io::IoSliceMut};

use super::{
    Image, ImageExtent, Pass,
    codec::{self, UnitKey},
};
use crate::{
    Error, Result,
    format::{Codec, HostFile, HostOffset, Lease, Place},
    storage::Storage,
};

/// What one `preadv` takes.
const MAX_SLICES: usize = 1024;

/// Stored runs that stand near each other are read together, up to this many bytes.
const STORED_READ_BYTES: u64 = 1 << 20;

/// No format stores a unit in more than this (qcow2: twice the largest cluster).
const MAX_STORED_BYTES: u32 = 16 << 20;

thread_local! {
    static STORED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A part of a read whose bytes stand in a host file as they are.
struct Piece<'a> {
    depth: usize,
    file: HostFile,
    at: u64,
    bytes: &'a mut [u8],
}

/// A part of a read that has to be decoded.
struct EncodedPiece<'a> {
    depth: usize,
    file: HostFile,
    at: u64,
    stored_bytes: u32,
    decoded_bytes: u32,
    skip_bytes: u32,
    how: Codec,
    bytes: &'a mut [u8],
}

impl Image {
    /// Fills `buf` with guest bytes. The range lies inside the disk.
    ///
    /// # Errors
    /// When tables or data cannot be read or are damaged, or the range is not inside the disk.
    pub fn read_at(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let _pass = self.gate.enter();
        self.range_inside(guest_offset, buf.len())?;
        self.read_inside(buf, guest_offset)
    }

    /// Keeps away those who want the image alone, for a job that reserves places in the top layer itself: they would wait
    /// for its reservations. Who holds a pass may only call what says so.
    pub(crate) fn pass(&self) -> Pass<'_> {
        self.gate.enter()
    }

    /// [`Self::read_at`] for who holds a pass.
    pub(crate) fn read_with(&self, _pass: &Pass<'_>, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.range_inside(guest_offset, buf.len())?;
        self.read_inside(buf, guest_offset)
    }

    /// Fills all of `bufs`, one behind the other.
    ///
    /// # Errors
    /// As [`Self::read_at`].
    pub fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], guest_offset: u64) -> Result<()> {
        let length = bufs.iter().map(|buf| buf.len()).sum();
        let _pass = self.gate.enter();
        let range = self.range_inside(guest_offset, length)?;
        let _lease = Lease::of(&*self.layers[0]);
        let mut extents = Vec::new();
        self.map_inside(range, &mut extents)?;
        self.read_extents(&extents, bufs.iter_mut().map(|buf| &mut **buf))
    }

    /// [`Self::read_at`] for who holds a pass.
    pub(super) fn read_inside(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let end = guest_offset + buf.len() as u64; // inside the disk
        let _lease = Lease::of(&*self.layers[0]);
        let mut extents = Vec::new();
        self.map_inside(guest_offset..end, &mut extents)?;
        if let [ImageExtent { depth, place: Place::Data { file, at, .. }, .. }] = extents[..] {
            return self.host_file(depth, file)?.read_at(buf, at.0);
        }
        self.read_extents(&extents, std::iter::once(buf))
    }

    /// Fills the buffers with what `extents` cover. The lease is held.
    fn read_extents<'a>(
        &self,
        extents: &[ImageExtent],
        bufs: impl Iterator<Item = &'a mut [u8]>,
    ) -> Result<()> {
        let (mut plain, mut encoded) = (Vec::new(), Vec::new());
        let mut extents = extents.iter();
        let (mut place, mut left_bytes, mut depth) = (Place::Unallocated, 0u64, 0);
        for mut buf in bufs {
            while !buf.is_empty() {
                if left_bytes == 0 {
                    let Some(next) = extents.next() else { break };
                    (place, left_bytes, depth) = (next.place, next.len_bytes, next.depth);
                }
                let take = usize::try_from(left_bytes).unwrap_or(usize::MAX).min(buf.len());
                let (bytes, rest) = std::mem::take(&mut buf).split_at_mut(take);
                buf = rest;
                match place {
                    Place::Zero { .. } | Place::Unallocated => bytes.fill(0),
                    Place::Data { file, at, .. } => plain.push(Piece { depth, file, at: at.0, bytes }),
                    Place::Encoded {
                        file,
                        at: HostOffset(at),
                        stored_bytes,
                        decoded_bytes,
                        skip_bytes,
                        how,
                    } => {
                        let piece = EncodedPiece {
                            depth,
                            file,
                            at,
                            stored_bytes,
                            decoded_bytes,
                            skip_bytes,
                            how,
                            bytes,
                        };
                        encoded.push(piece);
                    }
                }
                left_bytes -= take as u64;
                if left_bytes > 0 {
                    place = place.advanced(take as u64);
                }
            }
        }
        self.read_plain(plain)?;
        if encoded.is_empty() { Ok(()) } else { self.read_encoded(encoded) }
    }

    /// One system call for each run of host bytes, wherever its parts belong.
    fn read_plain(&self, mut pieces: Vec<Piece<'_>>) -> Result<()> {
        pieces.sort_unstable_by_key(|piece| (piece.depth, piece.file, piece.at));
        let mut pieces = pieces.into_iter().peekable();
        let mut slices: Vec<IoSliceMut<'_>> = Vec::new();
        while let Some(first) = pieces.next() {
            let mut end = first.at + first.bytes.len() as u64;
            slices.clear();
            slices.push(IoSliceMut::new(first.bytes));
            while slices.len() < MAX_SLICES
                && let Some(next) =
                    pieces.next_if(|next| (next.depth, next.file, next.at) == (first.depth, first.file, end))
            {
                end += next.bytes.len() as u64;
                slices.push(IoSliceMut::new(next.bytes));
            }
            self.host_file(first.depth, first.file)?.read_vectored_at(&mut slices, first.at)?;
        }
        Ok(())
    }

    fn read_encoded(&self, mut pieces: Vec<EncodedPiece<'_>>) -> Result<()> {
        // Learnt after the map was asked; see `DecodedUnits`.
        let generation = self.decoded.generation();
        pieces.sort_by_key(|piece| (piece.depth, piece.file, piece.at));
        let mut rest = &mut pieces[..];
        while let Some(first) = rest.first() {
            let (depth, file, start) = (first.depth, first.file, first.at);
            let mut end = start + u64::from(first.stored_bytes.min(MAX_STORED_BYTES));
            let near = rest.iter().skip(1).take_while(|piece| {
                let piece_end = piece.at + u64::from(piece.stored_bytes.min(MAX_STORED_BYTES));
                let joins = (piece.depth, piece.file) == (depth, file) && piece.at <= end;
                let joins = joins && piece_end - start <= STORED_READ_BYTES;
                if joins {
                    end = end.max(piece_end);
                }
                joins
            });
            let count = 1 + near.count();
            let (group, behind) = rest.split_at_mut(count);
            rest = behind;
            self.decode_group(group, start..end, generation)?;
        }
        Ok(())
    }

    /// Decodes pieces whose stored runs all stand in `run` of one file.
    fn decode_group(
        &self,
        group: &mut [EncodedPiece<'_>],
        run: std::ops::Range<u64>,
        generation: u64,
    ) -> Result<()> {
        let key = |piece: &EncodedPiece<'_>| UnitKey {
            depth: piece.depth,
            file: piece.file,
            at_bytes: piece.at,
            generation,
        };
        if let [piece] = group
            && let Some(unit) = self.decoded.get(&key(piece))
        {
            return copy_part(piece, &unit);
        }
        let storage = self.host_file(group[0].depth, group[0].file)?;
        STORED.with_borrow_mut(|stored| {
            let length = usize::try_from(run.end - run.start).unwrap_or(usize::MAX);
            if stored.len() < length {
                stored.resize(length, 0);
            }
            let stored = &mut stored[..length];
            storage.read_at(stored, run.start)?;
            for piece in group {
                let from = usize::try_from(piece.at - run.start).unwrap_or(usize::MAX);
                let until = from + piece.stored_bytes.min(MAX_STORED_BYTES) as usize;
                let stored = stored.get(from..until).unwrap_or_default();
                if piece.skip_bytes == 0 && piece.decoded_bytes as usize == piece.bytes.len() {
                    decode(&**storage, piece.how, stored, piece.at, piece.bytes)?;
                    continue;
                }
                let mut unit = vec![0; piece.decoded_bytes as usize];
                decode(&**storage, piece.how, stored, piece.at, &mut unit)?;
                copy_part(piece, &unit)?;
                self.decoded.put(key(piece), unit.into());
            }
            Ok(())
        })
    }
}

fn copy_part(piece: &mut EncodedPiece<'_>, unit: &[u8]) -> Result<()> {
    let from = piece.skip_bytes as usize;
    let part = unit.get(from..from.saturating_add(piece.bytes.len())).ok_or_else(|| {
        Error::Invalid(format!("the map asks for bytes behind a decoded unit of {} bytes", unit.len()))
    })?;
    piece.bytes.copy_from_slice(part);
    Ok(())
}

/// Fills `unit` from the stored run at `at` of `storage`.
pub(crate) fn decode(
    storage: &dyn Storage,
    how: Codec,
    stored: &[u8],
    at: u64,
    unit: &mut [u8],
) -> Result<()> {
    codec::decode(how, stored, unit).map_err(|why| {
        let name = match how {
            Codec::Deflate => "deflate",
            Codec::Zlib => "zlib",
            Codec::Zstd => "zstd",
        };
        let expected = format!("a {name} stream of {} bytes", unit.len());
        Error::corrupt(storage.path(), "compressed cluster", at, expected, why)
    })
}
