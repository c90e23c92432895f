//! An opened image that front ends share, with all that happens to it as a whole.
//!
//! Lanes come and go on their own threads. What concerns all requests at once goes through
//! [`Disk::drained`]: new requests are held back (as values, in their lanes), those under way end, the change is
//! made, and everybody goes on.
//!
//! Lock order: `changing` before that of `Pauses` before `lanes`. None is taken by a request, except the second by the
//! last one that ends while the disk is paused.

use std::{
    fmt,
    os::unix::fs::MetadataExt as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use img_core::{
    Error, Result,
    format::{Backing, HostFile, OpenMode, OptionSet, registry},
    image::{CacheMode, ChangeLog, Image, ImageName, OpenOptions},
    job::create::{self, CreateImage},
    storage::{Identity, Preallocation},
    text,
};

use crate::engine::{EngineInUse, Flight, LaneSnapshot, Mailbox, Pauses, ThreadClock, Workers};

/// Threads that may wait for tables, decoders and flushes at the same time, unless told otherwise.
const DEFAULT_WORKERS: usize = 16;

/// How an image is opened and served.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// The format, or `None` to probe.
    pub format: Option<String>,
    /// Refuse changes, and open the image without write access.
    pub read_only: bool,
    /// The host's page cache, by the reference's names.
    pub cache: CacheMode,
    /// Take no locks.
    pub force_share: bool,
    /// The most threads for what may wait.
    pub workers: usize,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            format: None,
            read_only: false,
            cache: CacheMode::Writeback,
            force_share: false,
            workers: DEFAULT_WORKERS,
        }
    }
}

/// What happened to a disk, for those who told somebody about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskEvent {
    /// The guest-visible size is different.
    Resized {
        /// The new one.
        size_bytes: u64,
    },
}

type Observer = Arc<dyn Fn(DiskEvent) + Send + Sync>;

/// Somebody is told of what happens to a disk, until this is dropped. A call that has begun by then may still go on.
#[must_use = "nobody is told any more when it is dropped"]
#[derive(Debug)]
pub struct Observation {
    disk: Weak<Disk>,
    number: u64,
}

impl Drop for Observation {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.upgrade() {
            disk.observers().present.retain(|(number, _)| *number != self.number);
        }
    }
}

#[derive(Default)]
struct Observers {
    present: Vec<(u64, Observer)>,
    /// How many there ever were.
    made: u64,
}

/// One opened image. Shared by lanes, front ends and the control socket.
pub struct Disk {
    image: RwLock<Arc<Image>>,
    /// Counts the exchanges of `image`.
    generation: AtomicU64,
    read_only: bool,
    cache: CacheMode,
    force_share: bool,
    /// Who changes the disk as a whole, one at a time.
    changing: Mutex<()>,
    lanes: Mutex<Lanes>,
    observers: Mutex<Observers>,
    /// For whatever image is on top.
    change_log: Mutex<Option<Arc<dyn ChangeLog>>>,
    pub(crate) pauses: Pauses,
    pub(crate) flight: Arc<Flight>,
    pub(crate) workers: Workers,
}

#[derive(Debug, Default)]
struct Lanes {
    present: Vec<PresentLane>,
    /// What lanes that are gone have counted, ...
    gone: LaneSnapshot,
    /// ... and spent.
    gone_cpu: Duration,
    /// How many there ever were.
    made: u64,
}

/// A lane whose thread lives.
#[derive(Debug)]
struct PresentLane {
    mailbox: Arc<Mailbox>,
    number: u64,
    engine: EngineInUse,
    clock: ThreadClock,
}

