//! `img convert`: copy disks into a new image, into one that exists, or into a pipe; from files and
//! from pipes.

mod numbers;
mod pipe;
mod stream;
mod target;

use std::fs::File;

use clap::ValueHint;
use img_core::{
    Error, JobStep,
    format::OpenMode,
    image::{CacheMode, Image},
    job::{
        bitmaps,
        convert::{ConvertOptions, Salvaged, convert, convert_marked},
    },
};

use self::{
    numbers::Numbers,
    pipe::PipeTarget,
    stream::{StreamArgs, StreamSource},
};
use crate::{
    args::{Opening, ProgressArgs, ShareArgs, source_cache},
    command::create,
    context::Context,
    created::Created,
    error::{Failure, Outcome, system_reason},
    object::ObjectArgs,
    option_list,
    progress::{Reporter, Style},
    snapshot_param,
};

/// Copy images, one behind the other, into a new image
///
/// A run that fails or is interrupted removes the files it made. A target that existed before is kept, with
/// whatever was written to it until then: the reference truncates it at the start, and so does this.
#[derive(Debug, clap::Args)]
#[command(override_usage = "img convert [OPTIONS] SRC_FILENAME... TGT_FILENAME", after_help = EXAMPLES)]
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
pub(crate) struct Args {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    objects: ObjectArgs,

    /// Take source names as full descriptions: driver=qcow2,file.filename=NAME,...
    #[arg(long, alias = "image-opts")]
    source_image_opts: bool,

    /// The format of the sources; found by looking at them when absent
    #[arg(short = 'f', long, value_name = "SRC_FMT")]
    source_format: Option<String>,

    /// Cache mode of the sources: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 'T', long, value_name = "SRC_CACHE")]
    source_cache: Option<String>,

    /// Copy the disk as it was at a snapshot: ID_OR_NAME, snapshot.id=ID or snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT", alias = "source-snapshot")]
    snapshot: Option<String>,

    #[command(flatten)]
    progress: ProgressArgs,

    /// The format of the target
    #[arg(short = 'O', long, value_name = "TGT_FMT", alias = "target-format")]
    output_format: Option<String>,

    /// Take the target's name as a full description; needs -n
    #[arg(long)]
    target_image_opts: bool,

    /// Options of the target's format: NAME=VALUE,...; "help" lists them
    #[arg(short = 'o', long, value_name = "TGT_OPTS", alias = "target-options")]
    options: Vec<String>,

    /// Compress the target's data
    #[arg(short, long)]
    compress: bool,

    /// How hard to compress, by the numbers of the method: zlib 1 to 12, zstd 1 to 22
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Beyond qemu-img")]
    level: Option<String>,

    /// Cache mode of the target
    #[arg(short = 't', long, value_name = "TGT_CACHE", alias = "target-cache")]
    output_cache: Option<String>,

    /// Record this image as the one below the target
    #[arg(short = 'B', long, value_name = "BACKING_FILENAME", value_hint = ValueHint::FilePath)]
    backing: Option<String>,

    /// The format of the image below
    #[arg(short = 'F', long, value_name = "BACKING_FMT")]
    backing_format: Option<String>,

    /// The target exists: write into it
    #[arg(short = 'n', long)]
    no_create: bool,

    /// The target, which exists, reads as zeroes
    #[arg(long)]
    target_is_zero: bool,

    /// Zeroes over at least this many bytes become holes; 0 writes everything
    #[arg(short = 'S', long, value_name = "BYTES")]
    sparse_size: Option<String>,

    /// Copy only what this persistent bitmap of the source marks, zeroes included: onto the backing file of the target
    /// (-B), or into a target that exists (-n)
    #[arg(long, value_name = "BITMAP", help_heading = "Beyond qemu-img")]
    dirty_bitmap: Option<String>,

    /// Copy the persistent dirty bitmaps too
    #[arg(long)]
    bitmaps: bool,

    #[command(flatten)]
    share: ShareArgs,

    /// Bytes a second at most
    #[arg(short, long, value_name = "RATE")]
    rate: Option<String>,

    /// How many requests or threads work at once, 1 to 16
    #[arg(short = 'm', long, value_name = "NUM")]
    parallel: Option<String>,

    /// Let the host copy where it can
    #[arg(short = 'C', long)]
    copy_range_offloading: bool,

    /// Put zeroes in place of what cannot be read, and say so
    #[arg(long)]
    salvage: bool,

    /// Leave out bitmaps that are not consistent
    #[arg(long)]
    skip_broken_bitmaps: bool,

    /// Write out of order: faster for some targets
    #[arg(short = 'W', long)]
    oob_writes: bool,

    #[command(flatten)]
    stream: StreamArgs,

