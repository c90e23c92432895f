//! Files that a command makes, and takes away again when it fails.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use img_core::text;

use crate::error::{Failure, os_text};

/// What goes when the process is ended at once.
static DOOMED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn doomed() -> MutexGuard<'static, Vec<PathBuf>> {
    DOOMED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn doom(file: &Path) {
    // The place in the list is taken before the lock is: whoever ends the process for want of memory needs the lock.
    let file = file.to_owned();
    doomed().push(file);
}

/// Removes what is being made, for a process that ends at once: it takes no memory, and tells nobody.
pub(crate) fn remove_all() {
    if let Ok(files) = DOOMED.try_lock() {
        for file in &*files {
            remove(file).ok();
        }
    }
}

/// Files that did not exist when the command started. They go when [`remove`](Self::remove) is called, or at
/// the latest when this is dropped, unless they are to be kept.
#[derive(Debug, Default)]
pub(crate) struct Created {
    files: Vec<PathBuf>,
}

impl Created {
    /// The command is about to make `file`: it is this command's to remove if nothing stands there now.
    pub(crate) fn expect(&mut self, file: &str) {
        let file = text::to_path(file);
        if fs::symlink_metadata(&file).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
            doom(&file);
            self.files.push(file);
        }
    }

    /// The command has made these files.
    pub(crate) fn add(&mut self, files: Vec<PathBuf>) {
        for file in files {
            if !self.files.contains(&file) {
                doom(&file);
                self.files.push(file);
            }
        }
    }

    /// The work is done: the files stay.
    pub(crate) fn keep(&mut self) {
        doomed().clear();
        self.files.clear();
    }

    /// Removes what was made.
    ///
    /// # Errors
    /// When a file cannot be removed: the user must know that a half-made image is left.
    pub(crate) fn remove(&mut self) -> Result<(), Failure> {
        doomed().clear();
        let mut outcome = Ok(());
        for file in self.files.drain(..) {
            if let Err(why) = remove(&file) {
                outcome = Err(Failure::new(format!(
                    "{}: an unfinished image is left, it could not be removed: {}",
                    text::from_path(&file),
                    os_text(&why)
                )));
            }
        }
        outcome
    }
}

fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        // Only reached with files left when the command panicked: the panic is the message.
        for file in self.files.drain(..) {
            remove(&file).ok();
        }
    }
}
