//! Other options for an image that exists.
//!
//! What is wanted is compared with what the header says, refused as a whole where a part of it is, and then reached
//! in the reference's order: version 3, width of the counts, features, (size), version 2. Each change is durable when
//! it returns, and leaves an image that is whole. A change of version or width makes the layer's idea of its own
//! tables a thing of the past: it writes no more, and the image is opened again for what is left.
//!
//! **Version 3.** (1) the snapshot table, where an entry lacks what version 3 demands, in new clusters, durable;
//! (2) the header with both, durable; (3) the old table counted down: a crash before leaves a leak.
//!
//! **Version 2.** (1) bitmaps, of which it has none, are removed; (2) zero clusters become data (`expand`);
//! (3) the header, durable. A crash in between leaves version 3 with the same disk.

use super::{
    create_layout::Run,
    expand,
    feature::{autoclear, compatible, incompatible},
    header::Header,
    layer::Qcow2Layer,
    snapshot_counts::Counts,
    snapshot_table::{MAX_TABLE_BYTES, Snapshot, encode_table, read_table},
};
use crate::{
    Error, Result,
    format::{Amended, Bitmaps, Codec, Layer, OptionSet},
};

/// What progress says of one change.
const STEP: u64 = 1 << 20;
/// log2 of the only width of counts in version 2.
const VERSION_2_REFCOUNT_ORDER: u32 = 4;

/// What the image is to be; the rest stays as it is.
struct Plan<'a> {
    version: u32,
    refcount_order: u32,
    lazy_refcounts: bool,
    raw_data: bool,
    data_file: Option<&'a str>,
    virtual_size_bytes: u64,
}

fn refuse<T>(text: &str) -> Result<T> {
    Err(Error::Invalid(text.to_owned()))
}

impl<'a> Plan<'a> {
    /// What `wanted` makes of an image with `header`; its refusals are the reference's, in its order.
    fn new(header: &Header, wanted: &'a OptionSet) -> Result<Self> {
        let is_raw_data = header.autoclear & autoclear::RAW_DATA != 0;
        let version = match wanted.get("compat") {
            None => header.geometry.version,
            Some("0.10" | "v2") => 2,
            Some("1.1" | "v3") => 3,
            Some(other) => return refuse(&format!("Unknown compatibility level {other}")),
        };
        if wanted.iter().any(|(name, _)| name.starts_with("encrypt.")) {
            return refuse("Can't amend encryption options - encryption not present");
        }
        let lazy = header.compatible & compatible::LAZY_REFCOUNTS != 0;
        let lazy_refcounts = wanted.switch("lazy_refcounts")?.unwrap_or(lazy);
        let refcount_order = match wanted.number("refcount_bits")? {
            None => header.geometry.refcount_order,
            Some(bits) if bits.is_power_of_two() && bits <= 64 => bits.trailing_zeros(),
            Some(_) => return refuse("Refcount width must be a power of two and may not exceed 64 bits"),
        };
        let data_file = wanted.get("data_file");
        if data_file.is_some() && !header.geometry.external_data {
            return refuse("data-file can only be set for images that use an external data file");
        }
        let raw_data = wanted.switch("data_file_raw")?.unwrap_or(is_raw_data);
        if raw_data && !is_raw_data {
            return refuse("data-file-raw cannot be set on existing images");
        }
        if version < 3
            && refcount_order != VERSION_2_REFCOUNT_ORDER
            && refcount_order != header.geometry.refcount_order
        {
            return refuse(
                "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                 (use compat=1.1 or greater)",
            );
        }
        let (name, format) = (wanted.get("backing_file"), wanted.get("backing_fmt"));
        let backing = header.backing.as_ref();
        let is_same = name == backing.map(|backing| backing.name.as_str())
            && format == backing.and_then(|backing| backing.format.as_deref());
        if (name.is_some() || format.is_some()) && !is_same {
            return refuse("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.");
        }
        if version < 3 && lazy_refcounts && !lazy {
            return refuse(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use compat=1.1 or greater)",
            );
        }
        let virtual_size_bytes = match wanted.size("size")? {
            None | Some(0) => header.virtual_size_bytes,
            Some(bytes) if i64::try_from(bytes).is_err() => return refuse("Image size cannot be negative"),
            Some(bytes) if bytes % 512 != 0 => return refuse("The new size must be a multiple of 512"),
            Some(bytes) => bytes,
        };
        let plan = Self { version, refcount_order, lazy_refcounts, raw_data, data_file, virtual_size_bytes };
        if version < header.geometry.version {
            plan.check_downgrade(header)?;
        }
        Ok(plan)
    }

    /// What version 2 cannot say. The snapshots are looked at by who can read them.
    fn check_downgrade(&self, header: &Header) -> Result<()> {
        if self.refcount_order != VERSION_2_REFCOUNT_ORDER {
            return refuse("compat=0.10 requires refcount_bits=16");
        }
        if header.geometry.external_data {
            return refuse("Cannot downgrade an image with a data file");
        }
        let features = header.incompatible & !incompatible::DIRTY;
        if features != 0 || header.compression != Codec::Deflate {
            return refuse(&format!(
                "Cannot downgrade an image with incompatible features {features:#x} set"
            ));
        }
        Ok(())
    }

    /// How many changes of tables are left.
    fn steps(&self, header: &Header) -> u64 {
        u64::from(self.version != header.geometry.version)
            + u64::from(self.refcount_order != header.geometry.refcount_order)
    }
}

