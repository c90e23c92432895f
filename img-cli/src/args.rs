//! Options that several commands share, and opening images by them.

use std::sync::Arc;

use clap::ValueHint;
use img_core::{
    format::{OpenMode, OptionSet, registry},
    image::{self, CacheMode, Image, ImageName, OpenOptions},
};

use crate::{
    context::Context,
    error::{Failure, reason},
    output::complain,
    progress::{Reporter, Style},
    snapshot_param::Wanted,
};

/// How the images on the command line are named.
#[derive(Debug, clap::Args)]
pub(crate) struct FormatArgs {
    /// The format of the image; found by looking at it when absent
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<String>,

    /// Take file names as full descriptions: driver=qcow2,file.filename=NAME,...
    #[arg(long)]
    pub(crate) image_opts: bool,
}

/// Sharing with running guests.
#[derive(Debug, clap::Args)]
pub(crate) struct ShareArgs {
    /// Open the image even while another process writes to it
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
}

/// Whether and how a long command tells how far it is.
#[derive(Debug, clap::Args)]
pub(crate) struct ProgressArgs {
    /// Show how far it is: as one line that is overwritten, or, with =json, as one JSON object a line:
    /// event ("progress" or "finished"), done and total (bytes; steps where no bytes are moved), percent, elapsed_ms
    #[arg(short, long, value_name = "STYLE", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "line")]
    progress: Option<String>,
}

impl ProgressArgs {
    /// # Errors
    /// When there is no such style.
    pub(crate) fn style(&self, quiet: bool) -> Result<Style, Failure> {
        match self.progress.as_deref() {
            None => Ok(Style::Hidden),
            Some("line" | "json") if quiet => Ok(Style::Hidden),
            Some("line") => Ok(Style::Percent),
            Some("json") => Ok(Style::Json),
            Some(other) => Err(Failure::usage(format!("--progress expects nothing or 'json' not '{other}'"))),
        }
    }

    /// Whether it was asked for.
    pub(crate) fn is_given(&self) -> bool {
        self.progress.is_some()
    }

    /// As [`Self::style`], with a bar on a terminal where nobody asked.
    ///
    /// # Errors
    /// As [`Self::style`].
    pub(crate) fn style_or_bar(&self, quiet: bool, context: &Context) -> Result<Style, Failure> {
        use std::io::IsTerminal as _;
        let wants_bar = !self.is_given() && !quiet && !context.is_reference();
        if wants_bar && std::io::stderr().is_terminal() { Ok(Style::Bar) } else { self.style(quiet) }
    }
}

/// The same for commands that the reference says nothing of.
#[derive(Debug, clap::Args)]
pub(crate) struct OwnProgressArgs {
    /// Show how far it is, on standard output: as one line that is overwritten, or, with =json, as one JSON object a
    /// line: event ("progress" or "finished"), done and total (bytes, requests or tables), percent, elapsed_ms
    #[arg(long, value_name = "STYLE", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "line", help_heading = "Beyond qemu-img")]
    progress: Option<String>,
}

impl OwnProgressArgs {
    /// # Errors
    /// As [`ProgressArgs::style`].
    pub(crate) fn style(&self) -> Result<Style, Failure> {
        self.as_theirs().style(false)
    }

    /// Whoever is to be told; `None` where nobody asked, and signals do what they do to any program.
    ///
    /// # Errors
    /// As [`ProgressArgs::style`].
    pub(crate) fn reporter(&self, quiet: bool, context: &Context) -> Result<Option<Reporter>, Failure> {
        let style = self.as_theirs().style(quiet)?;
        if style == Style::Hidden { Ok(None) } else { Reporter::start(style, 1.0, context).map(Some) }
    }

    /// Whoever is to be told of the writing of space: on a terminal also where nobody asked.
    ///
    /// # Errors
    /// As [`ProgressArgs::style`].
    pub(crate) fn of_filling(&self, quiet: bool, context: &Context) -> Result<Arc<Reporter>, Failure> {
        Reporter::start(self.as_theirs().style_or_bar(quiet, context)?, 1.0, context).map(Arc::new)
    }

    fn as_theirs(&self) -> ProgressArgs {
        ProgressArgs { progress: self.progress.clone() }
    }
}

