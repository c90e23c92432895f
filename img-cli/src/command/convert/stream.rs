//! `img convert - ...`: sources that are read front to back, and what they are wrapped in.

use std::{
    fs::{self, File},
    io::{self, Read, Seek as _, SeekFrom, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::FileTypeExt as _,
    },
    path::Path,
    sync::Arc,
};

use clap::ValueHint;
use img_core::{
    Error,
    format::{Driver, FrontReader, HostFile, registry},
    image::Image,
    job::{
        Progress as _,
        convert::{StreamOptions, StreamTarget, convert_stream},
    },
    storage::{StreamStorage, UnwrapOptions, Wrapper, unwrap},
    text,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::{Mode, OFlags},
    io::Errno,
};

use super::{Args, Job, pipe::PipeTarget};
use crate::{
    command::create,
    context::Context,
    created::Created,
    error::{Failure, os_text},
    limits, names,
    progress::{Reporter, Stops},
    size,
};

/// What may come out of a compressed source when nobody says.
const MAX_UNWRAPPED_BYTES: u64 = 1 << 40;

/// Guest disks are whole sectors.
const SECTOR_BYTES: u64 = 512;

/// How much is looked at when a source is kept: what is all zeroes becomes a hole.
const SPOOL_BLOCK_BYTES: usize = 64 << 10;

/// The options of sources in pipes, in compressed files and archives.
#[derive(Debug, clap::Args)]
pub(super) struct StreamArgs {
    /// Unwrap the source on the fly: what it is wrapped in, outermost first, of gz, xz, zst and tar; "none"; or,
    /// without a value, what its first bytes say. Without this option, names that end in .gz, .xz, .zst, .tar, .tgz
    /// or .txz are unwrapped unless -f is given
    #[arg(long, value_name = "WRAPPERS", num_args = 0..=1, require_equals = true, default_missing_value = "auto", help_heading = "Beyond qemu-img")]
    unwrap: Option<String>,

    /// The member of a tar archive that is the source; not needed when there is only one
    #[arg(long, value_name = "NAME", help_heading = "Beyond qemu-img")]
    member: Option<String>,

    /// The size of a raw source in a pipe, which cannot be seen beforehand: more or less is an error
    #[arg(long, value_name = "BYTES", help_heading = "Beyond qemu-img")]
    source_size: Option<String>,

    /// Keep sources that come out of a pipe or a wrapper in a nameless file in this directory, so that any layout
    /// can be read
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Beyond qemu-img")]
    spool: Option<String>,
}

/// A source that comes front to back.
pub(super) struct StreamSource {
    name: String,
    input: Box<dyn Read + Send>,
}

impl StreamArgs {
    /// The stream that a source of that name is; `None` for a file that can be read anywhere.
    pub(super) fn find(
        &self,
        name: &str,
        args: &Args,
        reporter: &Reporter,
        context: &Context,
    ) -> Result<Option<StreamSource>, Failure> {
        if context.is_reference() {
            return Ok(None);
        }
        if args.source_image_opts {
            let asked = [(self.unwrap.is_some(), "--unwrap"), (self.member.is_some(), "--member")];
            return match asked.iter().find(|(is_given, _)| *is_given) {
                Some((_, option)) => {
                    Err(Failure::new(format!("{option} does not go with --source-image-opts")))
                }
                None => Ok(None),
            };
        }
        let failed = |error: io::Error| Failure::new(format!("Could not open '{name}': {}", os_text(&error)));
        let wrappers = self.wrappers()?;
        let path = text::to_path(names::path(name));
        let is_stdin = matches!(name, "-" | "/dev/stdin");
        let is_pipe = is_stdin || fs::metadata(&path).is_ok_and(|found| found.file_type().is_fifo());
        let by_name = self.unwrap.is_none() && args.source_format.is_none() && is_called_wrapped(&path);
        let unwraps = match (&self.unwrap, by_name) {
            (Some(_), _) => wrappers != Some(Vec::new()),
            // What is read from a pipe to look at it is gone; unwrapping looks by itself.
            (None, by_name) => by_name && (is_pipe || has_magic(&path)),
        };
        if let (false, Some(member)) = (unwraps, &self.member) {
            return Err(Failure::new(format!("{name}: no archive is unwrapped that could hold '{member}'")));
        }
        if !is_pipe && !unwraps {
            return Ok(None);
        }
        let file = if is_stdin {
            io::stdin().as_fd().try_clone_to_owned().map(File::from)
        } else {
            open_at_once(&path)
        };
        let file = file.map_err(failed)?;
        let mut input: Box<dyn Read + Send> = Box::new(Awaited { file, stop: reporter.stops() });
        if unwraps {
            let max_bytes = limits::unwrapped_bytes().unwrap_or(MAX_UNWRAPPED_BYTES);
            let options = UnwrapOptions { wrappers, member: self.member.clone(), max_bytes };
            input = unwrap(input, &options).map_err(failed)?;
        }
        let name = if is_stdin { "standard input".to_owned() } else { name.to_owned() };
        Ok(Some(StreamSource { name, input }))
    }

