//! Decoding stored runs, and the few decoded units that are kept.
//!
//! Contexts are kept per thread; output never exceeds one unit, whatever the stream says.

use std::{
    cell::RefCell,
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use flate2::{Decompress, FlushDecompress};
use libdeflater::{DecompressionError, Decompressor};
use zstd::zstd_safe::{self, DCtx, InBuffer, OutBuffer, ResetDirective};

use crate::format::{Codec, HostFile};

/// How many decoded units an image keeps: several readers, each in its own unit.
const KEPT_UNITS: usize = 16;

/// How many bytes of decoded units an image keeps, as long as there is more than one.
const KEPT_BYTES: usize = 4 << 20;

thread_local! {
    static DEFLATE: RefCell<Decompressor> = RefCell::new(Decompressor::new());
    static ZSTD: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// Fills all of `unit` from the stream at the start of `stored`. What stands behind the stream is ignored.
///
/// # Errors
/// What is wrong with the stream, in words.
pub(super) fn decode(how: Codec, stored: &[u8], unit: &mut [u8]) -> Result<(), &'static str> {
    match how {
        Codec::Deflate => decode_deflate(stored, unit),
        Codec::Zlib => decode_zlib(stored, unit),
        Codec::Zstd => decode_zstd(stored, unit),
    }
}

fn decode_deflate(stored: &[u8], unit: &mut [u8]) -> Result<(), &'static str> {
    let written = DEFLATE.with_borrow_mut(|decoder| decoder.deflate_decompress(stored, unit));
    match written {
        Ok(bytes) if bytes == unit.len() => Ok(()),
        Ok(_) => Err("a stream that ends too early"),
        Err(_) => decode_prefix(Decompress::new(false), stored, unit),
    }
}

fn decode_zlib(stored: &[u8], unit: &mut [u8]) -> Result<(), &'static str> {
    let written = DEFLATE.with_borrow_mut(|decoder| decoder.zlib_decompress(stored, unit));
    match written {
        Ok(bytes) if bytes == unit.len() => Ok(()),
        Ok(_) => Err("a stream that ends too early"),
        // Bytes that do not add up to the checksum are not the ones that were stored.
        Err(DecompressionError::BadData) => Err("a damaged stream"),
        Err(DecompressionError::InsufficientSpace) => decode_prefix(Decompress::new(true), stored, unit),
    }
}

/// The fast decoder wants a whole, correct stream. One that is longer than the unit or breaks off behind it still
/// holds the unit, and the reference reads it.
fn decode_prefix(mut decoder: Decompress, stored: &[u8], unit: &mut [u8]) -> Result<(), &'static str> {
    let outcome = decoder.decompress(stored, unit, FlushDecompress::Finish);
    let whole = usize::try_from(decoder.total_out()) == Ok(unit.len());
    if outcome.is_ok() && whole { Ok(()) } else { Err("a damaged stream") }
}

fn decode_zstd(stored: &[u8], unit: &mut [u8]) -> Result<(), &'static str> {
    ZSTD.with_borrow_mut(|decoder| {
        // In one go, straight into the unit, where the frame is as it should be.
        if let Ok(frame_bytes) = zstd_safe::find_frame_compressed_size(stored)
            && let Some(frame) = stored.get(..frame_bytes)
            && decoder.decompress(unit, frame) == Ok(unit.len())
        {
            return Ok(());
        }
        // Several frames, or one longer than the unit.
        decoder.reset(ResetDirective::SessionOnly).map_err(zstd_safe::get_error_name)?;
        let unit_bytes = unit.len();
        let mut input = InBuffer::around(stored);
        let mut output = OutBuffer::around(unit);
        while output.pos() < unit_bytes {
            let before = (input.pos(), output.pos());
            decoder.decompress_stream(&mut output, &mut input).map_err(zstd_safe::get_error_name)?;
            if (input.pos(), output.pos()) == before {
                return Err("a stream that ends too early");
            }
        }
        Ok(())
    })
}

