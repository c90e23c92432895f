//! Chains of real files: names, formats, loops, depth, locks, and what a new file leaves behind.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::fs::OFlags;

use super::{Image, ImageName, MAX_CHAIN_DEPTH, OpenOptions};
use crate::{
    Error, Result,
    format::{Backing, HostFile, OpenMode, OptionSet, registry},
    job::create::{CreateImage, create, create_watched},
    storage::{CacheMode, Preallocation, Watcher},
};

const DISK: u64 = 1 << 20;

fn make(
    path: &Path,
    format: &str,
    backing: Option<(&str, Option<&str>)>,
    options: &[(&str, &str)],
) -> Result<()> {
    let mut set = OptionSet::new();
    for (name, value) in options {
        set.set(*name, *value);
    }
    let name = ImageName::from_path(path.to_str().unwrap());
    let backing =
        backing.map(|(name, format)| Backing { name: name.to_owned(), format: format.map(str::to_owned) });
    create(&request(&name, format, backing, set)).map(drop)
}

fn request<'a>(
    name: &'a ImageName,
    format: &str,
    backing: Option<Backing>,
    options: OptionSet,
) -> CreateImage<'a> {
    let driver = registry::by_name(format).unwrap();
    CreateImage { name, driver, virtual_size_bytes: DISK, backing, options }
}

fn open(path: &Path, mode: OpenMode) -> Result<Image> {
    Image::open(&ImageName::from_path(path.to_str().unwrap()), &OpenOptions::new(mode))
}

/// The message without the part that names the image, which the caller knows.
fn refusal(path: &Path, mode: OpenMode) -> String {
    match open(path, mode) {
        Err(Error::Open { source, .. }) => source.to_string(),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_chain_reads_through_names_relative_to_the_image_that_gives_them() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("sub")).unwrap();
    make(&at("base.raw"), "raw", None, &[]).unwrap();
    make(&at("sub/middle.qcow2"), "qcow2", Some(("../base.raw", Some("raw"))), &[]).unwrap();
    let json = format!(
        r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}}}}"#,
        at("sub/middle.qcow2").display()
    );
    make(&at("top.qcow2"), "qcow2", Some((&json, None)), &[]).unwrap();
    fs::write(at("base.raw"), vec![7; usize::try_from(DISK).unwrap() / 2]).unwrap();

    let image = open(&at("top.qcow2"), OpenMode::Write).unwrap();
    assert_eq!(image.layers().len(), 3);
    assert!(image.layer_name(2).ends_with("sub/../base.raw"));
    image.write_at(&[9; 10], 100_000).unwrap();
    let mut bytes = vec![1; usize::try_from(DISK).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    let mut model = vec![7; bytes.len() / 2];
    model.resize(bytes.len(), 0);
    model[100_000..100_010].fill(9);
    assert!(bytes == model);
    image.close().unwrap();

    let base_only = OpenOptions { backing: false, ..OpenOptions::new(OpenMode::Read) };
    let name = ImageName::from_path(at("top.qcow2").to_str().unwrap());
    assert_eq!(Image::open(&name, &base_only).unwrap().layers().len(), 1);
}

#[test]
fn what_goes_around_the_host_s_cache_does_so_in_every_layer() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    make(&at("base.raw"), "raw", None, &[]).unwrap();
    make(&at("middle.qcow2"), "qcow2", Some(("base.raw", Some("raw"))), &[]).unwrap();
    make(&at("top.qcow2"), "qcow2", Some(("middle.qcow2", Some("qcow2"))), &[]).unwrap();
    fs::write(at("base.raw"), vec![7; usize::try_from(DISK).unwrap()]).unwrap();
    let name = ImageName::from_path(at("top.qcow2").to_str().unwrap());
    for (cache, is_direct) in [
        (CacheMode::None, true),
        (CacheMode::Directsync, true),
        (CacheMode::Writeback, false),
        (CacheMode::Unsafe, false),
    ] {
        let options = OpenOptions { cache, ..OpenOptions::new(OpenMode::Write) };
        let image = match Image::open(&name, &options) {
            Err(error) if error.to_string().ends_with("filesystem does not support O_DIRECT") => return,
            image => image.unwrap(),
        };
        for depth in 0..3 {
            let fd = image.storage(depth, HostFile::IMAGE).unwrap().as_fd().unwrap();
            let flags = rustix::fs::fcntl_getfl(fd).unwrap();
            assert_eq!(flags.contains(OFlags::DIRECT), is_direct, "{cache:?}, layer {depth}");
        }
        let mut bytes = vec![1; 5000];
        image.read_at(&mut bytes, 100).unwrap();
        assert!(bytes == [7; 5000], "{cache:?}");
        image.close().unwrap();
    }
}

