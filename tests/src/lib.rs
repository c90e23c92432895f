//! What the black-box tests share.
//!
//! The promises themselves are the files of `tests/tests/`, one each, named as a sentence. Here is what they
//! run with: the built `img` and the reference tools ([`command`]), recognisable guest data ([`pattern`]),
//! hand-made images whose every byte is under control ([`craft`]), the same command lines in two
//! directories ([`twin`]), a guest that drives a virtio device ([`guest`]), and one
//! in a virtual machine ([`vm`]).

pub mod board;
mod child;
pub mod command;
pub mod craft;
pub mod daemon;
pub mod fuzz;
pub mod golden;
pub mod guest;
pub mod hostile;
pub mod memory;
pub mod nbd;
pub mod pattern;
pub mod peer;
pub mod qmp;
pub mod queue;
pub mod scenario;
pub mod twin;
pub mod vm;
pub mod vmdk;

use std::path::Path;

use img_core::{
    Result,
    format::OpenMode,
    image::{Image, ImageName, OpenOptions},
};
use proptest::test_runner::{Config as ProptestConfig, FileFailurePersistence, RngSeed};

/// Options to open a chain with: `writeback`, with locks.
#[must_use]
pub fn open_options(format: Option<&str>, mode: OpenMode) -> OpenOptions {
    OpenOptions { format: format.map(str::to_owned), ..OpenOptions::new(mode) }
}

/// Opens an image with its chain; see [`open_options`].
///
/// # Errors
/// As [`Image::open`].
///
/// # Panics
/// When the path is not UTF-8.
pub fn open(path: &Path, format: Option<&str>, mode: OpenMode) -> Result<Image> {
    let name = ImageName::parse(path.to_str().expect("the tests' own paths are UTF-8"))?;
    Image::open(&name, &open_options(format, mode))
}

/// All guest bytes.
///
/// # Errors
/// As [`Image::read_at`].
///
/// # Panics
/// When the disk does not fit into memory.
pub fn read_all(image: &Image) -> Result<Vec<u8>> {
    let size = usize::try_from(image.virtual_size_bytes()).expect("test disks fit in memory");
    let mut guest = vec![0; size];
    image.read_at(&mut guest, 0)?;
    Ok(guest)
}

/// Repeatable property tests: `cases` of them from a fixed seed, or `$IMG_TEST_CASES` from `$IMG_TEST_SEED`.
/// What fails is kept in `tests/regressions/NAME.txt` and tried first from then on.
///
/// # Panics
/// When one of the variables is set to something that is not a number.
#[must_use]
pub fn proptest_config(cases: u32, name: &str) -> ProptestConfig {
    let seed = number_from_environment("IMG_TEST_SEED").unwrap_or(1);
    let cases = number_from_environment("IMG_TEST_CASES")
        .map_or(cases, |cases| u32::try_from(cases).expect("IMG_TEST_CASES is a number of cases"));
    let path = format!("{}/regressions/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(Box::leak(path.into_boxed_str())))),
        // Every step of shrinking runs a dozen processes.
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    }
}

/// A variable that makes a test run longer or elsewhere.
///
/// # Panics
/// When it is set to something that is not a number.
#[must_use]
pub fn number_from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, not '{text}'")))
}
