//! Opening a chain: names, formats, loops, locks.
//!
//! One layer after the other, top first, without recursion. For each: open the host file, compare its
//! identity with those above it, find out its format, lock it, open it, and see what it names below.

use std::{path::Path, sync::Arc};

use super::{
    Image, ImageName, MAX_CHAIN_DEPTH,
    host::HostAccess,
    name::{BackingChoice, Node},
    path::full_backing_name,
    raw_node::RawNode,
};
use crate::{
    Error, Result,
    format::{Backing, Driver, Layer, OpenContext, OpenMode, OptionSet, registry},
    limits,
    storage::{DetectZeroes, Identity, Storage},
};

pub use crate::storage::CacheMode;

/// What an image is opened for, and how.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// What for.
    pub mode: OpenMode,
    /// The format, or `None` to probe.
    pub format: Option<String>,
    /// Cache mode of the top layer. Layers below, which are not written, are read past the page cache where it is.
    pub cache: CacheMode,
    /// Take no locks (`-U`).
    pub force_share: bool,
    /// Refuse images that others write, raw ones too; without, only formats with metadata are refused.
    pub exclusive: bool,
    /// Whether another image names this one: then the limit counts that says where references may lead.
    pub is_reference: bool,
    /// Whether the layers below the top are opened too.
    pub backing: bool,
    /// How many layers are opened at most, the top included.
    pub max_layers: usize,
    /// Formats are recognised by the first bytes of a file alone, as the reference does; without, by the last
    /// ones too.
    pub probe_heads_only: bool,
    /// Whether the top gives space back where its name does not say: else `detect-zeroes=unmap` is refused.
    pub discards: bool,
    /// Runtime options for the top layer's format.
    pub options: OptionSet,
}

impl OpenOptions {
    /// The whole chain, format probed, `writeback`, locked, no options.
    #[must_use]
    pub fn new(mode: OpenMode) -> Self {
        Self {
            mode,
            format: None,
            cache: CacheMode::Writeback,
            force_share: false,
            exclusive: false,
            is_reference: false,
            backing: true,
            max_layers: usize::MAX,
            probe_heads_only: false,
            discards: false,
            options: OptionSet::new(),
        }
    }

    /// The same with the format named.
    #[must_use]
    pub fn format(self, format: &str) -> Self {
        Self { format: Some(format.to_owned()), ..self }
    }
}

/// Something the user should know, that did not stop the open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// In the reference's words, without `warning: `.
    pub text: String,
    /// Further lines without a prefix.
    pub hints: Vec<String>,
}

/// An opened layer and how it came to be.
#[derive(Debug)]
pub(super) struct OpenedLayer {
    pub(super) layer: Arc<dyn Layer>,
    /// As the reference prints it.
    pub(super) name: String,
    /// Whether nobody named its format.
    pub(super) probed: bool,
    pub(super) zeroes: DetectZeroes,
    /// Whether the space of what is discarded or made zero may be given back.
    pub(super) discards: bool,
}

/// A layer still to be opened.
struct Pending {
    node: Node,
    /// Where its file may be when the name of `node` leads to none.
    other_names: Vec<String>,
    format: Option<String>,
    access: HostAccess,
    /// Whether the layer above named it itself, and so may know which one it is.
    is_recorded: bool,
    /// Whether it gives space back where its name does not say.
    discards: bool,
}

pub(super) fn open(name: &ImageName, options: &OpenOptions) -> Result<Image> {
    let opened = open_chain(name.node(), options)
        .map_err(|source| Error::Open { name: name.text().to_owned(), source: Box::new(source) })?;
    Ok(Image::new(opened, options.cache))
}

pub(super) fn open_snapshot(name: &ImageName, options: &OpenOptions, id_or_name: &str) -> Result<Image> {
    let options = OpenOptions { mode: OpenMode::Read, ..options.clone() };
    let mut opened = open_chain(name.node(), &options)
        .map_err(|source| Error::Open { name: name.text().to_owned(), source: Box::new(source) })?;
    let top = &mut opened.layers[0];
    let Some(snapshots) = top.layer.snapshots() else {
        let driver = top.layer.driver().name();
        return Err(Error::Invalid(format!("{}: {driver} images have no internal snapshots", top.name)));
    };
    top.layer = snapshots.view(id_or_name)?;
    Ok(Image::new(opened, options.cache))
}

