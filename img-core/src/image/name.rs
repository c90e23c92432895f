//! How images are named: plain paths, `file:`, `json:{…}` and option strings.
//!
//! All of them become a [`Node`]: which host file, which format, which options. `flat` turns the two
//! structured forms into names with dots; this file gives the names their meaning.

use serde_json::Value;

use super::{
    flat,
    flat::Flat,
    host::CacheChoice,
    null_node::NullNode,
    path::protocol,
    raw_node::{RawNode, Zeroes, described, described_file},
};
use crate::{
    Error, Result,
    format::{OptionSet, parse_size, raw, registry},
};

/// An image as the user, or another image, names it.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageName {
    /// As given, for messages and output.
    text: String,
    node: Node,
}

/// What a name says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// The host file; what stands in its place is called so.
    pub(super) path: String,
    /// What stands in place of the host file.
    pub(super) null: Option<NullNode>,
    /// The format, where the name fixes it.
    pub(super) driver: Option<String>,
    /// Options for the format's driver.
    pub(super) options: OptionSet,
    pub(super) backing: BackingChoice,
    pub(super) read_only: bool,
    pub(super) force_share: bool,
    /// What the format's node says of the page cache, for its file and for the image below it.
    pub(super) cache: CacheChoice,
    /// What the host file's own node says, which counts before that.
    pub(super) file_cache: CacheChoice,
    /// `aio=native`: only past the page cache.
    pub(super) native_aio: bool,
    /// `locking=off`: no locks.
    pub(super) unlocked: bool,
    pub(super) zeroes: Zeroes,
    /// The raw nodes between the format and its file, from the top.
    pub(super) raw_nodes: Vec<RawNode>,
    /// The choice of the host file's own node.
    pub(super) file_zeroes: Zeroes,
}

/// Which backing file an image gets.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum BackingChoice {
    /// The one it names.
    Recorded,
    /// None.
    Nothing,
    /// Another one.
    Node(Box<Node>),
}

impl ImageName {
    /// A file name argument: a path, `file:PATH` or `json:{…}`.
    ///
    /// # Errors
    /// [`Error::Open`] when it cannot name an image: unknown protocols, malformed JSON, unknown options.
    pub fn parse(text: &str) -> Result<Self> {
        Self::with_node(text, Node::parse(text))
    }

    /// An `--image-opts` string: `driver=qcow2,file.filename=…`.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_options(text: &str) -> Result<Self> {
        Self::with_node(text, Node::parse_options(text))
    }

    /// A plain host path, whatever characters it has.
    #[must_use]
    pub fn from_path(path: &str) -> Self {
        Self { text: path.to_owned(), node: Node::file(path) }
    }

    fn with_node(text: &str, node: Result<Node>) -> Result<Self> {
        match node {
            Ok(node) => Ok(Self { text: text.to_owned(), node }),
            Err(source) => Err(Error::Open { name: text.to_owned(), source: Box::new(source) }),
        }
    }

    /// As given.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What the reference calls the raw nodes between the format and its host file, from the top: one for each
    /// storage [below](crate::storage::Storage::below) the image file's that is not the file itself.
    pub fn raw_nodes(&self) -> impl Iterator<Item = String> {
        self.node.raw_names()
    }

    /// The image that this name says the one called `depth` steps above it stands on, where it says so: for who opens
    /// that one by itself.
    #[must_use]
    pub fn below(&self, depth: usize) -> Option<Self> {
        let mut node = &self.node;
        for _ in 0..depth {
            let BackingChoice::Node(below) = &node.backing else { return None };
            node = below;
        }
        Some(Self { text: node.path.clone(), node: node.clone() })
    }

    /// The host path of an image that is to be made: structured names cannot say that.
    pub fn path_to_create(&self) -> Result<&str> {
        match protocol(&self.text) {
            Some("json") => Err(Error::Invalid("Unknown protocol 'json'".to_owned())),
            _ => match NullNode::protocol(protocol(&self.text).unwrap_or_default()) {
                None => Ok(&self.node.path),
                Some(null) => {
                    Err(Error::Invalid(format!("Protocol driver '{null}' does not support image creation")))
                }
            },
        }
    }

    pub(super) fn node(&self) -> &Node {
        &self.node
    }
}

impl Node {
    /// A host file, everything else left open.
    pub(super) fn file(path: &str) -> Self {
        Self {
            path: path.to_owned(),
            null: None,
            driver: None,
            options: OptionSet::new(),
            backing: BackingChoice::Recorded,
            read_only: false,
            force_share: false,
            cache: CacheChoice::default(),
            file_cache: CacheChoice::default(),
            native_aio: false,
            unlocked: false,
            zeroes: Zeroes::default(),
            raw_nodes: Vec::new(),
            file_zeroes: Zeroes::default(),
        }
    }

