//! Power cuts under lanes: what a flush answered for is there.

use std::sync::Arc;

use img_core::{
    format::{CreateRequest, Layer, OpenContext, OpenMode, OptionSet, Repair, registry},
    image::Image,
    storage::{MemoryStorage, Storage, testing::CrashRecorder},
};
use proptest::{prelude::*, test_runner::TestCaseError};

use super::client::{Client, engines};
use crate::{
    disk::{Disk, DiskOptions},
    engine::{EngineChoice, Wait},
    request::Op,
};

const SECTOR: usize = 512;
const SECTORS: usize = 256;
/// Crashes that are tried for each history.
const STATES: usize = 150;

/// Writes that are under way together, and then a flush: sector, length in sectors, lane.
type Round = Vec<(usize, usize, bool)>;

fn driver_open(storage: Arc<dyn Storage>, mode: OpenMode) -> img_core::Result<Arc<dyn Layer>> {
    let driver = registry::by_name("qcow2").expect("a known format");
    let open_file = |_: &str, _: OpenMode| unreachable!("one file");
    driver.open(storage, &OpenContext { mode, options: &OptionSet::new(), open_file: &open_file })
}

/// What sectors may hold after a cut: the words that were durable, and those written since.
#[derive(Clone, Default)]
struct Sector {
    durable: u64,
    since: Vec<u64>,
}

fn try_history(engine: EngineChoice, rounds: &[Round], seed: u64) -> Result<(), TestCaseError> {
    let recorder = CrashRecorder::new();
    let storage = recorder.record(Arc::new(MemoryStorage::new("crash.qcow2"))).expect("recorded");
    let mut options = OptionSet::new();
    options.set("cluster_size", "1k");
    let open_file = |_: &str, _: OpenMode| unreachable!("one file");
    let request = CreateRequest {
        virtual_size_bytes: (SECTORS * SECTOR) as u64,
        backing: None,
        options: &options,
        open_file: &open_file,
    };
    registry::by_name("qcow2").expect("a known format").create(&storage, &request).expect("created");
    let layer = driver_open(storage, OpenMode::Write).expect("it was just made");
    let disk = Disk::over(Image::from_layers(vec![layer]).expect("one layer"), &DiskOptions::default());
    let mut clients = [Client::new(&disk, engine), Client::new(&disk, engine)];
    disk.image().flush().expect("flushed");
    recorder.mark(0);

    // By mark: what may be there from that mark on until the next.
    let mut allowed = vec![vec![Sector::default(); SECTORS]];
    let mut word = 0u64;
    for (round, mark) in rounds.iter().zip(1..) {
        let mut under_way = Vec::new();
        for &(at, count, lane) in round {
            word += 1;
            let count = count.min(SECTORS - at);
            let before = allowed.last_mut().expect("mark 0");
            before[at..at + count].iter_mut().for_each(|sector| sector.since.push(word));
            let bytes = word.to_le_bytes().repeat(count * SECTOR / 8);
            let client = &mut clients[usize::from(lane)];
            under_way.push((lane, client.submit_write((at * SECTOR) as u64, &bytes)));
        }
        while !clients.iter().all(Client::is_idle) {
            clients.iter_mut().for_each(|client| client.run(Wait::No));
        }
        for (lane, tag) in under_way {
            let (result, _) = clients[usize::from(lane)].answer(tag).expect("all are idle");
            prop_assert_eq!(result, Ok(()));
        }
        // Two of them may have gone to one sector in either order: what the guest reads now is what must stay.
        let guest = clients[0].read(0, SECTORS * SECTOR).expect("read");
        prop_assert_eq!(clients[1].change(Op::Flush, 0, 0), Ok(()));
        let settled = |index: usize| {
            let first = &guest[index * SECTOR..][..8];
            u64::from_le_bytes(first.try_into().expect("eight bytes"))
        };
        allowed
            .push((0..SECTORS).map(|index| Sector { durable: settled(index), since: Vec::new() }).collect());
        recorder.mark(mark);
    }
    drop(clients);
    for state in recorder.states(seed, STATES) {
        let Some(mark) = state.mark.and_then(|mark| usize::try_from(mark).ok()) else { continue };
        let [file] = <[MemoryStorage; 1]>::try_from(state.files).expect("one file is recorded");
        judge(file, &allowed[mark]).map_err(|why| {
            TestCaseError::fail(format!("{why}\nafter round {mark}\n{}", state.description))
        })?;
    }
    Ok(())
}

fn judge(file: MemoryStorage, allowed: &[Sector]) -> Result<(), String> {
    let text = |error: img_core::Error| error.to_string();
    let storage: Arc<dyn Storage> = Arc::new(file);
    let check = OpenMode::Check { repair: false };
    let audited = Image::from_layers(vec![driver_open(Arc::clone(&storage), check).map_err(text)?]);
    let report = audited.map_err(text)?.check(Repair::Nothing, &mut |_| {}).map_err(text)?;
    if (report.corruptions, report.check_errors) != (0, 0) {
        return Err(format!("more than leaks: {report:?}"));
    }
    let image =
        Image::from_layers(vec![driver_open(storage, OpenMode::Read).map_err(text)?]).map_err(text)?;
    let mut guest = vec![0; SECTORS * SECTOR];
    image.read_at(&mut guest, 0).map_err(text)?;
    for (index, (bytes, sector)) in guest.chunks(SECTOR).zip(allowed).enumerate() {
        let found = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
        let is_one_write = bytes.chunks(8).all(|word| word == found.to_le_bytes());
        if !is_one_write || (found != sector.durable && !sector.since.contains(&found)) {
            return Err(format!(
                "sector {index} holds {found}, not {} or one of {:?}",
                sector.durable, sector.since
            ));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_power_cut_loses_nothing_that_a_flush_answered_for(
        rounds in prop::collection::vec(
            prop::collection::vec((0..SECTORS, 1..6usize, any::<bool>()), 1..8),
            1..6,
        ),
        seed in any::<u64>(),
    ) {
        for engine in engines() {
            try_history(engine, &rounds, seed)?;
        }
    }
}
