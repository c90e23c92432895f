//! The same shell lines with the reference and with `img` in its place, in two equal directories; everything
//! that a script could see is compared.
//!
//! A line says `qemu-img …`: in one directory that is the reference, in the other a link of that name to
//! `img`. Compared are the exit code, standard output, standard error, and afterwards every file: its length,
//! what the reference's `info` says of it, and its contents as a disk.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use crate::command::{Run, img_binary, oracle, qemu_img};

/// Two directories that started equal.
#[derive(Debug)]
pub struct Twins {
    /// Removed with everything in it at the end.
    _root: tempfile::TempDir,
    /// Where `qemu-img` is the reference.
    theirs: PathBuf,
    /// Where `qemu-img` is `img`.
    ours: PathBuf,
    differences: Vec<String>,
    /// Whether what a failed line leaves in files is compared as well.
    compare_files: bool,
    /// What of a file's description may differ.
    ignored: Vec<&'static str>,
    /// Part of a name, and the format in which the contents of such files are compared.
    formats: Vec<(&'static str, &'static str)>,
}

impl Twins {
    /// Runs `setup` with the reference in both.
    ///
    /// # Panics
    /// When a line of it fails.
    #[must_use]
    #[track_caller]
    pub fn new(setup: &[&str]) -> Self {
        let root = tempfile::tempdir().expect("a temporary directory");
        let [theirs, ours] = ["theirs", "ours"].map(|name| root.path().join(name).join("w"));
        for (directory, tool) in [(&theirs, reference()), (&ours, img_binary().to_owned())] {
            fs::create_dir_all(directory).expect("a directory");
            link(directory, &tool);
        }
        let twins = Self {
            _root: root,
            theirs,
            ours,
            differences: Vec::new(),
            compare_files: true,
            ignored: Vec::new(),
            formats: Vec::new(),
        };
        for line in setup {
            for directory in [&twins.theirs, &twins.ours] {
                shell(line, directory, None).output().success();
            }
        }
        twins
    }

    /// Leaves files out of the comparison: for lines that change none.
    #[must_use]
    pub fn without_files(mut self) -> Self {
        self.compare_files = false;
        self
    }

    /// Leaves the host space that files take out of the comparison.
    #[must_use]
    pub fn without_disk_use(self) -> Self {
        self.ignoring("disk size: ")
    }

    /// Leaves what follows `text` in the description of a file out of the comparison.
    #[must_use]
    pub fn ignoring(mut self, text: &'static str) -> Self {
        self.ignored.push(text);
        self
    }

    /// Compares the contents of files that have `part` in their name as disks of that format, which is not what
    /// the reference would take them for.
    #[must_use]
    pub fn reading_as(mut self, part: &'static str, format: &'static str) -> Self {
        self.formats.push((part, format));
        self
    }

    /// Runs one line with each tool and compares.
    pub fn line(&mut self, line: &str) -> &mut Self {
        self.line_seen_through(line, &[])
    }

    /// The same, for lines whose output has parts that may differ: what follows one of `ignored`, up to the
    /// next comma or the end of the line.
    pub fn line_seen_through(&mut self, line: &str, ignored: &[&str]) -> &mut Self {
        let theirs = shell(line, &self.theirs, Some(&self.theirs)).output();
        let ours = shell(line, &self.ours, Some(&self.ours)).output();
        let mut report = String::new();
        if theirs.code != ours.code {
            report += &format!("  exit code: theirs {}, ours {}\n", theirs.code, ours.code);
        }
        for (what, theirs, ours) in
            [("stdout", &theirs.stdout, &ours.stdout), ("stderr", &theirs.stderr, &ours.stderr)]
        {
            let [theirs, ours] = [theirs, ours].map(|text| seen(text, ignored));
            report += &difference(what, &theirs, &ours);
        }
        if self.compare_files {
            report += &self.compare_directories();
        }
        if !report.is_empty() {
            self.differences.push(format!("$ {line}\n{report}"));
            // What follows would only repeat it.
            if self.compare_files {
                self.even_out();
            }
        }
        self
    }

    /// Several lines.
    pub fn lines(&mut self, lines: &[&str]) -> &mut Self {
        for line in lines {
            self.line(line);
        }
        self
    }

    /// # Panics
    /// When anything differed, with all that did.
    #[track_caller]
    pub fn agree(&self) {
        assert!(
            self.differences.is_empty(),
            "{} lines differ:\n{}",
            self.differences.len(),
            self.differences.join("\n")
        );
    }

    /// Names, lengths, descriptions and contents of all files.
    fn compare_directories(&self) -> String {
        let [theirs, ours] = [&self.theirs, &self.ours].map(|directory| files(directory));
        let mut report = String::new();
        for name in theirs.keys().chain(ours.keys().filter(|name| !theirs.contains_key(*name))) {
            match (theirs.get(name), ours.get(name)) {
                (Some(_), None) => report += &format!("  only theirs has the file {name}\n"),
                (None, Some(_)) => report += &format!("  only ours has the file {name}\n"),
                (Some(theirs), Some(ours)) if theirs != ours => report += &self.compare_file(name),
                _ => {}
            }
        }
        report
    }

