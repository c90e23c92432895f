#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| img_tests::fuzz::vpc(input));
