//! The VHD target: a small fixed or dynamic disk, its descriptors patched; what was opened is written, resized and
//! opened again beside a model.

use std::{ops::Range, sync::Arc};

use img_core::{
    Result,
    format::{Driver, OpenContext, OpenMode, OptionSet, Repair, registry},
    image::Image,
    storage::{MemoryStorage, Preallocation, Storage},
};

use super::{
    script::Script,
    targets::{assert_covered, assert_reads_alike, ranges},
};
use crate::craft::{
    Crafted,
    vhd::{self, SECTOR},
};

/// What the geometry (1, 4, 17) spans.
const SPAN_SECTORS: usize = 68;
/// Longer disks are not compared with a model.
const MODEL_BYTES: u64 = 1 << 20;
const OPERATIONS: usize = 16;

/// A valid disk to start from.
fn base(which: u8) -> Crafted {
    let fixed = |sectors: usize, creator| {
        let data: Vec<u8> = (1..=251).cycle().take(sectors).flat_map(|byte| [byte; SECTOR]).collect();
        Crafted { bytes: vhd::fixed(&data, (1, 4, 17), creator) }
    };
    match which % 6 {
        0 => fixed(SPAN_SECTORS, *b"qem2"),
        // The size counts, and is not that of the geometry.
        1 => fixed(61, *b"win "),
        // The geometry counts: there is more in front of the footer than the guest sees.
        2 => fixed(SPAN_SECTORS + 12, *b"vpc "),
        // A footer of 511 bytes, as old programs wrote it.
        3 => {
            let mut old = fixed(SPAN_SECTORS, *b"vpc ");
            old.bytes.pop();
            old
        }
        // What a guest wrote at the front looks like a descriptor.
        4 => fixed(SPAN_SECTORS, *b"qem2").put(0, &vhd::small(3).bytes[..3 * SECTOR]),
        _ => vhd::small(3),
    }
}

/// Changes a field of a footer, or the length of the file. Most patches leave right sums behind.
fn patch(image: Crafted, script: &mut Script<'_>) -> Crafted {
    /// Cookie, features, version, data offset, creator, sizes, geometry, type, sum, saved state.
    const FIELDS: [(usize, usize); 13] = [
        (0, 8),
        (8, 4),
        (12, 4),
        (16, 8),
        (28, 4),
        (40, 8),
        (48, 8),
        (56, 2),
        (58, 1),
        (59, 1),
        (60, 4),
        (64, 4),
        (84, 1),
    ];
    let (kind, place, value) = (script.byte(), usize::from(script.u16()), script.tricky());
    let end = image.bytes.len().saturating_sub(SECTOR);
    let (field, len) = FIELDS[place % FIELDS.len()];
    let mut image = image;
    match kind % 8 {
        // At the front, which a fixed disk lets its guest write.
        0 => image = image.put(field, &value.to_be_bytes()[8 - len..]),
        1..=5 => image = image.put(end + field, &value.to_be_bytes()[8 - len..]),
        6 => image.bytes.truncate(place),
        _ => image.bytes.resize(image.bytes.len() + place % 2048, 0),
    }
    if kind & 0x80 == 0 { vhd::summed(image) } else { image }
}

fn driver() -> &'static dyn Driver {
    registry::by_name("vpc").expect("every build has it")
}

fn open(storage: &Arc<dyn Storage>, mode: OpenMode) -> Result<Image> {
    let options = OptionSet::new();
    let context =
        OpenContext { mode, options: &options, open_file: &|_, _| unreachable!("no parent is read") };
    Image::from_layers(vec![driver().open(Arc::clone(storage), &context)?])
}

/// Opens in every mode; maps, reads and audits; then changes the disk. A map covers what it was asked for, an audit
/// changes nothing, and what a disk reads as, from then on and when it is opened again, is what was done to it.
pub fn vpc(input: &[u8]) {
    let mut script = Script::new(input);
    let mut image = base(script.byte());
    for _ in 0..script.byte() % 6 {
        image = patch(image, &mut script);
    }
    let memory = Arc::new(MemoryStorage::from_bytes("fuzz.vhd", &image.bytes));
    let storage: Arc<dyn Storage> = Arc::clone(&memory) as _;
    for mode in [OpenMode::Inspect, OpenMode::Read] {
        let Ok(image) = open(&storage, mode) else { continue };
        for range in ranges(&image, &mut script) {
            assert_covered(&image, &range);
            assert_reads_alike(&image, &range);
        }
    }
    if let Ok(image) = open(&storage, OpenMode::Check { repair: false }) {
        drop(image.check(Repair::Nothing, &mut |_| {}));
    }
    assert!(memory.to_vec() == image.bytes, "reading changed the image");
    if let Some(disk) = Disk::new(storage) {
        disk.live(&mut script);
    }
}

