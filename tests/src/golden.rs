//! `testdata/FORMAT/MANIFEST`: what reading each golden image must give. `testdata/README.md` says how its
//! lines are written.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A golden image and its contents.
#[derive(Clone, Debug)]
pub struct Golden {
    /// File name in [`folder`].
    pub name: String,
    /// What the guest reads, or `None` where this build refuses to read.
    pub guest: Option<Vec<u8>>,
    /// Internal snapshots in order: name and what the guest reads there.
    pub snapshots: Vec<(String, Vec<u8>)>,
}

/// The formats that have golden images.
pub const FORMATS: [&str; 4] = ["qcow2", "qed", "vmdk", "vpc"];

/// Where the golden images of `format` are.
#[must_use]
pub fn folder(format: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata")).join(format)
}

/// All golden images of `format`.
///
/// # Panics
/// When the manifest cannot be read, or a line of it makes no sense.
#[must_use]
pub fn manifest(format: &str) -> Vec<Golden> {
    let text =
        fs::read_to_string(folder(format).join("MANIFEST")).expect("the manifest is in the repository");
    let mut images: Vec<Golden> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["image", name, size] = words[..] {
            images.push(Golden {
                name: name.to_owned(),
                guest: Some(vec![0; number(size)]),
                snapshots: Vec::new(),
            });
            continue;
        }
        let image = images.last_mut().expect("the first line starts an image");
        match (&words[..], &mut image.guest) {
            (["data", offset, length, byte], Some(guest)) => {
                let byte = u8::try_from(number(byte)).expect("a byte");
                guest[number(offset)..][..number(length)].fill(byte);
            }
            (["resize", size], Some(guest)) => guest.resize(number(size), 0),
            (["snapshot", name], Some(guest)) => image.snapshots.push(((*name).to_owned(), guest.clone())),
            (["refused"], guest) => *guest = None,
            _ => panic!("MANIFEST: {line}"),
        }
    }
    images
}

fn number(text: &str) -> usize {
    match text.strip_prefix("0x") {
        Some(digits) => usize::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .expect("a number")
}