    /// The images to copy, and the target
    #[arg(value_name = "FILENAME", value_hint = ValueHint::FilePath)]
    files: Vec<String>,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img convert -O qcow2 disk.raw disk.qcow2
  img convert -c -O qcow2 -o compression_type=zstd --level 9 disk.raw disk.qcow2
  img convert -l before-upgrade disk.qcow2 old.raw
  img convert -p -n disk.qcow2 /dev/vg/lv
  img convert -O vmdk -o subformat=streamOptimized disk.qcow2 - | ssh host 'cat >disk.vmdk'";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let list = option_list::join(&args.options)?;
    let numbers = Numbers::read(args)?;
    let snapshot = args.snapshot.as_deref().map(|text| snapshot_param::parse(text, context)).transpose()?;
    args.objects.check(context)?;
    check_combination(args, list.is_some())?;
    let (target, sources) = match args.files.split_last() {
        Some((target, sources)) if !sources.is_empty() => (Some(target), sources),
        _ => (None, &[][..]),
    };
    if let Some(list) = &list
        && option_list::asks_for_help(list)
    {
        let format = args.output_format.as_deref().unwrap_or("raw");
        return create::help(format, target.map(String::as_str), context);
    }
    let Some(target) = target else {
        return Err(Failure::new("Must specify image file name"));
    };
    if snapshot.is_some() && sources.len() > 1 {
        return Err(Failure::new("No support for concatenating multiple snapshot"));
    }
    if let Some(pipe) = PipeTarget::find(target, context) {
        pipe.check(args)?;
    }
    let cache = source_cache(args.source_cache.as_deref())?;
    let style = args.progress.style_or_bar(args.quiet, context)?;
    let reporter = Reporter::start(style, 1.0, context)?;
    reporter.begin();
    let mut created = Created::default();
    let job = Job { args, numbers, list, snapshot, sources, target, cache, reporter: &reporter, context };
    let outcome = job.run(&mut created);
    if outcome.is_ok() {
        reporter.complete();
        created.keep();
    }
    let outcome = outcome.map_err(|failure| reporter.interrupted().unwrap_or(failure));
    let removed = created.remove();
    if let Err(failure) = &outcome
        && style == Style::Percent
    {
        // As the reference: the message comes before the end of the progress line.
        context.report(None, failure);
        reporter.finish();
        removed?;
        return Err(Failure::silent(failure.code));
    }
    reporter.finish();
    removed?;
    outcome.map(|()| 0)
}

/// # Errors
/// For options that exclude each other.
fn check_combination(args: &Args, has_options: bool) -> Result<(), Failure> {
    let refuse = |text: &str| Err(Failure::new(text));
    if args.skip_broken_bitmaps && !args.bitmaps {
        return refuse("Use of --skip-broken-bitmaps requires --bitmaps");
    }
    if args.copy_range_offloading && args.compress {
        return refuse("Cannot enable copy offloading when -c is used");
    }
    if args.copy_range_offloading && args.sparse_size.is_some() {
        return refuse("Cannot enable copy offloading when -S is used");
    }
    if args.copy_range_offloading && args.salvage {
        return refuse("Cannot use copy offloading in salvaging mode");
    }
    if args.no_create && has_options {
        return refuse("-o has no effect when skipping image creation");
    }
    if args.target_image_opts && !args.no_create {
        return refuse("--target-image-opts requires use of -n flag");
    }
    if args.target_is_zero && !args.no_create {
        return refuse("--target-is-zero requires use of -n flag");
    }
    if args.dirty_bitmap.is_some() && args.snapshot.is_some() {
        return refuse("--dirty-bitmap says what changed in the disk as it is now: it does not go with -l");
    }
    if args.level.is_some() && !args.compress {
        return refuse("--level requires -c");
    }
    Ok(())
}

/// What the sources are.
enum Found {
    Images(Vec<Image>),
    Stream(StreamSource),
}

/// Everything behind the command line.
struct Job<'a> {
    args: &'a Args,
    numbers: Numbers,
    list: Option<String>,
    snapshot: Option<snapshot_param::Wanted>,
    sources: &'a [String],
    target: &'a str,
    cache: CacheMode,
    reporter: &'a Reporter,
    context: &'a Context,
}

