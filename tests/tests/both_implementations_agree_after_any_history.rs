//! One random history, done by the library and by `qemu-io`/`qemu-img` to twin images: both read the same
//! and check clean, each through the other's eyes.
//!
//! CI runs a fixed set. A longer search: `IMG_TEST_CASES=2000 IMG_TEST_SEED=7 cargo test -p img-tests
//! --test both_implementations_agree_after_any_history`; what it finds is kept in `tests/regressions/`.

use std::{fs, path::Path};

use img_core::{
    format::{OpenMode, OptionSet, Repair, registry},
    image::{Image, ImageName},
    job::create::{CreateImage, create},
};
use img_tests::{
    command::{qemu_img, qemu_io},
    open, open_options,
    pattern::difference,
    proptest_config, read_all,
    scenario::{Command, Model, Op, Plan, Scenario, apply, qcow2_layout, qed_layout, scenario},
};
use proptest::{
    prelude::*,
    test_runner::{TestCaseError, TestCaseResult},
};

proptest! {
    #![proptest_config(proptest_config(60, "differential"))]

    #[test]
    fn both_implementations_agree_after_any_history(scenario in scenario(qcow2_layout(), 24, true)) {
        agree(&scenario)?;
    }
}

proptest! {
    #![proptest_config(proptest_config(40, "differential_qed"))]

    #[test]
    fn both_implementations_agree_after_any_history_of_qed(scenario in scenario(qed_layout(), 24, true)) {
        agree(&scenario)?;
    }
}

fn agree(scenario: &Scenario) -> TestCaseResult {
    let folder = tempfile::tempdir()?;
    let plan = scenario.plan();
    let format = scenario.layout.format();
    let below = put_below(folder.path(), scenario, &plan);
    create_ours(folder.path(), scenario, &plan, below.as_deref())?;
    run_ours(folder.path(), scenario, &plan)?;
    create_theirs(folder.path(), scenario, &plan, below.as_deref());
    run_theirs(folder.path(), format, &plan);

    let model = plan.models.last().expect("at least the first");
    for image in ["theirs", "ours"] {
        read_by_them(folder.path(), format, image, model)?;
        read_by_us(folder.path(), format, image, model)?;
    }
    Ok(())
}

