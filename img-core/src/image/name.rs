//! How images are named: plain paths, `file:`, `json:{…}` and option strings.

use crate::Result;

/// An image as the user, or another image, names it.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageName {
    /// As given, for messages and output.
    text: String,
}

impl ImageName {
    /// A file name argument: a path, `file:PATH` or `json:{…}`.
    pub fn parse(text: &str) -> Result<Self> {
        Ok(Self { text: text.to_owned() })
    }

    /// An `--image-opts` string: `driver=qcow2,file.filename=…`.
    pub fn parse_options(text: &str) -> Result<Self> {
        Ok(Self { text: text.to_owned() })
    }

    /// As given.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}
