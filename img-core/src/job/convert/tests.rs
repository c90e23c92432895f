//! Conversions against plain models and against qemu-img.

use std::{
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use super::*;
use crate::{
    format::{CreateRequest, Driver, OpenContext, OpenMode, OptionSet, raw::Raw},
    image::{ImageName, OpenOptions},
    job::{
        Unwatched,
        create::{CreateImage, create},
        map::{MapEntry, map},
        ordered::lock,
    },
    storage::MemoryStorage,
};

const SECTOR: usize = 512;

fn no_salvage(_: Salvaged, error: &Error) {
    panic!("nothing is salvaged here: {error}");
}

fn raw(storage: MemoryStorage, mode: OpenMode) -> Image {
    let context = OpenContext {
        mode,
        options: &OptionSet::new(),
        open_file: &|name, _| Err(Error::Invalid(format!("{name} is not to be opened"))),
    };
    let layer = Raw.open(Arc::new(storage), &context).expect("anything is raw");
    Image::from_layers(vec![layer]).expect("one layer")
}

fn source(bytes: &[u8]) -> Image {
    raw(MemoryStorage::from_bytes("source", bytes), OpenMode::Read)
}

/// Bytes of a few runs of data, zeroes and noise, different for each seed.
fn patterned(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let run = 1 + usize::try_from(random() % 200).expect("small") * SECTOR;
        match random() % 3 {
            0 => bytes.extend(std::iter::repeat_n(0, run)),
            1 => bytes.extend((0..run).map(|at| (at / 7).to_le_bytes()[0])),
            _ => bytes.extend((0..run).map(|_| random().to_le_bytes()[0])),
        }
    }
    bytes.truncate(len);
    bytes
}

#[test]
fn raw_sources_are_joined_on_sectors() {
    let (one, two) = (patterned(1_000_000, 1), patterned(300_001, 2));
    let padded = |bytes: &[u8]| bytes.len().next_multiple_of(SECTOR);
    let mut expected = vec![0; padded(&one) + padded(&two)];
    expected[..one.len()].copy_from_slice(&one);
    expected[padded(&one)..][..two.len()].copy_from_slice(&two);
    for threads in [1, 2, 4] {
        for sparse_bytes in [0, 512, 4096, 12288, 65536] {
            let storage = MemoryStorage::new("target");
            let request = CreateRequest {
                virtual_size_bytes: expected.len() as u64,
                backing: None,
                options: &OptionSet::new(),
                open_file: &|name, _| Err(Error::Invalid(format!("{name} is not to be opened"))),
            };
            let storage: Arc<dyn crate::storage::Storage> = Arc::new(storage);
            Raw.create(&storage, &request).expect("memory takes it");
            let context = OpenContext {
                mode: OpenMode::Write,
                options: &OptionSet::new(),
                open_file: request.open_file,
            };
            let layer = Raw.open(Arc::clone(&storage), &context).expect("just made");
            let target = Image::from_layers(vec![layer]).expect("one layer");
            let options =
                ConvertOptions { threads: Some(threads), sparse_bytes, ..ConvertOptions::default() };
            convert(&[source(&one), source(&two)], &target, &options, &no_salvage, &Unwatched)
                .expect("it fits");
            let mut found = vec![0; expected.len()];
            target.read_at(&mut found, 0).expect("inside");
            assert!(found == expected, "{threads} threads, -S {sparse_bytes}");
        }
    }
}

/// Runs a tool of the reference.
fn run(tool: &str, args: &[&str], dir: &Path) -> String {
    let output = Command::new(tool).args(args).current_dir(dir).output().expect("qemu-utils are installed");
    assert!(
        output.status.success(),
        "{tool} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("text")
}

fn name(path: &Path) -> ImageName {
    ImageName::parse(path.to_str().expect("text")).expect("a plain name")
}

fn open(path: &Path, format: &str, mode: OpenMode) -> Image {
    Image::open(&name(path), &OpenOptions::new(mode).format(format)).expect("it opens")
}

/// Converts into a new image and closes it.
fn convert_to_new(
    sources: &[Image],
    path: &Path,
    format: &str,
    create_options: &[(&str, &str)],
    options: &ConvertOptions,
) {
    let mut set = OptionSet::new();
    for (name, value) in create_options {
        set.set(*name, *value);
    }
    let virtual_size_bytes =
        sources.iter().map(|source| source.virtual_size_bytes().next_multiple_of(SECTOR as u64)).sum();
    let request = CreateImage {
        name: &name(path),
        driver: crate::format::registry::by_name(format).expect("known"),
        virtual_size_bytes,
        backing: None,
        options: set,
    };
    create(&request).expect("it is made");
    let target = open(path, format, OpenMode::Write);
    convert(sources, &target, options, &no_salvage, &Unwatched).expect("it is copied");
    target.close().expect("it closes");
}

fn map_line(entry: &MapEntry) -> String {
    let offset = entry.offset_bytes.map_or(String::new(), |at| format!(", \"offset\": {at}"));
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}{offset}}}",
        entry.start_bytes,
        entry.length_bytes,
        entry.depth,
        entry.present,
        entry.zero,
        entry.data,
        entry.compressed
    )
}

