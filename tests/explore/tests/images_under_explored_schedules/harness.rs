//! What the tests share: schedules, images in memory, and how queues read and write.

use std::{
    io::{IoSlice, IoSliceMut},
    ops::Range,
    path::Path,
    sync::Arc,
    task::{Wake, Waker},
};

use img_core_explored::{
    Result,
    format::{Attempt, Layer, OpenContext, OpenMode, OptionSet, Place, WriteStep, registry},
    image::{Commit, Image, ImageExtent, Lookaside, Ticket, WriteTicket},
    storage::{Flush, Identity, Limits, MemoryStorage, Preallocation, Storage},
};
use shuttle::{
    Config, Runner,
    rand::{Rng, thread_rng},
    scheduler::{PctScheduler, RandomScheduler},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread::{self, Thread},
};

/// Preemptions of a schedule that is mostly in order.
const PREEMPTIONS: usize = 3;
/// Calls go deeper than the explorer expects.
const STACK_BYTES: usize = 1 << 20;

/// Bytes of an image, made once, by the library as it is.
pub(crate) type Bytes = &'static [u8];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Runs `test` in so many schedules of each kind.
pub(crate) fn explore(schedules: u64, test: impl Fn() + Clone + Send + Sync + 'static) {
    let schedules = usize::try_from(number("IMG_TEST_CASES", schedules)).expect("a number of schedules");
    let seed = number("IMG_TEST_SEED", 1);
    let config = || {
        let mut config = Config::new();
        config.stack_size = STACK_BYTES;
        config
    };
    Runner::new(RandomScheduler::new_from_seed(seed, schedules), config()).run(test.clone());
    Runner::new(PctScheduler::new_from_seed(seed, PREEMPTIONS, schedules), config()).run(test);
}

/// The bytes of an empty image, over `parent` where there is one.
pub(crate) fn create(
    format: &str,
    size_bytes: u64,
    options: &[(&str, &str)],
    parent: Option<Bytes>,
) -> Bytes {
    use img_core::{format, storage};
    let memory = Arc::new(storage::MemoryStorage::new("explored"));
    let file: Arc<dyn storage::Storage> = Arc::clone(&memory) as _;
    let mut set = format::OptionSet::new();
    options.iter().for_each(|(name, value)| set.set(*name, *value));
    let request = format::CreateRequest {
        virtual_size_bytes: size_bytes,
        backing: parent
            .map(|_| format::Backing { name: "parent".to_owned(), format: Some(format.to_owned()) }),
        options: &set,
        open_file: &|_, _| {
            let bytes = parent.expect("the only other file is the parent");
            Ok(Arc::new(storage::MemoryStorage::from_bytes("parent", bytes)) as _)
        },
    };
    let driver = format::registry::by_name(format).expect("a known format");
    driver.create(&file, &request).expect("created");
    memory.to_vec().leak()
}

/// The image after `byte` was written to some ranges of its disk, by the library as it is.
pub(crate) fn filled(format: &str, image: Bytes, ranges: &[Range<u64>], byte: u8) -> Bytes {
    let bytes = changed(format, image, |image| {
        for range in ranges {
            image.write_at(&vec![byte; usize_of(range.end - range.start)], range.start).expect("written");
        }
    });
    bytes.leak()
}

/// The image after `change`, by the library as it is.
pub(crate) fn changed(format: &str, image: &[u8], change: impl FnOnce(&img_core::image::Image)) -> Vec<u8> {
    use img_core::{format, image::Image, storage};
    let memory = Arc::new(storage::MemoryStorage::from_bytes("filled", image));
    let options = format::OptionSet::new();
    let context = format::OpenContext {
        mode: format::OpenMode::Write,
        options: &options,
        open_file: &|_, _| unreachable!("one file"),
    };
    let driver = format::registry::by_name(format).expect("a known format");
    let layer = driver.open(Arc::clone(&memory) as _, &context).expect("it is valid");
    let image = Image::from_layers(vec![layer]).expect("one layer");
    change(&image);
    image.close().expect("closed");
    memory.to_vec()
}

/// Opens the files of a chain, top first, each of `format`; the top to be written, where every operation is a step.
pub(crate) fn open(
    format: &str,
    options: &[(&str, &str)],
    top: Arc<dyn Storage>,
    parent: Option<Arc<dyn Storage>>,
) -> Arc<Image> {
    open_stepped(format, options, Stepped { inner: top, steps: AtomicU64::new(0), tear: None }, parent)
}