/// Writes the backing file, common to both, and tells its format.
fn put_below(folder: &Path, scenario: &Scenario, plan: &Plan) -> Option<String> {
    let bytes = plan.below.as_ref()?;
    fs::write(folder.join("below.raw"), bytes).expect("written");
    if !scenario.below.as_ref()?.qcow2 {
        return Some("raw".to_owned());
    }
    qemu_img(
        folder,
        ["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "below.raw", "below.qcow2"],
    )
    .output()
    .success();
    Some("qcow2".to_owned())
}

fn options(scenario: &Scenario) -> OptionSet {
    let mut options = OptionSet::new();
    for option in scenario.layout.create_options().split(',') {
        let (name, value) = option.split_once('=').expect("NAME=VALUE");
        options.set(name, value);
    }
    options
}

fn create_ours(folder: &Path, scenario: &Scenario, plan: &Plan, below: Option<&str>) -> TestCaseResult {
    let path = folder.join("ours");
    let name = ImageName::parse(path.to_str().expect("UTF-8")).map_err(ours("name"))?;
    create(&CreateImage {
        name: &name,
        driver: registry::by_name(scenario.layout.format()).expect("known"),
        virtual_size_bytes: plan.size_bytes,
        backing: below.map(|format| img_core::format::Backing {
            name: format!("below.{format}"),
            format: Some(format.to_owned()),
        }),
        options: options(scenario),
    })
    .map(drop)
    .map_err(ours("create"))
}

fn run_ours(folder: &Path, scenario: &Scenario, plan: &Plan) -> TestCaseResult {
    let open_it =
        || open(&folder.join("ours"), Some(scenario.layout.format()), OpenMode::Write).map_err(ours("open"));
    let mut image = open_it()?;
    for (op, model) in plan.ops.iter().zip(&plan.models[1..]) {
        if *op == Op::Reopen {
            image.close().map_err(ours("close"))?;
            image = open_it()?;
        } else {
            apply(&image, op, &scenario.layout).map_err(ours(format!("{op:?}")))?;
        }
        // Before the image is closed too: what the caches say is what counts for a running guest.
        let guest = read_all(&image).map_err(ours("read"))?;
        if let Some(text) = difference(&guest, &model.guest) {
            return Err(TestCaseError::fail(format!("after {op:?}: {text} (theirs: the model)")));
        }
    }
    image.close().map_err(ours("close"))
}

fn ours(step: impl std::fmt::Display) -> impl Fn(img_core::Error) -> TestCaseError {
    move |error| TestCaseError::fail(format!("ours, {step}: {error}"))
}

fn create_theirs(folder: &Path, scenario: &Scenario, plan: &Plan, below: Option<&str>) {
    let mut run = qemu_img(
        folder,
        ["create", "-q", "-f", scenario.layout.format(), "-o", &scenario.layout.create_options()],
    );
    if let Some(format) = below {
        run = run.args(["-F", format, "-b", &format!("below.{format}")]);
    }
    run.arg("theirs").arg(plan.size_bytes.to_string()).output().success();
}

fn run_theirs(folder: &Path, format: &str, plan: &Plan) {
    let mut pending = Vec::new();
    let run_pending = |pending: &mut Vec<String>| {
        if !pending.is_empty() {
            let output = qemu_io(folder, format, "theirs", pending).output();
            assert!(!output.stdout.contains("failed"), "{output}");
            output.success();
            pending.clear();
        }
    };
    for op in &plan.ops {
        match op.command() {
            Command::Io(command) => pending.push(command),
            Command::Reopen => run_pending(&mut pending),
            Command::Img(arguments) => {
                run_pending(&mut pending);
                qemu_img(folder, arguments).arg("theirs").output().success();
            }
        }
    }
    run_pending(&mut pending);
}

fn read_by_them(folder: &Path, format: &str, image: &str, model: &Model) -> TestCaseResult {
    let check = qemu_img(folder, ["check", "-f", format, image]).output();
    prop_assert_eq!(check.code, 0, "{} checked by them: {}", image, check);
    let read = |arguments: &[&str], guest: &[u8], what: String| {
        let output = qemu_img(folder, ["convert", "-f", format, "-O", "raw"])
            .args(arguments)
            .args([image, "read.raw"])
            .output();
        prop_assert_eq!(output.code, 0, "{} {}", what, output);
        let mut bytes = fs::read(folder.join("read.raw"))?;
        // The reference reads a snapshot at the size that the disk has now.
        bytes.resize(guest.len(), 0);
        prop_assert_eq!(
            difference(&bytes, guest),
            None,
            "{} read by them (ours: the image, theirs: the model)",
            what
        );
        Ok(())
    };
    read(&[], &model.guest, image.to_owned())?;
    // The newest and the oldest snapshot: one process each.
    let mut ends: Vec<_> = model.snapshots.iter().collect();
    ends.dedup_by_key(|(name, _)| name.clone());
    for (name, guest) in ends.first().into_iter().chain(ends.last()) {
        let shown = guest.len().min(model.guest.len());
        let what = format!("{image}, snapshot {name}");
        let mut visible = guest[..shown].to_vec();
        visible.resize(guest.len(), 0);
        read(&["-l", name], &visible[..shown], what)?;
    }
    Ok(())
}

fn read_by_us(folder: &Path, format: &str, image: &str, model: &Model) -> TestCaseResult {
    let path = folder.join(image);
    let opened =
        open(&path, Some(format), OpenMode::Check { repair: false }).map_err(ours("open to check"))?;
    let mut texts = Vec::new();
    let report =
        opened.check(Repair::Nothing, &mut |finding| texts.push(finding.text)).map_err(ours("check"))?;
    prop_assert_eq!(
        (report.check_errors, report.corruptions, report.leaks),
        (0, 0, 0),
        "{} checked by us: {:#?}",
        image,
        texts
    );
    drop(opened);
    let opened = open(&path, Some(format), OpenMode::Read).map_err(ours("open"))?;
    let guest = read_all(&opened).map_err(ours("read"))?;
    prop_assert_eq!(difference(&guest, &model.guest), None, "{} read by us (theirs: the model)", image);
    drop(opened);
    for (name, guest) in &model.snapshots {
        let image_name = ImageName::parse(path.to_str().expect("UTF-8")).map_err(ours("name"))?;
        let options = open_options(Some(format), OpenMode::Read);
        let opened = Image::open_snapshot(&image_name, &options, name).map_err(ours("open snapshot"))?;
        let mut seen = read_all(&opened).map_err(ours("read snapshot"))?;
        let shown = seen.len().min(guest.len());
        seen.truncate(shown);
        prop_assert_eq!(difference(&seen, &guest[..shown]), None, "{}, snapshot {} read by us", image, name);
    }
    Ok(())
}
