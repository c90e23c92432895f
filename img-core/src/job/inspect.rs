//! One verdict about an image that is not trusted, from its own file alone.
//!
//! Files that the image names are listed and judged by their names. None is opened, whatever the policy allows, but
//! extents that hold the image's own tables: where all of them may be opened they are judged with it.

use std::{
    fs,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use crate::{
    Error, Result,
    format::{
        CheckReport, Driver, Extent, HostFile, Layer, OpenContext, OpenMode, OptionSet, Outline, Place,
        Reference, ReferenceKind, Repair, registry,
    },
    image::{data_file_path, full_backing_name, probe, protocol},
    limits,
    storage::{FileOptions, MemoryStorage, Storage, lock::Use},
    text,
};

/// How much is mapped at once, in units of allocation.
const WINDOW_UNITS: u64 = 8192;

/// How much is mapped at once where there are no such units.
const WINDOW_BYTES: u64 = 1 << 40;

/// How many findings of an audit become reasons; the rest is counted.
const MAX_FINDINGS: usize = 16;

/// What an image must be to be accepted.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The format that it is said to have; found by looking at it when absent.
    pub format: Option<String>,
    /// The formats that it may have; any when absent.
    pub allowed_formats: Option<Vec<String>>,
    /// The largest disk, in bytes: the image's own and those of its snapshots.
    pub max_size_bytes: Option<u64>,
    /// How many guest bytes at most are stored for each byte of the file.
    pub max_ratio: u64,
    /// Whether locks are left alone.
    pub force_share: bool,
}

/// What is known of an image, and why it is refused, if it is.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Its format, where that could be told.
    pub format: Option<&'static str>,
    /// Length of the file.
    pub file_bytes: u64,
    /// Size of the disk, where that could be told.
    pub virtual_size_bytes: Option<u64>,
    /// How guest data are encrypted.
    pub encryption: Option<&'static str>,
    /// It was not closed by its last writer.
    pub dirty: bool,
    /// It says of itself that it is damaged.
    pub corrupt: bool,
    /// Internal snapshots.
    pub snapshots: usize,
    /// Dirty bitmaps that it keeps.
    pub bitmaps: usize,
    /// The files that it names.
    pub references: Vec<Judged>,
    /// What its audit counted; `None` where there was none.
    pub check: Option<CheckReport>,
    /// What its map says is stored; `None` where the map was not read to its end.
    pub stored: Option<Stored>,
    /// Why it is refused. Empty: it is accepted.
    pub reasons: Vec<Reason>,
}

/// A file that the image names.
#[derive(Debug)]
pub struct Judged {
    /// As the image has it.
    pub reference: Reference,
    /// Whether it may be opened, by its name.
    pub allowed: bool,
}

/// Guest bytes that the file stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    /// All of them: what is neither unallocated nor known to be zero.
    pub guest_bytes: u64,
    /// Of them, compressed.
    pub compressed_guest_bytes: u64,
}

/// Why an image is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// Stays what it is from version to version.
    pub id: &'static str,
    /// For people.
    pub text: String,
    /// The structure that is wrong, and where in the file it stands.
    pub place: Option<(&'static str, u64)>,
    /// What is there.
    pub found: Option<String>,
    /// What should be.
    pub expected: Option<String>,
}

impl Reason {
    fn new(id: &'static str, text: String) -> Self {
        Self { id, text, place: None, found: None, expected: None }
    }

    /// Something is `found` and not as `expected`.
    fn beyond(id: &'static str, text: String, found: impl ToString, expected: impl ToString) -> Self {
        Self { found: Some(found.to_string()), expected: Some(expected.to_string()), ..Self::new(id, text) }
    }

    /// The reason that an error of the format is.
    fn of(error: &Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Corrupt { structure, at_bytes, expected, found, .. } => Self {
                place: Some((structure, *at_bytes)),
                ..Self::beyond("structure-invalid", text, found, expected)
            },
            Error::Unsupported { .. } => Self::new("feature-unsupported", text),
            Error::WrongFormat { .. } => Self::new("format-mismatch", text),
            _ => Self::new("image-unusable", text),
        }
    }
}

impl Verdict {
    /// Whether nothing speaks against the image.
    #[must_use]
    pub fn accepts(&self) -> bool {
        self.reasons.is_empty()
    }
}

