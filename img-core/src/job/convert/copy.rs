//! The threads of a conversion.

use std::io::IoSlice;

use super::{
    ConvertOptions,
    offload::{self, Offloaded},
    pieces::{self, Sparseness},
    plan::{Class, Cut, Piece, Pieces, Plan},
    source::{OnSalvaged, Sources},
};
use crate::{
    Error, Result,
    format::Codec,
    image::Pass,
    job::{
        MAX_THREADS, Progress,
        compress::Compressor,
        cores,
        ordered::{First, StopOnPanic, Turns, lock},
        target::{Reserved, Target, write_error},
        throttle::Throttle,
    },
    storage::DetectZeroes,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
        thread,
    },
    zeroes::is_zero,
};

/// How much a thread reads at once: large enough that system calls do not count, and small enough to be mostly in
/// the cache of its core still when zeroes are looked for and the bytes are written.
const PIECE_BYTES: u64 = 1 << 20;

/// The same where clusters are compressed: that takes so much longer than system calls that what threads hold counts.
const COMPRESSED_PIECE_BYTES: u64 = 256 << 10;

/// The reference's buffer, whose bounds can be seen in the result where zero detection looks across blocks.
const REFERENCE_PIECE_BYTES: u64 = 2 << 20;

/// How much the host is asked to copy at once.
const OFFLOAD_PIECE_BYTES: u64 = 64 << 20;

/// The largest cluster that there is: compressed clusters are read and stored as a whole.
const MAX_CLUSTER_BYTES: usize = 2 << 20;

/// A buffer for what is read, and one for what it is compressed to, of one cluster or piece each; the second with
/// room for what grows.
const MAX_THREAD_BUFFER_BYTES: usize = 2 * MAX_CLUSTER_BYTES + MAX_CLUSTER_BYTES / 16;

/// One less than there may be elsewhere, for the bound below.
pub(super) const MAX_CONVERT_THREADS: usize = MAX_THREADS - 1;

pub(super) const MAX_BUFFER_BYTES: usize = MAX_CONVERT_THREADS * MAX_THREAD_BUFFER_BYTES;
const _: () = assert!(MAX_BUFFER_BYTES < 64 << 20);

/// Threads beyond the number of cores, that have work while others wait for their turn or for the disk.
const SPARE_THREADS: usize = 1;

/// All that the threads share.
pub(super) struct Copy<'a> {
    sources: &'a Sources<'a>,
    target: Target<'a>,
    pieces: Mutex<Tickets<'a>>,
    sparseness: Option<Sparseness>,
    compress: Option<(Codec, Option<i32>)>,
    threads: usize,
    cut: Cut,
    /// Places are reserved in order.
    in_order: bool,
    target_is_zero: bool,
    turns: Turns,
    failed: First<Error>,
    offload: AtomicBool,
    throttle: Option<Throttle>,
    on_salvaged: OnSalvaged<'a>,
}

struct Tickets<'a> {
    pieces: Pieces<'a>,
    next: u64,
    done: u64,
}

/// What a thread keeps between pieces.
struct Hands<'a> {
    read: Vec<u8>,
    stored: Vec<u8>,
    compressor: Option<Compressor>,
    parts: Vec<pieces::Piece>,
    reserved: Vec<Reserved<'a>>,
}

/// Somebody else failed first; the reason is kept there.
struct Stopped;

impl<'a> Copy<'a> {
    pub(super) fn new(
        sources: &'a Sources<'a>,
        target: Target<'a>,
        plan: &'a Plan<'a>,
        options: &ConvertOptions,
        compression: Option<Codec>,
        is_local: bool,
        on_salvaged: OnSalvaged<'a>,
    ) -> Result<Self> {
        if let Some(how) = compression {
            // A level that does not exist is refused before anything is written.
            Compressor::check_level(how, options.level)?;
        }
        let compress = compression.map(|how| (how, options.level));
        let zeroes = target.image().detect_zeroes();
        let cut = if options.copy_offload && zeroes == DetectZeroes::Off {
            Cut::At(OFFLOAD_PIECE_BYTES)
        } else if is_local && zeroes == DetectZeroes::Off {
            Cut::At(match compress {
                None => PIECE_BYTES,
                Some(_) => COMPRESSED_PIECE_BYTES.max(target.cluster_bytes),
            })
        } else {
            Cut::After(REFERENCE_PIECE_BYTES)
        };
        let threads =
            options.threads.unwrap_or_else(|| cores() + SPARE_THREADS).clamp(1, MAX_CONVERT_THREADS);
        Ok(Self {
            sources,
            target,
            pieces: Mutex::new(Tickets { pieces: plan.pieces(), next: 0, done: 0 }),
            sparseness: (options.sparse_bytes > 0).then_some(Sparseness { run_bytes: options.sparse_bytes }),
            compress,
            threads,
            cut,
            in_order: target.allocates() && (!options.out_of_order || target.is_in_order_only()),
            target_is_zero: options.target_is_zero && !options.target_has_backing,
            turns: Turns::default(),
            failed: First::new(),
            offload: AtomicBool::new(options.copy_offload && zeroes == DetectZeroes::Off),
            throttle: options.rate_bytes.map(Throttle::new),
            on_salvaged,
        })
    }