/// A disk that is small enough for a model, and that.
struct Disk {
    storage: Arc<dyn Storage>,
    image: Image,
    model: Vec<u8>,
}

impl Disk {
    fn new(storage: Arc<dyn Storage>) -> Option<Self> {
        let image = open(&storage, OpenMode::Write).ok()?;
        if image.virtual_size_bytes() > MODEL_BYTES {
            return None;
        }
        let model = read(&image)?;
        Some(Self { storage, image, model })
    }

    /// What the script says, until something is refused.
    fn live(mut self, script: &mut Script<'_>) {
        for _ in 0..OPERATIONS {
            if script.is_empty() {
                break;
            }
            let what = script.byte();
            let done = match what % 8 {
                0 | 1 => self.write(what, script),
                2 | 3 => self.zero(what, script),
                4 | 5 => self.resize(script),
                6 => self.image.flush(),
                _ => {
                    self = self.again();
                    Ok(())
                }
            };
            self.compare(what);
            if done.is_err() {
                break;
            }
        }
        drop(self.again());
    }

    fn range(&self, script: &mut Script<'_>) -> Range<usize> {
        let len = self.model.len();
        let start = usize::from(script.u16()) % len.max(1);
        start..len.min(start + 1 + usize::from(script.u16()))
    }

    fn write(&mut self, byte: u8, script: &mut Script<'_>) -> Result<()> {
        let range = self.range(script);
        let bytes = vec![byte; range.len()];
        self.image.write_at(&bytes, range.start as u64)?;
        self.model[range].copy_from_slice(&bytes);
        Ok(())
    }

    fn zero(&mut self, what: u8, script: &mut Script<'_>) -> Result<()> {
        let range = self.range(script);
        let guest = range.start as u64..range.end as u64;
        if what & 8 == 0 {
            self.image.write_zeroes(guest, what & 16 == 0)?;
            self.model[range].fill(0);
            return Ok(());
        }
        self.image.discard(guest)?;
        let found = read(&self.image).expect("what was read before");
        for at in range {
            let was = std::mem::replace(&mut self.model[at], found[at]);
            assert!(
                found[at] == 0 || found[at] == was,
                "a discard made {was:#x} {:#x} at {at:#x}",
                found[at]
            );
        }
        Ok(())
    }

    /// New bytes are zeroes, and a refusal changes nothing.
    fn resize(&mut self, script: &mut Script<'_>) -> Result<()> {
        let asked = match script.byte() % 3 {
            0 => self.model.len() as u64 + u64::from(script.u16()),
            1 => (self.model.len() as u64).saturating_sub(u64::from(script.u16())),
            _ => script.tricky() % MODEL_BYTES,
        };
        let preallocation = match script.byte() % 3 {
            0 => Preallocation::Off,
            1 => Preallocation::Falloc,
            _ => Preallocation::Full,
        };
        self.image.resize(asked, preallocation)?;
        let size = self.image.virtual_size_bytes();
        assert!(size >= asked, "{size} for {asked}");
        self.model.resize(usize::try_from(size).expect("about a mebibyte"), 0);
        Ok(())
    }

    /// The disk closed and opened again, found by its footer where it is a fixed one.
    fn again(self) -> Self {
        let Self { storage, image, model } = self;
        let is_fixed = image.layers()[0].cluster_size_bytes().is_none();
        image.close().expect("closed");
        let image = open(&storage, OpenMode::Write).expect("it opens again");
        assert_eq!(image.layers()[0].cluster_size_bytes().is_none(), is_fixed);
        let disk = Self { storage, image, model };
        disk.compare(0);
        disk
    }

    fn compare(&self, what: u8) {
        let found = read(&self.image).expect("it reads");
        assert_eq!(found.len(), self.model.len(), "the size after {what}");
        if let Some(at) = found.iter().zip(&self.model).position(|(found, expected)| found != expected) {
            panic!("after {what} byte {at:#x} is {:#x}, not {:#x}", found[at], self.model[at]);
        }
    }
}

fn read(image: &Image) -> Option<Vec<u8>> {
    let mut guest = vec![0xee; usize::try_from(image.virtual_size_bytes()).expect("small")];
    image.read_at(&mut guest, 0).ok().map(|()| guest)
}
