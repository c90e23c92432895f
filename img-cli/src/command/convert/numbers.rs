//! The numbers on the command line, read.

use super::Args;
use crate::{error::Failure, size};

/// See the module.
pub(super) struct Numbers {
    pub(super) sparse_bytes: Option<u64>,
    pub(super) rate_bytes: Option<u64>,
    pub(super) threads: Option<usize>,
    pub(super) level: Option<i32>,
}

/// The largest `-S` ("a multiple of 512 up to 16 MiB").
const MAX_SPARSE_BYTES: u64 = 16 << 20;

impl Numbers {
    pub(super) fn read(args: &Args) -> Result<Self, Failure> {
        let bytes = |what, text: &Option<String>| match text {
            Some(text) => size::argument(what, text, size::MAX_BYTES).map(Some).map_err(Failure::new),
            None => Ok(None),
        };
        let sparse_bytes = bytes("buffer size for sparse output", &args.sparse_size)?;
        if sparse_bytes.is_some_and(|bytes| bytes % 512 != 0 || bytes > MAX_SPARSE_BYTES) {
            return Err(Failure::new(format!(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to \
                 {MAX_SPARSE_BYTES}. Select 0 to disable sparse detection (fully allocates output)."
            )));
        }
        let threads = match &args.parallel {
            Some(text) => {
                let count = size::count("number of coroutines", text, 1, 16).map_err(Failure::new)?;
                Some(usize::try_from(count).unwrap_or(16))
            }
            None => None,
        };
        let level = match &args.level {
            Some(text) => {
                Some(text.parse().map_err(|_| Failure::new(format!("Invalid level specified: '{text}'.")))?)
            }
            None => None,
        };
        Ok(Self { sparse_bytes, rate_bytes: bytes("rate limit", &args.rate)?, threads, level })
    }
}
