//! One member of a tar archive that comes out of a stream.
//!
//! Headers are parsed by the `tar` crate; the walk over them is ours, as the member has to outlive it.

use std::io::{self, Read};

use tar::{EntryType, Header, PaxExtensions};

use super::invalid;

/// Of headers and of the padding behind contents.
const BLOCK_BYTES: u64 = 512;

/// The longest list of attributes or name in front of a member.
const MAX_EXTENSION_BYTES: u64 = 64 << 10;

/// Members that are passed over on the way to the one that is wanted.
const MAX_MEMBERS: u32 = 100_000;

/// The bytes of a member.
pub(super) struct TarMember<R> {
    archive: R,
    left: u64,
    padding: u64,
    /// Nothing else may be in the archive: nobody said which member is wanted.
    is_only: bool,
    has_ended: bool,
}

struct Found {
    name: String,
    size: u64,
}

impl<R: Read> TarMember<R> {
    /// The member called `name`, or the first file, which has to be the only one.
    pub(super) fn find(mut archive: R, name: Option<&str>) -> io::Result<Self> {
        let mut passed = Vec::new();
        while let Some(found) = next_file(&mut archive)? {
            let padding = padding_behind(found.size);
            let clean = found.name.trim_start_matches("./");
            if name.is_none_or(|name| name.trim_start_matches("./") == clean) {
                return Ok(Self {
                    archive,
                    left: found.size,
                    padding,
                    is_only: name.is_none(),
                    has_ended: false,
                });
            }
            skip(&mut archive, found.size + padding)?;
            if passed.len() < 10 {
                passed.push(found.name);
            }
        }
        Err(invalid(match name {
            Some(name) => {
                format!("the archive has no member '{name}'; it begins with: {}", passed.join(", "))
            }
            None => "there is no file in the archive".to_owned(),
        }))
    }

    /// Reads what is behind the member: sums of a wrapper around the archive are looked at, and a second file is found.
    fn end(&mut self) -> io::Result<()> {
        skip(&mut self.archive, self.padding)?;
        if self.is_only
            && let Some(other) = next_file(&mut self.archive)?
        {
            return Err(invalid(format!(
                "there is more than one file in the archive ('{}'): name the one that is meant (--member)",
                other.name
            )));
        }
        io::copy(&mut self.archive, &mut io::sink())?;
        Ok(())
    }
}

impl<R: Read> Read for TarMember<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            if !self.has_ended && !buf.is_empty() {
                self.end()?;
                self.has_ended = true;
            }
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let count = self.archive.read(&mut buf[..most])?;
        if count == 0 && most > 0 {
            return Err(broken_off());
        }
        self.left -= count as u64;
        Ok(count)
    }
}

fn padding_behind(size: u64) -> u64 {
    (BLOCK_BYTES - size % BLOCK_BYTES) % BLOCK_BYTES
}

fn broken_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the archive breaks off")
}

/// Passes over members up to the next file; `None` at the end of the archive, which has to be there.
fn next_file(archive: &mut impl Read) -> io::Result<Option<Found>> {
    let (mut long_name, mut pax_size) = (None, None);
    for _ in 0..MAX_MEMBERS {
        let mut header = Header::new_old();
        archive.read_exact(header.as_mut_bytes()).map_err(|_| broken_off())?;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum: u32 = header
            .as_bytes()
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { u32::from(b' ') } else { u32::from(*byte) })
            .sum();
        if header.cksum()? != sum {
            return Err(invalid("a header of the archive is damaged: its sum is wrong"));
        }
        let size = pax_size.take().map_or_else(|| header.entry_size(), Ok)?;
        let behind =
            size.checked_add(padding_behind(size)).ok_or_else(|| invalid("a member of 2^64 bytes"))?;
        match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => {
                let name = long_name.take().unwrap_or_else(|| header.path_bytes().into_owned());
                return Ok(Some(Found { name: String::from_utf8_lossy(&name).into_owned(), size }));
            }
            EntryType::GNUSparse => return Err(invalid("a sparse member (GNU) is not supported")),
            EntryType::GNULongName => {
                let mut name = extension(archive, size)?;
                while name.pop_if(|byte| *byte == 0).is_some() {}
                long_name = Some(name);
            }
            EntryType::XHeader => {
                let bytes = extension(archive, size)?;
                for attribute in PaxExtensions::new(&bytes) {
                    let attribute = attribute?;
                    match attribute.key_bytes() {
                        b"path" => long_name = Some(attribute.value_bytes().to_vec()),
                        b"size" => {
                            let size = attribute.value().ok().and_then(|size| size.parse().ok());
                            pax_size = Some(size.ok_or_else(|| invalid("a size that is no number"))?);
                        }
                        key if key.starts_with(b"GNU.sparse") => {
                            return Err(invalid("a sparse member (GNU) is not supported"));
                        }
                        _ => {}
                    }
                }
            }
            _ => {
                long_name = None;
                skip(archive, behind)?;
            }
        }
    }
    Err(invalid(format!("more than {MAX_MEMBERS} members")))
}

/// The contents of a member that describes the next one.
fn extension(archive: &mut impl Read, size: u64) -> io::Result<Vec<u8>> {
    if size > MAX_EXTENSION_BYTES {
        return Err(invalid(format!("{size} bytes of attributes for one member")));
    }
    let mut bytes = vec![0; usize::try_from(size).expect("at most 64 KiB")];
    archive.read_exact(&mut bytes).map_err(|_| broken_off())?;
    skip(archive, padding_behind(size))?;
    Ok(bytes)
}

fn skip(archive: &mut impl Read, bytes: u64) -> io::Result<()> {
    let passed = io::copy(&mut archive.take(bytes), &mut io::sink())?;
    if passed < bytes { Err(broken_off()) } else { Ok(()) }
}
