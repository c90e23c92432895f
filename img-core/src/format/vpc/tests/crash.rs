//! What a power cut leaves, at every step of [`alloc`](super::super::alloc).

use std::sync::Arc;

use proptest::{collection::vec, prelude::*, test_runner::TestCaseError};
use zerocopy::IntoBytes as _;

use super::{create_small, footer, open};
use crate::{
    format::{OpenMode, Repair, vpc::footer::DiskType},
    image::Image,
    storage::{MemoryStorage, Preallocation, Storage, testing::CrashRecorder},
};

const DISK: u64 = 24 << 10;
/// Power cuts tried in each history.
const STATES: usize = 120;

#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64 },
    Flush,
    Grow,
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..DISK - 1, 1..6000_u64).prop_map(|(at, len)| (at, len.min(DISK - at)));
    prop_oneof![
        6 => (range.clone(), 1..=255_u8).prop_map(|((at, len), byte)| Step::Write { at, len, byte }),
        1 => range.prop_map(|(at, len)| Step::Zero { at, len }),
        2 => Just(Step::Flush),
        1 => Just(Step::Grow),
    ]
}

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

fn parent() -> Arc<dyn Storage> {
    let data: Vec<u8> = (0..DISK).map(|at| (at / 512 + 100).to_le_bytes()[0]).collect();
    let file = [&data[..], footer(DiskType::Fixed, DISK, b"qem2").as_bytes()].concat();
    Arc::new(MemoryStorage::from_bytes("parent.vhd", &file))
}

fn chain(storage: &Arc<dyn Storage>, mode: OpenMode, is_child: bool) -> crate::Result<Image> {
    let mut layers = vec![open(storage, mode)?];
    if is_child {
        layers.push(open(&parent(), OpenMode::Read)?);
    }
    Image::from_layers(layers)
}

fn read(image: &Image) -> crate::Result<Vec<u8>> {
    let mut guest = vec![0; index(image.virtual_size_bytes())];
    image.read_at(&mut guest, 0)?;
    Ok(guest)
}

/// The disk after each step; which of them are durable.
fn record(steps: &[Step], is_child: bool) -> (CrashRecorder, Vec<(Vec<u8>, bool)>) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("crash.vhd"));
    let of_parent = footer(DiskType::Fixed, DISK, b"qem2");
    create_small(&storage, DISK, 4096, is_child.then_some(&of_parent)).unwrap();
    let recorder = CrashRecorder::new();
    let recorded = recorder.record(storage).unwrap();
    let image = chain(&recorded, OpenMode::Write, is_child).unwrap();
    recorder.mark(0);
    let mut models = vec![(read(&image).unwrap(), true)];
    for (step, mark) in steps.iter().zip(1..) {
        let (mut model, _) = models.last().unwrap().clone();
        let mut is_durable = false;
        match *step {
            Step::Write { at, len, byte } => {
                image.write_at(&vec![byte; index(len)], at).unwrap();
                model[index(at)..index(at + len)].fill(byte);
            }
            Step::Zero { at, len } => {
                image.write_zeroes(at..at + len, true).unwrap();
                model[index(at)..index(at + len)].fill(0);
            }
            Step::Flush => {
                image.flush().unwrap();
                is_durable = true;
            }
            Step::Grow if !is_child => {
                image.resize(model.len() as u64 + (600 << 10), Preallocation::Off).unwrap();
                model.resize(index(image.virtual_size_bytes()), 0);
                is_durable = true;
            }
            Step::Grow => {}
        }
        models.push((model, is_durable));
        recorder.mark(mark);
    }
    (recorder, models)
}

fn judge(file: MemoryStorage, since: &[(Vec<u8>, bool)], is_child: bool) -> Result<(), String> {
    let storage: Arc<dyn Storage> = Arc::new(file);
    let audit = |repair, mode| {
        let layer = open(&storage, mode).map_err(|error| format!("no audit: {error}"))?;
        let mut told = Vec::new();
        let report = layer.check(repair, &mut |finding| told.push(finding.text));
        report.map(|report| (report, told)).map_err(|error| format!("no audit: {error}"))
    };
    let (report, told) = audit(Repair::Nothing, OpenMode::Check { repair: false })?;
    if report.corruptions > 0 || report.check_errors > 0 {
        return Err(format!("{report:?}: {told:?}"));
    }
    let guest = chain(&storage, OpenMode::Read, is_child).and_then(|image| read(&image));
    let guest = guest.map_err(|error| format!("does not read: {error}"))?;
    if !since.iter().any(|(model, _)| model.len() == guest.len()) {
        return Err(format!("a size of {} bytes, which the disk never had since", guest.len()));
    }
    for (at, byte) in guest.iter().enumerate() {
        if !since.iter().any(|(model, _)| model.get(at).copied().unwrap_or(0) == *byte) {
            return Err(format!("byte {at:#x} is {byte:#x}, which it never was since"));
        }
    }
    // Whoever goes on with it, by writing or by giving leaks back, changes nothing of that.
    let written = chain(&storage, OpenMode::Write, is_child).and_then(|image| {
        image.write_at(&guest[..100], 0)?;
        image.close()
    });
    written.map_err(|error| format!("cannot be written: {error}"))?;
    audit(Repair::Leaks, OpenMode::Check { repair: true })?;
    let (report, told) = audit(Repair::Nothing, OpenMode::Check { repair: false })?;
    if (report.corruptions, report.leaks) != (0, 0) {
        return Err(format!("after the repair: {report:?}: {told:?}"));
    }
    let again = chain(&storage, OpenMode::Read, is_child).and_then(|image| read(&image));
    if again.map_err(|error| error.to_string())? != guest {
        return Err("the repair changed the disk".to_owned());
    }
    Ok(())
}

fn try_history(steps: &[Step], is_child: bool, seed: u64) -> Result<(), String> {
    let (recorder, models) = record(steps, is_child);
    for state in recorder.states(seed, STATES) {
        let Some(done) = state.mark.map(index) else { continue };
        let durable = (0..=done).rev().find(|step| models[*step].1).unwrap_or(0);
        let running = (done + 1).min(models.len() - 1);
        let [file] = <[MemoryStorage; 1]>::try_from(state.files).expect("one file is recorded");
        judge(file, &models[durable..=running], is_child)
            .map_err(|text| format!("{text}\nafter step {done}\n{}", state.description))?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the cut, the image opens, what was flushed is there, an audit finds no more than leaks, and
    /// writing goes on.
    #[test]
    fn a_power_cut_loses_nothing_that_was_flushed(
        steps in vec(step(), 1..12),
        is_child in any::<bool>(),
        seed in any::<u64>(),
    ) {
        try_history(&steps, is_child, seed).map_err(TestCaseError::fail)?;
    }
}
