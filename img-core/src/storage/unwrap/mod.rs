//! Images inside compressed files and archives, unwrapped while they are read.
//!
//! Wrappers may stand in each other (a tar archive in an xz stream). What comes out is bounded, and so is what a
//! decompressor may keep: a few bytes can claim to be a window of gigabytes, or a disk of zeroes without end. Every
//! stream is read to its end, so that its sums are looked at and one that breaks off is an error.

mod tar_member;

use std::{
    fmt,
    io::{self, BufRead as _, BufReader, Read},
};

use self::tar_member::TarMember;

/// What an image can be wrapped in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrapper {
    /// gzip (RFC 1952), any number of members.
    Gzip,
    /// xz, any number of streams.
    Xz,
    /// Zstandard (RFC 8878), any number of frames.
    Zstd,
    /// A tar archive: POSIX ustar and pax, GNU's long names.
    Tar,
}

impl Wrapper {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Gzip, Self::Xz, Self::Zstd, Self::Tar];

    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gz",
            Self::Xz => "xz",
            Self::Zstd => "zst",
            Self::Tar => "tar",
        }
    }

    /// The wrapper of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|wrapper| wrapper.name() == name)
    }

    /// The wrapper that a stream which begins with `head` says to have, by its magic number.
    #[must_use]
    pub fn of(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            _ => (head.get(257..262) == Some(b"ustar")).then_some(Self::Tar),
        }
    }
}

impl fmt::Display for Wrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How to unwrap.
#[derive(Clone, Debug)]
pub struct UnwrapOptions {
    /// The wrappers, outermost first; `None` takes off those that are there by their magic numbers.
    pub wrappers: Option<Vec<Wrapper>>,
    /// The member of a tar archive; `None` for the only one there is.
    pub member: Option<String>,
    /// What may come out of each wrapper, in bytes.
    pub max_bytes: u64,
}

/// How many wrappers are taken off at most.
const MAX_WRAPPERS: usize = 4;

/// The largest window that a decompressor may ask for: `xz -7`, `zstd -19` and what is below them have less.
const MAX_WINDOW_BYTES: u64 = 16 << 20;

/// What liblzma takes beside its window.
const XZ_OVERHEAD_BYTES: u64 = 1 << 20;

/// Takes the wrappers off `input`: what is inside, read as it is asked for.
///
/// # Errors
/// When `input` cannot be read, a wrapper is not there, or an archive has no such member.
pub fn unwrap(input: Box<dyn Read + Send>, options: &UnwrapOptions) -> io::Result<Box<dyn Read + Send>> {
    let mut input: Box<dyn Read + Send> = input;
    let mut wanted = options.member.as_deref();
    let mut named = options.wrappers.as_ref().map(|wrappers| wrappers.iter().copied());
    for _ in 0..=MAX_WRAPPERS {
        let reader = Peekable::new(input)?;
        let there = Wrapper::of(reader.head());
        let wrapper = match &mut named {
            None => there,
            Some(named) => match (named.next(), there) {
                (Some(wrapper), Some(there)) if wrapper == there => Some(wrapper),
                (Some(wrapper), _) => return Err(invalid(format!("there is no {wrapper} stream"))),
                (None, _) => None,
            },
        };
        let Some(wrapper) = wrapper else {
            return match wanted {
                Some(member) => Err(invalid(format!("there is no tar archive that could hold '{member}'"))),
                None => Ok(Box::new(reader)),
            };
        };
        let inside: Box<dyn Read + Send> = match wrapper {
            Wrapper::Gzip => Box::new(flate2::read::MultiGzDecoder::new(reader)),
            Wrapper::Xz => {
                let stream = liblzma::stream::Stream::new_stream_decoder(
                    MAX_WINDOW_BYTES + XZ_OVERHEAD_BYTES,
                    liblzma::stream::CONCATENATED,
                )
                .map_err(io::Error::other)?;
                Box::new(Xz(liblzma::read::XzDecoder::new_stream(reader, stream)))
            }
            Wrapper::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::new(reader)?;
                decoder.window_log_max(MAX_WINDOW_BYTES.ilog2())?;
                Box::new(decoder)
            }
            Wrapper::Tar => {
                wanted = None;
                Box::new(TarMember::find(reader, options.member.as_deref())?)
            }
        };
        input = Box::new(Bounded { inside, wrapper, left: options.max_bytes, max_bytes: options.max_bytes });
    }
    Err(invalid(format!("more than {MAX_WRAPPERS} wrappers in each other")))
}

fn invalid(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// A stream whose first bytes were looked at.
struct Peekable {
    head: Vec<u8>,
    taken: usize,
    rest: BufReader<Box<dyn Read + Send>>,
}

/// As far as the magic number of a tar archive.
const HEAD_BYTES: u64 = 512;

impl Peekable {
    fn new(input: Box<dyn Read + Send>) -> io::Result<Self> {
        let mut rest = BufReader::with_capacity(64 << 10, input);
        let mut head = Vec::new();
        (&mut rest).take(HEAD_BYTES).read_to_end(&mut head)?;
        Ok(Self { head, taken: 0, rest })
    }

    fn head(&self) -> &[u8] {
        &self.head
    }
}

impl Read for Peekable {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.taken < self.head.len() {
            let count = (&self.head[self.taken..]).read(buf)?;
            self.taken += count;
            return Ok(count);
        }
        let there = self.rest.fill_buf()?;
        let count = there.len().min(buf.len());
        buf[..count].copy_from_slice(&there[..count]);
        self.rest.consume(count);
        Ok(count)
    }
}

/// liblzma says that its limit is reached in a way that names neither.
struct Xz<R: Read>(liblzma::read::XzDecoder<R>);

impl<R: Read> Read for Xz<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf).map_err(|error| {
            let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<liblzma::stream::Error>());
            match inner {
                Some(liblzma::stream::Error::MemLimit) => invalid(format!(
                    "the xz stream needs a window of more than {} MiB",
                    MAX_WINDOW_BYTES >> 20
                )),
                _ => error,
            }
        })
    }
}

/// What comes out of a wrapper, up to its limit.
struct Bounded {
    inside: Box<dyn Read + Send>,
    wrapper: Wrapper,
    left: u64,
    max_bytes: u64,
}

impl Read for Bounded {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.inside.read(buf)?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| {
            invalid(format!(
                "more than {} bytes come out of the {} stream (--limits unwrapped={})",
                self.max_bytes, self.wrapper, self.max_bytes
            ))
        })?;
        Ok(count)
    }
}
