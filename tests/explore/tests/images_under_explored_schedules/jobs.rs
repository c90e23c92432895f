//! What whole-image jobs promise, whichever of their threads goes on: there is an end, what the result reads as is what
//! the sources say, and the image is sound.

use std::sync::{Arc, OnceLock};

use img_core_explored::{
    Result,
    image::Image,
    job::{
        Unwatched,
        compare::{CompareOptions, Comparison, compare},
        convert::{ConvertOptions, convert},
        rebase::rebase,
    },
    storage::{
        MemoryStorage, Storage,
        testing::{FailAt, Operation},
    },
};
use shuttle::rand::{Rng, thread_rng};

use super::harness::{self, Audited, Bytes, close, explore, usize_of};

const THREADS: usize = 3;
/// What images hold before, and their parents.
const OLD: u8 = 0xff;
const BELOW: u8 = 0x55;
/// Of a cluster: what a source can hold apart from the rest.
const SLOTS: u64 = 8;

/// A kind of image, and its disk.
struct Kind {
    format: &'static str,
    options: &'static [(&'static str, &'static str)],
    cluster_bytes: u64,
    clusters: u64,
    has_parent: bool,
    compresses: bool,
    images: OnceLock<Images>,
}

struct Images {
    /// It holds nothing.
    empty: Bytes,
    /// Full of [`BELOW`].
    parent: Option<Bytes>,
    /// Of as many bytes, in clusters of a slot each.
    empty_source: Bytes,
}

const CLUSTERS_OF_4K: &[(&str, &str)] = &[("cluster_size", "4096")];

static QCOW2: Kind = Kind::new("qcow2", CLUSTERS_OF_4K, 4096, 4).compressing();
static QCOW2_OVER_A_PARENT: Kind = Kind::new("qcow2", CLUSTERS_OF_4K, 4096, 4).over_a_parent();
static SUBCLUSTERS: Kind =
    Kind::new("qcow2", &[("cluster_size", "16384"), ("extended_l2", "on")], 16 << 10, 3);
static QED: Kind = Kind::new("qed", &[("cluster_size", "4096"), ("table_size", "1")], 4096, 4);
static VMDK: Kind = Kind::new("vmdk", &[], 64 << 10, 3);
static VPC: Kind = Kind::new("vpc", &[("force_size", "on")], 2 << 20, 2);

impl Kind {
    const fn new(
        format: &'static str,
        options: &'static [(&'static str, &'static str)],
        cluster_bytes: u64,
        clusters: u64,
    ) -> Self {
        let images = OnceLock::new();
        Self { format, options, cluster_bytes, clusters, has_parent: false, compresses: false, images }
    }

    const fn over_a_parent(mut self) -> Self {
        self.has_parent = true;
        self
    }

    const fn compressing(mut self) -> Self {
        self.compresses = true;
        self
    }

    fn disk_bytes(&self) -> u64 {
        self.cluster_bytes * self.clusters
    }

    fn slot_bytes(&self) -> u64 {
        self.cluster_bytes / SLOTS
    }

    fn images(&self) -> &Images {
        self.images.get_or_init(|| {
            let size = self.disk_bytes();
            let disk = 0..size;
            let all = std::slice::from_ref(&disk);
            let parent = self.has_parent.then(|| {
                let empty = harness::create(self.format, size, self.options, None);
                harness::filled(self.format, empty, all, BELOW)
            });
            let empty = harness::create(self.format, size, self.options, parent);
            let slot = self.slot_bytes().to_string();
            Images {
                empty,
                parent,
                empty_source: harness::create("qcow2", size, &[("cluster_size", &slot)], None),
            }
        })
    }

    /// A source of data, zeroes of every sort and nothing, in an order that is drawn, and what it reads as.
    fn source(&self) -> (Vec<u8>, Vec<u8>) {
        let mut random = thread_rng();
        let mut reads = vec![0; usize_of(self.disk_bytes())];
        let bytes = harness::changed("qcow2", self.images().empty_source, |image| {
            for (at, slot) in reads.chunks_mut(usize_of(self.slot_bytes())).enumerate() {
                let guest = at as u64 * self.slot_bytes();
                match random.gen_range(0..8_u32) {
                    0..4 => {}
                    4 => image.write_zeroes(guest..guest + self.slot_bytes(), false).expect("zeroed"),
                    5 => image.write_at(slot, guest).expect("written"),
                    _ => {
                        slot.fill(u8::try_from(at % 250).expect("below 250") + 1);
                        image.write_at(slot, guest).expect("written");
                    }
                }
            }
        });
        (bytes, reads)
    }

