//! Random histories of a disk: what was done to it, and what it must read as afterwards.
//!
//! A [`Scenario`] is drawn by proptest: a layout and [`Step`]s whose numbers are only wishes. [`Scenario::plan`]
//! makes them concrete [`Op`]s that are legal where they stand (inside the disk, snapshots that exist), and
//! tells the flat [`Model`] after each. The same operations then go to the library ([`apply`]) and, as text,
//! to `qemu-io` and `qemu-img`.

use std::{collections::BTreeSet, fmt, sync::Arc};

use img_core::{
    Error, Result,
    format::{Codec, OptionSet},
    image::Image,
    storage::Preallocation,
};
use proptest::prelude::*;

/// The create options of an image under test, and with them what its format can do.
#[derive(Clone, Copy, Debug)]
pub enum Layout {
    /// See [`Qcow2`].
    Qcow2(Qcow2),
    /// See [`Qed`].
    Qed(Qed),
    /// monolithicSparse, with grains that can be said to be zero or without.
    Vmdk {
        /// The entry of a grain can say that it is zero.
        zeroed_grains: bool,
    },
    /// A dynamic VHD.
    Vpc,
}

/// Create options of qcow2.
#[derive(Clone, Copy, Debug)]
pub struct Qcow2 {
    /// 2 or 3.
    pub version: u8,
    /// 9 to 21.
    pub cluster_bits: u32,
    /// Width of a refcount, in bits.
    pub refcount_bits: u32,
    /// 32 subclusters to a cluster.
    pub extended_l2: bool,
    /// Compressed clusters are zstd rather than zlib.
    pub zstd: bool,
    /// Refcounts may lag behind until a clean close.
    pub lazy_refcounts: bool,
}

impl Qcow2 {
    /// Version 3 with clusters of 4 KiB, and what is default otherwise.
    pub const PLAIN: Self = Self {
        version: 3,
        cluster_bits: 12,
        refcount_bits: 16,
        extended_l2: false,
        zstd: false,
        lazy_refcounts: false,
    };
}

/// Create options of QED.
#[derive(Clone, Copy, Debug)]
pub struct Qed {
    /// 12 to 26.
    pub cluster_bits: u32,
    /// log2 of the clusters in a table: 0 to 4. The reference opens no image with 0.
    pub table_bits: u32,
}

