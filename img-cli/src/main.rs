//! `img`: make, inspect, convert and check disk images.
fn main() {}
