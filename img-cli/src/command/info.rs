//! `img info`: what an image is.

use std::{collections::HashSet, fmt::Write as _, fs, os::unix::fs::FileTypeExt as _};

use img_core::{
    format::{HostFile, OpenMode, SnapshotInfo},
    limits,
    storage::{Identity, Storage},
    text,
};
use serde_json::{Map, Value, json};

use crate::{
    args::{FileArg, FormatArgs, Layout, Opening, OutputArgs, ShareArgs},
    context::Context,
    error::{Failure, Outcome},
    names,
    object::ObjectArgs,
    qdict,
    size::Human,
    snapshot_table,
};

/// Describe an image
#[derive(Debug, clap::Args)]
#[command(override_usage = "img info [OPTIONS] FILENAME", after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    formats: FormatArgs,

    /// Describe the images below it too
    #[arg(short = 'b', long)]
    backing_chain: bool,

    #[command(flatten)]
    share: ShareArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    objects: ObjectArgs,
    #[command(flatten)]
    file: FileArg,
}

/// Shown below the help.
const EXAMPLES: &str = "\
Examples:
  img info disk.qcow2
  img info --backing-chain --output json overlay.qcow2";

/// Runs the command.
pub(crate) fn run(args: &Args, context: &Context) -> Outcome {
    let layout = args.output.layout()?;
    args.objects.check(context)?;
    let file = args.file.one()?;
    let mut opening = Opening {
        force_share: args.share.force_share,
        backing: false,
        ..Opening::new(file, &args.formats, OpenMode::Inspect)
    };
    let facts = if args.backing_chain {
        chain(opening, context)?
    } else {
        opening.backing = false;
        vec![Facts::gather(&opening, context)?.0]
    };
    match layout {
        Layout::Human => {
            let texts: Vec<String> = facts.iter().map(Facts::human).collect();
            context.out.print(texts.join("\n"));
        }
        Layout::Json if args.backing_chain => {
            context.out.line(qdict::pretty(&Value::Array(facts.iter().map(Facts::json).collect())));
        }
        Layout::Json => {
            context
                .out
                .print(facts.iter().map(|facts| qdict::pretty(&facts.json()) + "\n").collect::<String>());
        }
    }
    Ok(0)
}

/// The image and all below it. Each is opened by the name the one above gives it.
fn chain(top: Opening<'_>, context: &Context) -> Result<Vec<Facts>, Failure> {
    let mut all: Vec<Facts> = Vec::new();
    let mut seen = HashSet::new();
    let mut files = HashSet::new();
    let mut next = Some((top.name.to_owned(), top.format.map(str::to_owned)));
    while let Some((name, format)) = next.take() {
        let opening = Opening {
            name: &name,
            format: format.as_deref(),
            image_opts: top.image_opts && all.is_empty(),
            is_reference: !all.is_empty(),
            ..top
        };
        let endless = || Failure::new(format!("Backing file '{name}' creates an infinite loop."));
        if !seen.insert(name.clone()) {
            return Err(endless());
        }
        if all.len() == limits::chain_depth() {
            return Err(Failure::new(format!("the backing chain is deeper than {} images", all.len())));
        }
        let (facts, identity) = Facts::gather(&opening, context)?;
        // A loop whose names grow with every turn is found by the file itself.
        if identity.is_some_and(|identity| !files.insert(identity)) {
            return Err(endless());
        }
        if let Some(backing) = &facts.backing {
            let name = backing.full_name.clone().map_err(Failure::new)?;
            next = Some((name, backing.format.clone()));
        }
        all.push(facts);
    }
    Ok(all)
}

/// What is told about one image.
#[derive(Debug)]
struct Facts {
    name: String,
    format: &'static str,
    virtual_size_bytes: u64,
    /// Host space taken by all its files, where the host can tell.
    actual_size_bytes: Option<u64>,
    file: HostFacts,
    cluster_size_bytes: Option<u32>,
    encrypted: bool,
    dirty: bool,
    backing: Option<BackingFacts>,
    snapshots: Vec<SnapshotInfo>,
    details: Option<Value>,
    /// The host files beside the image's own, the last one first, as the reference lists them.
    others: Vec<HostFacts>,
}

/// What is told about a host file, or about a raw node above one.
#[derive(Debug)]
struct HostFacts {
    node: String,
    name: String,
    length_bytes: u64,
    actual_size_bytes: Option<u64>,
    protocol: &'static str,
    /// What a raw node stands on.
    below: Option<Box<HostFacts>>,
}

