//! The demonstration: the whole stack in one command, from an empty file to a guest that writes through a chain.

mod guest;

use std::{
    fmt,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use clap::Args;
use img_core::{
    format::{Backing, Driver, OpenMode, OptionSet, Repair, registry},
    image::{Image, ImageName, OpenOptions},
    job::{
        Unwatched,
        compare::{CompareOptions, Comparison, compare},
        convert::{ConvertOptions, convert},
        create::{CreateImage, create},
    },
};
use vm_memory::{Bytes, GuestAddress};
use vmm_runner::{
    Error, Result,
    drive::{Drive, DriveConfig},
    machine::{End, Entry, Machine, MachineConfig, MemoryConfig},
    virtio::VirtioDevice,
};

/// The size of the demonstration's disk.
const DISK_BYTES: u64 = 64 << 20;
/// Each layer writes this much, in every so-manieth block.
const LAYER_BYTES: u64 = 4 << 20;
/// What the layers write in.
const BLOCK_BYTES: usize = guest::BLOCK_BYTES as usize;
/// The name of the snapshot.
const SNAPSHOT: &str = "before-boot";
/// The most layers above the base.
const MAX_DEPTH: u32 = 64;

/// Shows the whole project in one run: makes a chain of images, writes, snapshots, converts, compares, checks,
/// and boots a guest that is built into this program on it.
#[derive(Debug, Args)]
pub(crate) struct DemoOptions {
    /// Format of the base image; without it raw, or the format of the layers where these stand on no raw image.
    #[arg(long, value_name = "FORMAT")]
    base_format: Option<String>,

    /// Format of the layers above it.
    #[arg(long, value_name = "FORMAT", default_value = "qcow2")]
    format: String,

    /// Layers above the base.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_DEPTH)))]
    depth: u32,

    /// Works in this directory, and leaves the images there.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Prints what was done, and how long it took.
struct Report {
    since: Instant,
}

impl Report {
    fn done(&mut self, what: &str, text: impl fmt::Display) -> Result<()> {
        let milliseconds = self.since.elapsed().as_secs_f64() * 1000.0;
        let text = text.to_string();
        let line = format!("  {what:<10} {text:<90} {milliseconds:>6.1} ms\n");
        io::stdout().write_all(line.as_bytes()).map_err(Error::host("standard output"))?;
        self.since = Instant::now();
        Ok(())
    }
}

/// Runs it.
pub(crate) fn run(options: &DemoOptions) -> Result<()> {
    let temporary = tempfile::tempdir().map_err(Error::host("a temporary directory"))?;
    let dir = options.dir.as_deref().unwrap_or(temporary.path());
    std::fs::create_dir_all(dir).map_err(Error::file(dir))?;
    let mut report = Report { since: Instant::now() };

    let layers = plan_chain(options, dir)?;
    let (base, top) = (&layers[0], layers.last().expect("a base at least"));
    let expected = make_chain(&layers)?;
    report.done(
        "made",
        format_args!(
            "a chain of {}, {} MiB written in each: {}",
            layers.len(),
            LAYER_BYTES >> 20,
            names(&layers)
        ),
    )?;

    read_back(top, &expected)?;
    report.done("read", "through the chain: what was written")?;

    let has_snapshot = take_snapshot(top)?;
    if has_snapshot {
        report.done("snapshot", format_args!("'{SNAPSHOT}' inside {}", top.file_name()))?;
    } else {
        report.done("snapshot", format_args!("none: {} images have no internal snapshots", top.format))?;
    }

    let copy = convert_to_compressed(top, dir)?;
    let bytes = std::fs::metadata(&copy.path).map_err(Error::file(&copy.path))?.len();
    report.done(
        "converted",
        format_args!(
            "the chain to {} ({} KiB, compressed); comparing says: identical",
            copy.file_name(),
            bytes >> 10
        ),
    )?;

    let checked = check(layers.iter().chain([&copy]))?;
    report.done("checked", format_args!("{checked}"))?;

    let sum = guest::sum(&expected[..guest::READ_BYTES as usize]);
    match boot(top, sum) {
        Ok(exits) => {
            report.done(
                "booted",
                format_args!(
                    "a guest of {} bytes: read {} KiB and wrote {} KiB through {} layers; {exits} exits",
                    guest::code().len(),
                    guest::READ_BYTES >> 10,
                    guest::WRITE_BYTES >> 10,
                    layers.len()
                ),
            )?;
        }
        Err(error @ (Error::OpenKvm(_) | Error::Kvm { .. })) => {
            let text = format!("  not booted: {error}\n  Everything else was done; the guest needs KVM.\n");
            return io::stdout().write_all(text.as_bytes()).map_err(Error::host("standard output"));
        }
        Err(error) => return Err(error),
    }

    verify(top, expected, has_snapshot)?;
    check(layers.iter())?;
    let kept = match (has_snapshot, base.file_name()) {
        (true, base) => format!("the snapshot and {base} are as they were"),
        (false, base) => format!("{base} is as it was"),
    };
    report.done("verified", format_args!("what the guest wrote is there; {kept}"))?;
    if options.dir.is_some() {
        let text = format!("  The images are in {}\n", dir.display());
        io::stdout().write_all(text.as_bytes()).map_err(Error::host("standard output"))?;
    }
    Ok(())
}

/// One image file of the demonstration.
#[derive(Clone, Debug)]
struct ImageFile {
    path: PathBuf,
    format: String,
}

impl ImageFile {
    fn name(&self) -> Result<ImageName> {
        Ok(ImageName::parse(&self.path.to_string_lossy())?)
    }

    fn file_name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn drive(&self) -> Result<Drive> {
        let mut config = DriveConfig::new(&self.path.to_string_lossy());
        config.format = Some(self.format.clone());
        Drive::open(config)
    }

    fn open(&self, mode: OpenMode) -> Result<Image> {
        Ok(Image::open(&self.name()?, &OpenOptions::new(mode).format(&self.format))?)
    }

    fn driver(&self) -> Result<&'static dyn Driver> {
        let unknown = || Error::Invalid(format!("'{}' is not a format", self.format));
        registry::by_name(&self.format).ok_or_else(unknown)
    }

    /// The size of the disk; some formats make it a little larger than they were told.
    fn virtual_size_bytes(&self) -> Result<u64> {
        Ok(self.open(OpenMode::Read)?.virtual_size_bytes())
    }

    fn create(&self, virtual_size_bytes: u64, backing: Option<&Self>) -> Result<()> {
        let backing =
            backing.map(|below| Backing { name: below.file_name(), format: Some(below.format.clone()) });
        create(&CreateImage {
            name: &self.name()?,
            driver: self.driver()?,
            virtual_size_bytes,
            backing,
            options: OptionSet::new(),
        })?;
        Ok(())
    }
}

fn names(files: &[ImageFile]) -> String {
    match files {
        [base, .., top] if files.len() > 3 => format!("{} <- ... <- {}", base.file_name(), top.file_name()),
        files => files.iter().map(ImageFile::file_name).collect::<Vec<_>>().join(" <- "),
    }
}

/// The files of the chain, from the base up.
fn plan_chain(options: &DemoOptions, dir: &Path) -> Result<Vec<ImageFile>> {
    let file = |stem: &str, format: &str| ImageFile {
        path: dir.join(format!("{stem}.{format}")),
        format: format.to_owned(),
    };
    let above = file("layer1", &options.format).driver()?;
    let base_format = match &options.base_format {
        Some(format) if above.has_backing() && !above.can_stand_on(format) => {
            return Err(Error::Invalid(format!(
                "{0} images do not stand on {format} ones: --base-format {0} makes a base for them",
                options.format
            )));
        }
        Some(format) => format,
        None if above.can_stand_on("raw") => "raw",
        None => &options.format,
    };
    let base = file("base", base_format);
    let above = (1..=options.depth).map(|layer| file(&format!("layer{layer}"), &options.format));
    Ok([base].into_iter().chain(above).collect())
}

/// What layer `layer` writes into block `block`; different everywhere.
fn content(layer: usize, block: usize) -> Vec<u8> {
    let seed = (layer as u64 + 1) << 32 | block as u64;
    (0..BLOCK_BYTES as u64 / 8)
        .flat_map(|word| (seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ word).to_le_bytes())
        .collect()
}

/// Makes each image and writes some blocks of the same part of the disk into it before the next one is put on top: some
/// formats record what the image below holds. Every layer shows somewhere. Returns what that part reads as in the end.
fn make_chain(layers: &[ImageFile]) -> Result<Vec<u8>> {
    let blocks = usize::try_from(LAYER_BYTES).unwrap_or(0) / BLOCK_BYTES;
    let mut expected = vec![0; blocks * BLOCK_BYTES];
    for (layer, file) in layers.iter().enumerate() {
        let below = layer.checked_sub(1).map(|below| &layers[below]);
        file.create(below.map_or(Ok(DISK_BYTES), ImageFile::virtual_size_bytes)?, below)?;
        let image = file.open(OpenMode::Write)?;
        for block in (0..blocks).filter(|block| block % (layer + 1) == 0) {
            let bytes = content(layer, block);
            let at = block * BLOCK_BYTES;
            image.write_at(&bytes, at as u64)?;
            expected[at..at + BLOCK_BYTES].copy_from_slice(&bytes);
        }
        image.close()?;
    }
    Ok(expected)
}

fn read_back(top: &ImageFile, expected: &[u8]) -> Result<()> {
    let mut read = vec![0; expected.len()];
    top.open(OpenMode::Read)?.read_at(&mut read, 0)?;
    if read == expected { Ok(()) } else { Err(differs("the chain", expected, &read)) }
}

fn differs(what: &str, expected: &[u8], found: &[u8]) -> Error {
    let at = expected.iter().zip(found).position(|(expected, found)| expected != found).unwrap_or(0);
    Error::Invalid(format!("{what} does not read as it was written, from byte {at} on"))
}

/// Whether the format has snapshots.
fn take_snapshot(top: &ImageFile) -> Result<bool> {
    let image = top.open(OpenMode::Write)?;
    let has_snapshots = image.layers()[0].snapshots().is_some();
    if has_snapshots {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        image.snapshot_create(SNAPSHOT, (u32::try_from(now.as_secs()).unwrap_or(0), now.subsec_nanos()))?;
    }
    image.close()?;
    Ok(has_snapshots)
}

fn convert_to_compressed(top: &ImageFile, dir: &Path) -> Result<ImageFile> {
    let copy = ImageFile { path: dir.join("copy.qcow2"), format: "qcow2".to_owned() };
    copy.create(top.virtual_size_bytes()?, None)?;
    let sources = [top.open(OpenMode::Read)?];
    let target = copy.open(OpenMode::Write)?;
    let options = ConvertOptions { compress: true, ..ConvertOptions::default() };
    convert(&sources, &target, &options, &|_, _| {}, &Unwatched)?;
    target.close()?;
    let target = copy.open(OpenMode::Read)?;
    match compare([&sources[0], &target], CompareOptions::default(), &mut || {}, &Unwatched)? {
        Comparison::Identical => Ok(copy),
        other => Err(Error::Invalid(format!("the copy differs from the chain: {other:?}"))),
    }
}

/// Says what was checked.
fn check<'a>(files: impl Iterator<Item = &'a ImageFile>) -> Result<String> {
    let mut clean = 0;
    for file in files {
        let image = file.open(OpenMode::Check { repair: false })?;
        if !image.layers()[0].driver().can_check() {
            continue;
        }
        let report = image.check(Repair::Nothing, &mut |_| {})?;
        if report.corruptions + report.leaks + report.check_errors > 0 {
            return Err(Error::Invalid(format!("{} has errors: {report:?}", file.file_name())));
        }
        clean += 1;
    }
    Ok(format!("no errors in {clean} images"))
}

