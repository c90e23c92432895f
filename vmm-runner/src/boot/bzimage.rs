//! The bzImage container (Linux: Documentation/arch/x86/boot.rst) and the kernel packed inside it.

use std::io::Read;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::in_memory;
use crate::{Error, Result, machine::GuestMemory};

/// Where the setup header stands.
const HEADER_AT: usize = 0x1F1;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The protocol that can say where the payload is.
const VERSION_PAYLOAD: u16 = 0x0208;
/// The protocol that says how much memory the kernel needs to unpack itself.
const VERSION_INIT_SIZE: u16 = 0x020A;
/// Load flags: the kernel belongs above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// Extended load flags: there is a 64-bit entry.
const HAS_64_BIT_ENTRY: u16 = 1;
/// The 64-bit entry is so far behind the start.
pub(super) const ENTRY_64: u64 = 0x200;
/// Blocks of LZ4's legacy frame unpack to at most this.
const LZ4_BLOCK_BYTES: usize = 8 << 20;
/// Magic number of LZ4's legacy frame.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4C, 0x18];
/// Magic number of a Zstandard frame (RFC 8878).
const ZSTD: [u8; 4] = [0x28, 0xB5, 0x2F, 0xFD];
/// Magic number of gzip (RFC 1952).
const GZIP: [u8; 2] = [0x1F, 0x8B];

/// The setup header of a bzImage.
#[derive(Clone, Copy)]
pub(super) struct Setup(setup_header);

impl Setup {
    /// `None` when this is no bzImage that loads high.
    pub(super) fn read(image: &[u8]) -> Option<Self> {
        let mut header = setup_header::default();
        let bytes = header.as_mut_slice();
        // Old kernels have a shorter header; what is behind it is code, and not looked at without its version.
        bytes.copy_from_slice(image.get(HEADER_AT..HEADER_AT + bytes.len())?);
        let (magic, flags) = (header.header, header.loadflags);
        (magic == MAGIC && flags & LOADED_HIGH != 0).then_some(Self(header))
    }

    pub(super) fn header(&self) -> setup_header {
        self.0
    }

    /// The byte behind the highest one of an initial file system.
    pub(super) fn initrd_limit(&self) -> u64 {
        u64::from(self.0.initrd_addr_max).saturating_add(1)
    }

    /// Where the kernel proper begins in the file.
    fn kernel_at(&self) -> usize {
        let sectors = match self.0.setup_sects {
            0 => 4,
            sectors => usize::from(sectors),
        };
        (sectors + 1) * 512
    }

    /// The kernel inside; `None` when it is packed in a way that is not known here, or not packed.
    pub(super) fn unpack(&self, image: &[u8], limit: u64) -> Result<Option<Vec<u8>>> {
        if self.0.version < VERSION_PAYLOAD {
            return Ok(None);
        }
        let start = self.kernel_at().saturating_add(self.0.payload_offset as usize);
        let end = start.saturating_add(self.0.payload_length as usize);
        let Some(payload) = image.get(start..end) else {
            return Err(bad("the payload reaches behind the end of the file"));
        };
        let unpacked = if payload.starts_with(&LZ4_LEGACY) {
            Some(unpack_lz4(payload, limit)?)
        } else if payload.starts_with(&ZSTD) {
            let decoder =
                zstd::stream::read::Decoder::with_buffer(payload).map_err(|error| bad(&error.to_string()))?;
            Some(read_all(decoder.single_frame(), limit)?)
        } else if payload.starts_with(&GZIP) {
            Some(read_all(flate2::read::GzDecoder::new(payload), limit)?)
        } else {
            None
        };
        Ok(unpacked.filter(|kernel| kernel.starts_with(b"\x7fELF")))
    }

    /// Puts the kernel, packed as it is, where it unpacks itself. Returns the byte behind what it needs.
    pub(super) fn load(&self, image: &[u8], memory: &GuestMemory) -> Result<u64> {
        let has_entry = self.0.version >= VERSION_INIT_SIZE && self.0.xloadflags & HAS_64_BIT_ENTRY != 0;
        if !has_entry {
            return Err(bad("it has no 64-bit entry, and cannot be unpacked on the host"));
        }
        let kernel = image.get(self.kernel_at()..).ok_or_else(|| bad("the file ends inside its header"))?;
        let at = self.load_address();
        memory.write_slice(kernel, at).map_err(in_memory("the kernel"))?;
        let needs = u64::from(self.0.init_size).max(kernel.len() as u64);
        at.0.checked_add(needs).ok_or_else(|| bad("it wants more memory than there can be"))
    }

