//! What one thread remembers of the map: a translation lookaside buffer, as processors have beside their page tables.
//!
//! Asking the map takes shared locks and a walk over tables, and of a chain that for more layers than one. Their lines are
//! not in the core's cache any more when the bytes of the request before have gone through it. A unit of guest bytes (the
//! smallest cluster of all layers) that is one run of data takes 24 bytes here, and no lock.
//!
//! Everything is forgotten when [`Layer::map_changes`] has grown. That is looked at under the ticket's lease, and it grows
//! before a change can be seen, hence before anything that was given up by it is given out: what has not grown by then
//! names places that stay what they are until the ticket ends.
//!
//! [`Layer::map_changes`]: crate::format::Layer::map_changes

use std::{ops::Range, sync::Arc};

use super::{Image, ImageExtent, Ticket};
use crate::{
    Result,
    format::{Attempt, HostFile, HostOffset, Place},
};

/// The most units that are remembered: 512 MiB in clusters of 64 KiB, in 192 KiB of memory, which is less than the cache
/// of a core.
const MOST_ENTRIES: u64 = 8192;

/// The least bytes of a unit: what requests are made of.
const MIN_UNIT_BYTES: u32 = 4096;

/// An image whose map one thread asks, and what it remembers of the answers.
#[derive(Debug)]
pub struct Lookaside {
    image: Arc<Image>,
    /// The logarithm of the bytes of a unit. `None` where nothing is remembered: there is no map to ask, or nobody counts
    /// its changes.
    unit_bits: Option<u32>,
    /// Where unit `n` may stand: at `n` modulo the length, which is a power of two.
    entries: Box<[Entry]>,
    /// The count of changes for which entries of `generation` are true.
    changes: u64,
    /// Never 0.
    generation: u16,
}

/// A unit that is one run of data.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    unit: u64,
    /// Where its first byte stands.
    at: u64,
    depth: u16,
    file: u16,
    /// As of which it is true; 0 for none.
    generation: u16,
    writable: bool,
}

impl Entry {
    /// What is to be remembered, when it can be.
    fn of(unit: u64, generation: u16, extent: &ImageExtent) -> Option<Self> {
        let Place::Data { file, at, writable } = extent.place else { return None };
        let (depth, file) = (u16::try_from(extent.depth).ok()?, u16::try_from(file.0).ok()?);
        Some(Self { unit, at: at.0, depth, file, generation, writable })
    }

    /// A part of the unit, `within` bytes behind its start.
    fn part(&self, guest_bytes: &Range<u64>, within: u64) -> ImageExtent {
        ImageExtent {
            guest_offset: guest_bytes.start,
            len_bytes: guest_bytes.end - guest_bytes.start,
            depth: self.depth.into(),
            place: Place::Data {
                file: HostFile(self.file.into()),
                at: HostOffset(self.at + within),
                writable: self.writable,
            },
        }
    }
}

impl Lookaside {
    /// Nothing is remembered yet.
    #[must_use]
    pub fn of(image: &Arc<Image>) -> Self {
        let layers = image.layers();
        let granularity = layers.iter().filter_map(|layer| layer.extent_granularity_bytes()).min();
        let is_counted = image.map_changes().is_some();
        let unit_bits = granularity.filter(|_| is_counted).map(|bytes| bytes.max(MIN_UNIT_BYTES).ilog2());
        let entries = unit_bits.map_or(0, |bits| {
            (image.virtual_size_bytes() >> bits).saturating_add(1).min(MOST_ENTRIES).next_power_of_two()
        });
        let entries = usize::try_from(entries).expect("at most MOST_ENTRIES");
        Self {
            image: Arc::clone(image),
            unit_bits,
            entries: vec![Entry::default(); entries].into_boxed_slice(),
            changes: 0,
            generation: 1,
        }
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// [`Image::try_map`], from what is remembered where it can be.
    ///
    /// # Errors
    /// As [`Image::try_map`].
    pub fn try_map(
        &mut self,
        guest_bytes: Range<u64>,
        extents: &mut Vec<ImageExtent>,
    ) -> Result<Attempt<Ticket>> {
        extents.clear();
        let Some(ticket) = self.image.try_enter() else { return Ok(Attempt::Busy) };
        self.image.check_inside(&guest_bytes)?;
        let Some((unit, bits)) = self.unit_of(&guest_bytes) else {
            return Ok(self.image.map_entered(ticket, guest_bytes, extents));
        };
        // Under the lease, and before the map is asked.
        self.keep_up();
        let entry = &mut self.entries[index(unit, self.entries.len())];
        let within = guest_bytes.start - (unit << bits);
        if entry.unit == unit && entry.generation == self.generation {
            extents.push(entry.part(&guest_bytes, within));
            return Ok(Attempt::Done(ticket));
        }
        let whole = unit << bits..((unit + 1) << bits).min(self.image.virtual_size_bytes());
        if !self.image.map_cached(whole, &mut |extent| extent.push_to(extents)) {
            extents.clear();
            return Ok(self.image.map_entered(ticket, guest_bytes, extents));
        }
        // A unit that the end of the disk cuts off may have more in it when the disk grows.
        if let [extent] = &extents[..]
            && extent.len_bytes == 1 << bits
            && let Some(known) = Entry::of(unit, self.generation, extent)
        {
            *entry = known;
        }
        extents.retain_mut(|extent| extent.cut_to(&guest_bytes));
        Ok(Image::answer(ticket, extents))
    }

    /// The unit that holds all of a range, and the logarithm of its bytes.
    fn unit_of(&self, guest_bytes: &Range<u64>) -> Option<(u64, u32)> {
        let bits = self.unit_bits?;
        let unit = guest_bytes.start >> bits;
        (!guest_bytes.is_empty() && (guest_bytes.end - 1) >> bits == unit).then_some((unit, bits))
    }

    /// Forgets everything when the map has changed.
    fn keep_up(&mut self) {
        let changes = self.image.map_changes().unwrap_or_default();
        if changes == self.changes {
            return;
        }
        self.changes = changes;
        self.generation = self.generation.wrapping_add(1);
        if self.generation == 0 {
            self.entries.fill(Entry::default());
            self.generation = 1;
        }
    }
}

/// Where a unit may stand among so many entries.
fn index(unit: u64, entries: usize) -> usize {
    usize::try_from(unit & (entries as u64 - 1)).expect("below the number of entries")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        format::{CreateRequest, Layer, OpenContext, OpenMode, OptionSet, registry},
        storage::{MemoryStorage, Preallocation, Storage},
    };

