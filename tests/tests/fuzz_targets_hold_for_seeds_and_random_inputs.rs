//! Every fuzz target over its kept seeds (`fuzz/seeds/TARGET/`) and over a fixed run of random inputs.
//!
//! A longer run without cargo-fuzz: `IMG_TEST_CASES=1000000 IMG_TEST_SEED=7 cargo test --release -p img-tests
//! --test fuzz_targets_hold_for_seeds_and_random_inputs`.

use std::{fs, panic, path::Path};

use img_tests::{fuzz, number_from_environment};

/// Runs `target` on `input`; a panic becomes a message that tells how to see it again.
fn holds(name: &str, target: fn(&[u8]), input: &[u8], origin: &str) -> Result<(), String> {
    panic::catch_unwind(|| target(input)).map_err(|_| format!("{name} fails for {origin}: {input:?}"))
}

#[test]
fn seeds_hold() {
    let seeds = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/seeds"));
    let mut tried = 0;
    for (name, target) in fuzz::TARGETS {
        for entry in fs::read_dir(seeds.join(name)).expect("every target has seeds") {
            let path = entry.expect("readable").path();
            let input = fs::read(&path).expect("readable");
            holds(name, target, &input, &path.display().to_string()).unwrap();
            tried += 1;
        }
    }
    assert!(tried >= fuzz::TARGETS.len());
}

#[test]
fn random_inputs_hold() {
    let cases = number_from_environment("IMG_TEST_CASES").unwrap_or(1500);
    let first = number_from_environment("IMG_TEST_SEED").unwrap_or(1) << 32;
    for (name, target) in fuzz::TARGETS {
        let failures: Vec<String> = (first..first + cases)
            .filter_map(|index| {
                holds(name, target, &fuzz::random_input(index), &format!("input {index}")).err()
            })
            .take(3)
            .collect();
        assert!(failures.is_empty(), "{failures:#?}");
    }
}
