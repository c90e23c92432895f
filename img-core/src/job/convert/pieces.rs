//! Which part of a buffer is worth writing: the reference's zero detection (`-S`).

use crate::zeroes::is_zero;

/// The unit in which zeroes are looked for at all.
const SECTOR_BYTES: usize = 512;

/// How zeroes in data are found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sparseness {
    /// A run of zeroes at least this long is left out; a multiple of 512, not 0.
    pub(super) run_bytes: u64,
}

/// A part of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: usize,
    pub(super) end: usize,
    /// Whether it has to be written.
    pub(super) is_data: bool,
}

impl Sparseness {
    /// Ends of pieces are moved to multiples of this, so that the target is written in aligned blocks: the
    /// largest power of two in `run_bytes`.
    fn alignment_bytes(self) -> u64 {
        1 << self.run_bytes.ilog2()
    }

    /// Whether the answer for a block does not depend on where buffers begin and end, as long as they do so on
    /// multiples of 4 KiB.
    pub(super) fn is_local(self) -> bool {
        self.run_bytes.is_power_of_two() && self.run_bytes <= 4096
    }

    /// Cuts `buf`, which stands at `offset` (a multiple of 512) of the disk, into data and zeroes.
    pub(super) fn pieces(self, buf: &[u8], offset: u64, pieces: &mut Vec<Piece>) {
        pieces.clear();
        if self.run_bytes.is_power_of_two() {
            self.whole_blocks(buf, offset, pieces);
        } else {
            self.runs(buf, offset, pieces);
        }
    }

    /// With a power of two each aligned block stands for itself: it is data unless all of it is zero.
    fn whole_blocks(self, buf: &[u8], offset: u64, pieces: &mut Vec<Piece>) {
        let block = usize::try_from(self.run_bytes).unwrap_or(usize::MAX);
        let mut start = 0;
        while start < buf.len() {
            let in_block =
                usize::try_from((offset + start as u64) & (self.run_bytes - 1)).expect("inside a block");
            let end = start.saturating_add(block - in_block).min(buf.len());
            push(pieces, start, end, !is_zero(&buf[start..end]));
            start = end;
        }
    }

    /// Otherwise runs are found sector by sector, their ends are aligned, and zeroes behind data count as data
    /// while they are shorter than asked for.
    fn runs(self, buf: &[u8], offset: u64, pieces: &mut Vec<Piece>) {
        let mut at = 0;
        while at < buf.len() {
            let least = usize::try_from(self.run_bytes).unwrap_or(usize::MAX).min(buf.len() - at);
            let mut end = at;
            let mut used = at;
            while end < buf.len() {
                let run = self.run(&buf[end..], offset + end as u64);
                end += run.len;
                if run.is_data {
                    used = end;
                } else if used == at || run.len >= least {
                    break;
                }
            }
            if used == at {
                push(pieces, at, end, false);
                at = end;
            } else {
                push(pieces, at, used, true);
                at = used;
            }
        }
    }

    /// The run at the front of `buf`, its end aligned so that zeroes never share a block with data.
    fn run(self, buf: &[u8], offset: u64) -> Run {
        let mut sectors = buf.chunks(SECTOR_BYTES).map(is_zero);
        let starts_zero = sectors.next().unwrap_or(true);
        let alike = 1 + sectors.take_while(|zero| *zero == starts_zero).count();
        let len = alike * SECTOR_BYTES;
        if len >= buf.len() {
            return Run { len: buf.len(), is_data: !starts_zero };
        }
        let alignment = self.alignment_bytes();
        let over = usize::try_from((offset + len as u64) & (alignment - 1)).expect("inside a block");
        let missing = usize::try_from(alignment).unwrap_or(usize::MAX).saturating_sub(over);
        if over == 0 {
            Run { len, is_data: !starts_zero }
        } else if starts_zero && len > over {
            Run { len: len - over, is_data: false }
        } else {
            Run { len: len.saturating_add(missing).min(buf.len()), is_data: true }
        }
    }
}

struct Run {
    len: usize,
    is_data: bool,
}

fn push(pieces: &mut Vec<Piece>, start: usize, end: usize, is_data: bool) {
    match pieces.last_mut() {
        Some(last) if last.is_data == is_data => last.end = end,
        _ => pieces.push(Piece { start, end, is_data }),
    }
}