/// What commands that change one image share.
#[derive(Debug, clap::Args)]
pub(crate) struct ChangeArgs {
    /// Print nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,

    #[command(flatten)]
    progress: ProgressArgs,

    #[command(flatten)]
    pub(crate) formats: FormatArgs,

    /// Cache mode of the image: none, writeback, writethrough, directsync or unsafe
    #[arg(short = 't', long, value_name = "CACHE")]
    cache: Option<String>,
}

impl ChangeArgs {
    /// # Errors
    /// As [`ProgressArgs::style`].
    pub(crate) fn style(&self) -> Result<Style, Failure> {
        self.progress.style(self.quiet)
    }

    /// # Errors
    /// When there is no such mode.
    pub(crate) fn cache_mode(&self) -> Result<CacheMode, Failure> {
        match self.cache.as_deref() {
            None => Ok(CacheMode::Writeback),
            Some(text) => CacheMode::from_name(text)
                .ok_or_else(|| Failure::new(format!("Invalid cache option: {text}"))),
        }
    }
}

/// How a report is laid out.
#[derive(Debug, clap::Args)]
pub(crate) struct OutputArgs {
    /// The layout of the report: human or json
    #[arg(long, value_name = "LAYOUT", hide_possible_values = true)]
    output: Option<String>,
}

/// See [`OutputArgs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Human,
    Json,
}

impl OutputArgs {
    /// Whether one was asked for.
    pub(crate) fn is_given(&self) -> bool {
        self.output.is_some()
    }

    /// # Errors
    /// When it is neither.
    pub(crate) fn layout(&self) -> Result<Layout, Failure> {
        match self.output.as_deref() {
            None | Some("human") => Ok(Layout::Human),
            Some("json") => Ok(Layout::Json),
            Some(other) => Err(Failure::usage(format!("--output expects 'human' or 'json' not '{other}'"))),
        }
    }
}

/// The one image that a command works on.
#[derive(Debug, clap::Args)]
pub(crate) struct FileArg {
    /// The image
    #[arg(value_name = "FILENAME", value_hint = ValueHint::FilePath)]
    files: Vec<String>,
}

impl FileArg {
    /// # Errors
    /// When there is none, or more than one.
    pub(crate) fn one(&self) -> Result<&str, Failure> {
        match self.files.as_slice() {
            [file] => Ok(file),
            _ => Err(Failure::usage("Expecting one image file name")),
        }
    }
}

/// # Errors
/// When `text` is no cache mode.
pub(crate) fn source_cache(text: Option<&str>) -> Result<CacheMode, Failure> {
    match text {
        None => Ok(CacheMode::Writeback),
        Some(text) => CacheMode::from_name(text)
            .ok_or_else(|| Failure::new(format!("Invalid source cache option: {text}"))),
    }
}

/// Protocols of the reference that are called otherwise than their drivers.
const PROTOCOLS_ELSEWHERE: &[&str] =
    &["fat", "gluster+rdma", "gluster+tcp", "gluster+unix", "nbd+tcp", "nbd+unix"];

/// An image to open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opening<'a> {
    /// As on the command line.
    pub(crate) name: &'a str,
    /// Whether `name` is a full description.
    pub(crate) image_opts: bool,
    /// The format, when it is named.
    pub(crate) format: Option<&'a str>,
    /// What for.
    pub(crate) mode: OpenMode,
    /// Its cache mode.
    pub(crate) cache: CacheMode,
    /// Whether locks are left alone.
    pub(crate) force_share: bool,
    /// Whether raw images that others write are refused too.
    pub(crate) exclusive: bool,
    /// Whether an image names it, not the user: it has to be where `--allow-refs` allows references.
    pub(crate) is_reference: bool,
    /// Whether the backing chain is opened too.
    pub(crate) backing: bool,
    /// Whether it gives space back where its name does not say.
    pub(crate) discards: bool,
}

impl<'a> Opening<'a> {
    /// The image called `name`, with its chain, in the default cache mode.
    pub(crate) fn new(name: &'a str, formats: &'a FormatArgs, mode: OpenMode) -> Self {
        Self { image_opts: formats.image_opts, ..Self::named(name, formats.format.as_deref(), mode) }
    }