impl Layout {
    /// The name of the format, as `-f` takes it.
    #[must_use]
    pub const fn format(&self) -> &'static str {
        match self {
            Self::Qcow2(_) => "qcow2",
            Self::Qed(_) => "qed",
            Self::Vmdk { .. } => "vmdk",
            Self::Vpc => "vpc",
        }
    }

    /// Host bytes of a cluster; for VHDs of half a block, so that disks of some clusters are not large.
    #[must_use]
    pub const fn cluster_bytes(&self) -> u64 {
        match self {
            Self::Qcow2(layout) => 1 << layout.cluster_bits,
            Self::Qed(layout) => 1 << layout.cluster_bits,
            Self::Vmdk { .. } => 64 << 10,
            Self::Vpc => 1 << 20,
        }
    }

    /// As `-o` takes them.
    #[must_use]
    pub fn create_options(&self) -> String {
        match self {
            Self::Qcow2(layout) => layout.create_options(),
            Self::Qed(layout) => {
                format!("cluster_size={},table_size={}", self.cluster_bytes(), 1 << layout.table_bits)
            }
            Self::Vmdk { zeroed_grains } => {
                format!("subformat=monolithicSparse,zeroed_grain={}", on_off(*zeroed_grains))
            }
            Self::Vpc => "subformat=dynamic,force_size=on".to_owned(),
        }
    }

    /// The smallest of its kind: with as many kinds of tables as large ones, and thousands of states of them can
    /// be tried.
    #[must_use]
    pub fn in_small_clusters(self) -> Self {
        match self {
            Self::Qcow2(old) => {
                let cluster_bits = if old.extended_l2 { 14 } else { 9 + old.cluster_bits % 4 };
                Self::Qcow2(Qcow2 { cluster_bits, ..old })
            }
            Self::Qed(old) => Self::Qed(Qed { cluster_bits: 12, table_bits: old.table_bits % 2 }),
            Self::Vmdk { .. } | Self::Vpc => self,
        }
    }

    /// How compressed clusters are encoded, where the format has some.
    #[must_use]
    pub const fn codec(&self) -> Option<Codec> {
        match self {
            Self::Qcow2(Qcow2 { zstd: true, .. }) => Some(Codec::Zstd),
            Self::Qcow2(_) => Some(Codec::Deflate),
            Self::Qed(_) | Self::Vmdk { .. } | Self::Vpc => None,
        }
    }

    /// Whether the format cannot hide what lies below behind zeroes, nor mark an image dirty.
    #[must_use]
    pub const fn is_version_2(&self) -> bool {
        matches!(self, Self::Qcow2(Qcow2 { version: 2, .. }))
    }

    /// How many bits count the references to a cluster; `None` for formats without snapshots.
    #[must_use]
    pub const fn refcount_bits(&self) -> Option<u32> {
        match self {
            Self::Qcow2(layout) => Some(layout.refcount_bits),
            Self::Qed(_) | Self::Vmdk { .. } | Self::Vpc => None,
        }
    }

    /// Whether a disk can become larger.
    const fn can_grow(&self) -> bool {
        !matches!(self, Self::Vmdk { .. })
    }

    /// Whether a disk can become smaller.
    const fn can_shrink(&self) -> bool {
        matches!(self, Self::Qcow2(_))
    }

    /// Whether what was discarded reads as zeroes, always. Elsewhere it may keep what it was.
    const fn discards_to_zeroes(&self) -> bool {
        matches!(self, Self::Qcow2(_))
    }

    /// Whether the reference can grow a disk over a longer backing file.
    const fn reference_hides_below(&self) -> bool {
        matches!(self, Self::Qcow2(Qcow2 { version: 3, .. }))
    }

    /// Whether the reference, when it writes a part of a zero cluster over a backing file, fills the rest with
    /// zeroes. In QED it copies the backing file's bytes.
    const fn reference_keeps_zeroes(&self) -> bool {
        matches!(self, Self::Qcow2(_))
    }

    /// Runtime options that make caches small: tables are written early and read again often.
    #[must_use]
    pub fn smallest_caches(&self) -> OptionSet {
        let mut options = OptionSet::new();
        if matches!(self, Self::Qcow2(_)) {
            for name in ["l2-cache-size", "refcount-cache-size", "l2-cache-entry-size"] {
                options.set(name, "512");
            }
        }
        options
    }
}

impl Qcow2 {
    fn create_options(&self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut text = format!("compat={compat},cluster_size={}", 1_u64 << self.cluster_bits);
        // Version 2 has no room to say otherwise.
        if self.version == 3 {
            text += &format!(
                ",refcount_bits={},extended_l2={},compression_type={},lazy_refcounts={}",
                self.refcount_bits,
                on_off(self.extended_l2),
                if self.zstd { "zstd" } else { "zlib" },
                on_off(self.lazy_refcounts)
            );
        }
        text
    }
}

const fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// Any layout that qcow2 allows.
pub fn qcow2_layout() -> impl Strategy<Value = Layout> {
    (2..=3u8, 9..=21u32, 0..=6u32, any::<[bool; 3]>()).prop_map(
        |(version, cluster_bits, refcount_order, [extended, zstd, lazy_refcounts])| {
            let new = version == 3;
            Layout::Qcow2(Qcow2 {
                version,
                cluster_bits,
                refcount_bits: if new { 1 << refcount_order } else { 16 },
                extended_l2: new && extended && cluster_bits >= 14,
                zstd: new && zstd,
                lazy_refcounts: new && lazy_refcounts,
            })
        },
    )
}

/// Any layout of QED that the reference opens, up to clusters of 1 MiB.
pub fn qed_layout() -> impl Strategy<Value = Layout> {
    (12..=20u32, 1..=4u32)
        .prop_map(|(cluster_bits, table_bits)| Layout::Qed(Qed { cluster_bits, table_bits }))
}

/// Any layout of a sparse VMDK.
pub fn vmdk_layout() -> impl Strategy<Value = Layout> {
    any::<bool>().prop_map(|zeroed_grains| Layout::Vmdk { zeroed_grains })
}

/// How a wished range is rounded.
#[derive(Clone, Copy, Debug)]
pub enum Grain {
    /// Not at all.
    Byte,
    /// To 512 bytes.
    Sector,
    /// To whole clusters.
    Cluster,
}

