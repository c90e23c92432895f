//! `img convert ... -`: the image goes to standard output, or into a named pipe, as it is made.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, IsTerminal as _},
    os::{fd::AsFd as _, unix::fs::FileTypeExt as _},
};

use img_core::{
    Error,
    format::{FrontRequest, FrontWriter, OptionSet},
    image::Image,
    job::convert::convert_to_pipe,
    storage::Pipe,
    text,
};

use super::{Args, Job};
use crate::{
    command::create,
    context::Context,
    error::{Failure, os_text},
    option_list,
};

/// Small parts of an image (markers, tables) are gathered up to this much.
const BUFFER_BYTES: usize = 64 << 10;

/// A target that is written front to back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PipeTarget<'a> {
    Stdout,
    Named(&'a str),
}

impl<'a> PipeTarget<'a> {
    /// What the name of a target means: `-` and `/dev/stdout` are standard output, whatever that is. Under the
    /// reference's name they are files as all others.
    pub(super) fn find(name: &'a str, context: &Context) -> Option<Self> {
        if context.is_reference() {
            return None;
        }
        if matches!(name, "-" | "/dev/stdout") {
            return Some(Self::Stdout);
        }
        let kind = std::fs::metadata(text::to_path(crate::names::path(name))).ok()?.file_type();
        kind.is_fifo().then_some(Self::Named(name))
    }

    fn name(self) -> &'a str {
        match self {
            Self::Stdout => "standard output",
            Self::Named(name) => name,
        }
    }

    /// # Errors
    /// For options that ask for what a pipe cannot be.
    pub(super) fn check(self, args: &Args) -> Result<(), Failure> {
        let refused = [
            (args.no_create, "-n", "there is no image yet"),
            (args.backing.is_some(), "-B", "a backing file"),
            (args.bitmaps, "--bitmaps", "bitmaps"),
            (args.dirty_bitmap.is_some(), "--dirty-bitmap", "a part of the disk"),
            (args.copy_range_offloading, "-C", "copying by the host"),
            (args.oob_writes, "-W", "writing out of order"),
            (args.sparse_size.is_some(), "-S", "holes"),
            (args.output_cache.is_some(), "-t", "a cache mode"),
        ];
        if let Some((_, option, what)) = refused.iter().find(|(is_given, _, _)| *is_given) {
            return Err(Failure::new(format!(
                "{option} ({what}) is not possible in a pipe: {}",
                self.name()
            )));
        }
        if self == Self::Stdout && args.progress.is_given() && !args.quiet {
            return Err(Failure::new("-p (--progress) writes to standard output, where the image goes"));
        }
        if self == Self::Stdout && io::stdout().is_terminal() {
            return Err(Failure::new("the image would go to the terminal: redirect standard output"));
        }
        Ok(())
    }

    pub(super) fn open(self) -> Result<Pipe, Failure> {
        let opened = match self {
            Self::Stdout => io::stdout().as_fd().try_clone_to_owned().map(File::from),
            Self::Named(name) => OpenOptions::new().write(true).open(text::to_path(crate::names::path(name))),
        };
        let file = opened.map_err(|error| {
            Failure::new(format!("Could not open '{}': {}", self.name(), os_text(&error)))
        })?;
        Ok(Pipe::new(Box::new(BufWriter::with_capacity(BUFFER_BYTES, file)), text::to_path(self.name())))
    }
}

impl Job<'_> {
    /// Copies the sources into a pipe.
    pub(super) fn to_pipe(
        &self,
        target: PipeTarget<'_>,
        sources: &[Image],
        total_bytes: u64,
    ) -> Result<(), Failure> {
        let writer = self.front_writer(target, total_bytes)?;
        let mut pipe = target.open()?;
        convert_to_pipe(
            sources,
            writer,
            &mut pipe,
            &self.options(false),
            &|lost, error| self.tell_salvaged(lost, error),
            self.reporter,
        )
        .map_err(Failure::from)
    }

    /// What lays the target out.
    pub(super) fn front_writer(
        &self,
        target: PipeTarget<'_>,
        total_bytes: u64,
    ) -> Result<Box<dyn FrontWriter>, Failure> {
        let driver = create::driver(self.args.output_format.as_deref().unwrap_or("raw"))?;
        if self.args.compress && !driver.can_compress() {
            return Err(Failure::new("Compression not supported for this file format"));
        }
        let known = option_list::descriptions(driver, true, self.context);
        let mut options = match &self.list {
            Some(list) => option_list::parse(list, &known).map_err(Failure::new)?,
            None => OptionSet::new(),
        };
        options.take("size");
        let virtual_size_bytes = total_bytes
            .checked_next_multiple_of(512)
            .ok_or_else(|| Failure::new("The sources are larger than any disk together"))?;
        let request = FrontRequest { virtual_size_bytes, options: &options, compress: self.args.compress };
        let said = |error: Error| {
            Failure::new(format!("{}: error while converting {}: {error}", target.name(), driver.name()))
        };
        driver.front_writer(&request).map_err(said)
    }
}
