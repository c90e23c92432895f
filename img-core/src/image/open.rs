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
};
use crate::{
    Error, Result,
    format::{Backing, Driver, Layer, OpenContext, OpenMode, OptionSet, registry},
    storage::{Identity, Storage},
};

pub use crate::storage::CacheMode;

/// What an image is opened for, and how.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// What for.
    pub mode: OpenMode,
    /// The format, or `None` to probe.
    pub format: Option<String>,
    /// Cache mode of the top layer; layers below use `writeback` without writing.
    pub cache: CacheMode,
    /// Take no locks (`-U`).
    pub force_share: bool,
    /// Refuse images that others write, raw ones too; without, only formats with metadata are refused.
    pub exclusive: bool,
    /// Whether the layers below the top are opened too.
    pub backing: bool,
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
            backing: true,
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
}

/// A layer still to be opened.
struct Pending {
    node: Node,
    format: Option<String>,
    access: HostAccess,
}

pub(super) fn open(name: &ImageName, options: &OpenOptions) -> Result<Image> {
    let (layers, warnings) = open_chain(name.node(), options)
        .map_err(|source| Error::Open { name: name.text().to_owned(), source: Box::new(source) })?;
    Ok(Image::new(layers, warnings, options.cache))
}

pub(super) fn open_snapshot(name: &ImageName, options: &OpenOptions, id_or_name: &str) -> Result<Image> {
    let options = OpenOptions { mode: OpenMode::Read, ..options.clone() };
    let (mut layers, warnings) = open_chain(name.node(), &options)
        .map_err(|source| Error::Open { name: name.text().to_owned(), source: Box::new(source) })?;
    let top = &mut layers[0];
    let Some(snapshots) = top.layer.snapshots() else {
        let driver = top.layer.driver().name();
        return Err(Error::Invalid(format!("{}: {driver} images have no internal snapshots", top.name)));
    };
    top.layer = snapshots.view(id_or_name)?;
    Ok(Image::new(layers, warnings, options.cache))
}

fn open_chain(top: &Node, options: &OpenOptions) -> Result<(Vec<OpenedLayer>, Vec<Warning>)> {
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
    let mut next = Some(Pending { node, format, access });
    let mut seen = Vec::new();
    let mut layers: Vec<OpenedLayer> = Vec::new();
    let mut above: Vec<String> = Vec::new();
    while let Some(pending) = next.take() {
        if layers.len() == MAX_CHAIN_DEPTH {
            return Err(inside(
                &above,
                Error::Invalid(format!("the backing chain is deeper than {MAX_CHAIN_DEPTH} images")),
            ));
        }
        let layer = open_layer(&pending, &mut seen).map_err(|error| inside(&above, error))?;
        above.push(pending.node.path.clone());
        if options.backing {
            next = below(&layer, &pending, access).map_err(|error| inside(&above, error))?;
        }
        layers.push(layer);
    }
    let warnings = match &layers[0] {
        top if top.probed && top.layer.driver().name() == "raw" && options.mode.writes() => {
            vec![guessed_raw(&top.name)]
        }
        _ => Vec::new(),
    };
    Ok((layers, warnings))
}

/// The reference says for each step down that the step failed.
fn inside(above: &[String], error: Error) -> Error {
    above
        .iter()
        .rev()
        .fold(error, |source, file| Error::Backing { file: file.into(), source: Box::new(source) })
}

fn open_layer(pending: &Pending, seen: &mut Vec<Identity>) -> Result<OpenedLayer> {
    let Pending { node, format, access } = pending;
    let access = access.for_node(node)?;
    let named = format.as_deref().map(driver_called).transpose()?;
    let storage = access.open(&node.path)?;
    let identity = storage.identity();
    if let Some(identity) = identity {
        if seen.contains(&identity) {
            return Err(Error::BackingLoop { file: storage.path().to_owned() });
        }
        seen.push(identity);
    }
    let driver = match named {
        Some(driver) => driver,
        None => probe(&*storage)?,
    };
    access.lock(&*storage, driver.name() == "raw")?;
    let open_file = |name: &str, mode: OpenMode| access.open_named(&node.path, identity, name, mode);
    let context = OpenContext { mode: access.mode, options: &node.options, open_file: &open_file };
    let layer = driver.open(storage, &context)?;
    Ok(OpenedLayer { layer, name: node.display(), probed: named.is_none() })
}

/// What the layer that was just opened stands on.
fn below(opened: &OpenedLayer, pending: &Pending, top: HostAccess) -> Result<Option<Pending>> {
    let mode = match top.mode {
        OpenMode::Inspect => OpenMode::Inspect,
        OpenMode::Read | OpenMode::Write | OpenMode::Check { .. } => OpenMode::Read,
    };
    let access = HostAccess { mode, cache: CacheMode::Writeback, ..top };
    let recorded = opened.layer.backing();
    let (node, format) = match &pending.node.backing {
        BackingChoice::Nothing => return Ok(None),
        BackingChoice::Node(_) if !opened.layer.driver().has_backing() => {
            let driver = opened.layer.driver().name();
            return Err(Error::Invalid(format!("Driver '{driver}' does not support backing files")));
        }
        BackingChoice::Node(node) => ((**node).clone(), None),
        BackingChoice::Recorded => match recorded {
            None => return Ok(None),
            Some(Backing { name, format }) => {
                (Node::parse(&full_backing_name(&pending.node.path, name))?, format.clone())
            }
        },
    };
    let format = format.or_else(|| node.driver.clone());
    Ok(Some(Pending { node, format, access }))
}

/// The driver of that name. Protocols recorded where a format should be mean the bytes as they are.
fn driver_called(name: &str) -> Result<&'static dyn Driver> {
    let format = if matches!(name, "file" | "host_device") { "raw" } else { name };
    registry::by_name(format).ok_or_else(|| Error::Invalid(format!("Unknown driver '{name}'")))
}

/// The format that the first bytes speak for.
fn probe(storage: &dyn Storage) -> Result<&'static dyn Driver> {
    let file_bytes = usize::try_from(storage.len_bytes()?).unwrap_or(usize::MAX);
    let mut head = [0; registry::PROBE_BYTES];
    let head = &mut head[..file_bytes.min(registry::PROBE_BYTES)];
    storage.read_at(head, 0)?;
    Ok(registry::probe(head, Path::new(storage.path())))
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