/// Something to do to a disk, with wished numbers.
#[derive(Clone, Debug)]
pub enum Step {
    /// Write one byte value over a range.
    Write(Grain, u32, u32, u8),
    /// Write compressed clusters where nothing was written before.
    Compress(u32, u8),
    /// Make a range zero, and maybe give its space back.
    Zero(Grain, u32, u32, bool),
    /// Give a range's space back.
    Discard(Grain, u32, u32),
    /// Make it durable.
    Flush,
    /// Close cleanly and open again.
    Reopen,
    /// Change the virtual size.
    Resize(u32),
    /// Take a snapshot.
    SnapshotCreate,
    /// Go back to one.
    SnapshotApply(u8),
    /// Forget one.
    SnapshotDelete(u8),
}

fn grain() -> impl Strategy<Value = Grain> {
    prop_oneof![Just(Grain::Byte), Just(Grain::Sector), Just(Grain::Cluster)]
}

/// Any step, the common ones often.
pub fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (grain(), any::<u32>(), any::<u32>(), 1..=255u8).prop_map(|(g, at, n, b)| Step::Write(g, at, n, b)),
        2 => (any::<u32>(), 1..=255u8).prop_map(|(at, byte)| Step::Compress(at, byte)),
        3 => (grain(), any::<u32>(), any::<u32>(), any::<bool>()).prop_map(|(g, at, n, u)| Step::Zero(g, at, n, u)),
        3 => (grain(), any::<u32>(), any::<u32>()).prop_map(|(g, at, n)| Step::Discard(g, at, n)),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => any::<u32>().prop_map(Step::Resize),
        2 => Just(Step::SnapshotCreate),
        1 => any::<u8>().prop_map(Step::SnapshotApply),
        1 => any::<u8>().prop_map(Step::SnapshotDelete),
    ]
}

/// What lies below the image.
#[derive(Clone, Debug)]
pub struct Below {
    /// Its size in clusters of the image above, and 512-byte sectors on top.
    pub clusters_and_sectors: (u32, u32),
    /// Whether it is qcow2 rather than raw.
    pub qcow2: bool,
    /// Seed of its contents.
    pub seed: u64,
}

/// A layout, a size, what lies below, and what happens.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Create options.
    pub layout: Layout,
    /// Wished size.
    pub size: u32,
    /// Backing file.
    pub below: Option<Below>,
    /// History.
    pub steps: Vec<Step>,
    /// It is for the library alone: the disk gets sizes at which the reference shows old bytes, or refuses.
    pub ours_alone: bool,
}

/// Any scenario of up to `steps` steps on an image of one of `layouts`; with a backing file half of the time where
/// `chains` are wanted.
pub fn scenario(
    layouts: impl Strategy<Value = Layout>,
    steps: usize,
    chains: bool,
) -> impl Strategy<Value = Scenario> {
    let below = ((1..24u32, 0..8u32), any::<bool>(), any::<u64>()).prop_map(|(size, qcow2, seed)| Below {
        clusters_and_sectors: size,
        qcow2,
        seed,
    });
    let below = if chains { proptest::option::of(below).boxed() } else { Just(None).boxed() };
    (layouts, any::<u32>(), below, proptest::collection::vec(step(), 1..=steps))
        .prop_map(|(layout, size, below, steps)| Scenario { layout, size, below, steps, ours_alone: false })
}

/// A step with numbers that are legal where it stands; `at` and `len` are guest bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are explained once, above")]
pub enum Op {
    /// One byte value over a range.
    Write { at: u64, len: u64, byte: u8 },
    /// One whole cluster of one byte value, compressed.
    Compress { at: u64, len: u64, byte: u8 },
    /// Zeroes, giving the space back with `unmap`.
    Zero { at: u64, len: u64, unmap: bool },
    /// Discard.
    Discard { at: u64, len: u64 },
    /// Flush.
    Flush,
    /// Close and open.
    Reopen,
    /// New virtual size.
    Resize(u64),
    /// Take.
    SnapshotCreate(String),
    /// Go back.
    SnapshotApply(String),
    /// Forget.
    SnapshotDelete(String),
}

/// What a disk must read as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Guest bytes; shared where a history leaves them alone.
    pub guest: Arc<Vec<u8>>,
    /// Snapshots in order.
    pub snapshots: Vec<(String, Arc<Vec<u8>>)>,
}