#[test]
fn loops_are_refused_whatever_the_file_is_called() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    make(&at("a.qcow2"), "qcow2", Some(("b.qcow2", Some("qcow2"))), &[]).unwrap();
    make(&at("b.qcow2"), "qcow2", Some(("link.qcow2", Some("qcow2"))), &[]).unwrap();
    fs::hard_link(at("a.qcow2"), at("link.qcow2")).unwrap();
    for mode in [OpenMode::Inspect, OpenMode::Read, OpenMode::Write, OpenMode::Check { repair: true }] {
        let why = refusal(&at("a.qcow2"), mode);
        assert!(why.contains("loops back to this file"), "{mode:?}: {why}");
    }
}

#[test]
fn chains_have_a_depth_limit() {
    let folder = tempfile::tempdir().unwrap();
    let name = |depth: usize| folder.path().join(format!("{depth}.qcow2"));
    let below = |depth: usize| format!("{}.qcow2", depth - 1);
    make(&name(0), "qcow2", None, &[]).unwrap();
    for depth in 1..=200 {
        let options = [("cluster_size", "512")];
        make(&name(depth), "qcow2", Some((&below(depth), Some("qcow2"))), &options).unwrap();
    }
    let image = open(&name(200), OpenMode::Read).unwrap();
    assert_eq!(image.layers().len(), 201);
    image.read_at(&mut [0; 4096], 12345).unwrap();
    const { assert!(MAX_CHAIN_DEPTH >= 200) };
}

#[test]
fn what_cannot_be_opened_is_said_in_the_reference_s_words() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let missing = at("missing").display().to_string();
    assert_eq!(
        refusal(&at("missing"), OpenMode::Read),
        format!("Could not open '{missing}': No such file or directory")
    );
    let directory = folder.path().display().to_string();
    assert_eq!(
        refusal(folder.path(), OpenMode::Read),
        format!("'file' driver requires '{directory}' to be a regular file")
    );
    for (backing, format, why) in [
        (
            "missing",
            "raw",
            format!("Could not open backing file: Could not open '{missing}': No such file or directory"),
        ),
        ("fd:3", "raw", "Could not open backing file: Unknown protocol 'fd'".to_owned()),
        ("x", "zork", "Could not open backing file: Unknown driver 'zork'".to_owned()),
    ] {
        make(&at("top.qcow2"), "qcow2", Some((backing, Some(format))), &[]).unwrap();
        assert_eq!(refusal(&at("top.qcow2"), OpenMode::Read), why);
        // One image alone can still be looked at.
        let alone = OpenOptions { backing: false, ..OpenOptions::new(OpenMode::Inspect) };
        Image::open(&ImageName::from_path(at("top.qcow2").to_str().unwrap()), &alone).unwrap();
    }
}

#[test]
fn a_disk_that_was_guessed_to_be_raw_cannot_become_something_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guessed");
    make(&path, "raw", None, &[]).unwrap();
    let image = open(&path, OpenMode::Write).unwrap();
    assert_eq!(image.warnings().len(), 1);
    let refused = image.write_at(b"\xfb\0\0\0\x03", 3).and(image.write_at(b"QFI", 0)).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(1), "{refused}");
    image.write_at(b"harmless", 0).unwrap();
    image.write_at(b"QFI\xfb", 512).unwrap();
    drop(image);

    let named = OpenOptions::new(OpenMode::Write).format("raw");
    let image = Image::open(&ImageName::from_path(path.to_str().unwrap()), &named).unwrap();
    assert!(image.warnings().is_empty());
    image.write_at(b"QFI\xfb", 0).unwrap();
    drop(image);
    assert!(open(&path, OpenMode::Read).is_err(), "no whole qcow2 header");
}

#[test]
fn one_writer_excludes_all_others_unless_they_share_by_force() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    make(&path, "qcow2", None, &[]).unwrap();
    let writer = open(&path, OpenMode::Write).unwrap();
    for mode in [OpenMode::Read, OpenMode::Write, OpenMode::Inspect] {
        assert!(refusal(&path, mode).contains("Is another process using the image"), "{mode:?}");
    }
    assert!(matches!(make(&path, "raw", None, &[]), Err(Error::Locked { .. })));
    let forced = OpenOptions { force_share: true, ..OpenOptions::new(OpenMode::Read) };
    Image::open(&ImageName::from_path(path.to_str().unwrap()), &forced).unwrap();
    writer.close().unwrap();
    open(&path, OpenMode::Read).unwrap();
}