fn our_map(path: &Path, format: &str, start: u64, length: Option<u64>) -> String {
    let image = open(path, format, OpenMode::Read);
    let mut lines = Vec::new();
    map(&image, start, length, &mut |entry| {
        lines.push(map_line(entry));
        Ok(())
    })
    .expect("it has a map");
    format!("[{}]\n", lines.join(",\n"))
}

fn their_map(path: &Path, format: &str) -> String {
    run("qemu-img", &["map", "--output=json", "-f", format, path.to_str().expect("text")], Path::new("/"))
}

struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a place for images"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn qemu_img(&self, args: &[&str]) -> String {
        run("qemu-img", args, self.0.path())
    }

    fn qemu_io(&self, image: &str, commands: &[&str]) {
        let mut args = vec![image];
        for command in commands {
            args.extend(["-c", command]);
        }
        run("qemu-io", &args, self.0.path());
    }

    /// An image of each kind that a map can tell apart: names and formats.
    fn zoo(&self) -> Vec<(&'static str, &'static str)> {
        std::fs::write(self.path("short.raw"), patterned(70_001, 3)).expect("room");
        let holes = std::fs::File::create(self.path("holes.raw")).expect("room");
        holes.set_len(3 << 20).expect("room");
        holes.write_all_at(&patterned(5000, 4), 300_000).expect("room");
        holes.write_all_at(&patterned(1 << 20, 5), 700_000).expect("room");
        self.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "short.raw", "-F", "raw", "over.qcow2", "1M"]);
        self.qemu_io(
            "over.qcow2",
            &["write 128k 64k", "write -z 256k 64k", "write 320k 128k", "write -z 384k 64k"],
        );
        self.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "over.qcow2", "-F", "qcow2", "top.qcow2", "2M"]);
        self.qemu_io(
            "top.qcow2",
            &["write -c 512k 64k", "write -c 576k 64k", "write 700k 3k", "write -z 1800k 8k"],
        );
        self.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "holes.raw", "-F", "raw", "holes.qcow2", "4M"]);
        self.qemu_io("holes.qcow2", &["write 1M 100k", "write 3M 1k"]);
        for kind in ["metadata", "falloc", "full"] {
            let file = format!("{kind}.qcow2");
            self.qemu_img(&[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &format!("preallocation={kind}"),
                &file,
                "4M",
            ]);
            self.qemu_io(&file, &["write 128k 64k", "write 1M 4k"]);
        }
        self.qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "extended_l2=on",
            "-b",
            "holes.raw",
            "-F",
            "raw",
            "sub.qcow2",
            "3M",
        ]);
        self.qemu_io("sub.qcow2", &["write 4k 2k", "write -z 66k 2k", "write -z 128k 64k", "write 200k 64k"]);
        // By its whole name: the reference looks for another one where it is started.
        let external = format!("data_file={},data_file_raw=on", self.path("ext.data").display());
        self.qemu_img(&["create", "-q", "-f", "qcow2", "-o", &external, "ext.qcow2", "1M"]);
        self.qemu_io("ext.qcow2", &["write 128k 64k"]);
        self.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "small.qcow2", "300k"]);
        self.qemu_io("small.qcow2", &["write 1k 3k", "write 100k 90k", "write -z 120k 1k"]);
        vec![
            ("short.raw", "raw"),
            ("holes.raw", "raw"),
            ("over.qcow2", "qcow2"),
            ("top.qcow2", "qcow2"),
            ("holes.qcow2", "qcow2"),
            ("metadata.qcow2", "qcow2"),
            ("falloc.qcow2", "qcow2"),
            ("full.qcow2", "qcow2"),
            ("sub.qcow2", "qcow2"),
            ("ext.qcow2", "qcow2"),
            ("small.qcow2", "qcow2"),
        ]
    }
}