/// A concrete history.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Virtual size at creation.
    pub size_bytes: u64,
    /// Guest bytes of the backing file.
    pub below: Option<Vec<u8>>,
    /// What is done.
    pub ops: Vec<Op>,
    /// What the disk reads as at first (`models[0]`) and after each operation.
    pub models: Vec<Model>,
}

impl Scenario {
    /// Bytes of backing contents: runs of single values and of zeroes.
    fn below_bytes(&self) -> Option<Vec<u8>> {
        let below = self.below.as_ref()?;
        let (clusters, sectors) = below.clusters_and_sectors;
        // Large clusters need not be many.
        let clusters = u64::from(clusters).min((4 << 20) / self.layout.cluster_bytes()).max(1);
        let len = clusters * self.layout.cluster_bytes() + u64::from(sectors) * 512;
        let mut random = crate::pattern::Random::new(below.seed);
        let mut bytes = vec![0; to_usize(len)];
        let mut at = 0;
        while at < bytes.len() {
            let run = (1 + to_usize(random.below(self.layout.cluster_bytes()))).min(bytes.len() - at);
            let value = random.next().to_le_bytes()[0];
            bytes[at..at + run].fill(if value < 64 { 0 } else { value });
            at += run;
        }
        Some(bytes)
    }

    /// The concrete history.
    #[must_use]
    pub fn plan(&self) -> Plan {
        let cluster = self.layout.cluster_bytes();
        let most_clusters = ((2 << 20) / cluster).clamp(4, 512);
        let size_bytes = (u64::from(self.size) % (most_clusters * cluster / 512) + 1) * 512;
        let below = self.below_bytes();
        let mut guest = below.clone().unwrap_or_default();
        guest.resize(to_usize(size_bytes), 0);
        let mut planner = Planner {
            layout: self.layout,
            has_below: below.is_some(),
            ours_alone: self.ours_alone,
            most_bytes: most_clusters * cluster,
            touched: BTreeSet::new(),
            compressed: BTreeSet::new(),
            freed_compressed: false,
            taken: 0,
            model: Model { guest: Arc::new(guest), snapshots: Vec::new() },
        };
        let mut plan = Plan { size_bytes, below, ops: Vec::new(), models: vec![planner.model.clone()] };
        for step in &self.steps {
            if let Some(op) = planner.concrete(step) {
                planner.model.apply(&op, &self.layout, planner.has_below);
                plan.ops.push(op);
                plan.models.push(planner.model.clone());
            }
        }
        plan
    }
}

/// Where a history stands while it is made concrete.
struct Planner {
    layout: Layout,
    has_below: bool,
    ours_alone: bool,
    most_bytes: u64,
    /// Guest clusters that some operation has reached: the reference refuses to write those compressed.
    touched: BTreeSet<u64>,
    /// Guest clusters written compressed.
    compressed: BTreeSet<u64>,
    /// Space of a compressed cluster may have been freed since the image was opened. The reference then packs
    /// the next compressed cluster behind the last one even where that host cluster is meanwhile in use for
    /// something else, and its own check calls the result corrupt.
    freed_compressed: bool,
    taken: u32,
    model: Model,
}

impl Planner {
    fn size(&self) -> u64 {
        self.model.guest.len() as u64
    }

    fn range(&self, grain: Grain, at: u32, len: u32) -> (u64, u64) {
        let (size, cluster) = (self.size(), self.layout.cluster_bytes());
        let unit = match grain {
            Grain::Byte => 1,
            Grain::Sector => 512,
            Grain::Cluster => cluster,
        };
        let start = u64::from(at) % size / unit * unit;
        let len = (1 + u64::from(len) % (3 * cluster)).next_multiple_of(unit);
        (start, len.min(size - start))
    }

    fn touch(&mut self, at: u64, len: u64) {
        let cluster = self.layout.cluster_bytes();
        let clusters = at / cluster..=(at + len - 1) / cluster;
        self.freed_compressed |= self.compressed.range(clusters.clone()).next().is_some();
        self.touched.extend(clusters);
    }