/// What the guest prints.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Boots the guest on an image and returns how often it left to this program.
fn boot(top: &ImageFile, sum: u32) -> Result<u64> {
    let drive = top.drive()?;
    let result = boot_on(Box::new(drive.device(0, 1, |_| {})?), false, sum);
    drive.close()?;
    result
}

/// Boots the guest on a disk. With `is_shared` another process can map its memory.
fn boot_on(disk: Box<dyn VirtioDevice>, is_shared: bool, sum: u32) -> Result<u64> {
    let screen = Screen::default();
    let memory = MemoryConfig { size_bytes: guest::RAM_BYTES, is_shared, ..MemoryConfig::default() };
    let mut machine =
        Machine::new(MachineConfig { memory, ..MachineConfig::default() }, Box::new(screen.clone()))?;
    machine.add_device(disk)?;
    let code_at = GuestAddress(guest::LOAD_ADDRESS);
    machine
        .memory()
        .write_slice(guest::code(), code_at)
        .map_err(|error| Error::Invalid(format!("the guest does not fit into its memory: {error}")))?;
    let exits = Arc::clone(machine.exits());
    let end = machine.run_from(Entry::Pvh { entry: code_at })?;
    let said = String::from_utf8_lossy(&screen.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned();
    if end != End::PowerOff || said != guest::farewell(sum) {
        return Err(Error::Guest(format!("{end:?} after {said:?}; expected {:?}", guest::farewell(sum))));
    }
    Ok(exits.total())
}

/// What the guest wrote is there, what it did not write is as before, and so is the snapshot.
fn verify(top: &ImageFile, before: Vec<u8>, has_snapshot: bool) -> Result<()> {
    let mut read = vec![0; before.len()];
    if has_snapshot {
        let options = OpenOptions::new(OpenMode::Read).format(&top.format);
        Image::open_snapshot(&top.name()?, &options, SNAPSHOT)?.read_at(&mut read, 0)?;
        if read != before {
            return Err(differs("the snapshot", &before, &read));
        }
    }
    let mut after = before;
    let written = guest::written();
    let at = guest::WRITE_AT as usize;
    after[at..at + written.len()].copy_from_slice(&written);
    top.open(OpenMode::Read)?.read_at(&mut read, 0)?;
    if read == after { Ok(()) } else { Err(differs("what the guest wrote", &after, &read)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_and_the_host_agree_on_the_patterns() {
        assert_eq!(guest::sum(&[1, 0, 0, 0, 2, 0, 0, 0]), 4);
        let written = guest::written();
        assert_eq!(written.len(), guest::WRITE_BYTES as usize);
        let block = guest::WRITE_AT / guest::BLOCK_BYTES;
        assert_eq!(written[..4], block.wrapping_mul(guest::PATTERN).to_le_bytes());
        assert_eq!(written[4..8], block.wrapping_mul(guest::PATTERN).wrapping_add(1).to_le_bytes());
    }

    /// The backend serves from threads of this process, through a socket and shared memory as if from another.
    #[test]
    fn the_guest_runs_on_a_disk_that_a_backend_serves() {
        use blk_backend::{
            vhost_user::Server,
            virtio::{Device, DeviceOptions},
        };
        use vmm_runner::virtio::VhostUserBlock;

        let dir = tempfile::tempdir().expect("a directory");
        let options = DemoOptions { base_format: None, format: "qcow2".to_owned(), depth: 2, dir: None };
        let layers = plan_chain(&options, dir.path()).expect("formats");
        let expected = make_chain(&layers).expect("space");
        let top = layers.last().expect("a base at least");
        let drive = top.drive().expect("it is there");
        let device = Device::new(drive.disk(), &DeviceOptions::default()).expect("a device");
        let socket = dir.path().join("socket");
        let server = Server::start(device, &socket, Arc::new(|_| {})).expect("a socket");
        // Twice: the backend takes one front end after the other.
        for _ in 0..2 {
            let disk = VhostUserBlock::connect(&socket, 1, Arc::new(|_| {})).expect("the backend");
            match boot_on(Box::new(disk), true, guest::sum(&expected[..guest::READ_BYTES as usize])) {
                Err(Error::OpenKvm(_)) if !Path::new("/dev/kvm").exists() => return,
                booted => assert!(booted.expect("it boots") > 0),
            }
        }
        server.stop();
        drive.close().expect("space");
        verify(top, expected, false).expect("what the guest wrote");
    }

    #[test]
    fn the_guest_is_small() {
        assert!((200..2000).contains(&guest::code().len()), "{} bytes", guest::code().len());
    }
}