    /// An image that holds some of its clusters, in an order that is drawn. Its disk read as `reads` below it.
    fn held(&self, empty: &[u8], reads: &mut [u8]) -> Vec<u8> {
        let mut random = thread_rng();
        harness::changed(self.format, empty, |image| {
            for (at, cluster) in reads.chunks_mut(usize_of(self.cluster_bytes)).enumerate() {
                let guest = at as u64 * self.cluster_bytes;
                match random.gen_range(0..6_u32) {
                    0..3 => {}
                    3 => {
                        image.write_zeroes(guest..guest + self.cluster_bytes, false).expect("zeroed");
                        cluster.fill(0);
                    }
                    _ => {
                        cluster.fill(OLD);
                        image.write_at(cluster, guest).expect("written");
                    }
                }
            }
        })
    }

    /// The image is sound and reads so.
    fn check(&self, image: &[u8], parent: Option<&[u8]>, expected: &[u8]) {
        // Formats without counts keep what was given up in the middle of the file.
        let leaks = self.format != "qcow2";
        let image =
            Audited::new(self.format, image, parent, false, leaks).unwrap_or_else(|why| panic!("{why}"));
        let found = image.read(0..self.disk_bytes()).expect("read");
        let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
        assert!(wrong.is_none(), "from {wrong:?} on it is not what the source holds");
    }
}

/// A conversion onto an image that exists, whose threads meet in its clusters.
struct Conversion {
    source: Image,
    expected: Vec<u8>,
    memory: Arc<MemoryStorage>,
    options: ConvertOptions,
}

impl Conversion {
    fn drawn(kind: &Kind) -> Self {
        let (source, expected) = kind.source();
        let old = kind.held(kind.images().empty, &mut vec![0; usize_of(kind.disk_bytes())]);
        let mut random = thread_rng();
        let options = ConvertOptions {
            threads: Some(THREADS),
            sparse_bytes: [0, 512, 1536, 4096][random.gen_range(0..4_usize)],
            out_of_order: random.gen_bool(0.5),
            compress: kind.compresses && random.gen_bool(0.3),
            copy_offload: random.gen_bool(0.2),
            target_is_zero: false,
            ..ConvertOptions::default()
        };
        Self {
            source: harness::open_to_read("qcow2", &source),
            expected,
            memory: Arc::new(MemoryStorage::from_bytes("target", &old)),
            options,
        }
    }

    /// Into the image on `storage`, which is the memory or has it below.
    fn run(&self, kind: &Kind, storage: Arc<dyn Storage>) -> Result<()> {
        let parent =
            kind.images().parent.map(|bytes| Arc::new(MemoryStorage::from_bytes("parent", bytes)) as _);
        let target = harness::open(kind.format, &[], storage, parent);
        let sources = std::slice::from_ref(&self.source);
        let converted = convert(sources, &target, &self.options, &|_, error| panic!("{error}"), &Unwatched);
        // An image that writes nothing any more says so again.
        let closed = Arc::into_inner(target).expect("nobody else holds it").close();
        converted.and(closed)
    }
}

fn conversions(kind: &'static Kind, schedules: u64) {
    explore(schedules, move || {
        let conversion = Conversion::drawn(kind);
        conversion.run(kind, Arc::clone(&conversion.memory) as _).expect("converted");
        kind.check(&conversion.memory.to_vec(), kind.images().parent, &conversion.expected);
    });
}