    /// Whether one more snapshot fits the refcounts: every cluster counts once for each, and a host cluster
    /// that holds compressed ones counts for each of them.
    fn may_snapshot(&self) -> bool {
        let Some(bits) = self.layout.refcount_bits() else { return false };
        let most = if bits >= 8 { 4 } else { (1 << bits) - 2 };
        self.model.snapshots.len() < most && (bits >= 16 || self.compressed.is_empty())
    }

    fn concrete(&mut self, step: &Step) -> Option<Op> {
        let cluster = self.layout.cluster_bytes();
        Some(match *step {
            Step::Write(grain, at, len, byte) => {
                let (at, len) = self.range(grain, at, len);
                self.touch(at, len);
                Op::Write { at, len, byte }
            }
            Step::Compress(at, byte) => {
                let (at, _) = self.range(Grain::Cluster, at, 0);
                let len = cluster.min(self.size() - at);
                let refcounts_overflow = self.layout.refcount_bits()? < 16 && self.taken > 0;
                if self.touched.contains(&(at / cluster)) || self.freed_compressed || refcounts_overflow {
                    return None;
                }
                self.touch(at, len);
                self.compressed.insert(at / cluster);
                Op::Compress { at, len, byte }
            }
            Step::Zero(grain, at, len, unmap) => {
                if self.has_below && !self.ours_alone && !self.layout.reference_keeps_zeroes() {
                    return None;
                }
                let (at, len) = self.range(grain, at, len);
                self.touch(at, len);
                Op::Zero { at, len, unmap }
            }
            Step::Discard(grain, at, len) => {
                if !self.layout.discards_to_zeroes() {
                    return None;
                }
                let (at, len) = self.range(grain, at, len);
                self.touch(at, len);
                Op::Discard { at, len }
            }
            Step::Flush => Op::Flush,
            Step::Reopen => {
                self.freed_compressed = false;
                Op::Reopen
            }
            Step::Resize(size) => {
                // Version 2 cannot record a snapshot's size.
                let hides = self.has_below && !self.ours_alone;
                if (hides && !self.layout.reference_hides_below())
                    || (self.layout.is_version_2() && !self.model.snapshots.is_empty())
                {
                    return None;
                }
                // The reference leaves old bytes in the tail of a cluster that is cut in two.
                let unit = if self.ours_alone { 512 } else { cluster };
                let size = (u64::from(size) % self.most_bytes + 1).next_multiple_of(unit);
                let can_be =
                    if size < self.size() { self.layout.can_shrink() } else { self.layout.can_grow() };
                if size == self.size() || !can_be {
                    return None;
                }
                // What is cut off may come back from a snapshot only; growing touches what zeroes hide.
                let (low, high) = (size.min(self.size()), size.max(self.size()));
                self.touch(low, high - low);
                Op::Resize(size)
            }
            // For the reference, taking, applying and deleting snapshots closes the image as well.
            Step::SnapshotCreate => {
                if !self.may_snapshot() {
                    return None;
                }
                self.taken += 1;
                self.freed_compressed = false;
                Op::SnapshotCreate(format!("s{}", self.taken))
            }
            Step::SnapshotApply(which) => Op::SnapshotApply(self.snapshot(which)?),
            Step::SnapshotDelete(which) => Op::SnapshotDelete(self.snapshot(which)?),
        })
    }

    fn snapshot(&self, which: u8) -> Option<String> {
        let snapshots = &self.model.snapshots;
        (!snapshots.is_empty()).then(|| snapshots[usize::from(which) % snapshots.len()].0.clone())
    }
}

impl Model {
    /// Does `op` to it.
    pub fn apply(&mut self, op: &Op, layout: &Layout, has_below: bool) {
        let cluster = layout.cluster_bytes();
        match op {
            Op::Write { at, len, byte } | Op::Compress { at, len, byte } => self.fill(*at, at + len, *byte),
            Op::Zero { at, len, .. } => self.fill(*at, at + len, 0),
            Op::Discard { at, len } => {
                let size = self.guest.len() as u64;
                let end = if at + len == size { size } else { (at + len) / cluster * cluster };
                let start = at.next_multiple_of(cluster);
                // Version 2 has no zero cluster to hide a backing file with, so it keeps what it has.
                if start < end && !(layout.is_version_2() && has_below) {
                    self.fill(start, end, 0);
                }
            }
            Op::Flush | Op::Reopen => {}
            Op::Resize(size) => Arc::make_mut(&mut self.guest).resize(to_usize(*size), 0),
            Op::SnapshotCreate(name) => self.snapshots.push((name.clone(), self.guest.clone())),
            Op::SnapshotApply(name) => {
                let (_, then) = self.snapshots.iter().find(|(known, _)| known == name).expect("planned");
                self.guest = Arc::clone(then);
            }
            Op::SnapshotDelete(name) => self.snapshots.retain(|(known, _)| known != name),
        }
    }