#[test]
fn maps_are_the_reference_s() {
    let lab = Lab::new();
    let mut wrong = Vec::new();
    for (file, format) in lab.zoo() {
        let path = lab.path(file);
        let (ours, theirs) = (our_map(&path, format, 0, None), their_map(&path, format));
        if ours != theirs {
            wrong.push(format!("{file}:\n{ours}{theirs}"));
            continue;
        }
        for (start, length) in [(5000, Some(300_000)), (66_000, None), (1 << 40, None)] {
            let mut args = vec!["map".to_owned(), "--output=json".into(), "-f".into(), format.into()];
            args.push(format!("--start-offset={start}"));
            args.extend(length.map(|length: u64| format!("--max-length={length}")));
            args.push(file.to_owned());
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let (ours, theirs) = (our_map(&path, format, start, length), lab.qemu_img(&args));
            if ours != theirs {
                wrong.push(format!("{args:?}:\n{ours}{theirs}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn converted_images_have_the_reference_s_map() {
    let lab = Lab::new();
    std::fs::write(lab.path("plain.raw"), patterned((9 << 20) + 1536, 6)).expect("room");
    let mut sources = lab.zoo();
    sources.push(("plain.raw", "raw"));
    let (ours, theirs) = (lab.path("ours"), lab.path("theirs"));
    let mut wrong = Vec::new();
    for (file, format) in sources {
        for sparse in [0_u64, 512, 4096, 12288, 65536] {
            for target in ["raw", "qcow2"] {
                lab.qemu_img(&[
                    "convert",
                    "-f",
                    format,
                    "-O",
                    target,
                    "-S",
                    &sparse.to_string(),
                    file,
                    "theirs",
                ]);
                let options = ConvertOptions {
                    sparse_bytes: sparse,
                    target_is_zero: sparse > 0,
                    ..ConvertOptions::default()
                };
                convert_to_new(
                    &[open(&lab.path(file), format, OpenMode::Read)],
                    &ours,
                    target,
                    &[],
                    &options,
                );
                let case = format!("{file} -O {target} -S {sparse}");
                assert_eq!(
                    lab.qemu_img(&["compare", "-f", target, "-F", target, "ours", "theirs"]),
                    "Images are identical.\n",
                    "{case}"
                );
                let (our_map, their_map) = (their_map(&ours, target), their_map(&theirs, target));
                if our_map != their_map {
                    wrong.push(format!("map of {case}"));
                }
                let blocks = |path: &Path| std::fs::metadata(path).expect("it is there").blocks();
                // The file system may need a block more or less for a file in many pieces.
                if blocks(&ours).abs_diff(blocks(&theirs)) > 8 {
                    wrong.push(format!("disk use of {case}: {}, not {}", blocks(&ours), blocks(&theirs)));
                }
                if target == "qcow2" {
                    lab.qemu_img(&["check", "-q", "ours"]);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_result_is_one_file_at_any_number_of_threads() {
    let lab = Lab::new();
    std::fs::write(lab.path("plain.raw"), patterned((9 << 20) + 1536, 7)).expect("room");
    for compress in [None, Some("zlib"), Some("zstd")] {
        for out_of_order in [false, true] {
            let mut first: Option<Vec<u8>> = None;
            for threads in [1, 2, 4, 15] {
                let options = ConvertOptions {
                    compress: compress.is_some(),
                    threads: Some(threads),
                    out_of_order,
                    ..ConvertOptions::default()
                };
                let path = lab.path("ours");
                let create = [("compression_type", compress.unwrap_or("zlib"))];
                convert_to_new(
                    &[open(&lab.path("plain.raw"), "raw", OpenMode::Read)],
                    &path,
                    "qcow2",
                    &create,
                    &options,
                );
                lab.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "plain.raw", "ours"]);
                lab.qemu_img(&["check", "-q", "ours"]);
                let bytes = std::fs::read(&path).expect("it is there");
                if !out_of_order {
                    assert!(
                        *first.get_or_insert_with(|| bytes.clone()) == bytes,
                        "{compress:?}, {threads} threads"
                    );
                }
            }
        }
    }
}

#[test]
fn compressed_images_are_as_small_as_the_reference_s() {
    let lab = Lab::new();
    let places = std::env::var_os("PATH").expect("the reference is found in it");
    let mut program = std::env::split_paths(&places)
        .find_map(|place| std::fs::read(place.join("qemu-img")).ok())
        .expect("the reference is a program");
    program.truncate(program.len() / SECTOR * SECTOR);
    std::fs::write(lab.path("program.raw"), program).expect("room");
    // Short matches nearby are what counts in logs and tables.
    let noise = patterned(1 << 20, 8);
    let write = |file: &str, line: fn(usize, &[u8]) -> String| {
        let lines = noise.chunks_exact(4).take(60_000).enumerate();
        let mut text: Vec<u8> = lines.flat_map(|(number, noise)| line(number, noise).into_bytes()).collect();
        text.truncate(text.len() / SECTOR * SECTOR);
        std::fs::write(lab.path(file), text).expect("room");
    };
    write("log.raw", |_, noise| {
        let bytes = u16::from(noise[0]) * 251 + u16::from(noise[1]);
        format!("2026-11-21T12:00:{:02} host app: GET /items/{} bytes={bytes}\n", noise[0] % 60, noise[1])
    });
    write("table.raw", |number, noise| {
        let name = ["alpha", "beta", "gamma", "delta"][usize::from(noise[0] % 4)];
        format!("{number},{name},{}.{:02},{}\n", u16::from(noise[1]) * 4, noise[2] % 100, noise[3] % 10)
    });
    for file in ["program.raw", "log.raw", "table.raw"] {
        for how in ["zlib", "zstd"] {
            let option = format!("compression_type={how}");
            lab.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", &option, file, "theirs"]);
            let options = ConvertOptions { compress: true, ..ConvertOptions::default() };
            let source = open(&lab.path(file), "raw", OpenMode::Read);
            convert_to_new(&[source], &lab.path("ours"), "qcow2", &[("compression_type", how)], &options);
            lab.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", file, "ours"]);
            let len = |name: &str| std::fs::metadata(lab.path(name)).expect("it is there").len();
            let (ours, theirs) = (len("ours"), len("theirs"));
            assert!(ours * 100 <= theirs * 102, "{file}, {how}: {ours} bytes against {theirs}");
            assert_eq!(ours % 512, 0, "{file}, {how}: the file ends on a sector");
        }
    }
}

/// Remembers what it is told.
#[derive(Default)]
struct Told(Mutex<Vec<(u64, u64)>>);

impl Progress for Told {
    fn advance(&self, done: u64, total: u64) {
        lock(&self.0).push((done, total));
    }
}

#[test]
fn progress_is_told_in_the_reference_s_steps() {
    let bytes = vec![7; 8 << 20];
    let target = raw(MemoryStorage::from_bytes("target", &vec![0; 8 << 20]), OpenMode::Write);
    let told = Told::default();
    convert(&[source(&bytes)], &target, &ConvertOptions::default(), &no_salvage, &told).expect("it fits");
    let steps: Vec<_> = lock(&told.0).iter().map(|(done, total)| done * 100 / total).collect();
    assert_eq!(steps, [0, 25, 50, 75, 100]);
}

/// Wants to stop at once.
struct Cancelled;

impl Progress for Cancelled {
    fn advance(&self, _: u64, _: u64) {}
    fn is_cancelled(&self) -> bool {
        true
    }
}

#[test]
fn a_cancelled_job_says_so() {
    let target = raw(MemoryStorage::from_bytes("target", &[0; 4096]), OpenMode::Write);
    let result = convert(&[source(&[1; 4096])], &target, &ConvertOptions::default(), &no_salvage, &Cancelled);
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
}

#[test]
fn a_target_that_is_too_small_is_refused() {
    let target = raw(MemoryStorage::from_bytes("target", &[0; 512]), OpenMode::Write);
    let result = convert(&[source(&[1; 1024])], &target, &ConvertOptions::default(), &no_salvage, &Unwatched);
    assert_eq!(result.expect_err("refused").to_string(), "output file is smaller than input file");
}