/// One write to the target fails under a conversion: it ends, says so, and leaves an image that is sound.
fn failures(kind: &'static Kind, schedules: u64) {
    explore(schedules, move || {
        let conversion = Conversion::drawn(kind);
        let is_write = |operation| operation == Operation::Write;
        let nth = thread_rng().gen_range(0..60);
        let failing = Arc::new(FailAt::once(Arc::clone(&conversion.memory) as _, is_write, nth));
        let converted = conversion.run(kind, Arc::clone(&failing) as _);
        let has_failed = failing.seen() > nth;
        assert_eq!(converted.is_err(), has_failed, "{converted:?}");
        let image = conversion.memory.to_vec();
        if has_failed {
            let (parent, repairs) = (kind.images().parent, kind.format != "qcow2");
            Audited::new(kind.format, &image, parent, repairs, true).unwrap_or_else(|why| panic!("{why}"));
        } else {
            kind.check(&image, kind.images().parent, &conversion.expected);
        }
    });
}

#[test]
fn conversions_to_qcow2() {
    conversions(&QCOW2, 60);
}

#[test]
fn conversions_to_qcow2_over_a_parent() {
    conversions(&QCOW2_OVER_A_PARENT, 40);
}

#[test]
fn conversions_to_subclusters() {
    conversions(&SUBCLUSTERS, 40);
}

#[test]
fn conversions_to_qed() {
    conversions(&QED, 40);
}

#[test]
fn conversions_to_vmdk() {
    conversions(&VMDK, 40);
}

#[test]
fn conversions_to_vpc() {
    conversions(&VPC, 20);
}

#[test]
fn failures_under_conversions_to_qcow2() {
    failures(&QCOW2, 60);
}

#[test]
fn failures_under_conversions_to_subclusters() {
    failures(&SUBCLUSTERS, 40);
}

#[test]
fn failures_under_conversions_to_qed() {
    failures(&QED, 40);
}

#[test]
fn failures_under_conversions_to_vmdk() {
    failures(&VMDK, 40);
}

#[test]
fn failures_under_conversions_to_vpc() {
    failures(&VPC, 20);
}

/// An overlay reads the same over another parent, and over none.
#[test]
fn rebases() {
    static KIND: Kind = Kind::new("qcow2", CLUSTERS_OF_4K, 4096, 16);
    static OVERLAY: OnceLock<Bytes> = OnceLock::new();
    explore(40, || {
        let empty = OVERLAY.get_or_init(|| {
            let parent = Some(KIND.images().empty_source);
            harness::create("qcow2", KIND.disk_bytes(), CLUSTERS_OF_4K, parent)
        });
        let (old, mut expected) = KIND.source();
        let overlay = KIND.held(empty, &mut expected);
        let mut random = thread_rng();
        let new = random.gen_bool(0.8).then(|| KIND.source().0);
        let memory = Arc::new(MemoryStorage::from_bytes("overlay", &overlay));
        let parent = Arc::new(MemoryStorage::from_bytes("parent", &old));
        let image = harness::open("qcow2", &[], Arc::clone(&memory) as _, Some(parent));
        let new_image = new.as_ref().map(|new| harness::open_to_read("qcow2", new));
        // Found out once for each layer, under a lock of the standard library's that the explorer does not know.
        for layer in image.layers().iter().chain(new_image.iter().flat_map(|new| new.layers())) {
            layer.has_sparse_data();
        }
        rebase(&image, new_image.as_ref(), random.gen_bool(0.3), &Unwatched).expect("rebased");
        close(image);
        KIND.check(&memory.to_vec(), new.as_deref(), &expected);
    });
}

/// Of several differences the first is told.
#[test]
fn comparisons() {
    static KIND: Kind = Kind::new("qcow2", CLUSTERS_OF_4K, 4096, 4);
    explore(60, || {
        let (one, expected) = KIND.source();
        let mut random = thread_rng();
        let mut differs: Vec<u64> =
            (0..random.gen_range(0..3_u32)).map(|_| random.gen_range(0..KIND.disk_bytes())).collect();
        let other = harness::changed("qcow2", &one, |image| {
            for at in &differs {
                image.write_at(&[!expected[usize_of(*at)]], *at).expect("written");
            }
        });
        differs.sort_unstable();
        let images = [&one, &other].map(|bytes| harness::open_to_read("qcow2", bytes));
        let found = compare(images.each_ref(), CompareOptions::default(), &mut || (), &Unwatched);
        let sector = |at: &u64| Comparison::ContentDiffers(at - at % 512);
        let expected = differs.first().map_or(Comparison::Identical, sector);
        assert_eq!(found.expect("compared"), expected);
    });
}