    /// Copies everything.
    pub(super) fn run(self, progress: &dyn Progress, total: u64) -> Result<()> {
        let work = || {
            let _stop = StopOnPanic(&self.turns);
            self.work(progress, total);
        };
        thread::scope(|scope| {
            for _ in 1..self.threads {
                scope.spawn(work);
            }
            work();
        });
        self.failed.into_inner().map_or(Ok(()), Err)
    }

    fn work(&self, progress: &dyn Progress, total: u64) {
        let mut hands = Hands {
            read: Vec::new(),
            stored: Vec::new(),
            compressor: None,
            parts: Vec::new(),
            reserved: Vec::new(),
        };
        while let Some((ticket, piece)) = self.claim(progress, total) {
            match self.copy(ticket, piece, &mut hands) {
                Ok(Ok(())) => {}
                Ok(Err(Stopped)) => return,
                Err(error) => {
                    hands.reserved.clear();
                    return self.fail(ticket, error);
                }
            }
        }
    }

    fn fail(&self, ticket: u64, error: Error) {
        self.failed.offer(ticket, error);
        self.turns.stop_from(ticket);
    }

    /// The next piece that needs work.
    fn claim(&self, progress: &dyn Progress, total: u64) -> Option<(u64, Piece)> {
        let mut tickets = lock(&self.pieces);
        loop {
            let ticket = tickets.next;
            if self.failed.is_before(ticket) {
                return None;
            }
            if progress.is_cancelled() {
                self.fail(ticket, Error::Cancelled);
                return None;
            }
            let piece = match tickets.pieces.next(self.cut, |class| self.is_copied(class)) {
                Ok(piece) => piece?,
                Err(error) => {
                    self.fail(ticket, error);
                    return None;
                }
            };
            if self.is_copied(piece.class) {
                self.tell(piece, tickets.done, |done| progress.advance(done, total));
                tickets.done += piece.len;
            } else if piece.class == Class::Backing || self.target_is_zero {
                continue;
            }
            tickets.next += 1;
            return Some((ticket, piece));
        }
    }

    /// Tells progress in the steps in which the reference copies, each when it begins.
    fn tell(&self, piece: Piece, done_before: u64, advance: impl Fn(u64)) {
        let step = if self.compress.is_some() { self.target.cluster_bytes } else { REFERENCE_PIECE_BYTES };
        let mut begin = piece.run_offset.next_multiple_of(step) - piece.run_offset;
        while begin < piece.len {
            advance(done_before + (begin + step).min(piece.run_left));
            begin += step;
        }
    }

    /// Whether bytes of that class are written as they are.
    fn is_copied(&self, class: Class) -> bool {
        class == Class::Data || (class == Class::Zero && self.sparseness.is_none())
    }

    /// Does `step` in the turn of `ticket`, where there are turns; nobody has one behind a step that fails.
    fn in_turn<T>(&self, ticket: u64, step: impl FnOnce() -> Result<T>) -> Result<Result<T, Stopped>> {
        if !self.in_order {
            return step().map(Ok);
        }
        let done = self.turns.in_turn(ticket, step, || self.turns.stop_from(ticket))?;
        Ok(done.ok_or(Stopped))
    }