    /// The same where the name is no full description.
    pub(crate) fn named(name: &'a str, format: Option<&'a str>, mode: OpenMode) -> Self {
        Self {
            name,
            image_opts: false,
            format,
            mode,
            cache: CacheMode::Writeback,
            force_share: false,
            exclusive: false,
            is_reference: false,
            backing: true,
            discards: false,
        }
    }

    /// The name in the library's terms.
    pub(crate) fn image_name(&self) -> Result<ImageName, Failure> {
        if let Some(protocol) = image::protocol(self.name)
            && !self.image_opts
            && protocol != "file"
            && (registry::is_elsewhere(protocol) || PROTOCOLS_ELSEWHERE.contains(&protocol))
        {
            return Err(Failure::new(format!(
                "Could not open '{}': The protocol '{protocol}' is not supported yet",
                self.name
            )));
        }
        let name =
            if self.image_opts { ImageName::parse_options(self.name) } else { ImageName::parse(self.name) };
        name.map_err(|error| Failure::open(self.name, &error))
    }

    /// The rest in the library's terms.
    pub(crate) fn options(&self, context: &Context) -> Result<OpenOptions, Failure> {
        let refuse = |why: String| Err(Failure::new(format!("Could not open '{}': {why}", self.name)));
        if self.force_share && self.mode.writes() {
            return refuse("force-share=on can only be used with read-only images".to_owned());
        }
        match self.format {
            Some(format) if registry::by_name(format).is_none() => {
                refuse(registry::unknown(format).to_string())
            }
            _ => Ok(OpenOptions {
                mode: self.mode,
                format: self.format.map(str::to_owned),
                cache: self.cache,
                force_share: self.force_share,
                exclusive: self.exclusive,
                is_reference: self.is_reference,
                backing: self.backing,
                max_layers: usize::MAX,
                probe_heads_only: context.is_reference(),
                discards: self.discards,
                options: OptionSet::new(),
            }),
        }
    }

    /// Opens it, printing what is worth a warning.
    pub(crate) fn open(&self, context: &Context) -> Result<Image, Failure> {
        let image = self.open_quietly(context)?;
        print_warnings(&image, context);
        Ok(image)
    }

    /// Opens it. What is worth a warning is told when it is opened once more.
    pub(crate) fn open_quietly(&self, context: &Context) -> Result<Image, Failure> {
        if self.image_opts && self.format.is_some() {
            return Err(Failure::new("--image-opts and --format are mutually exclusive"));
        }
        let options = self.options(context)?;
        let name = self.image_name()?;
        Image::open(&name, &options).map_err(|error| Failure::open(self.name, &error))
    }

    /// The disk of `image`, which this opened, as it was when a snapshot was taken.
    pub(crate) fn at_snapshot(
        &self,
        image: Image,
        wanted: &Wanted,
        context: &Context,
    ) -> Result<Image, Failure> {
        let failed = |why: String| Failure::new(format!("Failed to load snapshot: {why}"));
        let layer = &image.layers()[0];
        let Some(snapshots) = layer.snapshots() else {
            return Err(failed(format!(
                "Block format '{}' used by device '' does not support temporarily loading internal snapshots",
                layer.driver().name()
            )));
        };
        let list = snapshots.list().map_err(|error| failed(reason(&error)))?;
        let id = wanted.find(&list).ok_or_else(|| failed("Can't find snapshot".to_owned()))?.id.clone();
        drop(image);
        let image = Image::open_snapshot(&self.image_name()?, &self.options(context)?, &id)
            .map_err(|error| failed(reason(&error)))?;
        print_warnings(&image, context);
        Ok(image)
    }
}

/// Prints what was noticed when `image` was opened.
pub(crate) fn print_warnings(image: &Image, context: &Context) {
    for warning in image.warnings() {
        // The one about guessing raw is older than the reference's rule for warnings.
        if warning.text.starts_with("Image format was not specified") {
            complain(format_args!("WARNING: {}", warning.text));
        } else {
            context.warning(&warning.text);
        }
        for hint in &warning.hints {
            complain(hint);
        }
    }
}
