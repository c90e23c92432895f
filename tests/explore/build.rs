//! Tells the sources of `img-core` that they are built to be explored.

#![allow(clippy::print_stdout, reason = "that is how Cargo is told")]

fn main() {
    println!("cargo::rustc-cfg=explore");
}
