//! The images that are served, made by the reference's tools.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
    process::{Command, Stdio},
};

/// Guest bytes of the disks that are full of data.
const FULL_BYTES: u64 = 512 << 20;

/// Guest bytes of the disk whose clusters are all new: many more than are written.
const EMPTY_BYTES: u64 = 16 << 30;

/// Layers over the base of the long chain.
const LAYERS: u32 = 32;

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A raw file full of data.
    Raw,
    /// A qcow2 image full of data, its clusters in order.
    Qcow2,
    /// A qcow2 image of the same size with nothing in it.
    Empty,
    /// A large qcow2 image with nothing in it.
    EmptyLarge,
    /// A qcow2 image with nothing in it over [`Kind::Raw`].
    Overlay,
    /// 33 layers of qcow2; the lowest one is full of data, those above have a few clusters each.
    Chain,
}

impl Kind {
    /// Makes the image `disk` in `directory`, anew where there is one, and returns the layers from the bottom up.
    pub(crate) fn make(self, directory: &Path) -> io::Result<Vec<Layer>> {
        if self == Self::Raw || self == Self::Overlay {
            let name = if self == Self::Raw { "disk" } else { "base" };
            fill(&directory.join(name))?;
            if self == Self::Raw {
                return Ok(vec![Layer::new(name, "raw")]);
            }
        }
        let size = FULL_BYTES.to_string();
        let large = EMPTY_BYTES.to_string();
        match self {
            Self::Raw => {}
            Self::Qcow2 => {
                fill(&directory.join("data"))?;
                tool(directory, "qemu-img", &["convert", "-O", "qcow2", "-f", "raw", "data", "disk"], &[])?;
                fs::remove_file(directory.join("data"))?;
            }
            Self::Empty => create(directory, &["disk", &size])?,
            Self::EmptyLarge => create(directory, &["disk", &large])?,
            Self::Overlay => {
                create(directory, &["-b", "base", "-F", "raw", "disk"])?;
                return Ok(vec![Layer::new("base", "raw"), Layer::new("disk", "qcow2")]);
            }
            Self::Chain => return chain(directory),
        }
        Ok(vec![Layer::new("disk", "qcow2")])
    }
}

/// One file of a chain.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) file: String,
    pub(crate) format: &'static str,
}

impl Layer {
    pub(crate) fn new(file: &str, format: &'static str) -> Self {
        Self { file: file.to_owned(), format }
    }
}

fn chain(directory: &Path) -> io::Result<Vec<Layer>> {
    fill(&directory.join("data"))?;
    tool(directory, "qemu-img", &["convert", "-O", "qcow2", "-f", "raw", "data", "layer0"], &[])?;
    fs::remove_file(directory.join("data"))?;
    let mut layers = vec![Layer::new("layer0", "qcow2")];
    for number in 1..=LAYERS {
        let below = format!("layer{}", number - 1);
        let this = if number == LAYERS { "disk".to_owned() } else { format!("layer{number}") };
        create(directory, &["-b", &below, "-F", "qcow2", &this])?;
        let writes: Vec<String> = (0..16)
            .map(|write| {
                format!("write -q -P {number} {}k 64k", (number * 16 + write) * 832 % 524_288 / 64 * 64)
            })
            .collect();
        let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
        tool(directory, "qemu-io", &["-f", "qcow2", &this], &writes)?;
        layers.push(Layer::new(&this, "qcow2"));
    }
    Ok(layers)
}

/// Makes a file of bytes that are no zeroes anywhere.
fn fill(path: &Path) -> io::Result<()> {
    let mut file = crate::named(path, File::create(path))?;
    let mut piece = vec![0_u8; 1 << 20];
    for number in 0..FULL_BYTES >> 20 {
        for (at, word) in (number << 17..).zip(piece.chunks_exact_mut(8)) {
            word.copy_from_slice(&(at.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).to_le_bytes());
        }
        file.write_all(&piece)?;
    }
    Ok(())
}

fn create(directory: &Path, arguments: &[&str]) -> io::Result<()> {
    tool(directory, "qemu-img", &[&["create", "-q", "-f", "qcow2"], arguments].concat(), &[])
}

/// Runs a tool of the reference, with lines to read.
fn tool(directory: &Path, name: &str, arguments: &[&str], lines: &[&str]) -> io::Result<()> {
    let mut command = Command::new(name);
    command.args(arguments).current_dir(directory).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn()?;
    let mut input = child.stdin.take().expect("piped");
    input.write_all((lines.join("\n") + "\n").as_bytes())?;
    drop(input);
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("{name} {arguments:?}: {status}"))) }
}