/// [`open`] of one file, with a read that is torn.
pub(crate) fn open_torn(
    format: &str,
    options: &[(&str, &str)],
    file: Arc<dyn Storage>,
    tear: Tear,
) -> Arc<Image> {
    open_stepped(format, options, Stepped { inner: file, steps: AtomicU64::new(0), tear: Some(tear) }, None)
}

/// Where and when a long read is torn.
#[derive(Debug)]
pub(crate) struct Tear {
    /// Reads of more than so many bytes are.
    pub(crate) longer_than_bytes: usize,
    /// From this place of the file on ...
    pub(crate) at_bytes: u64,
    /// ... they read what is there when this has come to be.
    pub(crate) until: Arc<AtomicBool>,
}

fn open_stepped(
    format: &str,
    options: &[(&str, &str)],
    top: Stepped,
    parent: Option<Arc<dyn Storage>>,
) -> Arc<Image> {
    let mut layers = vec![open_layer(format, options, Arc::new(top), OpenMode::Write)];
    layers.extend(parent.map(|parent| open_layer(format, &[], parent, OpenMode::Read)));
    Arc::new(Image::from_layers(layers).expect("layers"))
}

/// Opens a file that is only read. Its operations are no steps.
pub(crate) fn open_to_read(format: &str, bytes: &[u8]) -> Image {
    let file = Arc::new(MemoryStorage::from_bytes("read", bytes));
    Image::from_layers(vec![open_layer(format, &[], file, OpenMode::Read)]).expect("one layer")
}

fn open_layer(
    format: &str,
    options: &[(&str, &str)],
    file: Arc<dyn Storage>,
    mode: OpenMode,
) -> Arc<dyn Layer> {
    let mut set = OptionSet::new();
    options.iter().for_each(|(name, value)| set.set(*name, *value));
    let context = OpenContext { mode, options: &set, open_file: &|_, _| unreachable!("one file") };
    registry::by_name(format).expect("a known format").open(file, &context).expect("it is valid")
}

/// A file at each operation on which another thread may go on.
#[derive(Debug)]
struct Stepped {
    inner: Arc<dyn Storage>,
    steps: AtomicU64,
    tear: Option<Tear>,
}

impl Stepped {
    fn step(&self) -> &dyn Storage {
        self.steps.fetch_add(1, Ordering::SeqCst);
        &*self.inner
    }
}

impl Storage for Stepped {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn len_bytes(&self) -> Result<u64> {
        self.step().len_bytes()
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], at_bytes: u64) -> Result<()> {
        self.step().read_vectored_at(bufs, at_bytes)?;
        for (buf, at) in each_at(bufs, at_bytes) {
            let Some(Tear { longer_than_bytes, at_bytes: tear, until }) = &self.tear else { break };
            if buf.len() > *longer_than_bytes && (at + 1..at + buf.len() as u64).contains(tear) {
                while !until.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
                self.step().read_at(&mut buf[usize_of(tear - at)..], *tear)?;
            }
        }
        Ok(())
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], at_bytes: u64) -> Result<()> {
        self.step().write_vectored_at(bufs, at_bytes)
    }

    fn flush(&self, what: Flush) -> Result<()> {
        self.step().flush(what)
    }

    fn resize(&self, len_bytes: u64, preallocation: Preallocation) -> Result<()> {
        self.step().resize(len_bytes, preallocation)
    }

    fn preallocate(&self, range_bytes: Range<u64>, preallocation: Preallocation) -> Result<()> {
        self.step().preallocate(range_bytes, preallocation)
    }

    fn punch_hole(&self, range_bytes: Range<u64>) -> Result<()> {
        self.step().punch_hole(range_bytes)
    }

    fn write_zeroes(&self, range_bytes: Range<u64>, may_unmap: bool) -> Result<()> {
        self.step().write_zeroes(range_bytes, may_unmap)
    }

    fn next_allocated(&self, from_bytes: u64) -> Result<Option<Range<u64>>> {
        self.step().next_allocated(from_bytes)
    }

    fn allocated_bytes(&self) -> Result<u64> {
        self.step().allocated_bytes()
    }

    fn identity(&self) -> Option<Identity> {
        self.inner.identity()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn is_writable(&self) -> bool {
        self.inner.is_writable()
    }
}