    /// The wrappers that were named; `None` for those that are there.
    fn wrappers(&self) -> Result<Option<Vec<Wrapper>>, Failure> {
        let list = match self.unwrap.as_deref() {
            None | Some("auto") => return Ok(None),
            Some("none") => return Ok(Some(Vec::new())),
            Some(list) => list,
        };
        let wrapper = |word: &str| {
            Wrapper::from_name(word).ok_or_else(|| {
                Failure::usage(format!(
                    "--unwrap expects gz, xz, zst or tar, several with commas, not '{word}'"
                ))
            })
        };
        list.split(',').map(wrapper).collect::<Result<_, _>>().map(Some)
    }

    fn source_bytes(&self) -> Result<Option<u64>, Failure> {
        let read = |text: &String| size::argument("source size", text, size::MAX_BYTES).map_err(Failure::new);
        self.source_size.as_ref().map(read).transpose()
    }

    /// Where streams are kept, if they are.
    pub(super) fn spool(&self) -> Option<&str> {
        self.spool.as_deref()
    }
}

/// Opens a file for reading; a pipe too before somebody writes to it.
fn open_at_once(path: &Path) -> io::Result<File> {
    let flags = OFlags::CLOEXEC | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags | OFlags::NONBLOCK, Mode::empty())?;
    rustix::fs::fcntl_setfl(&fd, OFlags::empty())?;
    Ok(File::from(fd))
}

/// How long nothing may come before somebody asks whether to go on waiting.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A file whose bytes may be long in coming; who waits for them can be stopped.
struct Awaited {
    file: File,
    stop: Stops,
}

impl Read for Awaited {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut asked = [PollFd::new(&self.file, PollFlags::IN)];
            match rustix::event::poll(&mut asked, Some(&PATIENCE)) {
                Ok(0) | Err(Errno::INTR) if self.stop.is_cancelled() => {
                    return Err(io::Error::other(Error::Cancelled));
                }
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return self.file.read(buf),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn is_called_wrapped(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    ["gz", "xz", "zst", "tar", "tgz", "txz"].contains(&ending)
}

/// Whether the file begins as its name says. One that cannot be read is an image that cannot be opened.
fn has_magic(path: &Path) -> bool {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| file.take(512).read_to_end(&mut head));
    read.is_ok() && Wrapper::of(&head).is_some()
}

impl StreamSource {
    /// Keeps all of it in a nameless file in `directory`.
    ///
    /// # Errors
    /// When the stream breaks off, or the directory takes no more.
    pub(super) fn spool(mut self, directory: &str) -> Result<File, Failure> {
        let mut file = tempfile::tempfile_in(text::to_path(directory))
            .map_err(|error| Failure::new(format!("{directory}: {}", os_text(&error))))?;
        let mut block = vec![0; SPOOL_BLOCK_BYTES];
        let mut at = 0_u64;
        loop {
            let mut filled = 0;
            while filled < block.len() {
                match self.input.read(&mut block[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        return Err(Failure::new(format!(
                            "{}: read at byte {at:#x}: {}",
                            self.name,
                            os_text(&error)
                        )));
                    }
                }
            }
            let kept = &block[..filled];
            let written = if kept.iter().all(|byte| *byte == 0) {
                file.seek(SeekFrom::Current(i64::try_from(filled).expect("a block"))).map(drop)
            } else {
                file.write_all(kept)
            };
            at += filled as u64;
            let written =
                if filled < block.len() { written.and_then(|()| file.set_len(at)) } else { written };
            written.map_err(|error| {
                Failure::new(format!("{directory}: keeping {}: {}", self.name, os_text(&error)))
            })?;
            if filled < block.len() {
                return Ok(file);
            }
        }
    }
}

/// The name under which an open file is an image.
pub(super) fn name_of(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

impl Job<'_> {
    /// Copies the one source, a stream, into the target.
    pub(super) fn copy_stream(&self, source: StreamSource, created: &mut Created) -> Result<(), Failure> {
        let args = self.args;
        let refused = [
            (args.snapshot.is_some(), "-l (a snapshot)"),
            (args.backing.is_some(), "-B (a backing file)"),
            (args.bitmaps, "--bitmaps"),
            (args.dirty_bitmap.is_some(), "--dirty-bitmap"),
            (args.copy_range_offloading, "-C (copying by the host)"),
            (args.source_cache.is_some(), "-T (a cache mode)"),
            (args.oob_writes, "-W (writing out of order)"),
            (args.salvage, "--salvage"),
        ];
        if let Some((_, option)) = refused.iter().find(|(is_given, _)| *is_given) {
            return Err(Failure::new(format!(
                "{option} is not possible with a source that is read front to back: {} (--spool DIR keeps it in a file)",
                source.name
            )));
        }
        let failed = |error: img_core::Error| Failure::open(&source.name, &error);
        let expected_bytes = args.stream.source_bytes()?;
        let stream = Arc::new(StreamStorage::new(source.input, text::to_path(&source.name)));
        let reader = self.driver_of(&stream)?.front_reader(Arc::clone(&stream)).map_err(failed)?;
        let known_bytes = reader.virtual_size_bytes().or(expected_bytes);
        if let (Some(own), Some(expected)) = (reader.virtual_size_bytes(), expected_bytes)
            && own != expected
        {
            return Err(Failure::new(format!("{}: the disk has {own} bytes, not {expected}", source.name)));
        }
        let options = StreamOptions {
            expected_bytes,
            sparse_bytes: self.numbers.sparse_bytes.unwrap_or(4096),
            compress: args.compress,
            level: self.numbers.level,
            threads: self.numbers.threads,
            rate_bytes: self.numbers.rate_bytes.filter(|rate| *rate > 0),
        };
        let copy = |reader: Box<dyn FrontReader>, target: StreamTarget<'_>| {
            convert_stream(&stream, reader, target, &options, self.reporter).map_err(Failure::from)
        };
        if let Some(pipe) = PipeTarget::find(self.target, self.context) {
            let size = known_bytes.ok_or_else(|| unknown_size(&source.name))?;
            let writer = self.front_writer(pipe, size)?;
            return copy(reader, StreamTarget::Pipe(writer, &mut pipe.open()?));
        }
        let target = self.stream_target(known_bytes, &source.name, created)?;
        let copied = copy(reader, StreamTarget::Image(&target));
        let closed = target.close();
        copied?;
        closed.map_err(Failure::from)
    }