    fn fill(&mut self, start: u64, end: u64, byte: u8) {
        Arc::make_mut(&mut self.guest)[to_usize(start)..to_usize(end)].fill(byte);
    }
}

/// Does `op` to an opened image of ours; [`Op::Reopen`] is the caller's.
///
/// # Errors
/// What the library says.
pub fn apply(image: &Image, op: &Op, layout: &Layout) -> Result<()> {
    match op {
        Op::Write { at, len, byte } => image.write_at(&vec![*byte; to_usize(*len)], *at),
        Op::Compress { at, len, byte } => {
            let mut guest = vec![*byte; to_usize(*len)];
            // A cluster that the end of the disk cuts is stored whole.
            guest.resize(to_usize(layout.cluster_bytes()), 0);
            image.write_compressed(&encode(&guest, layout.codec().expect("planned"))?, *at)
        }
        Op::Zero { at, len, unmap } => image.write_zeroes(*at..at + len, *unmap),
        Op::Discard { at, len } => image.discard(*at..at + len),
        Op::Flush => image.flush(),
        Op::Reopen => Ok(()),
        Op::Resize(size) => image.resize(*size, Preallocation::Off),
        Op::SnapshotCreate(name) => image.snapshot_create(name, (1_700_000_000, 0)),
        Op::SnapshotApply(name) => image.snapshot_apply(name),
        Op::SnapshotDelete(name) => image.snapshot_delete(name),
    }
}

/// The compressed form of a cluster, made without the library's own encoders.
fn encode(guest: &[u8], codec: Codec) -> Result<Vec<u8>> {
    match codec {
        Codec::Deflate | Codec::Zlib => {
            let mut stored = vec![0; guest.len() + 64];
            let mut compressor = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
            let len = match codec {
                Codec::Zlib => compressor.zlib_compress(guest, &mut stored),
                _ => compressor.deflate_compress(guest, &mut stored),
            }
            .map_err(|error| Error::Invalid(error.to_string()))?;
            stored.truncate(len);
            Ok(stored)
        }
        Codec::Zstd => zstd::bulk::compress(guest, 3).map_err(|error| Error::Invalid(error.to_string())),
    }
}

/// The operations as the reference's tools take them; see [`Command`].
pub enum Command {
    /// For one `qemu-io` process, together with its neighbours.
    Io(String),
    /// The process ends here.
    Reopen,
    /// Arguments of `qemu-img`, before the image name.
    Img(Vec<String>),
}

impl Op {
    /// For the reference.
    #[must_use]
    pub fn command(&self) -> Command {
        Command::Io(match self {
            Self::Write { at, len, byte } => format!("write -q -P {byte} {at} {len}"),
            Self::Compress { at, len, byte } => format!("write -q -c -P {byte} {at} {len}"),
            Self::Zero { at, len, unmap: false } => format!("write -q -z {at} {len}"),
            Self::Zero { at, len, unmap: true } => format!("write -q -z -u {at} {len}"),
            Self::Discard { at, len } => format!("discard -q {at} {len}"),
            Self::Flush => "flush".to_owned(),
            Self::Resize(size) => format!("truncate {size}"),
            Self::Reopen => return Command::Reopen,
            Self::SnapshotCreate(name) => return snapshot("-c", name),
            Self::SnapshotApply(name) => return snapshot("-a", name),
            Self::SnapshotDelete(name) => return snapshot("-d", name),
        })
    }
}

fn snapshot(option: &str, name: &str) -> Command {
    Command::Img(vec!["snapshot".to_owned(), option.to_owned(), name.to_owned()])
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(command) => write!(f, "qemu-io -c {command:?}"),
            Self::Reopen => write!(f, "reopen"),
            Self::Img(arguments) => write!(f, "qemu-img {}", arguments.join(" ")),
        }
    }
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("test disks fit in memory")
}