    const CLUSTER: u64 = 4096;
    const DISK_BYTES: u64 = 64 * CLUSTER;

    /// What happens to the map between looks.
    #[derive(Clone, Debug)]
    enum Step {
        Write(Range<u64>),
        Zero(Range<u64>, bool),
        Discard(Range<u64>),
        Grow,
        Take,
        Apply,
        Forget,
    }

    fn step() -> impl Strategy<Value = Step> {
        let clusters = (0..64_u64, 1..9_u64)
            .prop_map(|(first, count)| first * CLUSTER..((first + count) * CLUSTER).min(DISK_BYTES));
        let bytes =
            (0..DISK_BYTES, 1..3 * CLUSTER).prop_map(|(at, length)| at..(at + length).min(DISK_BYTES));
        let range = prop_oneof![clusters, bytes];
        prop_oneof![
            4 => range.clone().prop_map(Step::Write),
            2 => (range.clone(), any::<bool>()).prop_map(|(range, unmap)| Step::Zero(range, unmap)),
            1 => range.prop_map(Step::Discard),
            1 => Just(Step::Grow),
            1 => Just(Step::Take),
            1 => Just(Step::Apply),
            1 => Just(Step::Forget),
        ]
    }

    /// A new image of a format over a raw one that is half as long.
    fn image(format: &str, options: &[(&str, &str)]) -> Arc<Image> {
        let top: Arc<dyn Storage> = Arc::new(MemoryStorage::new("top"));
        let below = vec![7; usize::try_from(DISK_BYTES / 2).expect("small")];
        let below: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes("below", &below));
        let mut set = OptionSet::new();
        options.iter().for_each(|(name, value)| set.set(*name, *value));
        let request = CreateRequest {
            virtual_size_bytes: DISK_BYTES,
            backing: None,
            options: &set,
            open_file: &|_, _| unreachable!("one file"),
        };
        let driver = registry::by_name(format).expect("a known format");
        driver.create(&top, &request).expect("created");
        let options = OptionSet::new();
        let context = |mode| OpenContext { mode, options: &options, open_file: &|_, _| unreachable!() };
        let top = driver.open(top, &context(OpenMode::Write)).expect("sound");
        let raw = registry::by_name("raw").expect("raw");
        let below: Arc<dyn Layer> = raw.open(below, &context(OpenMode::Read)).expect("raw");
        Arc::new(Image::from_layers(vec![top, below]).expect("two layers"))
    }

    fn apply(image: &Image, step: &Step) {
        let has_snapshots = image.layers()[0].snapshots().is_some();
        match step {
            Step::Write(range) => {
                let length = usize::try_from(range.end - range.start).expect("small");
                image.write_at(&vec![1; length], range.start).expect("written");
            }
            Step::Zero(range, unmap) => image.write_zeroes(range.clone(), *unmap).expect("zeroed"),
            Step::Discard(range) => image.discard(range.clone()).expect("discarded"),
            Step::Grow => {
                let size = image.virtual_size_bytes() + CLUSTER / 2;
                image.resize(size, Preallocation::Off).or_else(|_| image.flush()).expect("grown, or refused");
            }
            Step::Take if has_snapshots => image.snapshot_create("s", (0, 0)).expect("taken"),
            // The last one of that name, where there is one.
            Step::Apply if has_snapshots => _ = image.snapshot_apply("s"),
            Step::Forget if has_snapshots => _ = image.snapshot_delete("s"),
            Step::Take | Step::Apply | Step::Forget => {}
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

        #[test]
        fn what_is_remembered_is_what_the_map_says(
            kind in 0..3_usize,
            steps in proptest::collection::vec(step(), 1..30),
            within in 0..CLUSTER - 512,
        ) {
            let (format, options): (_, &[_]) = [
                ("qcow2", &[("cluster_size", "4096")][..]),
                ("qcow2", &[("cluster_size", "16384"), ("extended_l2", "on")]),
                ("qed", &[("cluster_size", "4096"), ("table_size", "1")]),
            ][kind];
            let image = image(format, options);
            let mut lookaside = Lookaside::of(&image);
            for step in &steps {
                apply(&image, step);
                let size = image.virtual_size_bytes();
                // Twice: as the map says, and as it is remembered.
                for start in (within..size).step_by(4096).chain((0..size).step_by(4096)) {
                    let range = start..(start + 512).min(size);
                    let mut told = Vec::new();
                    let Ok(Attempt::Done(_ticket)) = lookaside.try_map(range.clone(), &mut told) else {
                        let mut bytes = [0; 512];
                        let length = usize::try_from(range.end - range.start).expect("small");
                        image.read_at(&mut bytes[..length], start).expect("tables are read");
                        continue;
                    };
                    let mut mapped = Vec::new();
                    image.map_range(range.clone(), &mut mapped).expect("mapped");
                    prop_assert_eq!(told, mapped, "{:?} after {:?}", range, step);
                }
            }
        }
    }

    #[test]
    fn a_unit_of_data_is_remembered_until_the_map_changes() {
        let image = image("qcow2", &[("cluster_size", "4096")]);
        image.write_at(&[1; 3 * 4096], 0).expect("written");
        let mut lookaside = Lookaside::of(&image);
        let mut extents = Vec::new();
        let mut is_known = |lookaside: &mut Lookaside, unit: u64| {
            let start = unit * CLUSTER + 512;
            let attempt = lookaside.try_map(start..start + 512, &mut extents).expect("inside");
            assert!(matches!(attempt, Attempt::Done(_)), "tables are in memory");
            let entry = lookaside.entries[index(unit, lookaside.entries.len())];
            (entry.unit, entry.generation) == (unit, lookaside.generation)
        };
        // Data of the top; of the layer below; nothing anywhere.
        assert_eq!([1, 20, 40].map(|unit| is_known(&mut lookaside, unit)), [true, true, false]);
        let generation = lookaside.generation;
        image.write_at(&[2; 4096], CLUSTER).expect("over what is there");
        is_known(&mut lookaside, 1);
        assert_eq!(lookaside.generation, generation, "no place has changed");
        image.write_at(&[2; 4096], 20 * CLUSTER).expect("over what is below");
        assert!(is_known(&mut lookaside, 20));
        assert_ne!(lookaside.generation, generation);

        // The end of the disk cuts a unit off.
        image.resize(DISK_BYTES + CLUSTER / 2, Preallocation::Off).expect("grown");
        image.write_at(&[3; 2048], DISK_BYTES).expect("written");
        assert!(!is_known(&mut lookaside, 64));

        // So many changes later the first generation comes again.
        lookaside.generation = u16::MAX;
        lookaside.changes = lookaside.changes.wrapping_sub(1);
        assert!(is_known(&mut lookaside, 1));
        assert_eq!((lookaside.generation, lookaside.entries[20].generation), (1, 0));
    }

    #[test]
    fn nothing_is_remembered_where_nothing_is_mapped() {
        let raw = registry::by_name("raw").expect("raw");
        let options = OptionSet::new();
        let context =
            OpenContext { mode: OpenMode::Write, options: &options, open_file: &|_, _| unreachable!() };
        let file = Arc::new(MemoryStorage::from_bytes("raw", &[1; 8192]));
        let image = Image::from_layers(vec![raw.open(file, &context).expect("raw")]).expect("one layer");
        let mut lookaside = Lookaside::of(&Arc::new(image));
        assert!(lookaside.entries.is_empty());
        let mut extents = Vec::new();
        let attempt = lookaside.try_map(512..8192, &mut extents).expect("inside");
        assert!(matches!(attempt, Attempt::Done(_)) && extents.len() == 1);
        assert!(lookaside.try_map(512..8193, &mut extents).is_err());
    }
}