#[test]
fn data_files_stand_beside_their_image_and_are_plain_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    make(&at("disk.qcow2"), "qcow2", None, &[("data_file", "disk.data")]).unwrap();
    let image = open(&at("disk.qcow2"), OpenMode::Write).unwrap();
    image.write_at(&[5; 1000], 70_000).unwrap();
    image.close().unwrap();
    assert!(fs::read(at("disk.data")).unwrap().contains(&5));
    let mut bytes = [0; 1000];
    open(&at("disk.qcow2"), OpenMode::Read).unwrap().read_at(&mut bytes, 70_000).unwrap();
    assert_eq!(bytes, [5; 1000]);
    for name in ["json:{\"driver\":\"file\",\"filename\":\"x\"}", "nbd:localhost:1", "other.qcow2"] {
        assert!(make(&at("other.qcow2"), "qcow2", None, &[("data_file", name)]).is_err(), "{name}");
        assert!(!at("other.qcow2").exists());
    }
}

#[test]
fn a_new_file_that_fails_is_removed_and_an_old_one_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let wrong = [("preallocation", "metadata")];
    assert_eq!(
        make(&path, "raw", None, &wrong).unwrap_err().to_string(),
        "Unsupported preallocation mode: metadata"
    );
    assert!(!path.exists());
    fs::write(&path, b"mine").unwrap();
    make(&path, "raw", None, &wrong).unwrap_err();
    assert!(path.exists());
    make(&path, "raw", None, &[("preallocation", "full"), ("nocow", "on")]).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), DISK);
}

/// Stops the taking of space when so many bytes are written.
#[derive(Debug)]
struct Stopping {
    at_bytes: u64,
    written: AtomicU64,
}

impl Watcher for Stopping {
    fn filled(&self, bytes: u64) -> Result<()> {
        let written = self.written.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if written < self.at_bytes { Ok(()) } else { Err(Error::Cancelled) }
    }
}

fn stopping_at(at_bytes: u64) -> Arc<dyn Watcher> {
    Arc::new(Stopping { at_bytes, written: AtomicU64::new(0) })
}

#[test]
fn taking_space_that_is_stopped_leaves_the_old_disk() {
    let folder = tempfile::tempdir().unwrap();
    for (format, options) in [
        ("raw", &[][..]),
        ("qcow2", &[]),
        ("qcow2", &[("data_file", "data.raw")]),
        ("vmdk", &[("subformat", "monolithicFlat")]),
        ("vpc", &[("subformat", "fixed"), ("force_size", "on")]),
    ] {
        let path = folder.path().join("disk");
        make(&path, format, None, options).unwrap();
        let opened = |mode| {
            let mut how = OpenOptions::new(mode);
            how.format = Some(format.to_owned());
            Image::open(&ImageName::from_path(path.to_str().unwrap()), &how).unwrap()
        };
        let image = opened(OpenMode::Write);
        image.write_at(&[7; 512], DISK - 512).unwrap();
        image.watch_filling(&stopping_at(4 << 20));
        let resized = image.resize(16 << 20, Preallocation::Full);
        assert!(matches!(resized, Err(Error::Cancelled)), "{format}: {resized:?}");
        assert_eq!(image.virtual_size_bytes(), DISK, "{format}");
        image.close().unwrap();

        let image = opened(OpenMode::Write);
        assert_eq!(image.virtual_size_bytes(), DISK, "{format}");
        let mut bytes = [0; 512];
        image.read_at(&mut bytes, DISK - 512).unwrap();
        assert_eq!(bytes, [7; 512], "{format}");
        // Nobody stops it this time.
        image.resize(4 << 20, Preallocation::Full).unwrap();
        assert_eq!(image.virtual_size_bytes(), 4 << 20, "{format}");
        image.close().unwrap();
    }
}

#[test]
fn a_new_file_whose_space_is_not_wanted_any_more_goes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let name = ImageName::from_path(path.to_str().unwrap());
    for format in ["raw", "qcow2"] {
        let mut options = OptionSet::new();
        options.set("preallocation", "full");
        let made = create_watched(&request(&name, format, None, options), Some(&stopping_at(DISK / 2)));
        assert!(matches!(made, Err(Error::Cancelled)), "{format}: {made:?}");
        assert!(!path.exists(), "{format}");
    }
}
