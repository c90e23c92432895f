//! Power cuts: what was flushed is there, a changed disk never keeps its content id, and no entry names a grain
//! that is not in the file.

use std::sync::Arc;

use super::{super::open::content_id, Craft, Folder};
use crate::{
    format::{OpenMode, Repair},
    image::Image,
    storage::{MemoryStorage, testing::CrashRecorder},
};

const DISK_BYTES: u64 = 2 << 20;

fn cid(folder: &Folder) -> u32 {
    content_id(&*folder.file("d.vmdk").expect("there")).expect("there is one")
}

/// Crash order 1 to 3 of `write`.
#[test]
fn a_power_cut_leaves_grains_that_nobody_names_and_nothing_worse() {
    for (with_tables, redundant) in [(true, true), (false, true), (false, false)] {
        let craft = Craft {
            sectors: DISK_BYTES / 512,
            with_tables,
            redundant,
            zeroed_grains: true,
            has_parent: false,
        };
        let recorder = CrashRecorder::new();
        let base = Arc::new(MemoryStorage::from_bytes("d.vmdk", &craft.bytes()));
        let disk = recorder.record(base).expect("recorded");
        let folder = Folder::default();
        folder.put("d.vmdk", disk);
        let old_cid = cid(&folder);

        let image = folder.image("d.vmdk", OpenMode::Write);
        let mut flushed = vec![0_u8; usize::try_from(DISK_BYTES).expect("small")];
        let mut models = vec![flushed.clone()];
        recorder.mark(0);
        let mut number = 7_u64;
        for round in 1..=6_u8 {
            for _ in 0..4 {
                number =
                    number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let start = usize::try_from((number >> 33) % (DISK_BYTES - 20_000)).expect("small");
                let end = start + usize::try_from((number >> 20) % 20_000 + 1).expect("small");
                flushed[start..end].fill(round);
                image.write_at(&flushed[start..end], start as u64).expect("written");
            }
            image.flush().expect("flushed");
            models.push(flushed.clone());
            recorder.mark(u64::from(round));
        }
        drop(image);

        for state in recorder.states(11, 200) {
            let folder = Folder::default();
            folder.put("d.vmdk", Arc::new(state.files[0].snapshot()));
            let layer = folder.open("d.vmdk", OpenMode::Check { repair: false }).expect("opens");
            let report = layer.check(Repair::Nothing, &mut |_| {}).expect("an audit");
            assert_eq!(report.corruptions, 0, "{state:?}");
            let image = Image::from_layers(vec![layer]).expect("a layer");
            let now = super::read_all(&image);
            let done = usize::try_from(state.mark.unwrap_or(0)).expect("small");
            // Each byte is the flushed one, or one that was on its way.
            let later = &models[done..models.len().min(done + 2)];
            for (at, byte) in now.iter().enumerate() {
                assert!(
                    later.iter().any(|model| model[at] == *byte) || done == 0 && *byte <= 1,
                    "{at:#x}: {byte}"
                );
            }
            if now != models[0] {
                assert_ne!(cid(&folder), old_cid, "changed under its old content id");
            }
        }
    }
}
