//! Signals that end the run in good order: images are closed, and the terminal is as it was.

use std::{io::Read, sync::Arc, thread};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    low_level::pipe,
};
use vmm_runner::{Error, Result, control::Runner};

/// Ends the run when the process is asked to end.
pub(crate) fn end_on_termination(runner: Arc<Runner>) -> Result<()> {
    let what = "a pipe for signals";
    let (mut asked, tell) = std::io::pipe().map_err(Error::host(what))?;
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        pipe::register(signal, tell.try_clone().map_err(Error::host(what))?).map_err(Error::host(what))?;
    }
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if asked.read(&mut [0]).is_ok() {
                runner.quit("host-signal");
            }
        })
        .map(drop)
        .map_err(Error::host("a thread for signals"))
}
