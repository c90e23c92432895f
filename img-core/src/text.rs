//! Names as text, although the host's names are bytes.
//!
//! File names, and the names inside images, are UTF-8 nearly always and must not be. Everything above the
//! system calls handles them as text; a byte that is not UTF-8 stands in it as a character of its own, from
//! the last row of Unicode, which is reserved for private use. No name is lost: [`to_bytes`] gives back what
//! [`from_bytes`] took, byte for byte. Whatever prints a name does so through [`to_bytes`].

use std::{
    borrow::Cow,
    ffi::OsStr,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

/// Byte 0xNN stands as the character `FIRST + 0xNN`; only bytes from 0x80 on ever need to.
const FIRST: u32 = 0x10_FF00;

/// The byte that a character stands for.
fn stood_for(character: char) -> Option<u8> {
    let byte = u32::from(character).checked_sub(FIRST + 0x80)?;
    u8::try_from(byte + 0x80).ok()
}

/// Whether a character stands for a byte that is no text.
#[must_use]
pub fn is_raw_byte(character: char) -> bool {
    stood_for(character).is_some()
}

/// The text that `bytes` are.
#[must_use]
pub fn from_bytes(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let stand = |byte: &u8| char::from_u32(FIRST + u32::from(*byte)).expect("in the last row of Unicode");
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if is_raw_byte(character) {
                // Taken already: its own bytes stand for themselves.
                text.extend(character.encode_utf8(&mut [0; 4]).as_bytes().iter().map(stand));
            } else {
                text.push(character);
            }
        }
        text.extend(chunk.invalid().iter().map(stand));
    }
    text
}

/// The bytes that `text` stands for.
#[must_use]
pub fn to_bytes(text: &str) -> Cow<'_, [u8]> {
    if !text.chars().any(is_raw_byte) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for character in text.chars() {
        match stood_for(character) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(bytes)
}

/// The host path of that name.
#[must_use]
pub fn to_path(text: &str) -> PathBuf {
    std::ffi::OsString::from_vec(to_bytes(text).into_owned()).into()
}

/// The name of a host path.
#[must_use]
pub fn from_path(path: &Path) -> String {
    from_os(path.as_os_str())
}

/// The text of a name that the system gave.
#[must_use]
pub fn from_os(name: &OsStr) -> String {
    from_bytes(name.as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_stays_what_it_is() {
        assert_eq!(from_bytes("disk-ü.qcow2".as_bytes()), "disk-ü.qcow2");
        assert_eq!(from_bytes(b"a\xffb"), "a\u{10FFFF}b");
        assert_eq!(to_bytes("a\u{10FFFF}b"), &b"a\xffb"[..]);
        assert_eq!(to_path("x\u{10FF80}"), Path::new(OsStr::from_bytes(b"x\x80")));
        // The characters that stand for bytes survive as names, too.
        let taken = "\u{10FF80}".as_bytes();
        assert_eq!(to_bytes(&from_bytes(taken)), taken);
    }

    proptest! {
        /// Whatever the bytes, none is lost.
        #[test]
        fn bytes_come_back(bytes in any::<Vec<u8>>()) {
            let text = from_bytes(&bytes);
            prop_assert_eq!(to_bytes(&text), bytes);
        }
    }
}