/// Judges the file at `path`, which is a path whatever characters it has.
///
/// # Errors
/// When the file cannot be opened, locked or read at all; everything else is a reason in the verdict.
pub fn inspect(path: &str, policy: &Policy) -> Result<Verdict> {
    let storage: Arc<dyn Storage> = Arc::new(FileOptions::new().open(text::to_path(path))?);
    let mut verdict = Verdict { file_bytes: storage.len_bytes()?, ..Verdict::default() };
    let Some(driver) = verdict.take_format(&*storage, policy)? else { return Ok(verdict) };
    // Raw data have no structures that a writer could change meanwhile.
    if driver.name() != "raw" && !policy.force_share {
        storage.lock(Use::Read)?;
    }
    let Some(outline) = verdict.kept(driver.outline(Arc::clone(&storage)))? else { return Ok(verdict) };
    verdict.virtual_size_bytes = Some(outline.virtual_size_bytes);
    verdict.judge_size("the disk", outline.virtual_size_bytes, policy);
    // Names are relative to the directory by whose name the image was opened.
    let directory = text::to_path(path).parent().map(|parent| fs::canonicalize(Path::new(".").join(parent)));
    let directory = directory.and_then(std::result::Result::ok);
    for reference in &outline.references {
        verdict.judge_reference(path, directory.as_deref(), reference);
    }
    verdict.judge_layer(driver, storage, &outline, policy)?;
    Ok(verdict)
}

