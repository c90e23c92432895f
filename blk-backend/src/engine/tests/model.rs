//! Many lanes at once against a model of bytes.
//!
//! Each sector of a write holds one number, in all its words, that no other write has. The model remembers for each
//! sector which writes may be what it holds: a write that has ended takes the place of all that had ended when it
//! began. Whatever a read gives must be one of those when it began, or of a write that was under way beside it at some
//! time, though a third one may have taken its place since. A discard leaves what was there or zeroes; the snapshots, sizes, pauses and flushes in between change nothing.

use std::{collections::BTreeMap, sync::Arc};

use img_core::{
    format::Repair,
    image::{Image, OpenOptions},
};
use proptest::{prelude::*, test_runner::TestCaseError};

use super::client::{Client, engines, image};
use crate::{
    disk::{Disk, DiskOptions},
    engine::{EngineChoice, Wait},
    request::{Errno, Op},
};

const SECTOR: u64 = 512;
const SECTORS: u64 = 2048;
const DISK_BYTES: u64 = SECTOR * SECTORS;
const LANES: usize = 3;

/// What is wished; made legal where it stands.
#[derive(Clone, Debug)]
enum Wish {
    Read(u64, u64),
    Write(u64, u64, bool),
    Zeroes(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    /// Take one answer, if any request is under way.
    Settle,
    SnapshotCreate,
    SnapshotDelete,
    Grow,
    Overlay,
}

fn wish() -> impl Strategy<Value = (usize, Wish)> {
    let range = || (0..SECTORS, prop_oneof![4 => 1..16u64, 1 => 64..400u64]);
    let wish = prop_oneof![
        8 => range().prop_map(|(at, count)| Wish::Read(at, count)),
        10 => (range(), any::<bool>()).prop_map(|((at, count), fua)| Wish::Write(at, count, fua)),
        3 => (range(), any::<bool>()).prop_map(|((at, count), unmap)| Wish::Zeroes(at, count, unmap)),
        3 => range().prop_map(|(at, count)| Wish::Discard(at, count)),
        2 => Just(Wish::Flush),
        6 => Just(Wish::Settle),
        1 => Just(Wish::SnapshotCreate),
        1 => Just(Wish::SnapshotDelete),
        1 => Just(Wish::Grow),
        1 => Just(Wish::Overlay),
    ];
    (0..LANES, wish)
}

/// Something that was done to a sector.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Change {
    /// What its words hold; `None` where a discard may have left what was there.
    word: Option<u64>,
    began: u64,
    ended: Option<u64>,
}

/// What each sector may hold.
struct Model {
    sectors: Vec<Vec<Change>>,
    /// Counts what happens.
    now: u64,
}

