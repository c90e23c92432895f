//! What stands between a format and its host file in a structured name: raw nodes, each a window on the one below,
//! and the choice of any node to tell writes of zeroes from others.

use std::sync::Arc;

use serde_json::Value;

use super::flat::Flat;
use crate::{
    Error, Result,
    storage::{DetectZeroes, Storage, Window},
};

/// The options `detect-zeroes` and `discard` of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Zeroes {
    detect: DetectZeroes,
    /// Whether it gives space back, where that is said.
    discard: Option<bool>,
}

impl Zeroes {
    pub(super) fn take(flat: &mut Flat) -> Result<Self> {
        let discard = match flat.take_text("discard")?.as_deref() {
            None => None,
            Some("ignore" | "off") => Some(false),
            Some("unmap" | "on") => Some(true),
            Some(_) => return Err(Error::Invalid("Invalid discard option".to_owned())),
        };
        let detect = match flat.take_text("detect-zeroes")?.as_deref() {
            None | Some("off") => DetectZeroes::Off,
            Some("on") => DetectZeroes::On,
            Some("unmap") => DetectZeroes::Unmap,
            Some(other) => return Err(Error::Invalid(format!("invalid parameter value: {other}"))),
        };
        Ok(Self { detect, discard })
    }

    /// Whether the node leaves everything as it comes.
    pub(super) fn is_plain(self) -> bool {
        self.detect == DetectZeroes::Off && self.discards()
    }

    /// Whether it gives space back that it is asked to; it does unless its option says otherwise.
    pub(super) fn discards(self) -> bool {
        self.discard.unwrap_or(true)
    }

    /// What is done, where `discards` says whether the node gives space back unless its own option does.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the two options contradict each other.
    pub(super) fn checked(self, discards: bool) -> Result<DetectZeroes> {
        if self.detect == DetectZeroes::Unmap && !self.discard.unwrap_or(discards) {
            return Err(Error::Invalid(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
                    .to_owned(),
            ));
        }
        Ok(self.detect)
    }
}

/// A raw node below a format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RawNode {
    pub(super) offset: Option<u64>,
    pub(super) size: Option<u64>,
    pub(super) zeroes: Zeroes,
}

impl RawNode {
    /// The storage that the node makes of the one below it.
    pub(super) fn over(self, storage: Arc<dyn Storage>) -> Result<Arc<dyn Storage>> {
        let zeroes = self.zeroes.checked(true)?;
        let window = Window::new(storage, self.offset.unwrap_or(0), self.size, zeroes)?;
        Ok(Arc::new(if self.zeroes.discards() { window } else { window.keeping_space() }))
    }

    /// Whether it shows less than all of what is below it.
    pub(super) fn is_window(&self) -> bool {
        self.offset.is_some() || self.size.is_some()
    }
}

/// A node as the reference writes it, in the order of its dictionary: `driver` over `file`, which is written so
/// already.
pub(super) fn described(driver: &str, offset: Option<u64>, size: Option<u64>, file: &str) -> String {
    let mut members = Vec::new();
    members.extend(offset.map(|offset| format!("\"offset\": {offset}")));
    members.push(format!("\"driver\": {}", Value::String(driver.to_owned())));
    members.extend(size.map(|size| format!("\"size\": {size}")));
    members.push(format!("\"file\": {file}"));
    format!("{{{}}}", members.join(", "))
}

/// The innermost node: a host file.
pub(super) fn described_file(path: &str) -> String {
    format!("{{\"driver\": \"file\", \"filename\": {}}}", Value::String(path.to_owned()))
}
