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
//! `level` counts as in the library behind it: 1 to 12 for deflate, 1 to 22 for Zstandard. Without one, output
//! is about as large as the reference's own (zlib level 6 with its small window, Zstandard level 3). For deflate
//! that is the second level: with the larger window it comes within 2 % of the reference on programs, logs, tables
//! and text, where the first loses up to a tenth. Zstandard gets smaller hash tables than its level 3 has for
//! clusters of the usual size: they stay in a core's cache, which takes 6 % of the time for 0.4 % of the output.

use libdeflater::CompressionLvl;
use zstd::zstd_safe::{CCtx, CParameter, get_error_name};

use crate::{Error, Result, format::Codec};

/// The level when none is asked for.
const DEFLATE_LEVEL: i32 = 2;

/// What the reference uses.
const ZSTD_LEVEL: i32 = 3;

/// Zstandard's level 3 hashes long and short matches (`ZSTD_dfast`) into tables of 2^16 and 2^15 entries for inputs of
/// these sizes, and into smaller ones for smaller inputs.
const ZSTD_MIDDLE_BYTES: std::ops::RangeInclusive<usize> = 32 << 10..=128 << 10;

/// Instead, as powers of two.
const ZSTD_TABLES: [CParameter; 2] = [CParameter::HashLog(14), CParameter::ChainLog(13)];

/// Zstandard's code for an output that does not fit (`ZSTD_error_dstSize_tooSmall`).
const DOES_NOT_FIT: usize = 70_usize.wrapping_neg();

/// A thread's own compressor, with the state that is worth keeping between clusters.
pub(super) enum Compressor {
    Deflate {
        compressor: libdeflater::Compressor,
        /// Whether the stream gets zlib's header and checksum, and is kept whatever its length: a format with
        /// such streams has no other way to store a cluster.
        zlib: bool,
    },
    Zstd(CCtx<'static>),
}

impl Compressor {
    /// Whether the codec has this level.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it has not.
    pub(super) fn check_level(how: Codec, level: Option<i32>) -> Result<()> {
        let most = match how {
            Codec::Deflate | Codec::Zlib => 12,
            Codec::Zstd => 22,
        };
        match level {
            Some(level) if !(1..=most).contains(&level) => {
                Err(Error::Invalid(format!("Compression level must be between 1 and {most}")))
            }
            _ => Ok(()),
        }
    }

    /// A compressor for `how` at `level`, or at its default, of clusters of `cluster_bytes`.
    ///
    /// # Errors
    /// As [`Self::check_level`].
    pub(super) fn new(how: Codec, level: Option<i32>, cluster_bytes: usize) -> Result<Self> {
        Self::check_level(how, level)?;
        if how != Codec::Zstd {
            let level = CompressionLvl::new(level.unwrap_or(DEFLATE_LEVEL)).expect("it was checked");
            let compressor = libdeflater::Compressor::new(level);
            return Ok(Self::Deflate { compressor, zlib: how == Codec::Zlib });
        }
        let mut parameters = vec![CParameter::CompressionLevel(level.unwrap_or(ZSTD_LEVEL))];
        if level.is_none() && ZSTD_MIDDLE_BYTES.contains(&cluster_bytes) {
            parameters.extend(ZSTD_TABLES);
        }
        let mut context = CCtx::create();
        for parameter in parameters {
            context.set_parameter(parameter).map_err(zstd_failed)?;
        }
        Ok(Self::Zstd(context))
    }

    /// How long the buffer must be that takes any compressed cluster of `cluster_bytes`.
    pub(super) fn bound(how: Codec, cluster_bytes: usize) -> usize {
        match how {
            Codec::Deflate | Codec::Zstd => cluster_bytes,
            // Stored blocks of at least 5000 bytes with 5 in front of each, and the checksum (libdeflate's own
            // bound, with room to spare).
            Codec::Zlib => cluster_bytes + cluster_bytes / 1000 + 64,
        }
    }