    fn of_null(null: NullNode) -> Self {
        Self { path: null.display(), null: Some(null), ..Self::file("") }
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        match protocol(text) {
            Some("json") => Self::from_flat(flat::parse_json(text)?),
            Some("file") => {
                let path = &text["file:".len()..];
                // What looks like another protocol is none.
                if protocol(path).is_some() {
                    Self::non_empty(&format!("./{path}"))
                } else {
                    Self::non_empty(path)
                }
            }
            Some(other) => match NullNode::protocol(other) {
                Some(null) => NullNode::named(null, text).map(Self::of_null),
                None => Err(Error::Invalid(format!("Unknown protocol '{other}'"))),
            },
            None => Self::non_empty(text),
        }
    }

    pub(super) fn parse_options(text: &str) -> Result<Self> {
        Self::from_flat(flat::parse_list(text)?)
    }

    fn non_empty(path: &str) -> Result<Self> {
        if path.is_empty() {
            return Err(Error::Invalid("The 'file' block driver requires a file name".to_owned()));
        }
        if path.contains('\0') {
            return Err(Error::Invalid("A file name cannot contain a zero byte".to_owned()));
        }
        Ok(Self::file(path))
    }

    fn from_flat(mut flat: Flat) -> Result<Self> {
        let driver = flat.take_text("driver")?;
        if matches!(driver.as_deref(), Some("file" | "host_device")) {
            // A protocol where a format is expected: the bytes as they are.
            let mut node = Self::file_node(flat)?;
            node.driver = Some("raw".to_owned());
            node.zeroes = std::mem::take(&mut node.file_zeroes);
            return Ok(node);
        }
        if let Some(protocol) = driver.as_deref().and_then(NullNode::protocol) {
            let mut node = Self::null_node(protocol, flat)?;
            node.driver = driver;
            node.zeroes = std::mem::take(&mut node.file_zeroes);
            return Ok(node);
        }
        let file = match flat.take("file") {
            Some(Value::String(name)) => {
                return Err(Error::Invalid(format!("Cannot find device='{name}' nor node-name='{name}'")));
            }
            Some(Value::Null) => Flat::default(),
            Some(other) => return Err(Error::Invalid(format!("Invalid value for 'file': {other}"))),
            None => flat.take_prefix("file."),
        };
        if file.is_empty() {
            return Err(match driver {
                None => Error::Invalid("Must specify either driver or file".to_owned()),
                Some(driver) if registry::by_name(&driver).is_none() => registry::unknown(&driver),
                Some(_) => Error::Invalid("A block device must be specified for \"file\"".to_owned()),
            });
        }
        let mut node = Self::file_node(file)?;
        node.driver = driver;
        node.zeroes = node.take_common(&mut flat)?;
        node.backing = match flat.take("backing") {
            Some(Value::Null) => BackingChoice::Nothing,
            Some(Value::String(text)) if text.is_empty() => BackingChoice::Nothing,
            Some(Value::String(name)) => {
                return Err(Error::Invalid(format!("Cannot find device='{name}' nor node-name='{name}'")));
            }
            Some(other) => return Err(Error::Invalid(format!("Invalid value for 'backing': {other}"))),
            None => {
                let backing = flat.take_prefix("backing.");
                if backing.is_empty() {
                    BackingChoice::Recorded
                } else {
                    BackingChoice::Node(Box::new(Self::from_flat(backing)?))
                }
            }
        };
        for (name, value) in flat.into_entries() {
            node.options.set(name, flat::text(&value));
        }
        Ok(node)
    }

    /// The options of the protocols that keep nothing.
    fn null_node(protocol: &'static str, mut flat: Flat) -> Result<Self> {
        let mut common = Self::file("");
        let file_zeroes = common.take_common(&mut flat)?;
        let null = NullNode::take(protocol, &mut flat)?;
        Ok(Self { path: null.display(), null: Some(null), file_zeroes, ..common })
    }