impl Verdict {
    /// The format, where policy allows it.
    fn take_format(&mut self, storage: &dyn Storage, policy: &Policy) -> Result<Option<&'static dyn Driver>> {
        let driver = match &policy.format {
            Some(name) => {
                registry::by_name(name).ok_or_else(|| Error::Invalid(format!("Unknown driver '{name}'")))?
            }
            None => match probe(storage, false) {
                Ok(driver) => driver,
                Err(Error::Invalid(text)) => {
                    self.reasons.push(Reason::new("format-ambiguous", text));
                    return Ok(None);
                }
                Err(error) => return Err(error),
            },
        };
        self.format = Some(driver.name());
        if let Some(allowed) = &policy.allowed_formats
            && !allowed.iter().any(|name| name == driver.name())
        {
            let (format, allowed) = (driver.name(), allowed.join(","));
            let text = format!("the format {format} is not among those that are allowed: {allowed}");
            self.reasons.push(Reason::beyond("format-not-allowed", text, format, allowed));
        }
        Ok(Some(driver))
    }

    /// What a step came to; where it failed for what the image says, that is a reason.
    fn kept<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error @ Error::Io { .. }) => Err(error),
            Err(error) => {
                let reason = Reason::of(&error);
                if !self.reasons.contains(&reason) {
                    self.reasons.push(reason);
                }
                Ok(None)
            }
        }
    }

    fn judge_size(&mut self, what: &str, bytes: u64, policy: &Policy) {
        if let Some(most) = policy.max_size_bytes.filter(|most| bytes > *most) {
            let text = format!("{what} has {bytes} bytes, more than the {most} that are allowed");
            self.reasons.push(Reason::beyond("virtual-size", text, bytes, most));
        }
    }

    fn judge_reference(&mut self, image: &str, directory: Option<&Path>, reference: &Reference) {
        let what = match &reference.kind {
            ReferenceKind::Backing { .. } => "a backing file",
            ReferenceKind::DataFile => "a data file",
            ReferenceKind::Extent { .. } => "an extent",
        };
        let refusal = reference_refusal(image, directory, &reference.name);
        self.references.push(Judged { reference: reference.clone(), allowed: refusal.is_none() });
        if let Some((id, why)) = refusal {
            let text = format!("{image}: {what} is named, '{}': {why}", reference.name);
            self.reasons.push(Reason { found: Some(reference.name.clone()), ..Reason::new(id, text) });
        }
        if let ReferenceKind::Backing { format: None } = reference.kind {
            let text = format!(
                "{image}: the format of the backing file '{}' is not recorded: whoever wrote into that file chooses it",
                reference.name
            );
            self.reasons.push(Reason::new("reference-format-unknown", text));
        }
        let is_allowed = self.references.last().is_some_and(|judged| judged.allowed);
        if let ReferenceKind::Extent { has_tables: true } = reference.kind
            && !is_allowed
        {
            let text = format!(
                "{image}: the tables in the extent '{}' are not judged, as it is another file",
                reference.name
            );
            self.reasons.push(Reason::new("tables-elsewhere", text));
        }
    }

    /// Judges what the image's own file holds.
    fn judge_layer(
        &mut self,
        driver: &'static dyn Driver,
        storage: Arc<dyn Storage>,
        outline: &Outline,
        policy: &Policy,
    ) -> Result<()> {
        let whole = match &outline.layer {
            Some(_) => None,
            None => self.open_with_tables(driver, &storage, policy)?,
        };
        let Some(layer) = outline.layer.as_ref().or(whole.as_ref()) else { return Ok(()) };
        let file = text::from_path(storage.path());
        self.dirty = layer.is_dirty();
        if self.dirty {
            self.reasons.push(Reason::new("dirty", format!("{file}: its last writer did not close it")));
        }
        self.corrupt = layer.is_marked_corrupt();
        if self.corrupt {
            self.reasons.push(Reason::new("corrupt", format!("{file}: it is marked as corrupt")));
        }
        self.encryption = layer.encryption();
        if let Some(encryption) = self.encryption {
            let text = format!("{file}: it is encrypted ({encryption})");
            self.reasons
                .push(Reason { found: Some(encryption.to_owned()), ..Reason::new("encrypted", text) });
        }
        let snapshots = layer.snapshots().map_or(Ok(Vec::new()), |snapshots| snapshots.list());
        if let Some(snapshots) = self.kept(snapshots)? {
            self.snapshots = snapshots.len();
            for snapshot in &snapshots {
                let what = format!("the disk of the snapshot '{}'", snapshot.name);
                self.judge_size(&what, snapshot.virtual_size_bytes, policy);
            }
        }
        let bitmaps = layer.bitmaps().map_or(Ok(Vec::new()), |bitmaps| bitmaps.list());
        self.bitmaps = self.kept(bitmaps)?.map_or(0, |bitmaps| bitmaps.len());
        if self.encryption.is_none() && whole.is_none() {
            // What is only refused to who reads the disk.
            self.kept(open_to_read(driver, storage))?;
        }
        if driver.can_check() {
            self.audit(&file, &**layer);
        }
        if !layer.is_its_file() {
            self.measure(&file, &**layer, whole.is_some(), policy)?;
        }
        Ok(())
    }

    /// Opens an image whose tables are in extents that it names, where policy lets each of its extents be opened.
    fn open_with_tables(
        &mut self,
        driver: &'static dyn Driver,
        storage: &Arc<dyn Storage>,
        policy: &Policy,
    ) -> Result<Option<Arc<dyn Layer>>> {
        let extents = || {
            self.references.iter().filter_map(|judged| match judged.reference.kind {
                ReferenceKind::Extent { has_tables } => Some((has_tables, judged.allowed)),
                ReferenceKind::Backing { .. } | ReferenceKind::DataFile => None,
            })
        };
        if !extents().any(|(has_tables, _)| has_tables) || !extents().all(|(_, allowed)| allowed) {
            return Ok(None);
        }
        let image = text::from_path(storage.path());
        let open_file = |name: &str, _: OpenMode| -> Result<Arc<dyn Storage>> {
            let path = data_file_path(&image, name)?;
            let file = limits::open_reference(&path, || {
                Ok(Arc::new(FileOptions::new().open(text::to_path(&path))?) as Arc<dyn Storage>)
            })?;
            if !policy.force_share {
                file.lock(Use::Read)?;
            }
            Ok(file)
        };
        let options = OptionSet::new();
        let context = OpenContext { mode: OpenMode::Read, options: &options, open_file: &open_file };
        self.kept(driver.open(Arc::clone(storage), &context))
    }

    /// The image's own check.
    fn audit(&mut self, file: &str, layer: &dyn Layer) {
        let mut findings = Vec::new();
        let mut more = 0_u64;
        let result = layer.check(Repair::Nothing, &mut |finding| {
            if findings.len() < MAX_FINDINGS {
                findings.push(finding.text);
            } else {
                more += 1;
            }
        });
        let report = result.unwrap_or_else(|error| {
            let reason = match error {
                Error::Io { .. } => Reason::new("check-failed", format!("the check failed: {error}")),
                _ => Reason::of(&error),
            };
            self.reasons.push(reason);
            CheckReport { check_errors: 1, ..CheckReport::default() }
        });
        if report.check_errors > 0 || report.corruptions > 0 {
            let text = format!(
                "{file}: the check found {} errors and could not look at {} places",
                report.corruptions, report.check_errors
            );
            self.reasons.push(Reason::beyond("check-errors", text, report.corruptions, 0));
            let findings = findings.into_iter().map(|text| Reason::new("check-finding", text));
            self.reasons.extend(findings);
            if more > 0 {
                self.reasons.push(Reason::new("check-finding", format!("and {more} more findings")));
            }
        }
        self.check = Some(report);
    }

    /// How many guest bytes the file stands for; with `all_files`, those of its extents too. Ends as soon as they are
    /// too many.
    fn measure(&mut self, file: &str, layer: &dyn Layer, all_files: bool, policy: &Policy) -> Result<()> {
        let window =
            layer.extent_granularity_bytes().map_or(WINDOW_BYTES, |unit| u64::from(unit) * WINDOW_UNITS);
        let mut files_bytes = self.file_bytes;
        if all_files {
            for extent in (1..).map_while(|number| layer.file(HostFile(number))) {
                files_bytes = files_bytes.saturating_add(extent.len_bytes()?);
            }
        }
        let most = files_bytes.saturating_mul(policy.max_ratio);
        let size = layer.virtual_size_bytes();
        let mut stored = Stored::default();
        let mut extents = Vec::new();
        let mut start = 0;
        while start < size {
            let end = start.saturating_add(window).min(size);
            extents.clear();
            if self.kept(layer.map_range(start..end, &mut extents))?.is_none() {
                return Ok(());
            }
            stored.count(&extents, all_files);
            if stored.guest_bytes > most {
                let (found, ratio) = (stored.guest_bytes, policy.max_ratio);
                let text = format!(
                    "{file}: {} bytes of file stand for {found} bytes of disk or more ({} of them compressed), \
                     more than {ratio} for one",
                    files_bytes, stored.compressed_guest_bytes
                );
                self.reasons.push(Reason::beyond("expansion-ratio", text, found, most));
                return Ok(());
            }
            start = end;
        }
        self.stored = Some(stored);
        Ok(())
    }
}

