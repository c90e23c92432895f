//! Images made and checked by the installed `qemu-img`, and patches of single bytes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use serde_json::Value;

use super::super::{super::header::Header, check};
use crate::{
    Error,
    format::{CheckReport, OpenMode, Repair},
    storage::{CacheMode, FileOptions, MemoryStorage, Storage},
};

/// How an image is made: options of `create`, then commands of `qemu-io` and `qemu-img`.
pub(super) struct Recipe {
    pub(super) name: &'static str,
    pub(super) options: &'static str,
    pub(super) size: &'static str,
    /// Each is `io COMMAND…` for `qemu-io -c`, or the arguments of `qemu-img` with `IMAGE` for the file.
    pub(super) steps: &'static [&'static str],
}

/// Runs a program that must succeed.
pub(super) fn run(program: &str, arguments: &[&str]) -> Output {
    let output =
        Command::new(program).args(arguments).env("LC_ALL", "C").output().expect("qemu-utils is installed");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

impl Recipe {
    /// Makes the image.
    pub(super) fn make(&self, directory: &Path) -> PathBuf {
        let path = directory.join(format!("{}.qcow2", self.name));
        let image = path.to_str().expect("a plain name");
        let data = directory.join(format!("{}.data", self.name));
        let options = self.options.replace("DATA", data.to_str().expect("a plain name"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, image, self.size]);
        for step in self.steps {
            if let Some(command) = step.strip_prefix("io ") {
                run("qemu-io", &["-f", "qcow2", "-c", command, image]);
            } else {
                let arguments: Vec<&str> =
                    step.split(' ').map(|word| if word == "IMAGE" { image } else { word }).collect();
                run("qemu-img", &arguments);
            }
        }
        path
    }
}

/// What an audit, with the second look that follows a repair, says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) lines: Vec<String>,
    pub(super) report: Option<CheckReport>,
    /// The text behind `Check failed: `.
    pub(super) failure: Option<String>,
}

/// The reference's; `None` when it does not open the image.
pub(super) fn theirs(image: &Path, repair: Option<&str>) -> Option<Verdict> {
    let mut command = Command::new("qemu-img");
    command.args(["check", "-f", "qcow2", "--output=json"]).env("LC_ALL", "C");
    if let Some(what) = repair {
        command.args(["-r", what]);
    }
    let output = command.arg(image).output().expect("qemu-utils is installed");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    if stderr.contains("Could not open") {
        return None;
    }
    let mut failure = None;
    let mut lines = Vec::new();
    for line in stderr.lines() {
        match line.strip_prefix("qemu-img: Check failed") {
            Some(text) => failure = text.strip_prefix(": ").map(str::to_owned),
            // It rewrites bitmaps whenever it opens for writing, and loses them over its own failures.
            None if line.contains("persistent bitmaps") => {}
            // Freeing a table that was never counted.
            None if line.starts_with("qcow2_free_clusters failed") => {}
            None => lines.push(line.to_owned()),
        }
    }
    let report = serde_json::from_slice::<Value>(&output.stdout).ok().map(|json| {
        let field = |name: &str| json.get(name).and_then(Value::as_u64).unwrap_or(0);
        CheckReport {
            check_errors: field("check-errors"),
            corruptions: field("corruptions"),
            leaks: field("leaks"),
            corruptions_fixed: field("corruptions-fixed"),
            leaks_fixed: field("leaks-fixed"),
            image_end_offset: field("image-end-offset"),
            total_clusters: field("total-clusters"),
            allocated_clusters: field("allocated-clusters"),
            fragmented_clusters: field("fragmented-clusters"),
            compressed_clusters: field("compressed-clusters"),
        }
    });
    Some(Verdict { lines, report, failure })
}

/// Ours.
pub(super) fn ours(storage: &Arc<dyn Storage>, repair: Repair) -> Result<Verdict, Error> {
    let writable = repair != Repair::Nothing;
    let mut header = Header::read(storage.as_ref(), OpenMode::Check { repair: writable })?;
    let mut lines = Vec::new();
    let mut findings = |finding: crate::format::Finding| {
        let prefix = if finding.with_program_name { "qemu-img: " } else { "" };
        lines.extend(format!("{prefix}{}", finding.text).lines().map(str::to_owned));
    };
    let mut result = check(storage, &mut header, repair, &mut findings, &crate::format::unwatched);
    if let Ok(first) = &result
        && (first.corruptions_fixed > 0 || first.leaks_fixed > 0)
    {
        let (corruptions_fixed, leaks_fixed) = (first.corruptions_fixed, first.leaks_fixed);
        let again = check(storage, &mut header, Repair::Nothing, &mut findings, &crate::format::unwatched);
        result = again.map(|report| CheckReport { corruptions_fixed, leaks_fixed, ..report });
    }
    let (report, failure) = match result {
        Ok(report) => (Some(report), None),
        Err(error) => (None, Some(super::super::os_text(&error))),
    };
    Ok(Verdict { lines, report, failure })
}

/// A file opened for reading and writing.
pub(super) fn open(path: &Path) -> Arc<dyn Storage> {
    Arc::new(
        FileOptions::new().write(true).cache(CacheMode::Unsafe).open(path).expect("the file was just made"),
    )
}

/// A file's bytes in memory.
pub(super) fn load(path: &Path) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::from_bytes("image", &fs::read(path).expect("the file was just made")))
}

/// What the reference reads from an image; `None` where it cannot read all of it.
pub(super) fn contents(image: &Path) -> Option<Vec<u8>> {
    let raw = image.with_extension("raw");
    let output =
        Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(image).arg(&raw).output();
    output.expect("qemu-utils is installed").status.success().then(|| fs::read(raw).expect("just written"))
}