/// An opened chain.
pub(super) struct Opened {
    pub(super) layers: Vec<OpenedLayer>,
    pub(super) warnings: Vec<Warning>,
    /// Nobody said that the top, which is opened for writing, is raw.
    pub(super) guessed_raw: bool,
}

fn open_chain(top: &Node, options: &OpenOptions) -> Result<Opened> {
    let access = HostAccess {
        mode: options.mode,
        cache: options.cache,
        locked: !options.force_share,
        exclusive: options.exclusive,
    };
    let mut node = top.clone();
    for (name, value) in options.options.iter() {
        node.options.set(name, value);
    }
    let format = options.format.clone().or_else(|| node.driver.clone());
    let mut next = Some(Pending {
        node,
        other_names: Vec::new(),
        format,
        access,
        is_recorded: false,
        discards: options.discards,
    });
    let mut opening = Opening {
        seen: Vec::new(),
        heads_only: options.probe_heads_only,
        is_reference: options.is_reference,
    };
    let mut warnings = Vec::new();
    let mut layers: Vec<OpenedLayer> = Vec::new();
    let mut above: Vec<String> = Vec::new();
    while let Some(pending) = next.take() {
        let most = limits::chain_depth().min(MAX_CHAIN_DEPTH);
        if layers.len() == most {
            let error = Error::Invalid(format!("the backing chain is deeper than {most} images"));
            return Err(inside(&above, error));
        }
        let (layer, pending) = opening.found(pending).map_err(|error| inside(&above, error))?;
        if pending.is_recorded
            && let Some(above_it) = layers.last()
        {
            let text = above_it.layer.check_backing(&*layer.layer).map_err(|error| inside(&above, error))?;
            warnings.extend(text.map(|text| Warning { text, hints: Vec::new() }));
        }
        above.push(pending.node.path.clone());
        if options.backing && layers.len() + 1 < options.max_layers {
            next = below(&layer, &pending).map_err(|error| inside(&above, error))?;
        }
        layers.push(layer);
    }
    let top = &layers[0];
    let guessed = top.probed && top.layer.is_its_file() && options.mode.writes();
    if guessed {
        warnings.push(guessed_raw(&top.name));
    }
    Ok(Opened { layers, warnings, guessed_raw: guessed })
}

/// The reference says for each step down that the step failed.
fn inside(above: &[String], error: Error) -> Error {
    above
        .iter()
        .rev()
        .fold(error, |source, file| Error::Backing { file: file.into(), source: Box::new(source) })
}

/// What the layers opened so far mean for the next one.
struct Opening {
    seen: Vec<Identity>,
    heads_only: bool,
    /// Whether an image names the next one: all but the top, which the user may have named.
    is_reference: bool,
}

impl Opening {
    /// Opens a layer under the first of its names that leads to a file, and gives back what it was found as.
    fn found(&mut self, pending: Pending) -> Result<(OpenedLayer, Pending)> {
        let mut first_error = None;
        let others = pending.other_names.iter().map(|name| Node::file(name));
        for node in std::iter::once(pending.node.clone()).chain(others) {
            let pending =
                Pending { node, other_names: Vec::new(), format: pending.format.clone(), ..pending };
            match self.layer(&pending) {
                Ok(layer) => {
                    self.is_reference = true;
                    return Ok((layer, pending));
                }
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOENT.raw_os_error()) => {
                    first_error = first_error.or(Some(error));
                }
                Err(error) => return Err(error),
            }
        }
        Err(first_error.expect("the loop ran, and ended with each error kept"))
    }

    fn layer(&mut self, pending: &Pending) -> Result<OpenedLayer> {
        let Pending { node, format, access, discards, .. } = pending;
        let access = access.for_node(node)?;
        let named = format.as_deref().map(driver_called).transpose()?;
        let mut storage = match &node.null {
            // An image has no say in how long its readers wait.
            Some(null) if pending.is_recorded && self.is_reference && null.is_slow() => {
                return Err(Error::Invalid(format!(
                    "'{}' is refused: an image names it with latency-ns",
                    node.path
                )));
            }
            Some(null) => null.open(access.mode.writes()),
            None if self.is_reference => limits::open_reference(&node.path, || access.open(&node.path))?,
            None => access.open(&node.path)?,
        };
        let identity = storage.identity();
        if let Some(identity) = identity {
            if self.seen.contains(&identity) {
                return Err(Error::BackingLoop { file: storage.path().to_owned() });
            }
            self.seen.push(identity);
        }
        if !node.file_zeroes.is_plain() {
            storage = RawNode { zeroes: node.file_zeroes, ..RawNode::default() }.over(storage)?;
        }
        for raw_node in node.raw_nodes.iter().rev() {
            storage = raw_node.over(storage)?;
        }
        let zeroes = node.zeroes.checked(*discards)?;
        let driver = match named {
            Some(driver) => driver,
            None => probe(&*storage, self.heads_only)?,
        };
        if matches!(node.backing, BackingChoice::Node(_)) && !driver.has_backing() {
            return Err(Error::Invalid("Driver doesn't support backing files".to_owned()));
        }
        access.lock(&*storage, driver.name() == "raw")?;
        let open_file = |name: &str, mode: OpenMode| access.open_named(&node.path, identity, name, mode);
        let context = OpenContext { mode: access.mode, options: &node.options, open_file: &open_file };
        let layer = driver.open(storage, &context)?;
        Ok(OpenedLayer {
            layer,
            name: node.display(driver.name()),
            probed: named.is_none(),
            zeroes,
            discards: node.zeroes.discards(),
        })
    }
}

