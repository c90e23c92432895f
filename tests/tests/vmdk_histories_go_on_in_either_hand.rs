//! One random history of a VMDK, begun by one implementation and continued by the other, both ways round: the
//! disk reads as the flat model, to both, and checks clean.

use std::{fs, ops::Range, path::Path};

use img_core::format::OpenMode;
use img_tests::{
    command::{img, qemu_img, qemu_io},
    open,
    pattern::difference,
    proptest_config, read_all,
};
use proptest::{prelude::*, test_runner::TestCaseResult};

const DISK_BYTES: u64 = (33 << 20) + 512 * 7;

/// A range becomes this byte; 0 is written as zeroes.
type Step = (Range<u64>, u8);

fn step() -> impl Strategy<Value = Step> {
    let start = prop_oneof![0..DISK_BYTES / 512, (0..DISK_BYTES >> 16).prop_map(|grain| grain << 7)];
    let len = prop_oneof![1..300_u64, (1..40_u64).prop_map(|grains| grains << 7)];
    (start, len, 0..=5_u8)
        .prop_map(|(start, len, byte)| (start * 512..((start + len) * 512).min(DISK_BYTES), byte))
}

fn do_ours(image: &Path, steps: &[Step]) {
    let image = open(image, Some("vmdk"), OpenMode::Write).unwrap_or_else(|error| panic!("{error}"));
    for (range, byte) in steps {
        if *byte == 0 {
            image.write_zeroes(range.clone(), true).expect("zeroed");
        } else {
            let len = usize::try_from(range.end - range.start).expect("small");
            image.write_at(&vec![*byte; len], range.start).expect("written");
        }
    }
    image.close().expect("closed");
}

fn do_theirs(folder: &Path, image: &str, steps: &[Step]) {
    let commands: Vec<String> = steps
        .iter()
        .map(|(Range { start, end }, byte)| match byte {
            0 => format!("write -q -z {start} {}", end - start),
            _ => format!("write -q -P {byte} {start} {}", end - start),
        })
        .collect();
    qemu_io(folder, "vmdk", image, &commands).output().success();
}

fn create(folder: &Path, ours: bool, options: &str, image: &str, backing: bool) {
    let mut arguments = vec!["create", "-q", "-f", "vmdk", "-o", options];
    if backing {
        arguments.extend(["-b", "below.vmdk", "-F", "vmdk"]);
    }
    let size = DISK_BYTES.to_string();
    arguments.extend([image, &size]);
    if ours {
        img(folder, &arguments).output().success();
    } else {
        qemu_img(folder, &arguments).output().success();
    }
}

fn check(folder: &Path, image: &str, model: &[u8]) -> TestCaseResult {
    let ours =
        open(&folder.join(image), Some("vmdk"), OpenMode::Read).unwrap_or_else(|error| panic!("{error}"));
    let read = read_all(&ours).expect("readable");
    drop(ours);
    prop_assert!(difference(&read, model).is_none(), "{image}, read by us: {:?}", difference(&read, model));
    qemu_img(folder, ["convert", "-f", "vmdk", "-O", "raw", image, "read.raw"]).output().success();
    let read = fs::read(folder.join("read.raw")).expect("readable");
    prop_assert!(difference(&read, model).is_none(), "{image}, read by them: {:?}", difference(&read, model));
    qemu_img(folder, ["check", "-q", "-f", "vmdk", image]).output().success();
    Ok(())
}

proptest! {
    #![proptest_config(proptest_config(24, "vmdk"))]

    #[test]
    fn histories_go_on_in_either_hand(
        kind in 0..4_usize,
        zeroed in any::<bool>(),
        backing in any::<bool>(),
        first in proptest::collection::vec(step(), 1..8),
        second in proptest::collection::vec(step(), 1..8),
    ) {
        let kind = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"][kind];
        let is_flat = kind.ends_with("Flat");
        let backing = backing && !is_flat;
        let zeroed = if zeroed && !is_flat { "on" } else { "off" };
        let options = format!("subformat={kind},zeroed_grain={zeroed}");
        let folder = tempfile::tempdir()?;
        let folder = folder.path();
        let mut model = vec![0; usize::try_from(DISK_BYTES).expect("small")];
        if backing {
            qemu_img(folder, ["create", "-q", "-f", "vmdk", "below.vmdk", "17M"]).output().success();
            qemu_io(folder, "vmdk", "below.vmdk", &["write -q -P 9 1M 15M"]).output().success();
            model[1 << 20..16 << 20].fill(9);
        }
        for (image, ours_first) in [("a.vmdk", true), ("b.vmdk", false)] {
            create(folder, ours_first, &options, image, backing);
            for (steps, ours) in [(&first, ours_first), (&second, !ours_first)] {
                if ours {
                    do_ours(&folder.join(image), steps);
                } else {
                    do_theirs(folder, image, steps);
                }
            }
        }
        for (range, byte) in first.iter().chain(&second) {
            let place = |at: u64| usize::try_from(at).expect("small");
            model[place(range.start)..place(range.end)].fill(*byte);
        }
        for image in ["a.vmdk", "b.vmdk"] {
            check(folder, image, &model)?;
        }
    }
}
