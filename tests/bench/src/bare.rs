//! What the bytes of a row cost by themselves: read, or read and written elsewhere, in long pieces on all cores, with
//! no format, no look for zeroes and no order. What goes through the page cache does not take less.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use rustix::fs::SeekFrom;

use crate::inputs::Inputs;

const PIECE_BYTES: u64 = 1 << 20;

/// The bytes of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bare {
    /// These files are read.
    Read(&'static [&'static str]),
    /// This file is read, and written to another.
    Copy(&'static str),
}

impl Bare {
    /// This program, which does it in a process of its own.
    pub(crate) fn command(&self, inputs: &Inputs) -> io::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        match self {
            Self::Read(files) => {
                command.arg("--bare").args(files.iter().map(|file| inputs.path(file)));
            }
            Self::Copy(file) => {
                let (file, output) = (inputs.path(file), inputs.path("output"));
                command.args([
                    OsStr::new("--bare"),
                    file.as_os_str(),
                    OsStr::new("--to"),
                    output.as_os_str(),
                ]);
            }
        }
        Ok(command)
    }
}

/// Reads what is not a hole in `files`, and writes it to the same place in a new file `to`.
pub(crate) fn run(files: &[PathBuf], to: Option<&Path>) -> io::Result<()> {
    let files = files.iter().map(File::open).collect::<io::Result<Vec<_>>>()?;
    let to = to.map(File::create).transpose()?;
    let mut pieces = Vec::new();
    for file in &files {
        for_each_piece(file, |at, len| pieces.push((file, at, len)))?;
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = vec![0; usize::try_from(PIECE_BYTES).map_err(io::Error::other)?];
        while let Some((file, at, len)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let piece = &mut buffer[..*len];
            file.read_exact_at(piece, *at)?;
            if let Some(to) = &to {
                to.write_all_at(piece, *at)?;
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads = thread::available_parallelism()?.get();
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        let ends = others.into_iter().map(|other| other.join().expect("it does not panic"));
        ends.fold(own, io::Result::and)
    })
}

/// The pieces of what is not a hole: where each begins, and how many bytes it has.
fn for_each_piece(file: &File, mut visit: impl FnMut(u64, usize)) -> io::Result<()> {
    let mut at = 0;
    loop {
        let (start, end) = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => (start, rustix::fs::seek(file, SeekFrom::Hole(start))?),
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        at = start;
        while at < end {
            let len = (end - at).min(PIECE_BYTES);
            visit(at, usize::try_from(len).map_err(io::Error::other)?);
            at += len;
        }
    }
}