impl Qcow2Layer {
    /// See [`LayerWriter::amend`](crate::format::LayerWriter::amend).
    pub(super) fn amend_options(
        &self,
        wanted: &OptionSet,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Amended> {
        self.check_writable()?;
        let header = self.header().clone();
        let plan = Plan::new(&header, wanted)?;
        self.check_snapshots(&plan, &header)?;
        let total = plan.steps(&header) * STEP;
        let mut step = |done: u64, of: u64| {
            let done = u128::from(done.min(of)) * u128::from(STEP) / u128::from(of.max(1));
            progress(u64::try_from(done).expect("at most a step"), total);
        };
        if plan.version > header.geometry.version {
            self.upgrade(plan.version)?;
            return Ok(Amended::OpenAgain);
        }
        if plan.refcount_order != header.geometry.refcount_order {
            self.change_refcount_width(plan.refcount_order, &mut step)?;
            return Ok(Amended::OpenAgain);
        }
        self.change_features(&plan, &header)?;
        if plan.virtual_size_bytes != self.virtual_size_bytes() {
            return Ok(Amended::Resize(plan.virtual_size_bytes));
        }
        if plan.version < header.geometry.version {
            self.downgrade(plan.version, &mut step)?;
            return Ok(Amended::OpenAgain);
        }
        Ok(Amended::Complete)
    }

    /// Version 2 has no room for a size or a state of the machine of their own.
    fn check_snapshots(&self, plan: &Plan<'_>, header: &Header) -> Result<()> {
        if plan.version >= header.geometry.version {
            return Ok(());
        }
        let table = read_table(self.image_file(), header)?;
        let fits = |snapshot: &Snapshot| {
            snapshot.info.virtual_size_bytes == plan.virtual_size_bytes
                && u32::try_from(snapshot.info.vm_state_bytes).is_ok()
        };
        if table.iter().all(fits) {
            return Ok(());
        }
        refuse("Internal snapshots prevent downgrade of image")
    }

    /// Makes a header that is about to be written durable, and the last thing that this layer writes.
    fn write_last_header(&self, change: impl Fn(&mut Header)) -> Result<()> {
        let mut changed = self.header().clone();
        change(&mut changed);
        if changed.encode().is_err() {
            return refuse("Failed to update the image header: No space left on device");
        }
        self.settle()?;
        self.update_header(change)?;
        self.halt.halt(|| "its header has changed for good".to_owned());
        Ok(())
    }

    fn upgrade(&self, version: u32) -> Result<()> {
        let header = self.header().clone();
        let old = read_table(self.image_file(), &header)?;
        let new: Vec<Snapshot> = old.iter().map(Snapshot::with_extra_data).collect();
        if new == old {
            return self.write_last_header(|header| header.geometry.version = version);
        }
        let bytes = encode_table(&new);
        if bytes.len() > MAX_TABLE_BYTES {
            return refuse("Failed to update the snapshot table: File too large");
        }
        // (1)
        let offset = self.allocate_clusters(self.geometry.clusters_for(bytes.len() as u64))?;
        self.image_file().write_at(&bytes, offset)?;
        // (2)
        self.write_last_header(|header| {
            header.geometry.version = version;
            header.snapshots_offset = offset;
        })?;
        // (3)
        let mut counts = Counts::new(self.image_file(), &header, self.runtime.discard_snapshots)?;
        let clusters = self.geometry.clusters_for(encode_table(&old).len() as u64);
        let start = header.snapshots_offset >> self.geometry.cluster_bits;
        counts.add(Run { start, clusters }, false, &mut 0)?;
        counts.write()?;
        counts.punch_freed()
    }

    /// What stands in the header alone.
    fn change_features(&self, plan: &Plan<'_>, header: &Header) -> Result<()> {
        let mut changed = header.clone();
        set_bit(&mut changed.autoclear, autoclear::RAW_DATA, plan.raw_data);
        set_bit(&mut changed.compatible, compatible::LAZY_REFCOUNTS, plan.lazy_refcounts);
        if let Some(name) = plan.data_file {
            changed.data_file = Some(name.to_owned()).filter(|name| !name.is_empty());
        }
        if changed == *header {
            return Ok(());
        }
        if changed.encode().is_err() {
            return refuse("Failed to update the image header: No space left on device");
        }
        // Counts that were late are made right before nobody expects them to be late any more.
        self.settle()?;
        self.update_header(|header| {
            header.autoclear = changed.autoclear;
            header.compatible = changed.compatible;
            header.data_file.clone_from(&changed.data_file);
        })
    }

    fn downgrade(&self, version: u32, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        // (1)
        for bitmap in Bitmaps::list(self)? {
            Bitmaps::remove(self, &bitmap.name)?;
        }
        self.settle()?;
        // (2)
        expand::expand_zero_clusters(self, progress)?;
        // (3)
        self.write_last_header(|header| {
            header.geometry.version = version;
            header.incompatible = 0;
            header.compatible = 0;
            header.autoclear = 0;
            header.unknown_fields.clear();
            header.padding = [0; 7];
        })
    }
}

fn set_bit(field: &mut u64, bit: u64, on: bool) {
    *field = if on { *field | bit } else { *field & !bit };
}