/// What can be told of a lane that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneReport {
    /// Counts the lanes of the disk, those that are gone included.
    pub number: u64,
    /// What it stands on.
    pub engine: EngineInUse,
    /// CPU time of its thread.
    pub cpu: Duration,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("image", &self.image().layer_name(0)).finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens an image with its chain.
    ///
    /// # Errors
    /// Those of [`Image::open`].
    pub fn open(name: &ImageName, options: &DiskOptions) -> Result<Arc<Self>> {
        let mode = if options.read_only { OpenMode::Read } else { OpenMode::Write };
        let open = OpenOptions {
            format: options.format.clone(),
            cache: options.cache,
            force_share: options.force_share,
            ..OpenOptions::new(mode)
        };
        Ok(Self::over(Image::open(name, &open)?, options))
    }

    /// Serves an image that the caller opened, in the cache mode and for the uses that `options` name.
    #[must_use]
    pub fn over(image: Image, options: &DiskOptions) -> Arc<Self> {
        let read_only = options.read_only || image.layers()[0].writer().is_none();
        Arc::new(Self {
            image: RwLock::new(Arc::new(image)),
            generation: AtomicU64::new(0),
            read_only,
            cache: options.cache,
            force_share: options.force_share,
            changing: Mutex::default(),
            lanes: Mutex::default(),
            observers: Mutex::default(),
            change_log: Mutex::default(),
            pauses: Pauses::default(),
            flight: Arc::default(),
            workers: Workers::new(options.workers),
        })
    }

    /// The image as it is now. A live snapshot exchanges it; who keeps one for long asks again.
    #[must_use]
    pub fn image(&self) -> Arc<Image> {
        Arc::clone(&self.image.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Guest-visible size.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.image().virtual_size_bytes()
    }

    /// Whether changes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether every write is durable before it is done.
    #[must_use]
    pub fn writes_through(&self) -> bool {
        self.cache.writes_through()
    }

    /// Holds new requests back and returns when none is under way. Every call needs its
    /// [`resume`](Self::resume). Lanes must go on being run; never called on the thread of one that has requests.
    pub fn pause(&self) {
        self.pauses.begin(|| self.lanes().present.iter().any(|lane| lane.mailbox.is_active()));
    }

    /// Takes one [`pause`](Self::pause) back; requests go on when it was the last.
    pub fn resume(&self) {
        if self.pauses.end() {
            self.lanes().present.iter().for_each(|lane| lane.mailbox.ring());
        }
    }

    /// Does something while no request is under way. The same care as with [`pause`](Self::pause).
    pub fn drained<T>(&self, change: impl FnOnce() -> T) -> T {
        let _one = self.changing();
        self.paused(change)
    }

    fn paused<T>(&self, change: impl FnOnce() -> T) -> T {
        struct Resume<'a>(&'a Disk);
        impl Drop for Resume<'_> {
            fn drop(&mut self) {
                self.0.resume();
            }
        }
        self.pause();
        let _resume = Resume(self);
        change()
    }

    /// Changes the guest-visible size, and tells the observers.
    ///
    /// # Errors
    /// Those of [`Image::resize`].
    pub fn resize(&self, size_bytes: u64) -> Result<()> {
        // Until the observers know: who is told of two sizes is told of the newer one last.
        let _one = self.changing();
        self.paused(|| self.image().resize(size_bytes, Preallocation::Off))?;
        self.tell(DiskEvent::Resized { size_bytes: self.size_bytes() });
        Ok(())
    }

    /// Takes an internal snapshot while the guest runs. `date` is in seconds and nanoseconds since 1970.
    ///
    /// # Errors
    /// Those of [`Image::snapshot_create`].
    pub fn snapshot_create(&self, name: &str, date: (u32, u32)) -> Result<()> {
        self.drained(|| self.image().snapshot_create(name, date))
    }

    /// Forgets an internal snapshot while the guest runs.
    ///
    /// # Errors
    /// Those of [`Image::snapshot_delete`].
    pub fn snapshot_delete(&self, id_or_name: &str) -> Result<()> {
        self.drained(|| self.image().snapshot_delete(id_or_name))
    }

    /// Puts a new image of `format` over the disk while the guest runs: what is written from now on goes there, and
    /// the image that was on top is not changed any more. With `existing` the image is there already; it has the
    /// disk's size, and whoever made it saw to what it names as its backing file.
    ///
    /// # Errors
    /// When the image cannot be made or opened, is in the chain already or hides all of it, or the old top cannot be
    /// flushed. The disk is then as it was.
    pub fn snapshot_external(&self, overlay: &ImageName, format: &str, existing: bool) -> Result<()> {
        self.drained(|| {
            let image = self.image();
            if self.read_only {
                return Err(Error::ReadOnly { file: image.layer_name(0).into() });
            }
            if !existing {
                self.make_overlay(&image, overlay, format)?;
            }
            let open = OpenOptions {
                format: Some(format.to_owned()),
                cache: self.cache,
                force_share: self.force_share,
                backing: false,
                ..OpenOptions::new(OpenMode::Write)
            };
            let new = image.with_overlay(Image::open(overlay, &open)?)?;
            // The old top is flushed; notes go on with the new one.
            image.keep_change_log(None);
            new.keep_change_log(self.change_log.lock().unwrap_or_else(PoisonError::into_inner).clone());
            *self.image.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
            self.generation.fetch_add(1, SeqCst);
            Ok(())
        })
    }

    /// Tells `log` from now on of each change that is not durable, or nobody; also of those to an image that comes on
    /// top later. All that was written before is made durable first.
    ///
    /// # Errors
    /// Those of [`Image::flush`]; nobody is told then.
    pub fn keep_change_log(&self, log: Option<Arc<dyn ChangeLog>>) -> Result<()> {
        self.drained(|| {
            let image = self.image();
            let mut kept = self.change_log.lock().unwrap_or_else(PoisonError::into_inner);
            // One that was kept learns of the flush: what it has noted is to be done again by nobody.
            let flushed = if image.notes_changes() || log.is_some() { image.flush() } else { Ok(()) };
            *kept = log.filter(|_| flushed.is_ok());
            image.keep_change_log(kept.clone());
            flushed
        })
    }

    fn make_overlay(&self, image: &Image, overlay: &ImageName, format: &str) -> Result<()> {
        let driver = registry::by_name(format).filter(|driver| driver.has_backing());
        let driver = driver.ok_or_else(|| {
            Error::Invalid(format!("Format '{format}' does not exist or has no backing files"))
        })?;
        let top = &image.layers()[0];
        self.check_is_foreign(image, overlay)?;
        let request = CreateImage {
            name: overlay,
            driver,
            virtual_size_bytes: image.virtual_size_bytes(),
            backing: Some(Backing {
                name: image.backing_name_for(overlay.path_to_create()?)?,
                format: Some(top.driver().name().to_owned()),
            }),
            options: OptionSet::new(),
        };
        create::create(&request).map(drop)
    }

    /// Making an image empties its file: it must not be one of this disk's. (Locks say so too, where there are any.)
    fn check_is_foreign(&self, image: &Image, overlay: &ImageName) -> Result<()> {
        let path = overlay.path_to_create()?;
        let Ok(found) = std::fs::metadata(text::to_path(path)) else { return Ok(()) };
        let identity = Identity { device: found.dev(), inode: found.ino() };
        let files = image.layers().iter().filter_map(|layer| layer.file(HostFile::IMAGE)?.identity());
        if files.into_iter().any(|known| known == identity) {
            return Err(Error::Invalid(format!("'{path}' is in use by the disk itself")));
        }
        Ok(())
    }

    /// Calls `observer` after each change that a front end tells its guest about, on the thread that made it. No other
    /// change to the disk as a whole is made meanwhile: `observer` makes none, either.
    pub fn observe(self: &Arc<Self>, observer: impl Fn(DiskEvent) + Send + Sync + 'static) -> Observation {
        let mut observers = self.observers();
        let number = observers.made;
        observers.made += 1;
        observers.present.push((number, Arc::new(observer)));
        Observation { disk: Arc::downgrade(self), number }
    }

    /// What all lanes, present and gone, have counted.
    #[must_use]
    pub fn stats(&self) -> LaneSnapshot {
        let lanes = self.lanes();
        let mut sum = lanes.gone.clone();
        lanes.present.iter().for_each(|lane| sum.add(&lane.mailbox.snapshot()));
        sum
    }

    /// The lanes that are there.
    #[must_use]
    pub fn lane_reports(&self) -> Vec<LaneReport> {
        let report = |lane: &PresentLane| LaneReport {
            number: lane.number,
            engine: lane.engine.clone(),
            cpu: lane.clock.spent(),
        };
        self.lanes().present.iter().map(report).collect()
    }

    /// CPU time of the threads of all lanes, present and gone. Workers are not among them.
    #[must_use]
    pub fn lanes_cpu(&self) -> Duration {
        let lanes = self.lanes();
        lanes.gone_cpu + lanes.present.iter().map(|lane| lane.clock.spent()).sum::<Duration>()
    }

    /// Makes everything durable and marks the image clean. Requests that come afterwards wait for ever: the
    /// front ends are closed before.
    ///
    /// # Errors
    /// When metadata or data cannot be written or flushed.
    pub fn close(&self) -> Result<()> {
        let _one = self.changing();
        self.pause();
        self.image().layers()[0].writer().map_or(Ok(()), |writer| writer.close())
    }

    fn tell(&self, event: DiskEvent) {
        // Called without the lock: what an observer drops may be the end of an observation.
        let observers: Vec<Observer> =
            self.observers().present.iter().map(|(_, observer)| Arc::clone(observer)).collect();
        observers.iter().for_each(|observer| observer(event));
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn observers(&self) -> MutexGuard<'_, Observers> {
        self.observers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(SeqCst)
    }

    /// A lane of the calling thread.
    pub(crate) fn add_lane(&self, lane: &Arc<Mailbox>, engine: EngineInUse) {
        let mut lanes = self.lanes();
        let number = lanes.made;
        lanes.made += 1;
        lanes.present.push(PresentLane {
            mailbox: Arc::clone(lane),
            number,
            engine,
            clock: ThreadClock::start(),
        });
    }

    pub(crate) fn remove_lane(&self, lane: &Arc<Mailbox>) {
        let mut lanes = self.lanes();
        let Some(at) = lanes.present.iter().position(|present| Arc::ptr_eq(&present.mailbox, lane)) else {
            return;
        };
        let gone = lanes.present.remove(at);
        lanes.gone_cpu += gone.clock.spent();
        lanes.gone.add(&lane.snapshot());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::tests::image,
        virtio::{Device, DeviceOptions},
    };

    const MIB: u64 = 1 << 20;

    #[test]
    fn sizes_are_told_in_their_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let name = image(dir.path(), "disk", "qcow2", &[], MIB, None);
        let disk = Disk::open(&name, &DiskOptions::default()).expect("it was just made");
        let (observed, told) = (Arc::downgrade(&disk), Arc::new(AtomicU64::new(0)));
        let count = Arc::clone(&told);
        let _watch = disk.observe(move |_| {
            let disk = observed.upgrade().expect("it is being changed");
            assert!(disk.changing.try_lock().is_err(), "the next change waits until all know of this one");
            assert!(!disk.pauses.is_any(), "requests do not");
            count.fetch_add(1, SeqCst);
        });
        disk.resize(2 * MIB).expect("resized");
        assert_eq!(told.load(SeqCst), 1);
    }

    #[test]
    fn a_disk_keeps_no_observer_that_is_gone() {
        let dir = tempfile::tempdir().expect("a directory");
        let name = image(dir.path(), "disk", "qcow2", &[], MIB, None);
        let disk = Disk::open(&name, &DiskOptions::default()).expect("it was just made");
        let told = Arc::new(AtomicU64::new(0));
        let observe = || {
            let told = Arc::clone(&told);
            disk.observe(move |_| {
                told.fetch_add(1, SeqCst);
            })
        };
        let (one, other) = (observe(), observe());
        drop(one);
        disk.resize(2 * MIB).expect("resized");
        assert_eq!(told.load(SeqCst), 1);
        drop(other);
        for _ in 0..3 {
            Device::new(&disk, &DeviceOptions::default()).expect("a device");
        }
        assert_eq!(disk.observers().present.len(), 0);
        // What an observer has may be the last of what observes.
        let last = Arc::new(Mutex::new(None));
        let has = Arc::clone(&last);
        *last.lock().unwrap() = Some(disk.observe(move |_| drop(has.lock().unwrap().take())));
        disk.resize(3 * MIB).expect("resized");
        assert_eq!(disk.observers().present.len(), 0);
    }
}
