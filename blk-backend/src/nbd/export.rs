//! What a server offers: disks under names, and how each may be used.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use img_core::{Error, Result, format::DirtyMap, image::Image};

use super::{
    command::Framing,
    context::Context,
    wire::{MAX_STRING_BYTES, transmission_flag as flag},
};
use crate::disk::Disk;

/// "Block size constraints": the size that is told as preferred, the default of the protocol and the page of a host.
pub(super) const PREFERRED_BLOCK_BYTES: u32 = 4096;

/// How a disk is offered.
#[derive(Clone, Debug, Default)]
pub struct ExportOptions {
    /// What clients ask for; the empty name is the default export.
    pub name: String,
    /// For people; may be empty.
    pub description: String,
    /// Refuse what writes, also where the disk could be written.
    pub read_only: bool,
    /// Offer `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Dirty bitmaps of the image to offer as `qemu:dirty-bitmap:NAME`.
    pub bitmaps: Vec<String>,
}

/// A disk that clients can connect to.
#[derive(Debug)]
pub struct Export {
    options: ExportOptions,
    disk: Arc<Disk>,
    bitmaps: Vec<Arc<ExportedBitmap>>,
}

/// A bitmap under the name of its context.
#[derive(Debug)]
pub(super) struct ExportedBitmap {
    name: String,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// It does not change any more.
    Fixed(DirtyMap),
    /// Changes of the disk are noted in it.
    Live,
}

impl ExportedBitmap {
    pub(super) fn new(name: impl Into<String>, map: DirtyMap) -> Self {
        Self { name: name.into(), content: Content::Fixed(map) }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The bits; `None` for one that is still being written to.
    pub(super) fn map(&self) -> Option<&DirtyMap> {
        match &self.content {
            Content::Fixed(map) => Some(map),
            Content::Live => None,
        }
    }
}

impl Export {
    /// Offers `disk`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name or description that is no string of the protocol, and for bitmaps that the
    /// image does not have or that may have missed changes.
    pub fn new(disk: Arc<Disk>, options: ExportOptions) -> Result<Self> {
        for (what, text) in [("name", &options.name), ("description", &options.description)] {
            if text.len() > MAX_STRING_BYTES || text.contains('\0') {
                return Err(Error::Invalid(format!(
                    "the export's {what} is longer than 4096 bytes or has a NUL"
                )));
            }
        }
        let image = disk.image();
        let read_only = options.read_only || disk.is_read_only();
        let mut bitmaps = Vec::new();
        for name in &options.bitmaps {
            bitmaps.push(Arc::new(offered_bitmap(&image, name, !disk.is_read_only())?));
        }
        Ok(Self { options: ExportOptions { read_only, ..options }, disk, bitmaps })
    }

    /// What clients ask for.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.options.name
    }

    /// For people.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.options.description
    }

    /// Whether what writes is refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.options.read_only
    }

    /// The disk behind it.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    /// "Transmission flags". All connections share one disk, whose flush covers what any of them wrote: hence
    /// `CAN_MULTI_CONN`.
    pub(super) fn transmission_flags(&self, framing: Framing) -> u16 {
        let always =
            flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
        let access = if self.is_read_only() {
            flag::READ_ONLY
        } else {
            flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
        };
        let framing = match framing {
            Framing::Simple => 0,
            Framing::Structured => flag::SEND_DF,
            Framing::Extended => flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD,
        };
        always | access | framing
    }

    /// What can be asked about it, in the order of the contexts' numbers.
    pub(super) fn contexts(&self) -> Vec<Context> {
        let bitmaps = self.bitmaps.iter().map(|bitmap| Context::Bitmap(Arc::clone(bitmap)));
        let depth = self.options.allocation_depth.then_some(Context::Depth);
        std::iter::once(Context::Allocation).chain(depth).chain(bitmaps).collect()
    }

    /// The context with bits that stand still: a bitmap that is written to is taken as it is now.
    ///
    /// # Errors
    /// When the bitmap cannot be read any more.
    pub(super) fn fixed(&self, context: Context) -> Result<Context> {
        match context {
            Context::Bitmap(bitmap) if bitmap.map().is_none() => {
                let map = read_bitmap(&self.disk.image(), &bitmap.name)?;
                Ok(Context::Bitmap(Arc::new(ExportedBitmap::new(&bitmap.name, map))))
            }
            context => Ok(context),
        }
    }
}

/// Looks the bitmap up, and reads it where it does not change any more.
fn offered_bitmap(image: &Image, name: &str, disk_is_written: bool) -> Result<ExportedBitmap> {
    for layer in image.layers() {
        let Some(bitmaps) = layer.bitmaps() else { continue };
        let Some(known) = bitmaps.list()?.into_iter().find(|known| known.name == name) else { continue };
        if known.inconsistent {
            return Err(Error::Invalid(format!("Bitmap '{name}' is inconsistent and cannot be used")));
        }
        if known.enabled && disk_is_written {
            return Ok(ExportedBitmap { name: known.name, content: Content::Live });
        }
        return Ok(ExportedBitmap::new(name, bitmaps.read(name)?));
    }
    Err(Error::Invalid(format!("Bitmap '{name}' is not found")))
}

/// The bitmap of the topmost layer that has it: a live snapshot puts layers above.
fn read_bitmap(image: &Image, name: &str) -> Result<DirtyMap> {
    for bitmaps in image.layers().iter().filter_map(|layer| layer.bitmaps()) {
        if bitmaps.list()?.iter().any(|known| known.name == name) {
            return bitmaps.read(name);
        }
    }
    Err(Error::Invalid(format!("Bitmap '{name}' is not found")))
}

/// The exports of a server.
#[derive(Debug, Default)]
pub struct Exports {
    list: Mutex<Vec<Arc<Export>>>,
    closing: AtomicBool,
}

impl Exports {
    fn list(&self) -> MutexGuard<'_, Vec<Arc<Export>>> {
        // The list is whole whenever the lock is free.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an export.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the name is taken.
    pub fn add(&self, export: Export) -> Result<Arc<Export>> {
        let mut list = self.list();
        if list.iter().any(|known| known.name() == export.name()) {
            return Err(Error::Invalid(format!("NBD server already has export named '{}'", export.name())));
        }
        let export = Arc::new(export);
        list.push(Arc::clone(&export));
        Ok(export)
    }

    /// Takes an export out of the list; connections to it go on.
    pub fn remove(&self, export: &Arc<Export>) {
        self.list().retain(|known| !Arc::ptr_eq(known, export));
    }

    pub(super) fn has(&self, export: &Arc<Export>) -> bool {
        self.list().iter().any(|known| Arc::ptr_eq(known, export))
    }

    /// The export called `name`.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Arc<Export>> {
        self.list().iter().find(|export| export.name() == name).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Export>> {
        self.list().clone()
    }

    /// From now on handshakes are told that the server goes.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }
}