    pub(super) fn load_address(&self) -> GuestAddress {
        GuestAddress(u64::from(self.0.code32_start))
    }
}

fn bad(why: &str) -> Error {
    Error::Invalid(format!("the kernel is damaged or too old: {why}"))
}

fn read_all(decoder: impl Read, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = decoder.take(limit + 1).read_to_end(&mut bytes).map_err(|error| bad(&error.to_string()))?;
    if read as u64 > limit {
        return Err(bad("it unpacks to more than any kernel has"));
    }
    Ok(bytes)
}

/// LZ4's legacy frame: after the magic number, blocks with their packed length before them. The kernel's build
/// appends the unpacked length.
fn unpack_lz4(payload: &[u8], limit: u64) -> Result<Vec<u8>> {
    let word = |bytes: &[u8]| bytes.first_chunk().map(|word| u32::from_le_bytes(*word));
    let (packed, length) =
        payload.split_last_chunk().ok_or_else(|| bad("an LZ4 payload without its length"))?;
    let length = u32::from_le_bytes(*length) as usize;
    if length as u64 > limit {
        return Err(bad("it unpacks to more than any kernel has"));
    }
    let mut rest = &packed[LZ4_LEGACY.len().min(packed.len())..];
    let mut kernel = Vec::new();
    while kernel.len() < length {
        let size = word(rest).ok_or_else(|| bad("an LZ4 payload that ends early"))? as usize;
        let block =
            rest.get(4..4usize.saturating_add(size)).ok_or_else(|| bad("an LZ4 block behind the payload"))?;
        rest = &rest[4 + size..];
        let start = kernel.len();
        kernel.resize(start + LZ4_BLOCK_BYTES, 0);
        let count = lz4_flex::block::decompress_into(block, &mut kernel[start..])
            .map_err(|error| bad(&format!("LZ4: {error}")))?;
        kernel.truncate(start + count);
        if count == 0 {
            return Err(bad("an LZ4 block with nothing in it"));
        }
    }
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lz4(content: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        for block in content.chunks(LZ4_BLOCK_BYTES) {
            let packed = lz4_flex::block::compress(block);
            payload.extend(u32::try_from(packed.len()).expect("small").to_le_bytes());
            payload.extend(packed);
        }
        payload.extend(u32::try_from(content.len()).expect("small").to_le_bytes());
        payload
    }

    /// A bzImage around a payload.
    fn around(payload: &[u8]) -> Vec<u8> {
        let header = setup_header {
            header: MAGIC,
            version: 0x020F,
            loadflags: LOADED_HIGH,
            setup_sects: 1,
            payload_offset: 16,
            payload_length: u32::try_from(payload.len()).expect("small"),
            ..Default::default()
        };
        let mut image = vec![0; HEADER_AT];
        image.extend(header.as_slice());
        image.resize(1024 + 16, 0);
        image.extend(payload);
        image
    }

    #[test]
    fn kernels_are_unpacked_however_they_are_packed() {
        let mut kernel = b"\x7fELF".to_vec();
        kernel.extend((0..LZ4_BLOCK_BYTES + 5000).map(|at| u8::try_from(at / 7 % 251).expect("below 251")));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, &kernel).expect("in memory");
        let mut zstd = zstd::encode_all(&kernel[..], 1).expect("in memory");
        zstd.extend(u32::try_from(kernel.len()).expect("small").to_le_bytes());
        for payload in [lz4(&kernel), gzip.finish().expect("in memory"), zstd] {
            let image = around(&payload);
            let setup = Setup::read(&image).expect("a bzImage");
            assert!(setup.unpack(&image, 64 << 20).expect("sound") == Some(kernel.clone()));
            assert!(setup.unpack(&image, 1 << 20).is_err(), "a limit");
            assert!(setup.unpack(&image[..image.len() - 1], 64 << 20).is_err(), "a short file");
        }
        let image = around(b"\xFD7zXZ\0");
        assert_eq!(
            Setup::read(&image).expect("a bzImage").unpack(&image, 1 << 20).expect("not an error"),
            None
        );
    }

    #[test]
    fn damaged_payloads_are_errors() {
        let good = lz4(&[b"\x7fELF".to_vec(), vec![7; 100_000]].concat());
        for at in [4, 5, 8, 12, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 0xFF;
            let image = around(&bad);
            let setup = Setup::read(&image).expect("a bzImage");
            // An answer, whichever; never a panic, and never more than the limit.
            if let Ok(Some(kernel)) = setup.unpack(&image, 1 << 20) {
                assert!(kernel.len() <= (1 << 20) + LZ4_BLOCK_BYTES);
            }
        }
    }
}