/// Widens the data among `pieces` to multiples of `unit_bytes` of the disk, inside a buffer of `len` bytes at
/// `offset`: what the target allocates as a whole is written as a whole.
pub(super) fn widen(pieces: &mut Vec<Piece>, unit_bytes: u64, len: usize, offset: u64) {
    if unit_bytes <= 1 || pieces.iter().all(|piece| piece.is_data) {
        return;
    }
    let in_buffer = |at: u64| usize::try_from(at.saturating_sub(offset)).unwrap_or(len).min(len);
    let mut widened = Vec::with_capacity(pieces.len());
    let mut at = 0;
    for piece in pieces.iter().filter(|piece| piece.is_data) {
        let start = in_buffer((offset + piece.start as u64) / unit_bytes * unit_bytes).max(at);
        let end = in_buffer((offset + piece.end as u64).next_multiple_of(unit_bytes));
        if start > at {
            push(&mut widened, at, start, false);
        }
        if end > start {
            push(&mut widened, start, end, true);
            at = end;
        }
    }
    if at < len {
        push(&mut widened, at, len, false);
    }
    *pieces = widened;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(run_bytes: u64, sectors: &[u8], first_sector: u64) -> Vec<Piece> {
        let buf: Vec<u8> = sectors.iter().flat_map(|fill| [*fill; SECTOR_BYTES]).collect();
        let mut pieces = Vec::new();
        Sparseness { run_bytes }.pieces(&buf, first_sector * 512, &mut pieces);
        pieces
    }

    fn spans(pieces: &[Piece]) -> Vec<(usize, bool)> {
        pieces.iter().map(|piece| ((piece.end - piece.start) / SECTOR_BYTES, piece.is_data)).collect()
    }

    #[test]
    fn short_zeroes_between_data_are_data_when_longer_ones_are_asked_for() {
        // 3 sectors asked for: ends are aligned to 2.
        assert_eq!(spans(&cut(1536, &[1, 1, 0, 0, 1, 1, 0, 0, 0, 0], 0)), [(6, true), (4, false)]);
        assert_eq!(spans(&cut(1536, &[0, 0, 1, 0, 1, 0, 0], 0)), [(2, false), (4, true), (1, false)]);
    }

    #[test]
    fn widened_data_covers_whole_units_inside_the_buffer() {
        let mut pieces = cut(512, &[0, 0, 0, 1, 0, 0, 0, 0, 0], 2);
        widen(&mut pieces, 2048, 9 * 512, 1024);
        // Units end after sectors 2, 6 and 10 of the buffer.
        assert_eq!(spans(&pieces), [(2, false), (4, true), (3, false)]);
    }

    proptest! {
        /// For powers of two, the sector-by-sector rule and the block-by-block rule agree.
        #[test]
        fn blocks_and_runs_agree(sectors in prop::collection::vec(0u8..2, 1..80), first in 0u64..20, log in 0u32..5) {
            let sparse = Sparseness { run_bytes: 512 << log };
            let buf: Vec<u8> = sectors.iter().flat_map(|fill| [*fill; SECTOR_BYTES]).collect();
            let (mut blocks, mut runs) = (Vec::new(), Vec::new());
            sparse.whole_blocks(&buf, first * 512, &mut blocks);
            sparse.runs(&buf, first * 512, &mut runs);
            prop_assert_eq!(blocks, runs);
        }

        /// Pieces cover the buffer, and what is left out is zero, however they are widened.
        #[test]
        fn nothing_is_lost(
            sectors in prop::collection::vec(0u8..2, 1..80),
            first in 0u64..20,
            run_sectors in 1u64..12,
            unit_log in 0u32..8,
        ) {
            let buf: Vec<u8> = sectors.iter().flat_map(|fill| [*fill; SECTOR_BYTES]).collect();
            let mut pieces = Vec::new();
            Sparseness { run_bytes: run_sectors * 512 }.pieces(&buf, first * 512, &mut pieces);
            widen(&mut pieces, 512 << unit_log, buf.len(), first * 512);
            let mut at = 0;
            for piece in &pieces {
                prop_assert_eq!(piece.start, at);
                prop_assert!(piece.is_data || is_zero(&buf[piece.start..piece.end]));
                at = piece.end;
            }
            prop_assert_eq!(at, buf.len());
        }
    }
}