impl Model {
    fn new(words: impl Fn(u64) -> u64) -> Self {
        let initial = |sector| vec![Change { word: Some(words(sector)), began: 0, ended: Some(0) }];
        Self { sectors: (0..SECTORS * 2).map(initial).collect(), now: 1 }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn sectors(&mut self, range: &(u64, u64)) -> &mut [Vec<Change>] {
        let (start, end) = (count_of(range.0), count_of(range.0 + range.1));
        &mut self.sectors[start..end]
    }

    fn begin(&mut self, range: (u64, u64), words: &[Option<u64>]) -> u64 {
        let began = self.tick();
        for sector in self.sectors(&range) {
            sector.extend(words.iter().map(|word| Change { word: *word, began, ended: None }));
        }
        began
    }

    /// The change that began then has ended.
    fn end(&mut self, range: (u64, u64), began: u64) {
        let now = self.tick();
        for sector in self.sectors(&range) {
            for change in sector.iter_mut().filter(|change| change.began == began) {
                change.ended = Some(now);
            }
            // A change with a certain result hides all that had ended when it began.
            let certain: Vec<u64> = sector
                .iter()
                .filter(|change| change.ended.is_some() && change.word.is_some())
                .filter(|change| {
                    !sector.iter().any(|other| other.began == change.began && other.word != change.word)
                })
                .map(|change| change.began)
                .collect();
            let hidden =
                |change: &Change| certain.iter().any(|began| change.ended.is_some_and(|end| end < *began));
            sector.retain(|change| !hidden(change));
        }
    }

    /// Whether a read may find `word` in a sector; `seen` are the changes known when it began and those since.
    fn allows(&self, sector: u64, word: u64, seen: &[Change]) -> bool {
        let now = &self.sectors[count_of(sector)];
        now.iter().chain(seen).any(|change| change.word == Some(word))
    }
}

fn count_of(number: u64) -> usize {
    usize::try_from(number).expect("it is small")
}

/// A request that is under way.
struct Pending {
    lane: usize,
    kind: PendingKind,
}

enum PendingKind {
    /// `seen`: for each sector, what it may have held at any time since the read began.
    Read {
        range: (u64, u64),
        seen: Vec<Vec<Change>>,
    },
    Change {
        range: (u64, u64),
        began: u64,
    },
    Flush,
}

struct Run {
    disk: Arc<Disk>,
    clients: Vec<Client>,
    model: Model,
    pending: BTreeMap<(usize, u64), Pending>,
    next_word: u64,
    sectors: u64,
    snapshots: u32,
    overlays: u32,
    dir: tempfile::TempDir,
}

impl Run {
    fn step(&mut self, lane: usize, wish: &Wish) -> Result<(), TestCaseError> {
        let sectors = self.sectors;
        let fit = |at: u64, count: u64| {
            let at = at % sectors;
            (at, count.min(sectors - at))
        };
        match *wish {
            Wish::Read(at, count) => {
                let range = fit(at, count);
                self.model.tick();
                let seen = self.model.sectors(&range).to_vec();
                let kind = PendingKind::Read { range, seen };
                self.submit(lane, Op::Read, range, &vec![0xee; count_of(range.1 * SECTOR)], kind)?;
            }
            Wish::Write(at, count, fua) => {
                let range = fit(at, count);
                self.next_word += 1;
                let word = self.next_word;
                let began = self.begin_change(range, &[Some(word)]);
                let bytes = word.to_le_bytes().repeat(count_of(range.1 * SECTOR / 8));
                self.submit(lane, Op::Write { fua }, range, &bytes, PendingKind::Change { range, began })?;
            }
            Wish::Zeroes(at, count, may_unmap) => {
                let range = fit(at, count);
                let began = self.begin_change(range, &[Some(0)]);
                let op = Op::WriteZeroes { may_unmap, fast_only: false, fua: false };
                self.submit(lane, op, range, &[], PendingKind::Change { range, began })?;
            }
            Wish::Discard(at, count) => {
                let range = fit(at, count);
                let began = self.begin_change(range, &[Some(0), None]);
                self.submit(
                    lane,
                    Op::Discard { fua: false },
                    range,
                    &[],
                    PendingKind::Change { range, began },
                )?;
            }
            Wish::Flush => self.submit(lane, Op::Flush, (0, 0), &[], PendingKind::Flush)?,
            Wish::Settle => self.settle_one()?,
            Wish::SnapshotCreate => {
                self.snapshots += 1;
                let name = format!("s{}", self.snapshots);
                self.whole(move |disk| ignore_unsupported(disk.snapshot_create(&name, (1, 0))))?;
            }
            Wish::SnapshotDelete => {
                let list = self.disk.image();
                let names = list.layers()[0].snapshots().map(|snapshots| snapshots.list());
                if let Some(Ok(names)) = names
                    && let Some(first) = names.first().map(|info| info.name.clone())
                {
                    self.whole(move |disk| disk.snapshot_delete(&first))?;
                }
            }
            Wish::Grow => {
                if self.sectors < SECTORS * 2 {
                    self.sectors = (self.sectors + 300).min(SECTORS * 2);
                    let size = self.sectors * SECTOR;
                    self.whole(move |disk| disk.resize(size))?;
                }
            }
            Wish::Overlay => {
                if self.overlays < 3 {
                    self.overlays += 1;
                    let path = self.dir.path().join(format!("overlay{}", self.overlays));
                    let path = img_core::image::ImageName::from_path(path.to_str().expect("plain names"));
                    self.whole(move |disk| disk.snapshot_external(&path, "qcow2", false))?;
                }
            }
        }
        Ok(())
    }