/// What the layer that was just opened stands on.
fn below(opened: &OpenedLayer, pending: &Pending) -> Result<Option<Pending>> {
    let access = pending.access.below(&pending.node)?;
    let recorded = opened.layer.backing();
    let mut other_names = Vec::new();
    let is_recorded = pending.node.backing == BackingChoice::Recorded;
    let (node, format) = match &pending.node.backing {
        BackingChoice::Nothing => return Ok(None),
        BackingChoice::Node(node) => ((**node).clone(), None),
        BackingChoice::Recorded => match recorded {
            None => return Ok(None),
            Some(Backing { name, format }) => {
                let others = opened.layer.other_backing_names().iter();
                other_names.extend(others.map(|name| full_backing_name(&pending.node.path, name)));
                (Node::parse(&full_backing_name(&pending.node.path, name))?, format.clone())
            }
        },
    };
    let format = format.or_else(|| node.driver.clone());
    Ok(Some(Pending { node, other_names, format, access, is_recorded, discards: true }))
}

/// The driver of that name. Protocols recorded where a format should be mean the bytes as they are.
fn driver_called(name: &str) -> Result<&'static dyn Driver> {
    let format = if matches!(name, "file" | "host_device") { "raw" } else { name };
    registry::by_name(format).ok_or_else(|| registry::unknown(name))
}

/// The format that the first bytes speak for, or where they say nothing, the last ones. Bytes that a guest can
/// write stand at one end or the other: where the two ends disagree, the user has to say which one counts.
pub(crate) fn probe(storage: &dyn Storage, heads_only: bool) -> Result<&'static dyn Driver> {
    let file_bytes = storage.len_bytes()?;
    let most = |bytes: usize| usize::try_from(file_bytes).unwrap_or(usize::MAX).min(bytes);
    let mut head = [0; registry::PROBE_BYTES];
    let head = &mut head[..most(registry::PROBE_BYTES)];
    storage.read_at(head, 0)?;
    let by_head = registry::probe(head, Path::new(storage.path()));
    if heads_only {
        return Ok(by_head);
    }
    let mut tail = [0; registry::PROBE_TAIL_BYTES];
    let tail = &mut tail[..most(registry::PROBE_TAIL_BYTES)];
    storage.read_at(tail, file_bytes - tail.len() as u64)?;
    match registry::probe_tail(tail, file_bytes) {
        Some(by_tail) if by_tail.name() != by_head.name() && !registry::is_a_guess(by_head) => {
            Err(Error::Invalid(format!(
                "the file starts as a {} image and ends as a {} image; name the format that it has",
                by_head.name(),
                by_tail.name()
            )))
        }
        Some(by_tail) => Ok(by_tail),
        None => Ok(by_head),
    }
}

fn guessed_raw(name: &str) -> Warning {
    Warning {
        text: format!("Image format was not specified for '{name}' and probing guessed raw."),
        hints: vec![
            "         Automatically detecting the format is dangerous for raw images, write operations on \
             block 0 will be restricted."
                .to_owned(),
            "         Specify the 'raw' format explicitly to remove the restrictions.".to_owned(),
        ],
    }
}