/// Buffers, and where in the file they stand.
fn each_at<'a, 'b>(
    bufs: &'a mut [IoSliceMut<'b>],
    at_bytes: u64,
) -> impl Iterator<Item = (&'a mut IoSliceMut<'b>, u64)> {
    bufs.iter_mut().scan(at_bytes, |next, buf| {
        let at = *next;
        *next += buf.len() as u64;
        Some((buf, at))
    })
}

/// The image, opened by the library as it is; first for writing where what a crash left is to be made good.
pub(crate) struct Audited(img_core::image::Image);

impl Audited {
    /// An audit finds nothing wrong with it, or nothing but `leaks`.
    pub(crate) fn new(
        format: &str,
        top: &[u8],
        parent: Option<&[u8]>,
        repairs: bool,
        leaks: bool,
    ) -> Result<Self, String> {
        use img_core::{format as formats, image::Image, storage};
        let file = |bytes: &[u8]| -> Arc<dyn storage::Storage> {
            Arc::new(storage::MemoryStorage::from_bytes("audited", bytes))
        };
        let top = file(top);
        let driver = formats::registry::by_name(format).expect("a known format");
        let layer = |storage: &Arc<dyn storage::Storage>, mode| {
            let options = formats::OptionSet::new();
            let context =
                formats::OpenContext { mode, options: &options, open_file: &|_, _| unreachable!("one file") };
            driver.open(Arc::clone(storage), &context).map_err(|error| error.to_string())
        };
        let one = |mode| Image::from_layers(vec![layer(&top, mode)?]).map_err(|error| error.to_string());
        if repairs {
            one(formats::OpenMode::Write)?.close().map_err(|error| error.to_string())?;
        }
        let mut findings = Vec::new();
        let report = one(formats::OpenMode::Check { repair: false })?
            .check(formats::Repair::Nothing, &mut |finding| findings.push(finding.text))
            .map_err(|error| error.to_string())?;
        if (report.corruptions, report.check_errors) != (0, 0) || (report.leaks != 0 && !leaks) {
            return Err(format!("{report:?} {findings:#?}"));
        }
        let mut layers = vec![layer(&top, formats::OpenMode::Read)?];
        if let Some(parent) = parent {
            layers.push(layer(&file(parent), formats::OpenMode::Read)?);
        }
        Image::from_layers(layers).map(Self).map_err(|error| error.to_string())
    }

    /// What the guest reads there.
    pub(crate) fn read(&self, guest: Range<u64>) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0xee; usize_of(guest.end - guest.start)];
        self.0.read_at(&mut bytes, guest.start).map_err(|error| error.to_string())?;
        Ok(bytes)
    }
}

pub(crate) fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("small")
}

/// Wakes a thread of the explorer.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Tries until nobody is in the way, parked in between: a wake-up that is lost is a deadlock, which the explorer tells.
fn when_free<T>(image: &Image, mut attempt: impl FnMut() -> Attempt<T>) -> Attempt<T> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        match attempt() {
            Attempt::Busy => {}
            other => return other,
        }
        image.wake_on_progress(&waker);
        match attempt() {
            Attempt::Busy => thread::park(),
            other => return other,
        }
    }
}

/// Writes as a queue does: from memory where that is enough.
pub(crate) fn write(image: &Arc<Image>, guest: Range<u64>, byte: u8) {
    let bytes = vec![byte; usize_of(guest.end - guest.start)];
    let mut steps = Vec::new();
    let attempt = when_free(image, || image.try_prepare_write(guest.clone(), &mut steps).expect("inside"));
    let Attempt::Done(ticket) = attempt else {
        return image.write_at(&bytes, guest.start).expect("written");
    };
    for step in &steps {
        let WriteStep { guest_bytes, file, at, fill_before_bytes, fill_after_bytes, .. } = step;
        let before = around(image, &ticket, guest_bytes.start - fill_before_bytes..guest_bytes.start);
        let after = around(image, &ticket, guest_bytes.end..guest_bytes.end + fill_after_bytes);
        let (Some(before), Some(after)) = (before, after) else {
            drop(ticket);
            return image.write_at(&bytes, guest.start).expect("written");
        };
        let len = usize_of(guest_bytes.end - guest_bytes.start);
        let all = [&before, &bytes[..len], &after].concat();
        image.storage(0, *file).expect("open").write_at(&all, at.0 - fill_before_bytes).expect("written");
    }
    match ticket.try_commit() {
        Commit::Done => {}
        Commit::Blocks(ticket) => ticket.commit().expect("committed"),
    }
}