impl Job<'_> {
    fn run(&self, created: &mut Created) -> Result<(), Failure> {
        let mut spooled = Vec::new();
        let sources = match self.find_sources(&mut spooled)? {
            Found::Stream(source) => return self.copy_stream(source, created),
            Found::Images(sources) => sources,
        };
        self.check_source_size(&sources)?;
        if let Some(name) = &self.args.dirty_bitmap {
            if sources.len() > 1 {
                return Err(Failure::new("--dirty-bitmap is only possible with a single source"));
            }
            // It is found out before anything is made.
            bitmaps::marks(&sources[0], name)?;
        }
        let total_bytes = sources
            .iter()
            .try_fold(0u64, |sum, source| sum.checked_add(source.virtual_size_bytes()))
            .ok_or_else(|| Failure::new("The sources are larger than any disk together"))?;
        if let Some(pipe) = PipeTarget::find(self.target, self.context) {
            return self.to_pipe(pipe, &sources, total_bytes);
        }
        let planned =
            if self.args.no_create { None } else { Some(self.plan_target(total_bytes, sources.len())?) };
        self.check_bitmaps(&sources)?;
        let cache = self.target_cache()?;
        let has_backing = match planned {
            None => self.args.backing.is_some(),
            Some(planned) => self.create_target(planned, created)?,
        };
        self.stop_if_asked()?;
        let target = self.open_target(cache)?;
        if self.args.no_create && target.virtual_size_bytes() < total_bytes {
            return Err(Failure::new("output file is smaller than input file"));
        }
        if self.args.no_create && self.args.compress && !target.layers()[0].driver().can_compress() {
            return Err(Failure::new("Compression not supported for this file format"));
        }
        // A target that stays is closed after a failure too: what was written until then counts.
        let filled = self.fill(&sources, &target, has_backing);
        let closed = target.close();
        filled?;
        closed.map_err(Failure::from)
    }

    fn stop_if_asked(&self) -> Result<(), Failure> {
        self.reporter.interrupted().map_or(Ok(()), Err)
    }

    /// Opens the sources. Those that come front to back are kept in files first, where that is asked for.
    fn find_sources(&self, spooled: &mut Vec<File>) -> Result<Found, Failure> {
        let mut names = Vec::new();
        for name in self.sources {
            let Some(source) = self.args.stream.find(name, self.args, self.reporter, self.context)? else {
                names.push(name.clone());
                continue;
            };
            match self.args.stream.spool() {
                Some(directory) => {
                    let file = source.spool(directory)?;
                    names.push(stream::name_of(&file));
                    spooled.push(file);
                }
                None if self.sources.len() > 1 => {
                    return Err(Failure::new("A source that is read front to back has to be the only one"));
                }
                None => return Ok(Found::Stream(source)),
            }
        }
        self.open_sources(&names).map(Found::Images)
    }

    fn open_sources(&self, names: &[String]) -> Result<Vec<Image>, Failure> {
        names
            .iter()
            .map(|name| {
                let opening = Opening {
                    image_opts: self.args.source_image_opts,
                    cache: self.cache,
                    force_share: self.args.share.force_share,
                    exclusive: true,
                    ..Opening::named(name, self.args.source_format.as_deref(), OpenMode::Read)
                };
                let image = opening.open(self.context)?;
                match &self.snapshot {
                    Some(wanted) => opening.at_snapshot(image, wanted, self.context),
                    None => Ok(image),
                }
            })
            .collect()
    }

    fn check_bitmaps(&self, sources: &[Image]) -> Result<(), Failure> {
        match (self.args.bitmaps, sources) {
            (false, _) => Ok(()),
            (true, [source]) => Ok(bitmaps::check_bitmaps(source, self.args.skip_broken_bitmaps)?),
            (true, _) => Err(Failure::new("Copying bitmaps only possible with single source")),
        }
    }

    /// Zeroes are looked for in runs of so many bytes; 0 for nowhere.
    fn sparse_bytes(&self) -> u64 {
        self.numbers.sparse_bytes.unwrap_or(4096)
    }

    /// Copies everything that is asked for.
    fn fill(&self, sources: &[Image], target: &Image, has_backing: bool) -> Result<(), Failure> {
        if self.args.bitmaps {
            bitmaps::check_bitmap_target(target)?;
        }
        self.copy(sources, target, has_backing)?;
        if self.args.bitmaps {
            bitmaps::copy_bitmaps(&sources[0], target, &mut |name| {
                self.context.warning(&format!("Skipping inconsistent bitmap '{name}'"));
            })?;
        }
        Ok(())
    }

    fn options(&self, has_backing: bool) -> ConvertOptions {
        ConvertOptions {
            sparse_bytes: self.sparse_bytes(),
            compress: self.args.compress,
            level: self.numbers.level,
            threads: self.numbers.threads,
            out_of_order: self.args.oob_writes,
            copy_offload: self.args.copy_range_offloading,
            target_is_zero: !self.args.no_create || self.args.target_is_zero,
            target_has_backing: has_backing,
            salvage: self.args.salvage,
            rate_bytes: self.numbers.rate_bytes.filter(|rate| *rate > 0),
        }
    }

    fn tell_salvaged(&self, lost: Salvaged, error: &Error) {
        if self.args.quiet {
            return;
        }
        // One line a sector: as short as the reference's, for which damage is an I/O error, too.
        let (at, why) = (lost.offset_bytes, system_reason(error));
        self.context.warning(&match lost.step {
            JobStep::Map => format!("error while reading block status at offset {at}: {why}"),
            _ => format!("error while reading offset {at}: {why}"),
        });
    }

    fn copy(&self, sources: &[Image], target: &Image, has_backing: bool) -> Result<(), Failure> {
        let options = self.options(has_backing);
        let salvaged = |lost: Salvaged, error: &Error| self.tell_salvaged(lost, error);
        let copied = match &self.args.dirty_bitmap {
            None => convert(sources, target, &options, &salvaged, self.reporter),
            Some(name) => {
                let marks = bitmaps::marks(&sources[0], name)?;
                convert_marked(&sources[0], &marks, target, &options, &salvaged, self.reporter)
            }
        };
        copied.map_err(|error| match error {
            // A format that can, on an image that cannot: one with an external data file.
            Error::Unsupported { .. } if self.args.compress => {
                Failure::new("error while writing at byte 0: Operation not supported")
            }
            other => Failure::of_job(&other, self.context),
        })
    }
}