    fn begin_change(&mut self, (at, count): (u64, u64), words: &[Option<u64>]) -> u64 {
        let began = self.model.begin((at, count), words);
        for pending in self.pending.values_mut() {
            if let PendingKind::Read { range: (first, _), seen } = &mut pending.kind {
                let changed = (*first..).zip(seen).filter(|(sector, _)| (at..at + count).contains(sector));
                for (_, seen) in changed {
                    seen.extend(words.iter().map(|word| Change { word: *word, began, ended: None }));
                }
            }
        }
        began
    }

    /// A change of the whole disk, on a thread of its own, while the lanes go on.
    fn whole(
        &mut self,
        change: impl FnOnce(&Disk) -> img_core::Result<()> + Send,
    ) -> Result<(), TestCaseError> {
        let disk = Arc::clone(&self.disk);
        std::thread::scope(|scope| {
            let waker = self.clients.iter().map(|client| client.lane.waker()).collect::<Vec<_>>();
            let changed = scope.spawn(move || {
                let result = change(&disk);
                waker.iter().for_each(crate::engine::LaneWaker::wake);
                result
            });
            while !changed.is_finished() {
                for client in &mut self.clients {
                    client.run(Wait::No);
                }
                std::thread::yield_now();
            }
            let changed = changed.join().expect("no panic");
            changed.map_err(|error| TestCaseError::fail(format!("the disk is not changed: {error}")))
        })?;
        self.collect()
    }

    fn submit(
        &mut self,
        lane: usize,
        op: Op,
        (at, count): (u64, u64),
        bytes: &[u8],
        kind: PendingKind,
    ) -> Result<(), TestCaseError> {
        let tag = loop {
            if let Some(tag) = self.clients[lane].submit(op, at * SECTOR, count * SECTOR, bytes) {
                break tag;
            }
            self.settle_one()?;
        };
        self.pending.insert((lane, tag), Pending { lane, kind });
        Ok(())
    }