    /// Compresses a cluster into the front of `out`, which is as long as [`Self::bound`] says; the length, or
    /// `None` when it does not shrink and is to be stored as it is.
    pub(super) fn compress(&mut self, cluster: &[u8], out: &mut [u8]) -> Result<Option<usize>> {
        let stored = match self {
            Self::Deflate { compressor, zlib } => {
                let Some(stored) = deflate(compressor, *zlib, cluster, out) else { return Ok(None) };
                if *zlib {
                    return Ok(Some(stored));
                }
                stored
            }
            Self::Zstd(context) => match context.compress2(out, cluster) {
                Ok(stored) => stored,
                Err(DOES_NOT_FIT) => return Ok(None),
                Err(code) => return Err(zstd_failed(code)),
            },
        };
        Ok((stored < cluster.len()).then_some(stored))
    }
}

fn zstd_failed(code: usize) -> Error {
    Error::Invalid(format!("a cluster could not be compressed: {}", get_error_name(code)))
}

/// The length of the stream, when it fits.
fn deflate(
    compressor: &mut libdeflater::Compressor,
    zlib: bool,
    cluster: &[u8],
    out: &mut [u8],
) -> Option<usize> {
    // The only error there is says that the stream does not fit.
    if zlib {
        compressor.zlib_compress(cluster, out).ok()
    } else {
        compressor.deflate_compress(cluster, out).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::testing::noise;

    /// 64 KiB whose best matches are 16 KiB away.
    fn far_matches() -> Vec<u8> {
        noise(1, 16384).repeat(4)
    }

    #[test]
    fn far_distances_pass_a_decoder_with_a_small_window_that_gets_the_whole_cluster() {
        let cluster = far_matches();
        let mut compressor = Compressor::new(Codec::Deflate, None, 65536).expect("the default level exists");
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
            let mut compressor = Compressor::new(how, None, noise.len()).expect("the default level exists");
            let mut out = vec![0; noise.len()];
            assert_eq!(compressor.compress(noise, &mut out).expect("enough room"), None, "{how:?}");
        }
    }

    #[test]
    fn zlib_streams_are_kept_even_where_they_do_not_shrink() {
        let noise = &far_matches()[..16384];
        for cluster in [&noise[..1], &noise[..512], noise, &[0; 65536], &noise.repeat(128)] {
            let mut compressor =
                Compressor::new(Codec::Zlib, None, cluster.len()).expect("the default level exists");
            let mut out = vec![0; Compressor::bound(Codec::Zlib, cluster.len())];
            let stored = compressor.compress(cluster, &mut out).expect("enough room").expect("kept");
            let mut back = Vec::new();
            let mut decoder = flate2::read::ZlibDecoder::new(&out[..stored]);
            std::io::Read::read_to_end(&mut decoder, &mut back).expect("a valid stream");
            assert!(back == cluster);
        }
    }

    #[test]
    fn smaller_tables_cost_little() {
        let text = [
            include_str!("inspect.rs"),
            include_str!("rebase.rs"),
            include_str!("../format/qcow2/write.rs"),
            include_str!("../format/qcow2/header.rs"),
            include_str!("../format/qcow2/snapshot.rs"),
            include_str!("../format/layer.rs"),
        ]
        .concat();
        let sizes = [None, Some(ZSTD_LEVEL)].map(|level| {
            let mut compressor = Compressor::new(Codec::Zstd, level, 32768).expect("it exists");
            let mut out = vec![0; 32768];
            let stored = |cluster| compressor.compress(cluster, &mut out).expect("it can").unwrap_or(32768);
            text.as_bytes().chunks_exact(32768).map(stored).sum::<usize>()
        });
        assert!(sizes[0] != sizes[1] && sizes[0] * 100 <= sizes[1] * 102, "{sizes:?}");
    }

    #[test]
    fn unknown_levels_are_refused() {
        for (how, level) in [
            (Codec::Deflate, 0),
            (Codec::Deflate, 13),
            (Codec::Zlib, 13),
            (Codec::Zstd, 0),
            (Codec::Zstd, 23),
        ] {
            assert!(Compressor::check_level(how, Some(level)).is_err(), "{how:?} {level}");
        }
    }
}