    fn compare_file(&self, name: &str) -> String {
        let mut ignored = self.ignored.clone();
        let [theirs, ours] = [&self.theirs, &self.ours].map(|directory| host_bytes(&directory.join(name)));
        if theirs.abs_diff(ours) <= HOST_MAP_BYTES {
            ignored.push("disk size: ");
        }
        let info = |directory: &Path| {
            let output = qemu_img(directory, ["info", "-U", "--", name]).output();
            seen(&format!("{}{}", output.stdout, output.stderr), &ignored)
        };
        let report = difference(&format!("info {name}"), &info(&self.theirs), &info(&self.ours));
        if !report.is_empty() {
            return report;
        }
        let [theirs, ours] = [&self.theirs, &self.ours].map(|directory| directory.join(name));
        let mut compared = Run::new(oracle("qemu-img"), &self.ours).args(["compare", "-U"]);
        if let Some((_, format)) = self.formats.iter().find(|(part, _)| name.contains(part)) {
            compared = compared.args(["-f", format, "-F", format]);
        }
        let compared = compared.arg("--");
        let compared = compared.arg(theirs).arg(ours).output();
        match compared.code {
            0 => String::new(),
            _ => format!("  contents of {name}: {}{}", compared.stdout, compared.stderr),
        }
    }

    /// Makes our directory as theirs is.
    fn even_out(&self) {
        for entry in fs::read_dir(&self.ours).expect("our directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.expect("removed");
        }
        let copy = format!("cp -a --sparse=auto {}/. .", self.theirs.display());
        shell(&copy, &self.ours, None).output().success();
    }
}

/// What a file system takes for its own map of a file beside the file's blocks: how many pieces two equal files are in
/// depends on where there was room, and more than a few need a block of their own.
const HOST_MAP_BYTES: u64 = 8 << 10;

/// Host space that a file takes.
fn host_bytes(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |facts| facts.blocks() * 512)
}

/// Where the tool of a directory is found: beside it, so that it is not among its files.
fn tools(directory: &Path) -> PathBuf {
    directory.with_file_name("bin")
}

fn link(directory: &Path, tool: &Path) {
    let tools = tools(directory);
    fs::create_dir_all(&tools).expect("a directory");
    symlink(tool, tools.join("qemu-img")).expect("a link");
}

/// Where the reference is installed.
fn reference() -> PathBuf {
    let name = Path::new(oracle("qemu-img"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
        .expect("the reference runs, so it is on the search path")
}

/// A shell line, with the tool of `tools_of` or the reference in front of the search path.
fn shell(line: &str, directory: &Path, tools_of: Option<&Path>) -> Run {
    let mut path = OsString::from("PATH=");
    let tool = match tools_of {
        Some(of) => tools(of),
        None => reference().parent().map(Path::to_owned).unwrap_or_default(),
    };
    path.push(tool);
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    Run::new("env", directory).arg(path).args(["sh", "-c", line])
}

/// Length and bytes of each file, by its name below `directory`.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![directory.to_owned()];
    while let Some(here) = open.pop() {
        for entry in fs::read_dir(&here).expect("a directory of the test") {
            let path = entry.expect("an entry").path();
            let kind = fs::symlink_metadata(&path).expect("an entry").file_type();
            if kind.is_dir() {
                open.push(path);
            } else if kind.is_file() {
                let name = path.strip_prefix(directory).expect("below it").display().to_string();
                found.insert(name, digest(&path));
            }
        }
    }
    found
}

/// Enough to tell files apart without reading holes: the length and every block that is not zero.
fn digest(path: &Path) -> Vec<u8> {
    use std::hash::{DefaultHasher, Hash as _, Hasher as _};
    use std::os::unix::fs::FileExt as _;

    let file = fs::File::open(path).expect("a file of the test");
    let length = file.metadata().expect("its metadata").len();
    let mut hash = DefaultHasher::new();
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let mut block = vec![0; 1 << 16];
        let read = file.read_at(&mut block, data).expect("a readable file");
        if block[..read].iter().any(|byte| *byte != 0) {
            (data, &block[..read]).hash(&mut hash);
        }
        at = data + u64::try_from(read.max(1)).expect("a small number");
    }
    [length.to_le_bytes(), hash.finish().to_le_bytes()].concat()
}

/// What may differ is made equal: dates of snapshots, and what follows one of `ignored`.
fn seen(text: &str, ignored: &[&str]) -> String {
    let mut lines = Vec::new();
    for line in text.split('\n') {
        let mut line = line.to_owned();
        for prefix in ["\"date-sec\": ", "\"date-nsec\": "].iter().chain(ignored) {
            if let Some(at) = line.find(prefix) {
                let start = at + prefix.len();
                let end = line[start..].find(',').map_or(line.len(), |end| start + end);
                line.replace_range(start..end, "…");
            }
        }
        lines.push(without_date(&line));
    }
    lines.join("\n")
}

/// `2026-11-21 12:32:17` becomes a fixed text of that length.
fn without_date(line: &str) -> String {
    const SHAPE: &[u8] = b"0000-00-00 00:00:00";
    let fits = |window: &[u8]| {
        window.iter().zip(SHAPE).all(|(byte, shape)| match shape {
            b'0' => byte.is_ascii_digit(),
            _ => byte == shape,
        })
    };
    match line.as_bytes().windows(SHAPE.len()).position(fits) {
        Some(at) => format!("{}YYYY-MM-DD hh:mm:ss{}", &line[..at], &line[at + SHAPE.len()..]),
        None => line.to_owned(),
    }
}

/// The first line that differs, with both versions.
fn difference(what: &str, theirs: &str, ours: &str) -> String {
    if theirs == ours {
        return String::new();
    }
    let mut pairs = theirs.split('\n').zip(ours.split('\n')).enumerate();
    match pairs.find(|(_, (theirs, ours))| theirs != ours) {
        Some((index, (theirs, ours))) => {
            format!("  {what}, line {}:\n    theirs: {theirs:?}\n    ours:   {ours:?}\n", index + 1)
        }
        None => format!("  {what}: one goes on\n    theirs: {theirs:?}\n    ours:   {ours:?}\n"),
    }
}