    /// The options of the protocol `file`.
    fn file_node(mut flat: Flat) -> Result<Self> {
        match flat.take_text("driver")?.as_deref() {
            None | Some("file" | "host_device") => {}
            Some("raw") => {
                let mut inner = Self::from_flat({
                    flat.put("driver", Value::String("raw".to_owned()));
                    flat
                })?;
                let options = std::mem::take(&mut inner.options);
                raw::check_options(&options)?;
                if matches!(inner.backing, BackingChoice::Node(_)) {
                    return Err(Error::Invalid("Driver doesn't support backing files".to_owned()));
                }
                let node = RawNode {
                    offset: options.size("offset")?,
                    size: options.size("size")?,
                    zeroes: std::mem::take(&mut inner.zeroes),
                };
                inner.raw_nodes.insert(0, node);
                inner.file_cache = inner.file_cache.or(std::mem::take(&mut inner.cache));
                return Ok(Self { driver: None, backing: BackingChoice::Recorded, ..inner });
            }
            Some(other) => {
                return match NullNode::protocol(other) {
                    Some(protocol) => Self::null_node(protocol, flat),
                    None => Err(registry::unknown(other)),
                };
            }
        }
        let path = match flat.take("filename") {
            Some(Value::String(path)) => path,
            _ => String::new(),
        };
        let mut node = Self::non_empty(&path)?;
        node.file_zeroes = node.take_common(&mut flat)?;
        node.file_cache = std::mem::take(&mut node.cache);
        if let Some(locking) = flat.take_text("locking")? {
            node.unlocked = match locking.as_str() {
                "off" => true,
                "on" | "auto" => false,
                other => return Err(Error::Invalid(format!("invalid parameter value: {other}"))),
            };
        }
        if let Some(aio) = flat.take_text("aio")? {
            // All three give the same answers; ours is the plain system call.
            node.native_aio = match aio.as_str() {
                "threads" | "io_uring" => false,
                "native" => true,
                other => return Err(Error::Invalid(format!("invalid parameter value: {other}"))),
            };
        }
        // What becomes of the page cache when a guest has moved to another host: none does here.
        flat.take_switch("drop-cache")?;
        match flat.into_entries().next() {
            Some((name, _)) => {
                Err(Error::Invalid(format!("Block protocol 'file' doesn't support the option '{name}'")))
            }
            None => Ok(node),
        }
    }

    /// Options that every node has. Those that nodes do not share are returned.
    fn take_common(&mut self, flat: &mut Flat) -> Result<Zeroes> {
        // One node of those above each other is enough.
        self.read_only |= flat.take_switch("read-only")?.unwrap_or(false);
        flat.take_switch("auto-read-only")?;
        self.force_share |= flat.take_switch("force-share")?.unwrap_or(false);
        self.cache = CacheChoice::take(flat)?;
        flat.take_text("node-name")?; // nothing here refers to nodes by name
        Zeroes::take(flat)
    }

    /// As the reference prints it once it is open in the format `driver`: the host file's name where that says it
    /// all, else `json:{…}`.
    pub(super) fn display(&self, driver: &str) -> String {
        let number = |name: &str| self.options.get(name).and_then(|text| parse_size(text).ok());
        let (offset, size) = if driver == "raw" { (number("offset"), number("size")) } else { (None, None) };
        let is_plain = offset.is_none() && size.is_none() && self.raw_nodes.is_empty();
        let is_told_by_path = match &self.null {
            None => true,
            // The path of a node with options is the node in full, which leaves no room for a format above it.
            Some(null) => null.is_default() || NullNode::protocol(driver).is_some(),
        };
        if is_plain && is_told_by_path {
            return self.path.clone();
        }
        format!("json:{}", described(driver, offset, size, &self.described_below(0)))
    }

    /// The raw nodes from `first` on, and the file.
    fn described_below(&self, first: usize) -> String {
        let nodes = self.raw_nodes[first..].iter().rev();
        let file = self.null.as_ref().map_or_else(|| described_file(&self.path), NullNode::described);
        nodes.fold(file, |file, node| described("raw", node.offset, node.size, &file))
    }

