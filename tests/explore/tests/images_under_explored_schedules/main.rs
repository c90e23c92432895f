//! Threads on one image, in schedules that are chosen: at each lock and each atomic of `img-core`, and at each
//! operation on the file, another one may go on. What the library promises holds in all of them.
//!
//! Half of the schedules are random; the others are mostly in order, with few preemptions, in places drawn so that each
//! bug that takes no more of them is found with a known probability (PCT). `IMG_TEST_CASES` says how many are tried,
//! and `IMG_TEST_SEED` which.

mod every_format;
mod harness;
mod jobs;
mod qcow2;
mod vmdk;
