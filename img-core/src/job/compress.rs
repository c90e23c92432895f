//! Making compressed clusters.
//!
//! # Deflate: the window question
//! QEMU writes qcow2's zlib clusters with a 4 KiB window and sets up its decoder for one (`windowBits` -12),
//! but it inflates a cluster in one call into a buffer that holds the whole cluster. zlib looks at its window
//! only for distances that reach behind the output of the present call, so any distance inside the cluster is
//! decoded; qcow2's specification asks for a deflate stream (RFC 1951) and names no window. We therefore let
//! libdeflate use its 32 KiB window: output is smaller than the reference's at a fraction of its time. Tests
//! prove with `qemu-img`, and with zlib-rs set to a 4 KiB window, that such clusters are read. What cannot
//! read them is a decoder that asks for its output in pieces smaller than a cluster *and* limits its window.
//!
//! # Level
//! `level` counts as in the library behind it: 1 to 12 for deflate, 1 to 22 for Zstandard. The defaults give
//! output no larger than the reference's own (zlib level 6 with its small window, Zstandard level 3).

use libdeflater::CompressionLvl;

use crate::{Error, Result, format::Codec};

/// libdeflate's level whose output on system images is at most as large as zlib's at level 6 and 4 KiB.
const DEFLATE_LEVEL: i32 = 3;

/// What the reference uses.
const ZSTD_LEVEL: i32 = 3;

/// Zstandard's code for an output that does not fit (`ZSTD_error_dstSize_tooSmall`).
const DOES_NOT_FIT: usize = 70_usize.wrapping_neg();

/// A thread's own compressor, with the state that is worth keeping between clusters.
pub(super) enum Compressor {
    Deflate(libdeflater::Compressor),
    Zstd(zstd::zstd_safe::CCtx<'static>),
}

impl Compressor {
    /// A compressor for `how` at `level`, or at its default.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a level that the codec does not have.
    pub(super) fn new(how: Codec, level: Option<i32>) -> Result<Self> {
        let bad_level = |most: i32| Error::Invalid(format!("Compression level must be between 1 and {most}"));
        match how {
            Codec::Deflate => {
                let level = level.unwrap_or(DEFLATE_LEVEL);
                if level < 1 {
                    return Err(bad_level(12));
                }
                let level = CompressionLvl::new(level).map_err(|_| bad_level(12))?;
                Ok(Self::Deflate(libdeflater::Compressor::new(level)))
            }
            Codec::Zstd => {
                let level = level.unwrap_or(ZSTD_LEVEL);
                if !(1..=22).contains(&level) {
                    return Err(bad_level(22));
                }
                let mut context = zstd::zstd_safe::CCtx::create();
                context
                    .set_parameter(zstd::zstd_safe::CParameter::CompressionLevel(level))
                    .map_err(|_| bad_level(22))?;
                Ok(Self::Zstd(context))
            }
        }
    }

    /// Compresses a cluster into the front of `out`, which is as long; the length, or `None` when it does not shrink and is to be
    /// stored as it is.
    pub(super) fn compress(&mut self, cluster: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        let stored = match self {
            Self::Deflate(compressor) => match compressor.deflate_compress(cluster, out) {
                Ok(stored) => stored,
                Err(libdeflater::CompressionError::InsufficientSpace) => return Ok(None),
            },
            Self::Zstd(context) => match context.compress2(out, cluster) {
                Ok(stored) => stored,
                Err(DOES_NOT_FIT) => return Ok(None),
                Err(code) => {
                    let reason = zstd::zstd_safe::get_error_name(code);
                    return Err(Error::Invalid(format!("a cluster could not be compressed: {reason}")));
                }
            },
        };
        Ok((stored < cluster.len()).then_some(stored))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 KiB whose best matches are 16 KiB away.
    fn far_matches() -> Vec<u8> {
        let mut state = 1_u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        let block: Vec<u8> = (0..16384).map(|_| noise()).collect();
        block.repeat(4)
    }

    #[test]
    fn far_distances_pass_a_decoder_with_a_small_window_that_gets_the_whole_cluster() {
        let cluster = far_matches();
        let mut compressor = Compressor::new(Codec::Deflate, None).expect("the default level exists");
        let mut out = vec![0; cluster.len()];
        let stored =
            compressor.compress(&cluster, &mut out).expect("enough room").expect("three quarters repeat");
        assert!(stored < 20_000, "{stored} bytes: distances beyond 4 KiB are in use");

        let mut decoder = flate2::Decompress::new_with_window_bits(false, 12);
        let mut back = vec![0; cluster.len()];
        decoder
            .decompress(&out[..stored], &mut back, flate2::FlushDecompress::Finish)
            .expect("a valid stream");
        assert_eq!(back, cluster);
    }

    #[test]
    fn what_does_not_shrink_is_left_alone() {
        let noise = &far_matches()[..16384];
        for how in [Codec::Deflate, Codec::Zstd] {
            let mut compressor = Compressor::new(how, None).expect("the default level exists");
            let mut out = vec![0; noise.len()];
            assert_eq!(compressor.compress(noise, &mut out).expect("enough room"), None, "{how:?}");
        }
    }

    #[test]
    fn unknown_levels_are_refused() {
        for (how, level) in [(Codec::Deflate, 0), (Codec::Deflate, 13), (Codec::Zstd, 0), (Codec::Zstd, 23)] {
            assert!(Compressor::new(how, Some(level)).is_err(), "{how:?} {level}");
        }
    }
}
