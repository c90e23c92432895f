//! Lanes from outside: every request, on several formats.

mod client;
mod control;
mod model;
mod requests;
