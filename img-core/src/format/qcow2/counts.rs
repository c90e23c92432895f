//! Runs of reference counts in the bytes of a refcount block, many at a time: 4 TiB have 67 million counts.

use std::ops::Range;

use super::geometry::{refcount_get, refcount_set};

/// The first count of a part that is zero; the end of the part where none is.
pub(super) fn next_free(block: &[u8], order: u32, part: Range<usize>) -> usize {
    // A lane is zero where taking one borrows from above and its own top bit was not set.
    let ones = LOW_BITS[order as usize];
    let tops = ones << ((1 << order) - 1);
    first_where(block, order, part, |word| word.wrapping_sub(ones) & !word & tops != 0, |count| count == 0)
}

/// The first count of a part that is not zero; the end of the part where all are.
pub(super) fn next_used(block: &[u8], order: u32, part: Range<usize>) -> usize {
    first_where(block, order, part, |word| word != 0, |count| count != 0)
}

/// A word whose lanes of `1 << order` bits are one each.
const LOW_BITS: [u64; 7] = [
    u64::MAX,
    0x5555_5555_5555_5555,
    0x1111_1111_1111_1111,
    0x0101_0101_0101_0101,
    0x0001_0001_0001_0001,
    0x0000_0001_0000_0001,
    1,
];

/// The first count of a part that is `wanted`. Words that `may_have` one are looked at closely; how bytes are
/// ordered in a count does not matter to it.
fn first_where(
    block: &[u8],
    order: u32,
    part: Range<usize>,
    may_have: impl Fn(u64) -> bool,
    wanted: impl Fn(u64) -> bool,
) -> usize {
    let per_word = 64 >> order;
    let words = block.as_chunks().0;
    let mut at = part.start;
    while at < part.end {
        if at.is_multiple_of(per_word) {
            let whole = &words[at / per_word..part.end / per_word];
            at += whole.iter().take_while(|word| !may_have(u64::from_le_bytes(**word))).count() * per_word;
        }
        let close_end = part.end.min((at / per_word + 1) * per_word);
        while at < close_end {
            if wanted(refcount_get(block, order, at)) {
                return at;
            }
            at += 1;
        }
    }
    part.end
}

/// Whether any count of a part is one of two values. Like the two functions below, without branches for the
/// width that nearly all images have.
pub(super) fn any_is(block: &[u8], order: u32, mut part: Range<usize>, values: [u64; 2]) -> bool {
    if order != 4 {
        return part.any(|index| values.contains(&refcount_get(block, order, index)));
    }
    let [one, other] = values.map(|value| u16::try_from(value).expect("a count of 16 bits").to_be());
    let counts = block.as_chunks().0[part].iter().map(|count| u16::from_ne_bytes(*count));
    counts.fold(false, |any, count| any | (count == one) | (count == other))
}

/// Whether all counts of a part are one.
pub(super) fn all_one(block: &[u8], order: u32, mut part: Range<usize>) -> bool {
    if order != 4 {
        return part.all(|index| refcount_get(block, order, index) == 1);
    }
    let counts = block.as_chunks().0[part].iter().map(|count| u16::from_be_bytes(*count));
    counts.fold(0, |bits, count| bits | (count ^ 1)) == 0
}

/// Adds one to each count of a part, or takes one away. None overflows.
pub(super) fn add_to_each(block: &mut [u8], order: u32, part: Range<usize>, up: bool) {
    if order != 4 {
        for index in part {
            let count = refcount_get(block, order, index);
            refcount_set(block, order, index, if up { count + 1 } else { count - 1 });
        }
        return;
    }
    let change = if up { 1 } else { u16::MAX };
    for count in &mut block.as_chunks_mut().0[part] {
        *count = u16::from_be_bytes(*count).wrapping_add(change).to_be_bytes();
    }
}

/// The counts from `first` on.
pub(super) fn read_counts(block: &[u8], order: u32, first: usize, counts: &mut [u64]) {
    fn read<const BYTES: usize>(block: &[u8], counts: &mut [u64], number: impl Fn([u8; BYTES]) -> u64) {
        counts.iter_mut().zip(block.as_chunks().0).for_each(|(count, bytes)| *count = number(*bytes));
    }
    match order {
        4 => read(&block[first * 2..], counts, |bytes| u16::from_be_bytes(bytes).into()),
        5 => read(&block[first * 4..], counts, |bytes| u32::from_be_bytes(bytes).into()),
        6 => read(&block[first * 8..], counts, u64::from_be_bytes),
        _ => (first..).zip(counts).for_each(|(index, count)| *count = refcount_get(block, order, index)),
    }
}

/// Makes the counts from `first` on be `counts`. All of them fit.
pub(super) fn write_counts(block: &mut [u8], order: u32, first: usize, counts: &[u64]) {
    /// The last bytes of each number.
    fn write<const BYTES: usize>(block: &mut [u8], counts: &[u64]) {
        for (bytes, count) in block.as_chunks_mut::<BYTES>().0.iter_mut().zip(counts) {
            debug_assert!(BYTES == 8 || *count >> (BYTES * 8) == 0, "the caller checked the count");
            bytes.copy_from_slice(&count.to_be_bytes()[8 - BYTES..]);
        }
    }
    match order {
        4 => write::<2>(&mut block[first * 2..], counts),
        5 => write::<4>(&mut block[first * 4..], counts),
        6 => write::<8>(&mut block[first * 8..], counts),
        _ => (first..).zip(counts).for_each(|(index, count)| refcount_set(block, order, index, *count)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the width and the place, many counts are read and written as they are one by one.
        #[test]
        fn many_counts_are_those_that_are_there(
            order in 0_u32..=6,
            first in 0_usize..40,
            counts in proptest::collection::vec(any::<u64>(), 1..24),
        ) {
            let max = if order == 6 { u64::MAX } else { (1 << (1_u32 << order)) - 1 };
            let counts: Vec<u64> = counts.iter().map(|count| count & max).collect();
            let mut one_by_one = vec![0xa5_u8; 512];
            let mut block = one_by_one.clone();
            for (index, count) in (first..).zip(&counts) {
                refcount_set(&mut one_by_one, order, index, *count);
            }
            write_counts(&mut block, order, first, &counts);
            prop_assert_eq!(&block, &one_by_one);
            let mut back = vec![0; counts.len()];
            read_counts(&block, order, first, &mut back);
            prop_assert_eq!(back, counts);
        }

        /// Whatever the width and the part, runs are found where looking at each count finds them.
        #[test]
        fn runs_are_found_as_one_by_one(
            order in 0_u32..=6,
            used in proptest::collection::vec((0_usize..512, 0_usize..80, any::<bool>()), 0..12),
            (start, end) in (0_usize..512, 0_usize..512),
        ) {
            let mut block = vec![0_u8; 4096];
            let count = (block.len() * 8) >> order;
            for (first, len, is_used) in used {
                for index in first..(first + len).min(count) {
                    refcount_set(&mut block, order, index, u64::from(is_used));
                }
            }
            let part = start.min(end)..start.max(end);
            let by_one = |wanted: bool| {
                let mut one = part.clone();
                one.find(|&at| (refcount_get(&block, order, at) == 0) == wanted).unwrap_or(part.end)
            };
            prop_assert_eq!(next_free(&block, order, part.clone()), by_one(true));
            prop_assert_eq!(next_used(&block, order, part.clone()), by_one(false));
        }
    }
}
