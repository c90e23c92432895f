//! Lanes from outside: every request, on several formats.

mod client;
mod control;
mod crash;
mod direct;
mod fill;
mod model;
mod requests;

pub(crate) use client::image;