    /// What the raw nodes are called, from the top.
    fn raw_names(&self) -> impl Iterator<Item = String> {
        (0..self.raw_nodes.len()).map(|first| match &self.raw_nodes[first..] {
            [last] if !last.is_window() => self.path.clone(),
            _ => format!("json:{}", self.described_below(first)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        match ImageName::parse(text) {
            Err(Error::Open { source, .. }) => source.to_string(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn every_form_names_the_same_file() {
        for text in [
            "a.qcow2",
            "file:a.qcow2",
            r#"json:{"file.filename":"a.qcow2"}"#,
            "json:{'file.filename':'a.qcow2'}",
            r#"json:{"file":{"driver":"file","filename":"a.qcow2"}}"#,
        ] {
            assert_eq!(ImageName::parse(text).unwrap().node, Node::file("a.qcow2"), "{text}");
            assert_eq!(ImageName::parse(text).unwrap().node.display("qcow2"), "a.qcow2");
        }
        let by_options = ImageName::parse_options("driver=qcow2,file.filename=a,,b").unwrap();
        assert_eq!(by_options.node.path, "a,b");
        assert_eq!(by_options.node.driver.as_deref(), Some("qcow2"));
        assert_eq!(ImageName::parse("./fd:x").unwrap().node.path, "./fd:x");
    }

    #[test]
    fn refusals_are_the_reference_s() {
        for (text, why) in [
            ("fd:x", "Unknown protocol 'fd'"),
            ("", "The 'file' block driver requires a file name"),
            ("json:{", "Could not parse the JSON options: JSON parse error, premature EOI"),
            ("json:", "Could not parse the JSON options: Expecting a JSON value"),
            ("json:{}", "Must specify either driver or file"),
            ("json:[1]", "Invalid JSON object given"),
            (r#"json:{"driver":"foo"}"#, "Unknown driver 'foo'"),
            (r#"json:{"driver":"qcow2"}"#, "A block device must be specified for \"file\""),
            (r#"json:{"filename":"a.qcow2"}"#, "Must specify either driver or file"),
            (r#"json:{"driver":"qcow2","file":"n"}"#, "Cannot find device='n' nor node-name='n'"),
            (
                r#"json:{"driver":"raw","file":{"driver":"file","filename":"a","foo":3}}"#,
                "Block protocol 'file' doesn't support the option 'foo'",
            ),
            (r#"json:{"driver":"raw","file":{"driver":"zork"}}"#, "Unknown driver 'zork'"),
            (
                r#"json:{"driver":"raw","file":{"driver":"file"}}"#,
                "The 'file' block driver requires a file name",
            ),
            (
                r#"json:{"driver":"raw","file.filename":"a","read-only":"maybe"}"#,
                "Parameter 'read-only' expects 'on' or 'off'",
            ),
        ] {
            assert_eq!(refusal(text), why, "{text}");
        }
        for (text, why) in [
            ("a.qcow2", "Cannot find device='a.qcow2' nor node-name='a.qcow2'"),
            ("", "Must specify either driver or file"),
            ("driver=raw,file=x", "Cannot find device='x' nor node-name='x'"),
        ] {
            assert_eq!(Node::parse_options(text).unwrap_err().to_string(), why, "{text}");
        }
    }

    #[test]
    fn options_go_where_they_belong() {
        let text = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"o","cache":{"direct":true}},
            "l2-cache-size":"3M","lazy-refcounts":true,"read-only":true,
            "backing":{"driver":"raw","offset":512,"file.filename":"b"}}"#;
        let node = Node::parse(text).unwrap();
        assert_eq!(node.options.get("l2-cache-size"), Some("3M"));
        assert_eq!(node.options.get("lazy-refcounts"), Some("on"));
        assert!(node.read_only);
        assert_eq!(node.file_cache, CacheChoice { direct: Some(true), no_flush: None });
        let BackingChoice::Node(backing) = &node.backing else { panic!("{:?}", node.backing) };
        assert_eq!((backing.path.as_str(), backing.options.get("offset")), ("b", Some("512")));
        let none = Node::parse(r#"json:{"driver":"qcow2","file.filename":"o","backing":null}"#).unwrap();
        assert_eq!(none.backing, BackingChoice::Nothing);
    }

    #[test]
    fn a_window_is_displayed_as_json() {
        let text = r#"json:{"driver":"raw","offset":512,"size":"1k","file":{"filename":"a.raw"}}"#;
        let window = r#"{"offset": 512, "driver": "raw", "size": 1024, "file": {"driver": "file", "filename": "a.raw"}}"#;
        assert_eq!(ImageName::parse(text).unwrap().node.display("raw"), format!("json:{window}"));
        let text = r#"json:{"file":{"driver":"raw","offset":512,"size":1024,"file":{"driver":"raw",
            "file":{"driver":"file","filename":"a"}}}}"#;
        let name = ImageName::parse(text).unwrap();
        let plain = r#"{"driver": "raw", "file": {"driver": "file", "filename": "a"}}"#;
        let below = format!(r#"{{"offset": 512, "driver": "raw", "size": 1024, "file": {plain}}}"#);
        assert_eq!(name.node.display("qcow2"), format!(r#"json:{{"driver": "qcow2", "file": {below}}}"#));
        assert_eq!(name.raw_nodes().collect::<Vec<_>>(), [format!("json:{below}"), "a".to_owned()]);
    }
}