impl Stored {
    fn count(&mut self, extents: &[Extent], all_files: bool) {
        for extent in extents {
            match extent.place {
                Place::Data { file, .. } if all_files || file == HostFile::IMAGE => {
                    self.guest_bytes += extent.len_bytes
                }
                Place::Encoded { .. } => {
                    self.guest_bytes += extent.len_bytes;
                    self.compressed_guest_bytes += extent.len_bytes;
                }
                // Nothing stands for it, or another file does.
                Place::Unallocated | Place::Zero { .. } | Place::Data { .. } => {}
            }
        }
    }
}

/// Opens the image as readers of its disk do, with nothing in the place of the files that it names.
fn open_to_read(driver: &dyn Driver, storage: Arc<dyn Storage>) -> Result<()> {
    let open_file = |name: &str, _: OpenMode| -> Result<Arc<dyn Storage>> {
        Ok(Arc::new(MemoryStorage::new(text::to_path(name)).read_only()))
    };
    let options = OptionSet::new();
    let context = OpenContext { mode: OpenMode::Read, options: &options, open_file: &open_file };
    driver.open(storage, &context).map(drop)
}

/// Why the image called `image`, in the directory of that true name, may not name a file so: an id and a text.
fn reference_refusal(image: &str, directory: Option<&Path>, name: &str) -> Option<(&'static str, String)> {
    let plain = match protocol(name) {
        None => name,
        Some("file") => &name["file:".len()..],
        Some(protocol) => {
            let why = format!("only plain names are judged, not those of '{protocol}:'");
            return Some(("reference-not-plain", why));
        }
    };
    let Some(allowed) = limits::references_in() else {
        return Some(("reference", "no directory is allowed for references".to_owned()));
    };
    let inside = format!("references have to lead into {}", text::from_path(allowed));
    // By its letters first: what is outside is not even looked up.
    let leads = directory.map(|directory| lexically(&directory.join(text::to_path(plain))));
    if !leads.is_some_and(|path| path.starts_with(allowed) && path != allowed) {
        return Some(("reference-outside", inside));
    }
    // Then by the links on its way.
    let opened_as = full_backing_name(image, plain);
    limits::check_reference(&opened_as).err().map(|_| ("reference-outside", inside))
}

/// `path` without `.` and `..`, by its letters alone.
fn lexically(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(plain.pop()),
            other => plain.push(other),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Codec, HostOffset};

    #[test]
    fn names_are_followed_by_their_letters() {
        for (path, plain) in
            [("/a/./b/../c", "/a/c"), ("/../../x", "/x"), ("/a/b/../../../etc", "/etc"), ("/a//b/", "/a/b")]
        {
            assert_eq!(lexically(Path::new(path)), Path::new(plain), "{path}");
        }
    }

    #[test]
    fn stored_bytes_are_those_that_the_file_stands_for() {
        let data = |file| Place::Data { file, at: HostOffset(0), writable: false };
        let encoded = Place::Encoded {
            file: HostFile::IMAGE,
            at: HostOffset(0),
            stored_bytes: 512,
            decoded_bytes: 65536,
            skip_bytes: 0,
            how: Codec::Zstd,
        };
        let places = [
            (1, Place::Unallocated),
            (2, Place::Zero { reserved: None }),
            (4, data(HostFile(1))),
            (8, data(HostFile::IMAGE)),
            (16, encoded),
        ];
        let mut stored = Stored::default();
        stored.count(&places.map(|(len_bytes, place)| Extent { len_bytes, place }), false);
        assert_eq!(stored, Stored { guest_bytes: 24, compressed_guest_bytes: 16 });
        let mut stored = Stored::default();
        stored.count(&places.map(|(len_bytes, place)| Extent { len_bytes, place }), true);
        assert_eq!(stored, Stored { guest_bytes: 28, compressed_guest_bytes: 16 });
    }
}