/// Flushes as a queue does: by syncs alone where that is enough.
pub(crate) fn flush(image: &Arc<Image>) {
    match when_free(image, || image.try_flush()) {
        Attempt::Done(ticket) => {
            let sync = |file| image.storage(0, file).expect("open").flush(Flush::Data).expect("synced");
            ticket.files().iter().copied().for_each(sync);
            ticket.synced();
        }
        _ => image.flush().expect("flushed"),
    }
}

/// What a step of a write fills; `None` where memory cannot tell.
fn around(image: &Arc<Image>, ticket: &WriteTicket, guest: Range<u64>) -> Option<Vec<u8>> {
    let mut bytes = vec![0xee; usize_of(guest.end - guest.start)];
    let mut extents = Vec::new();
    ticket.map_fill(guest.clone(), &mut extents).then(|| fill(image, &extents, guest.start, &mut bytes))?;
    Some(bytes)
}

/// Reads as somebody does who seldom asks, with time between the answer and the bytes.
pub(crate) fn read(image: &Arc<Image>, guest: Range<u64>) -> Vec<u8> {
    read_by(image, &guest, |extents| image.try_map(guest.clone(), extents))
}

/// Reads as a queue does, which remembers the map.
pub(crate) fn read_remembering(lookaside: &mut Lookaside, guest: Range<u64>) -> Vec<u8> {
    let image = Arc::clone(lookaside.image());
    read_by(&image, &guest, |extents| lookaside.try_map(guest.clone(), extents))
}

fn read_by(
    image: &Arc<Image>,
    guest: &Range<u64>,
    mut map: impl FnMut(&mut Vec<ImageExtent>) -> Result<Attempt<Ticket>>,
) -> Vec<u8> {
    let mut bytes = vec![0xee; usize_of(guest.end - guest.start)];
    let mut extents = Vec::new();
    loop {
        let attempt = when_free(image, || map(&mut extents).expect("inside"));
        if let Attempt::Done(_ticket) = attempt {
            fill(image, &extents, guest.start, &mut bytes);
            return bytes;
        }
        // Whoever may wait has his turn, too.
        if thread_rng().gen_bool(0.3) || !read_table(image, guest.clone()) {
            image.read_at(&mut bytes, guest.start).expect("read");
            return bytes;
        }
    }
}

/// Reads a piece of a table that memory lacks, as a queue does. Whether there was one.
fn read_table(image: &Arc<Image>, guest: Range<u64>) -> bool {
    let Some(ticket) = image.missing_table(guest) else { return false };
    let mut bytes = vec![0xee; usize_of(ticket.len_bytes())].into_boxed_slice();
    let storage = image.storage(ticket.depth(), ticket.file()).expect("open");
    storage.read_at(&mut bytes, ticket.at().0).expect("read");
    ticket.offer(bytes);
    true
}

/// Fills `bytes`, which start at `start` of the guest's disk, from where the map says.
fn fill(image: &Arc<Image>, extents: &[ImageExtent], start: u64, bytes: &mut [u8]) {
    for extent in extents {
        let from = usize_of(extent.guest_offset - start);
        let part = &mut bytes[from..from + usize_of(extent.len_bytes)];
        match extent.place {
            Place::Data { file, at, .. } => {
                image.storage(extent.depth, file).expect("open").read_at(part, at.0).expect("read");
            }
            Place::Zero { .. } | Place::Unallocated => part.fill(0),
            Place::Encoded { .. } => unreachable!("nothing is compressed"),
        }
    }
}

pub(crate) fn spawn(
    image: &Arc<Image>,
    work: impl FnOnce(&Arc<Image>) + Send + 'static,
) -> thread::JoinHandle<()> {
    let image = Arc::clone(image);
    thread::spawn(move || work(&image))
}

pub(crate) fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().expect("it ends"));
}

pub(crate) fn close(image: Arc<Image>) {
    Arc::into_inner(image).expect("nobody else holds it").close().expect("closed");
}
