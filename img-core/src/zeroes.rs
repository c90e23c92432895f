//! Finding zeroes in memory.

/// Bytes that are or-ed together before the result is looked at: long enough for wide vector code, short
/// enough to stop early.
const STRIDE: usize = 256;

/// Whether every byte is zero. Looks at the first, middle and last bytes before it reads everything, as data
/// rarely passes that.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return true };
    if first | last | bytes[bytes.len() / 2] != 0 {
        return false;
    }
    let (strides, tail) = bytes.as_chunks::<STRIDE>();
    strides.iter().all(|stride| or_all(stride) == 0) && tail.iter().all(|byte| *byte == 0)
}

fn or_all(stride: &[u8; STRIDE]) -> u64 {
    let (words, _) = stride.as_chunks::<8>();
    words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_found() {
        for len in [0, 1, 7, 8, 255, 256, 257, 4096, 4099] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes), "{len} zeroes");
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