    fn copy<'s>(&'s self, ticket: u64, piece: Piece, hands: &mut Hands<'s>) -> Result<Result<(), Stopped>> {
        if let Some(throttle) = &self.throttle
            && self.is_copied(piece.class)
        {
            throttle.pass(piece.len, || self.failed.is_before(ticket));
        }
        if !self.is_copied(piece.class) {
            return self.in_turn(ticket, || self.zero(piece.start, piece.len, true));
        }
        if piece.class == Class::Data && self.compress.is_none() && self.offload.load(Ordering::Relaxed) {
            return self.in_turn(ticket, || self.copy_by_host(piece, hands));
        }
        self.read(piece, hands)?;
        match self.compress {
            Some(_) => self.copy_compressed(ticket, piece, hands),
            None => {
                self.find_parts(piece, hands);
                let Ok(pass) = self.in_turn(ticket, || self.reserve_parts(piece, hands))? else {
                    return Ok(Err(Stopped));
                };
                self.target.write(&pass, &hands.read, &mut hands.reserved).map(Ok)
            }
        }
    }

    fn read(&self, piece: Piece, hands: &mut Hands<'_>) -> Result<()> {
        let len = usize::try_from(piece.len).expect("a piece is small");
        hands.read.resize(len, 0);
        if piece.class == Class::Zero {
            hands.read.fill(0);
            return Ok(());
        }
        self.sources.read(&mut hands.read, piece.start, self.on_salvaged)
    }

    /// Finds what of the piece is written.
    fn find_parts(&self, piece: Piece, hands: &mut Hands<'_>) {
        match self.sparseness {
            None => {
                hands.parts.clear();
                hands.parts.push(pieces::Piece { start: 0, end: hands.read.len(), is_data: true });
            }
            Some(sparseness) => {
                sparseness.pieces(&hands.read, piece.start, &mut hands.parts);
                pieces::widen(&mut hands.parts, self.target.unit_bytes, hands.read.len(), piece.start);
            }
        }
    }

    /// Reserves the places of the parts, once the others are zero, and keeps away who wants the target alone.
    fn reserve_parts<'s>(&'s self, piece: Piece, hands: &mut Hands<'s>) -> Result<Pass<'s>> {
        // Nothing is reserved yet: making a part of a cluster zero may take the target alone.
        let mut refusal = Ok(());
        hands.parts.retain(|part| {
            let bytes = &hands.read[part.start..part.end];
            let may_unmap = if part.is_data { self.detected(bytes) } else { Some(true) };
            let Some(may_unmap) = may_unmap else { return true };
            if refusal.is_ok() && (part.is_data || !self.target_is_zero) {
                refusal = self.zero(piece.start + part.start as u64, bytes.len() as u64, may_unmap);
            }
            false
        });
        refusal?;
        let pass = self.target.image().pass();
        let mut last_cluster = None;
        for part in &hands.parts {
            let (start, end) = (piece.start + part.start as u64, piece.start + part.end as u64);
            if last_cluster == Some(start / self.target.cluster_bytes) {
                // Two reservations in one cluster exclude each other.
                self.target.write(&pass, &hands.read, &mut hands.reserved)?;
            }
            self.target.reserve(&pass, start..end, part.start, &mut hands.reserved)?;
            last_cluster = Some((end - 1) / self.target.cluster_bytes);
        }
        Ok(pass)
    }

    fn zero(&self, start: u64, len: u64, may_unmap: bool) -> Result<()> {
        let zeroed = self.target.image().write_zeroes(start..start + len, may_unmap);
        zeroed.map_err(|error| write_error(start, error))
    }

    /// Whether bytes become zeroes in the target instead of being written: then whether their space may be given back.
    fn detected(&self, bytes: &[u8]) -> Option<bool> {
        self.target.image().detect_zeroes().unmaps(&[IoSlice::new(bytes)])
    }

    /// Lets the host copy what it can of a piece, and reads and writes the rest.
    fn copy_by_host<'s>(&'s self, piece: Piece, hands: &mut Hands<'s>) -> Result<()> {
        if self.is_offloaded(piece, hands)? {
            return Ok(());
        }
        // At its ends the piece may have only a part of a cluster.
        let cluster = self.target.cluster_bytes;
        let end = piece.start + piece.len;
        let whole = piece.start.next_multiple_of(cluster)..end - end % cluster;
        if whole.is_empty() || (whole.start == piece.start && whole.end == end) {
            return self.copy_in_parts(piece, hands);
        }
        let part = |from: u64, to: u64| Piece { start: from, len: to - from, ..piece };
        self.copy_in_parts(part(piece.start, whole.start), hands)?;
        let middle = part(whole.start, whole.end);
        if !self.is_offloaded(middle, hands)? {
            self.copy_in_parts(middle, hands)?;
        }
        self.copy_in_parts(part(whole.end, end), hands)
    }

    /// Whether the host copied the piece. Where it refuses, it is not asked again.
    fn is_offloaded<'s>(&'s self, piece: Piece, hands: &mut Hands<'s>) -> Result<bool> {
        if !self.offload.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let guest_bytes = piece.start..piece.start + piece.len;
        let pass = self.target.image().pass();
        self.target.reserve(&pass, guest_bytes.clone(), 0, &mut hands.reserved)?;
        let outcome = offload::copy(self.sources, guest_bytes, &self.target, &hands.reserved)
            .map_err(|error| write_error(piece.start, error))?;
        match outcome {
            Offloaded::Done => Target::commit(&mut hands.reserved)?,
            Offloaded::NotHere => hands.reserved.clear(),
            Offloaded::Refused => {
                hands.reserved.clear();
                self.offload.store(false, Ordering::Relaxed);
            }
        }
        Ok(outcome == Offloaded::Done)
    }

    /// Copies a piece that is larger than a buffer.
    fn copy_in_parts<'s>(&'s self, piece: Piece, hands: &mut Hands<'s>) -> Result<()> {
        let end = piece.start + piece.len;
        let mut start = piece.start;
        while start < end {
            let part = Piece { start, len: (end - start).min(PIECE_BYTES), ..piece };
            self.read(part, hands)?;
            self.find_parts(part, hands);
            let pass = self.reserve_parts(part, hands)?;
            self.target.write(&pass, &hands.read, &mut hands.reserved)?;
            start += part.len;
        }
        Ok(())
    }

    fn copy_compressed<'s>(
        &'s self,
        ticket: u64,
        piece: Piece,
        hands: &mut Hands<'s>,
    ) -> Result<Result<(), Stopped>> {
        let clusters = self.compress_clusters(hands)?;
        // Those stored as they are stand in another buffer, so they are written on their own.
        let mut plain = Vec::new();
        let reserve = || self.reserve_clusters(piece, &clusters, &mut hands.reserved, &mut plain);
        let Ok(pass) = self.in_turn(ticket, reserve)? else { return Ok(Err(Stopped)) };
        self.target.write(&pass, &hands.stored, &mut hands.reserved)?;
        self.target.write(&pass, &hands.read, &mut plain)?;
        Ok(Ok(()))
    }

    /// Reserves the places of compressed clusters, and of those stored as they are, once the others are zero. As
    /// [`Self::reserve_parts`].
    fn reserve_clusters<'s>(
        &'s self,
        piece: Piece,
        clusters: &[Cluster],
        compressed: &mut Vec<Reserved<'s>>,
        plain: &mut Vec<Reserved<'s>>,
    ) -> Result<Pass<'s>> {
        let guest_bytes = |cluster: &Cluster| {
            let start = piece.start + cluster.at as u64;
            start..(start + self.target.cluster_bytes).min(piece.start + piece.len)
        };
        for cluster in clusters {
            let may_unmap = match cluster.stored {
                Stored::Zero if !self.target_is_zero => true,
                Stored::Detected { may_unmap } => may_unmap,
                Stored::Zero | Stored::Compressed(_) | Stored::Plain => continue,
            };
            let guest = guest_bytes(cluster);
            self.zero(guest.start, guest.end - guest.start, may_unmap)?;
        }
        let pass = self.target.image().pass();
        for cluster in clusters {
            let guest = guest_bytes(cluster);
            match &cluster.stored {
                Stored::Compressed(bytes) => {
                    compressed.push(self.target.reserve_compressed(&pass, guest.start, bytes.clone())?);
                }
                Stored::Plain => self.target.reserve(&pass, guest, cluster.at, plain)?,
                Stored::Zero | Stored::Detected { .. } => {}
            }
        }
        Ok(pass)
    }

    /// Compresses what was read, cluster by cluster, one behind the other into `stored`.
    fn compress_clusters(&self, hands: &mut Hands<'_>) -> Result<Vec<Cluster>> {
        let Some((how, level)) = self.compress else { return Ok(Vec::new()) };
        let cluster_bytes = usize::try_from(self.target.cluster_bytes).expect("at most 2 MiB");
        let compressor = match &mut hands.compressor {
            Some(compressor) => compressor,
            none => none.insert(Compressor::new(how, level, cluster_bytes)?),
        };
        // The last cluster of a disk is compressed as a whole too, filled up with zeroes.
        let len = hands.read.len();
        hands.read.resize(len.next_multiple_of(cluster_bytes), 0);
        let bound = Compressor::bound(how, cluster_bytes);
        hands.stored.resize(hands.read.len() / cluster_bytes * bound, 0);
        let mut clusters = Vec::with_capacity(hands.read.len() / cluster_bytes);
        let mut free = 0;
        for (index, cluster) in hands.read.chunks(cluster_bytes).enumerate() {
            let stored = if self.sparseness.is_some() && is_zero(cluster) {
                Stored::Zero
            } else if let Some(may_unmap) = self.detected(cluster) {
                Stored::Detected { may_unmap }
            } else {
                match compressor.compress(cluster, &mut hands.stored[free..free + bound])? {
                    None => Stored::Plain,
                    Some(len) => {
                        free += len;
                        Stored::Compressed(free - len..free)
                    }
                }
            };
            clusters.push(Cluster { at: index * cluster_bytes, stored });
        }
        Ok(clusters)
    }
}

/// A cluster of the buffer and what becomes of it.
struct Cluster {
    at: usize,
    stored: Stored,
}

enum Stored {
    Zero,
    /// The target tells zeroes from other bytes.
    Detected {
        may_unmap: bool,
    },
    Plain,
    Compressed(std::ops::Range<usize>),
}
