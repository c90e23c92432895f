//! The commands, one file each: parse, call the library, print.
//!
//! Each has an `Args` with clap's definitions, which make the parser, the help, the manual page and the
//! completions, and a `run` that returns the exit code. What several share stands in [`args`](crate::args).
//! The first line of each `Args`' comment is its line in the list of commands.
//! None knows anything about a format.

pub(crate) mod amend;
pub(crate) mod bench;
pub(crate) mod bitmap;
pub(crate) mod check;
pub(crate) mod commit;
pub(crate) mod compare;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod create;
pub(crate) mod dd;
pub(crate) mod info;
pub(crate) mod inspect;
pub(crate) mod man;
pub(crate) mod map;
pub(crate) mod measure;
pub(crate) mod rebase;
pub(crate) mod resize;
pub(crate) mod snapshot;