impl HostFacts {
    /// `raw_nodes` are called so, from the top; `storage` is what the uppermost makes of the file.
    fn gather(
        node: String,
        storage: &dyn Storage,
        raw_nodes: &mut dyn Iterator<Item = String>,
    ) -> Result<Self, Failure> {
        let raw_node = raw_nodes.next();
        let below = match (&raw_node, storage.below()) {
            (Some(_), Some((below, _))) => Some(Box::new(Self::gather("file".to_owned(), below, raw_nodes)?)),
            _ => None,
        };
        Ok(Self {
            node,
            name: raw_node.unwrap_or_else(|| text::from_path(storage.path())),
            // In whole sectors, as the reference counts.
            length_bytes: storage.len_bytes()?.next_multiple_of(512),
            actual_size_bytes: storage.allocated_bytes().ok(),
            protocol: protocol(storage),
            below,
        })
    }

    /// Whether there is a host file at all, about which more is known.
    fn is_on_host(&self) -> bool {
        matches!(self.protocol, "file" | "host_device")
    }

    /// `above` is the path of the nodes above.
    fn human(&self, above: &str, level: usize, lines: &mut Lines) {
        let path = format!("{above}/{}", self.node);
        lines.add(level, format_args!("Child node '{path}':"));
        let level = level + 1;
        let (name, file_is, length_is) = match self.below {
            Some(_) => ("image", "file format: raw".to_owned(), "virtual size"),
            None => ("filename", format!("protocol type: {}", self.protocol), "file length"),
        };
        lines.add(level, format_args!("{name}: {}", self.name));
        lines.add(level, file_is);
        let length = self.length_bytes;
        lines.add(level, format_args!("{length_is}: {} ({length} bytes)", Human(length)));
        lines.add(level, format_args!("disk size: {}", disk_size(self.actual_size_bytes)));
        if let Some(below) = &self.below {
            below.human(&path, level, lines);
        }
    }

    fn json(&self) -> Value {
        let mut file = json!({
            "children": self.below.iter().map(|below| below.json()).collect::<Vec<_>>(),
            "virtual-size": self.length_bytes,
            "filename": self.name,
            "format": if self.below.is_some() { "raw" } else { self.protocol },
        });
        if self.is_on_host() {
            file["dirty-flag"] = false.into();
        }
        if self.is_on_host() && self.below.is_none() {
            file["format-specific"] = json!({ "type": "file", "data": {} });
        }
        if let Some(bytes) = self.actual_size_bytes {
            file["actual-size"] = bytes.into();
        }
        json!({ "name": self.node, "info": file })
    }
}

fn disk_size(bytes: Option<u64>) -> String {
    bytes.map_or("unavailable".to_owned(), |bytes| Human(bytes).to_string())
}

#[derive(Debug)]
struct BackingFacts {
    name: String,
    full_name: Result<String, String>,
    format: Option<String>,
}

impl Facts {
    /// Opens an image and asks it everything. The identity of its file comes beside.
    fn gather(opening: &Opening<'_>, context: &Context) -> Result<(Self, Option<Identity>), Failure> {
        let image = opening.open(context)?;
        let layer = &image.layers()[0];
        let storage = layer.file(HostFile::IMAGE).ok_or_else(|| Failure::new("The image has no file"))?;
        let file_name = text::from_path(storage.path());
        let name = image.layer_name(0).to_owned();
        let backing = layer.backing().map(|backing| BackingFacts {
            full_name: names::full_backing_name(&file_name, &backing.name),
            name: backing.name.clone(),
            format: backing.format.clone(),
        });
        let mut raw_nodes = opening.image_name()?.raw_nodes().collect::<Vec<_>>().into_iter();
        let file = HostFacts::gather("file".to_owned(), &**storage, &mut raw_nodes)?;
        let mut others = Vec::new();
        for (node, file) in layer.other_files().into_iter().rev() {
            if let Some(storage) = layer.file(file) {
                others.push(HostFacts::gather(node, &**storage, &mut std::iter::empty())?);
            }
        }
        let sizes = others.iter().map(|other| other.actual_size_bytes);
        let actual_size_bytes = sizes.chain([file.actual_size_bytes]).sum();
        let facts = Self {
            format: layer.driver().name(),
            virtual_size_bytes: layer.virtual_size_bytes(),
            actual_size_bytes,
            file,
            others,
            cluster_size_bytes: layer.cluster_size_bytes(),
            encrypted: layer.is_encrypted(),
            dirty: layer.is_dirty(),
            backing,
            snapshots: layer.snapshots().map_or(Ok(Vec::new()), |snapshots| snapshots.list())?,
            details: layer.details()?,
            name,
        };
        Ok((facts, storage.identity()))
    }

    /// What the image stands on; a protocol in the place of a format stands on nothing.
    fn children(&self) -> impl Iterator<Item = &HostFacts> {
        self.others.iter().chain((self.file.protocol != self.format).then_some(&self.file))
    }