/// Which stored run a decoded unit came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UnitKey {
    pub(super) depth: usize,
    pub(super) file: HostFile,
    pub(super) at_bytes: u64,
    /// Of [`DecodedUnits::generation`], read after the map was asked.
    pub(super) generation: u64,
}

/// The last decoded units of an image.
///
/// A place in the host file can hold another run later. That takes a compressed write, which begins a new
/// [generation](Self::begin_generation) before the map points there; a reader learns the generation after
/// it asked the map. So nobody who was sent to the new run finds the old unit.
#[derive(Debug, Default)]
pub(super) struct DecodedUnits {
    kept: Mutex<VecDeque<(UnitKey, Arc<[u8]>)>>,
    generation: AtomicU64,
}

impl DecodedUnits {
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn begin_generation(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn get(&self, key: &UnitKey) -> Option<Arc<[u8]>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(known, _)| known == key)?;
        let entry = kept.remove(at)?;
        let unit = Arc::clone(&entry.1);
        kept.push_front(entry);
        Some(unit)
    }

    pub(super) fn put(&self, key: UnitKey, unit: Arc<[u8]>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(known, _)| known.generation == key.generation && *known != key);
        kept.push_front((key, unit));
        let mut bytes: usize = kept.iter().map(|(_, unit)| unit.len()).sum();
        while kept.len() > KEPT_UNITS || (bytes > KEPT_BYTES && kept.len() > 1) {
            bytes -= kept.pop_back().map_or(0, |(_, unit)| unit.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn text() -> Vec<u8> {
        (0..65536u32).map(|n| (n / 7 * 31 % 251).to_le_bytes()[0]).collect()
    }

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zlib(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::new(6));
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// The text, stored in each way.
    fn stored(text: &[u8]) -> [(Codec, Vec<u8>); 3] {
        [(Codec::Deflate, deflated(text)), (Codec::Zlib, zlib(text)), (Codec::Zstd, zstandard(text))]
    }

    fn zstandard(bytes: &[u8]) -> Vec<u8> {
        let mut stored = vec![0; zstd_safe::compress_bound(bytes.len())];
        let length = zstd_safe::compress(&mut stored[..], bytes, 3).unwrap();
        stored.truncate(length);
        stored
    }

    #[test]
    fn what_stands_behind_the_stream_is_ignored() {
        let text = text();
        for (how, stored) in stored(&text) {
            for foreign in [&[][..], &[0; 700], &[0xff; 700], &stored] {
                let run = [&stored[..], foreign].concat();
                let mut unit = vec![0; text.len()];
                assert_eq!(decode(how, &run, &mut unit), Ok(()), "{how:?}");
                assert!(unit == text);
            }
        }
    }

    #[test]
    fn a_unit_is_never_exceeded_and_never_short() {
        let text = text();
        for (how, stored) in stored(&text) {
            let mut half = vec![0; text.len() / 2];
            assert_eq!(decode(how, &stored, &mut half), Ok(()), "{how:?}");
            assert!(half == text[..half.len()]);
            assert!(decode(how, &stored, &mut vec![0; text.len() + 1]).is_err(), "{how:?}");
            assert!(decode(how, &stored[..stored.len() / 2], &mut vec![0; text.len()]).is_err());
            assert!(decode(how, &[0xff; 600], &mut vec![0; text.len()]).is_err());
            assert!(decode(how, &[], &mut vec![0; text.len()]).is_err());
        }
    }

    #[test]
    fn units_of_an_older_generation_are_not_found() {
        let units = DecodedUnits::default();
        let key = |generation| UnitKey { depth: 0, file: HostFile::IMAGE, at_bytes: 7, generation };
        units.put(key(units.generation()), Arc::from([1u8; 4]));
        assert!(units.get(&key(units.generation())).is_some());
        units.begin_generation();
        assert!(units.get(&key(units.generation())).is_none());
    }
}