    fn driver_of(&self, stream: &StreamStorage) -> Result<&'static dyn Driver, Failure> {
        if let Some(format) = &self.args.source_format {
            return create::driver(format);
        }
        use img_core::storage::Storage as _;
        let failed = |error: img_core::Error| Failure::from(error);
        let mut head = vec![0; stream.available(0, registry::PROBE_BYTES).map_err(failed)?];
        stream.read_at(&mut head, 0).map_err(failed)?;
        Ok(registry::probe(&head, stream.path()))
    }

    /// # Errors
    /// When the one source does not have the size that was announced.
    pub(super) fn check_source_size(&self, sources: &[Image]) -> Result<(), Failure> {
        let Some(expected) = self.args.stream.source_bytes()? else { return Ok(()) };
        let ([source], [name]) = (sources, self.sources) else {
            return Err(Failure::new("--source-size is only possible with a single source"));
        };
        let (top, disk_bytes) = (&source.layers()[0], source.virtual_size_bytes());
        let file_bytes = match top.file(HostFile::IMAGE).filter(|_| top.is_its_file()) {
            Some(file) => Some(file.len_bytes()?),
            None => None,
        };
        // The disk is whole sectors; a raw file, and what was announced, need not be.
        let own = file_bytes
            .filter(|bytes| bytes.next_multiple_of(SECTOR_BYTES) == disk_bytes)
            .unwrap_or(disk_bytes);
        if own != expected {
            return Err(Failure::new(format!("{name}: the disk has {own} bytes, not {expected}")));
        }
        Ok(())
    }

    /// Makes and opens the target of a stream, which reads as zeroes.
    fn stream_target(
        &self,
        bytes: Option<u64>,
        source: &str,
        created: &mut Created,
    ) -> Result<Image, Failure> {
        let cache = self.target_cache()?;
        if self.args.no_create {
            let target = self.open_target(cache)?;
            let size = bytes.ok_or_else(|| unknown_size(source))?;
            if target.virtual_size_bytes() < size {
                return Err(Failure::new("output file is smaller than input file"));
            }
            if !self.args.target_is_zero {
                // What the source does not reach stays, as with sources that are files.
                let end = size.next_multiple_of(SECTOR_BYTES).min(target.virtual_size_bytes());
                target.write_zeroes(0..end, true)?;
            }
            return Ok(target);
        }
        let can_grow = matches!(self.args.output_format.as_deref(), None | Some("raw" | "qcow2"));
        if bytes.is_none() && !can_grow {
            return Err(unknown_size(source));
        }
        self.create_target(self.plan_target(bytes.unwrap_or(0), 1)?, created)?;
        self.stop_if_asked()?;
        self.open_target(cache)
    }
}

fn unknown_size(source: &str) -> Failure {
    Failure::new(format!(
        "{source}: the target has to know the size of the disk, which this source tells only at its end: \
         --source-size BYTES says it, --spool DIR finds it out"
    ))
}
