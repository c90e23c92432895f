//! New host files of formats whose guest bytes stand in them at their own offsets.

use super::OptionSet;
use crate::{
    Error, Result,
    storage::{Preallocation, Storage},
};

/// A file that was empty gets its first block: with bytes there, how a direct reader must be aligned can be
/// found out by trying. The reference does so, and it shows in the space taken.
pub(super) fn first_block(storage: &dyn Storage, len_bytes: u64) -> Result<()> {
    let zeroes = [0; 4096];
    match len_bytes {
        0 => Ok(()),
        1..4096 => storage.write_at(&zeroes[..512], 0),
        4096.. => storage.write_at(&zeroes, 0),
    }
}

/// The option `preallocation` of a new file.
pub(super) fn file_preallocation(options: &OptionSet) -> Result<Preallocation> {
    match options.get("preallocation") {
        None | Some("off") => Ok(Preallocation::Off),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some("metadata") => Err(Error::Invalid("Unsupported preallocation mode: metadata".to_owned())),
        Some(other) => Err(Error::Invalid(format!("invalid parameter value: {other}"))),
    }
}

/// Refuses the options of a new file where there is none: a pipe takes no space and has no attributes.
pub(super) fn refuse_file_options(options: &OptionSet) -> Result<()> {
    let is_asked = |(name, value): &(&str, &str)| match *name {
        "preallocation" => *value != "off",
        "nocow" | "extent_size_hint" | "backing_file" | "backing_fmt" | "data_file" | "data_file_raw" => true,
        _ => false,
    };
    match options.iter().find(is_asked) {
        None => Ok(()),
        Some((name, _)) => Err(Error::Invalid(format!("the option '{name}' has no meaning for a pipe"))),
    }
}
