//! Fuzz targets as plain functions: the same code runs under cargo-fuzz (`fuzz/`), over the kept seeds, and in a
//! bounded loop of random inputs in the ordinary tests.
//!
//! An input is not the image itself but a script of what is broken in a valid one, so that mutation goes
//! where the parsers look instead of drowning in magic numbers. A target returns when all is well and panics
//! when the library broke a promise; an error from the library is an answer.

mod machine;
mod nbd;
mod ring;
mod script;
mod served;
mod targets;
mod vhost_user;
mod vmdk;
mod vpc;

pub use machine::machine;
pub use nbd::nbd;
pub use ring::ring;
pub use targets::{check, map, open, read, repair, write};
pub use vhost_user::vhost_user;
pub use vmdk::vmdk;
pub use vpc::vpc;

use crate::pattern::Random;

/// A target by name, for the seeds' folders and the command line.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 12] = [
    ("open", open),
    ("map", map),
    ("read", read),
    ("check", check),
    ("repair", repair),
    ("write", write),
    ("nbd", nbd),
    ("vmdk", vmdk),
    ("vpc", vpc),
    ("ring", ring),
    ("machine", machine),
    ("vhost_user", vhost_user),
];

/// The `index`th random input: the length varies, and small numbers are common, as they are in scripts.
#[must_use]
pub fn random_input(index: u64) -> Vec<u8> {
    let mut random = Random::new(index);
    let len = random.below(160);
    (0..len)
        .map(|_| {
            let byte = random.next().to_le_bytes()[0];
            if random.below(3) == 0 { byte % 8 } else { byte }
        })
        .collect()
}

/// The image that an input describes, to look at with other tools.
#[must_use]
pub fn image_bytes(input: &[u8]) -> Vec<u8> {
    script::Script::new(input).image().bytes
}
