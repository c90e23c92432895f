//! A pseudo terminal whose users come and go.
//!
//! While nobody has it open, what the guest says is lost, as on a line whose cable is pulled: a guest does not wait for
//! a user who may never come. Somebody who has it open and does not read is waited for.

use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{self, Mode, OFlags, inotify},
    io::Errno,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

use crate::{Error, Result};

/// An event of inotify without a name, as one of a file is (inotify(7)).
const EVENT_BYTES: usize = 16;

/// Where the guest's bytes go.
#[derive(Debug)]
pub(super) struct Screen(Arc<OwnedFd>);

/// Where the user's come from.
#[derive(Debug)]
pub(super) struct Keyboard {
    controller: Arc<OwnedFd>,
    /// Readable when somebody has opened the terminal.
    opened: OwnedFd,
}

/// A new pseudo terminal, raw, and the name under which users open it.
pub(super) fn open() -> Result<(Screen, Keyboard, PathBuf)> {
    make().map_err(Error::host("a pseudo terminal"))
}

fn make() -> rustix::io::Result<(Screen, Keyboard, PathBuf)> {
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&controller)?;
    unlockpt(&controller)?;
    let name = ptsname(&controller, Vec::new())?;
    let name = Path::new(OsStr::from_bytes(name.to_bytes())).to_owned();
    // The terminal tells whether somebody has it open once somebody had.
    drop(fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?);
    let mut modes = tcgetattr(&controller)?;
    modes.make_raw();
    tcsetattr(&controller, OptionalActions::Now, &modes)?;
    fs::fcntl_setfl(&controller, fs::fcntl_getfl(&controller)? | OFlags::NONBLOCK)?;
    let opened = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    inotify::add_watch(&opened, &name, inotify::WatchFlags::OPEN)?;
    let controller = Arc::new(controller);
    Ok((Screen(Arc::clone(&controller)), Keyboard { controller, opened }, name))
}

/// Waits for `what`, or until nobody has the terminal open; whether somebody has.
fn wait(controller: &OwnedFd, what: PollFlags) -> rustix::io::Result<bool> {
    let mut fds = [PollFd::new(controller, what)];
    poll(&mut fds, None)?;
    Ok(!fds[0].revents().contains(PollFlags::HUP))
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        while wait(&self.0, PollFlags::OUT)? {
            match rustix::io::write(&*self.0, bytes) {
                Err(Errno::AGAIN) => {}
                result => return Ok(result?),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Keyboard {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(&*self.controller, &mut *buffer) {
                Err(Errno::AGAIN) => {
                    wait(&self.controller, PollFlags::IN)?;
                }
                // Nobody has it open: until the next one opens it.
                Err(Errno::IO) => {
                    rustix::io::read(self.opened.as_fd(), &mut [0; EVENT_BYTES])?;
                }
                result => return Ok(result?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};

    use super::*;

    fn user(name: &Path) -> File {
        OpenOptions::new().read(true).write(true).open(name).expect("it exists")
    }

    /// Far more than any buffer holds.
    fn say_much(screen: &mut Screen) {
        screen.write_all(&[b'.'; 1 << 20]).expect("nobody is waited for");
    }

    #[test]
    fn users_come_and_go() {
        let (mut screen, mut keyboard, name) = open().expect("a pseudo terminal");
        for typed in [*b"root\r", *b"exit\r"] {
            say_much(&mut screen);
            let mut user = user(&name);
            screen.write_all(b"login: ").expect("room");
            let mut seen = [0; 7];
            user.read_exact(&mut seen).expect("what was written");
            assert_eq!(&seen, b"login: ");
            user.write_all(&typed).expect("room");
            let mut heard = [0; 5];
            keyboard.read_exact(&mut heard).expect("what was typed");
            assert_eq!(heard, typed);
        }
    }

    #[test]
    fn who_waits_for_a_key_hears_all_users() {
        let (_screen, mut keyboard, name) = open().expect("a pseudo terminal");
        let heard = std::thread::spawn(move || {
            let mut heard = [0; 3];
            keyboard.read_exact(&mut heard).map(|()| heard)
        });
        for key in b"abc" {
            user(&name).write_all(&[*key]).expect("room");
        }
        assert_eq!(&heard.join().expect("no panic").expect("it goes on"), b"abc");
    }

    /// The buffer is full, and then the user leaves without having read it.
    #[test]
    fn a_user_who_leaves_is_waited_for_no_longer() {
        let (mut screen, _keyboard, name) = open().expect("a pseudo terminal");
        let mut user = user(&name);
        let said = std::thread::spawn(move || say_much(&mut screen));
        user.read_exact(&mut [0; 4096]).expect("more than a buffer holds is said");
        drop(user);
        said.join().expect("it ends");
    }
}