    /// Waits until some request has ended.
    fn settle_one(&mut self) -> Result<(), TestCaseError> {
        let before = self.pending.len();
        while !self.pending.is_empty() && self.pending.len() == before {
            // No lane may sleep: another one may hold what it waits for.
            self.clients.iter_mut().for_each(|client| client.run(Wait::No));
            self.collect()?;
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<(), TestCaseError> {
        let keys: Vec<_> = self.pending.keys().copied().collect();
        for (lane, tag) in keys {
            let Some((result, bytes)) = self.clients[lane].answer(tag) else { continue };
            let Pending { kind, lane } = self.pending.remove(&(lane, tag)).expect("it was there");
            prop_assert_eq!(result, Ok::<(), Errno>(()), "on lane {}", lane);
            match kind {
                PendingKind::Flush => {}
                PendingKind::Change { range, began } => self.model.end(range, began),
                PendingKind::Read { range, seen } => self.check_read(range.0, &bytes, &seen)?,
            }
        }
        Ok(())
    }

    fn check_read(&self, first: u64, bytes: &[u8], seen: &[Vec<Change>]) -> Result<(), TestCaseError> {
        for (index, sector) in bytes.chunks(count_of(SECTOR)).enumerate() {
            for word in sector.chunks_exact(8) {
                let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
                let at = first + index as u64;
                prop_assert!(
                    self.model.allows(at, word, &seen[index]),
                    "sector {} holds {:#x}, which is none of {:?}, {:?}",
                    at,
                    word,
                    self.model.sectors[count_of(at)],
                    seen[index]
                );
            }
        }
        Ok(())
    }
}

/// Formats without internal snapshots say so.
fn ignore_unsupported(result: img_core::Result<()>) -> img_core::Result<()> {
    match result {
        Err(img_core::Error::Unsupported { .. }) => Ok(()),
        other => other,
    }
}

/// The kinds of disks that are tried.
#[derive(Clone, Copy, Debug)]
enum Base {
    Raw,
    Fresh,
    Preallocated,
    /// Over a compressed image.
    Overlay,
}

/// What the words of a sector of the compressed base hold.
fn base_word(sector: u64) -> u64 {
    if sector < SECTORS && sector % 96 < 80 { 0xba5e_0000 + sector } else { 0 }
}

fn run(base: Base, engine: EngineChoice, wishes: &[(usize, Wish)]) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().expect("a directory");
    let (format, model) = match base {
        Base::Raw => ("raw", Model::new(|_| 0)),
        Base::Fresh | Base::Preallocated => ("qcow2", Model::new(|_| 0)),
        Base::Overlay => ("qcow2", Model::new(base_word)),
    };
    let name = match base {
        Base::Raw => image(dir.path(), "disk", "raw", &[], DISK_BYTES, None),
        Base::Fresh => image(dir.path(), "disk", "qcow2", &[("cluster_size", "4k")], DISK_BYTES, None),
        Base::Preallocated => {
            image(dir.path(), "disk", "qcow2", &[("preallocation", "metadata")], DISK_BYTES, None)
        }
        Base::Overlay => {
            compressed_base(dir.path());
            image(dir.path(), "disk", "qcow2", &[("cluster_size", "16k")], DISK_BYTES, Some("base"))
        }
    };
    let options = DiskOptions { format: Some(format.to_owned()), ..DiskOptions::default() };
    let disk = Disk::open(&name, &options).expect("it was just made");
    let clients = (0..LANES).map(|_| Client::new(&disk, engine)).collect();
    let mut run = Run {
        disk,
        clients,
        model,
        pending: BTreeMap::new(),
        next_word: 1 << 40,
        sectors: SECTORS,
        snapshots: 0,
        overlays: 0,
        dir,
    };
    for (lane, wish) in wishes {
        run.step(*lane, wish)?;
    }
    while !run.pending.is_empty() {
        run.settle_one()?;
    }
    run.step(0, &Wish::Read(0, SECTORS * 2))?;
    while !run.pending.is_empty() {
        run.settle_one()?;
    }
    run.clients.clear();
    run.disk.close().map_err(|error| TestCaseError::fail(error.to_string()))?;
    if run.disk.image().layers()[0].driver().can_check() {
        let mut texts = Vec::new();
        let report = run.disk.image().check(Repair::Nothing, &mut |finding| texts.push(finding.text));
        let report = report.map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert_eq!((report.corruptions, report.check_errors, report.leaks), (0, 0, 0), "{:?}", texts);
    }
    Ok(())
}

fn compressed_base(dir: &std::path::Path) {
    use std::io::Write as _;

    let name = image(dir, "base", "qcow2", &[("cluster_size", "16k")], DISK_BYTES, None);
    let base = Image::open(&name, &OpenOptions::new(img_core::format::OpenMode::Write)).expect("opens");
    for cluster in 0..DISK_BYTES / 16384 {
        let bytes: Vec<u8> =
            (0..32).flat_map(|at| base_word(cluster * 32 + at).to_le_bytes().repeat(64)).collect();
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&bytes).expect("in memory");
        base.write_compressed(&encoder.finish().expect("in memory"), cluster * 16384).expect("written");
    }
    base.close().expect("closed");
}

macro_rules! model_tests {
    ($($name:ident: $base:expr;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]
            $(
                #[test]
                fn $name(wishes in prop::collection::vec(wish(), 1..150)) {
                    for engine in engines() {
                        run($base, engine, &wishes)?;
                    }
                }
            )*
        }
    };
}

model_tests! {
    a_raw_disk_is_the_model: Base::Raw;
    a_fresh_disk_is_the_model: Base::Fresh;
    a_preallocated_disk_is_the_model: Base::Preallocated;
    an_overlay_over_compressed_clusters_is_the_model: Base::Overlay;
}