    fn human(&self) -> String {
        let mut lines = Lines::default();
        lines.add(0, format_args!("image: {}", self.name));
        lines.add(0, format_args!("file format: {}", self.format));
        let virtual_size = self.virtual_size_bytes;
        lines.add(0, format_args!("virtual size: {} ({virtual_size} bytes)", Human(virtual_size)));
        lines.add(0, format_args!("disk size: {}", disk_size(self.actual_size_bytes)));
        if self.encrypted {
            lines.add(0, "encrypted: yes");
        }
        if let Some(cluster_size) = self.cluster_size_bytes {
            lines.add(0, format_args!("cluster_size: {cluster_size}"));
        }
        if self.dirty {
            lines.add(0, "cleanly shut down: no");
        }
        if let Some(backing) = &self.backing {
            let place = match &backing.full_name {
                Err(_) => " (cannot determine actual path)".to_owned(),
                Ok(full) if *full != backing.name => format!(" (actual path: {full})"),
                Ok(_) => String::new(),
            };
            lines.add(0, format_args!("backing file: {}{place}", backing.name));
            if let Some(format) = &backing.format {
                lines.add(0, format_args!("backing file format: {format}"));
            }
        }
        if !self.snapshots.is_empty() {
            lines.0.push_str(&snapshot_table::table(&self.snapshots));
        }
        if let Some(details) = self.details.as_ref().and_then(|details| details.get("data"))
            && !is_empty(details)
        {
            lines.add(0, "Format specific information:");
            lines.tree(details, 1);
        }
        for file in self.children() {
            file.human("", 0, &mut lines);
        }
        lines.0
    }

    fn json(&self) -> Value {
        let mut object = json!({
            "virtual-size": self.virtual_size_bytes,
            "filename": self.name,
            "format": self.format,
        });
        if self.file.is_on_host() {
            object["dirty-flag"] = self.dirty.into();
        }
        if let Some(bytes) = self.actual_size_bytes {
            object["actual-size"] = bytes.into();
        }
        if let Some(bytes) = self.cluster_size_bytes {
            object["cluster-size"] = bytes.into();
        }
        if self.encrypted {
            object["encrypted"] = true.into();
        }
        if let Some(backing) = &self.backing {
            object["backing-filename"] = backing.name.as_str().into();
            if let Ok(full) = &backing.full_name {
                object["full-backing-filename"] = full.as_str().into();
            }
            if let Some(format) = &backing.format {
                object["backing-filename-format"] = format.as_str().into();
            }
        }
        if !self.snapshots.is_empty() {
            object["snapshots"] = self.snapshots.iter().map(snapshot_table::json).collect();
        }
        if let Some(details) = &self.details {
            object["format-specific"] = details.clone();
        }
        // Last, as in the reference: of keys in one bucket of its dictionary the youngest is printed first.
        object["children"] = self.children().map(HostFacts::json).collect();
        object
    }
}

/// The reference's name for the kind of host file.
fn protocol(storage: &dyn Storage) -> &'static str {
    let is_device =
        |data: fs::Metadata| data.file_type().is_block_device() || data.file_type().is_char_device();
    match storage.protocol() {
        "file" if fs::metadata(storage.path()).is_ok_and(is_device) => "host_device",
        protocol => protocol,
    }
}

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty)
}

/// Indented lines.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, level: usize, text: impl std::fmt::Display) {
        writeln!(self.0, "{}{text}", "    ".repeat(level)).expect("a String takes everything");
    }

    /// Any JSON value as an outline; dashes in keys become spaces.
    fn tree(&mut self, value: &Value, level: usize) {
        match value {
            Value::Object(map) => {
                for (key, value) in qdict::ordered(map) {
                    self.branch(&key.replace('-', " "), value, level);
                }
            }
            Value::Array(items) => {
                for (index, value) in items.iter().enumerate() {
                    self.branch(&format!("[{index}]"), value, level);
                }
            }
            scalar => self.add(level, Scalar(scalar)),
        }
    }

    fn branch(&mut self, label: &str, value: &Value, level: usize) {
        match value {
            Value::Object(_) | Value::Array(_) => {
                self.add(level, format_args!("{label}:"));
                self.tree(value, level + 1);
            }
            scalar => self.add(level, format_args!("{label}: {}", Scalar(scalar))),
        }
    }
}

/// A string without quotes, everything else as in JSON.
struct Scalar<'a>(&'a Value);

impl std::fmt::Display for Scalar<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Value::String(text) => f.write_str(text),
            other => write!(f, "{other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_become_an_outline() {
        let mut lines = Lines::default();
        lines.tree(
            &json!({
                "compat": "1.1",
                "lazy-refcounts": false,
                "bitmaps": [{ "flags": ["auto"], "name": "b0", "granularity": 65536 }, { "flags": [] }],
                "encrypt": { "format": "aes" },
            }),
            1,
        );
        assert_eq!(
            lines.0,
            "    compat: 1.1\n    lazy refcounts: false\n    bitmaps:\n        [0]:\n            flags:\n                \
             [0]: auto\n            name: b0\n            granularity: 65536\n        [1]:\n            flags:\n    \
             encrypt:\n        format: aes\n"
        );
    }
}
