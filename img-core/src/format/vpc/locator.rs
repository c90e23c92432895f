//! Parent locators: the names by which a differencing disk knows its parent ("Parent Locator Entry").
//!
//! Programs write what their system calls the file: relative and absolute Windows paths in UTF-16
//! (`W2ru`, `W2ku`), in an eight-bit code page (`Wi2r`, `Wi2k`), file URLs (`MacX`), and the bare name in the
//! header. [`candidates`] turns them into host names, those first that say most about where the file is from
//! here. A name is only ever a file's: whatever looks like a protocol in it is part of the file's name.

use super::header::{Header, RawHeader, RawLocator};
use crate::{Error, Result, storage::Storage, text};

/// Relative path, UTF-16, little-endian.
pub(super) const RELATIVE_UTF16: [u8; 4] = *b"W2ru";
/// Absolute path, UTF-16, little-endian.
pub(super) const ABSOLUTE_UTF16: [u8; 4] = *b"W2ku";
/// File URL, UTF-8.
pub(super) const FILE_URL: [u8; 4] = *b"MacX";
/// Relative path in an eight-bit code page (deprecated).
const RELATIVE_BYTES: [u8; 4] = *b"Wi2r";
/// Absolute path in an eight-bit code page (deprecated).
const ABSOLUTE_BYTES: [u8; 4] = *b"Wi2k";

/// The longest name that is read: 32767 UTF-16 units, the longest path of Windows.
const MAX_NAME_BYTES: u32 = 65534;

/// The host names under which the parent may be found, best first, none twice.
///
/// # Errors
/// [`Error::Corrupt`] when no name can be made out.
pub(super) fn candidates(storage: &dyn Storage, header: &Header) -> Result<Vec<String>> {
    let (mut near, mut far) = (Vec::new(), Vec::new());
    let mut broken = None;
    for (index, locator) in header.raw.locators.iter().enumerate() {
        match read_name(storage, header, index, locator) {
            Ok(Some(Name { host, by_relative_path: true })) => near.extend(host),
            Ok(Some(Name { host, by_relative_path: false })) => far.extend(host),
            Ok(None) => {}
            // Another one may do; what was wrong with the first is told if none does.
            Err(error) => broken = broken.or(Some(error)),
        }
    }
    let bare = decode_utf16(&header.raw.parent_name, Order::Big);
    let bare = bare.split('\0').next().unwrap_or_default();
    far.extend(from_windows(bare));
    let mut names: Vec<String> = Vec::new();
    for name in near.into_iter().chain(far) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if !names.is_empty() {
        return Ok(names);
    }
    Err(broken.unwrap_or_else(|| {
        let offset = std::mem::offset_of!(RawHeader, locators) as u64;
        let at = header.at_bytes + offset;
        Error::corrupt(storage.path(), "header.parent_locators", at, "a name of the parent", "none")
    }))
}

/// What one locator says.
struct Name {
    /// Host names, best first.
    host: Vec<String>,
    /// Whether it leads from this file to the parent, and not from some root.
    by_relative_path: bool,
}

fn read_name(
    storage: &dyn Storage,
    header: &Header,
    index: usize,
    locator: &RawLocator,
) -> Result<Option<Name>> {
    let code = locator.platform_code;
    let known = [RELATIVE_UTF16, ABSOLUTE_UTF16, FILE_URL, RELATIVE_BYTES, ABSOLUTE_BYTES];
    if !known.contains(&code) {
        return Ok(None);
    }
    let Some(bytes) = read_bytes(storage, header, index, locator)? else { return Ok(None) };
    let host = match code {
        RELATIVE_UTF16 | ABSOLUTE_UTF16 => from_windows(&decode_utf16(&bytes, Order::Little)),
        FILE_URL => from_url(&bytes).into_iter().collect(),
        _ => from_windows(&text::from_bytes(&bytes)),
    };
    let is_url = code == FILE_URL && host.first().is_some_and(|name| !name.starts_with('/'));
    Ok(Some(Name { host, by_relative_path: is_url || code == RELATIVE_UTF16 || code == RELATIVE_BYTES }))
}

/// The bytes of a name without padding; `None` where there are none.
fn read_bytes(
    storage: &dyn Storage,
    header: &Header,
    index: usize,
    locator: &RawLocator,
) -> Result<Option<Vec<u8>>> {
    let (at, len) = (locator.data_offset.get(), locator.data_length.get());
    let file_bytes = storage.len_bytes()?;
    let is_inside = at.checked_add(u64::from(len)).is_some_and(|end| end <= file_bytes);
    if !is_inside || len > MAX_NAME_BYTES {
        let field = std::mem::offset_of!(RawHeader, locators) + index * size_of::<RawLocator>();
        return Err(Error::corrupt(
            storage.path(),
            "header.parent_locators",
            header.at_bytes + field as u64,
            format_args!("at most {MAX_NAME_BYTES} bytes before the end of {file_bytes}"),
            format_args!("{len} bytes at {at:#x}"),
        ));
    }
    let mut bytes = vec![0; len as usize];
    storage.read_at(&mut bytes, at)?;
    while bytes.last() == Some(&0) && (locator.platform_code[0] != b'W' || bytes.len() % 2 == 1) {
        bytes.pop();
    }
    Ok((!bytes.is_empty()).then_some(bytes))
}

/// The order of the bytes of UTF-16 units.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Big,
    Little,
}

/// Text up to the end of the bytes; units that are no text become replacement characters. Some programs wrote
/// locators in the other order: a name whose units would all be plain characters in that order is read in it.
fn decode_utf16(bytes: &[u8], order: Order) -> String {
    let pairs = bytes.as_chunks::<2>().0;
    let swapped = order == Order::Little && !pairs.is_empty() && pairs.iter().all(|pair| pair[0] == 0);
    let unit = |pair: &[u8; 2]| match order {
        Order::Little if !swapped => u16::from_le_bytes(*pair),
        _ => u16::from_be_bytes(*pair),
    };
    let text: String = char::decode_utf16(pairs.iter().map(unit))
        .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect();
    text.trim_end_matches('\0').to_owned()
}

/// Host names for a Windows path. What is relative stays so. An absolute path means nothing here unless it has
/// neither drive nor server, as programs on other systems write it: else only the last part counts, for a file
/// that stands beside the image.
fn from_windows(path: &str) -> Vec<String> {
    let path = path.replace('\\', "/");
    let last = path.rsplit('/').next().unwrap_or_default();
    let last = last.rsplit_once(':').map_or(last, |(_, name)| name);
    let has_drive = path.as_bytes().get(1) == Some(&b':') && path.as_bytes()[0].is_ascii_alphabetic();
    let mut names = Vec::new();
    if !has_drive && !path.starts_with("//") && !path.is_empty() {
        names.push(path.clone());
    }
    if (has_drive || path.starts_with('/')) && !last.is_empty() {
        names.push(last.to_owned());
    }
    names.into_iter().filter_map(|name| plain(&name)).collect()
}

/// The host name of a file URL. The host part is nobody's business, except for the dots of a relative path,
/// which stand in its place.
fn from_url(url: &[u8]) -> Option<String> {
    let rest = url.strip_prefix(b"file://".as_slice())?;
    let is_relative = rest.starts_with(b"./") || rest.starts_with(b"../");
    let path = match rest.iter().position(|&byte| byte == b'/') {
        _ if is_relative => rest,
        Some(slash) => &rest[slash..],
        None => return None,
    };
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, behind)) = rest.split_first() {
        let digits = behind.first_chunk::<2>().and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(escaped) if byte == b'%' => {
                bytes.push(escaped);
                rest = &behind[2..];
            }
            _ => {
                bytes.push(byte);
                rest = behind;
            }
        }
    }
    plain(&text::from_bytes(&bytes))
}

/// `name` as the name of a file, whatever characters it has; `None` where it cannot be one.
fn plain(name: &str) -> Option<String> {
    let last = name.rsplit('/').next().unwrap_or_default();
    if matches!(last, "" | "." | "..") || name.contains('\0') {
        return None;
    }
    // A colon before the first slash would be taken for a protocol.
    let name = name.strip_prefix("./").unwrap_or(name);
    let has_colon = name.split('/').next().is_some_and(|first| first.contains(':'));
    Some(if has_colon { format!("./{name}") } else { name.to_owned() })
}

/// What is recorded of a parent.
pub(super) struct Recorded {
    /// Locators: platform code and bytes.
    pub(super) locators: Vec<([u8; 4], Vec<u8>)>,
    /// The bare name for the header.
    pub(super) parent_name: [u8; 512],
}

/// How the parent called `name` is recorded: as a Windows path, where `name` can be said as one, and as a URL.
///
/// # Errors
/// [`Error::Invalid`] when the name is too long.
pub(super) fn record(name: &str) -> Result<Recorded> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let is_absolute = name.starts_with('/');
    let from_here = if is_absolute || name.starts_with("./") || name.starts_with("../") {
        name.to_owned()
    } else {
        format!("./{name}")
    };
    let mut locators = Vec::new();
    if !name.contains('\\') && !name.chars().any(text::is_raw_byte) {
        let windows = from_here.replace('/', "\\");
        let code = if is_absolute { ABSOLUTE_UTF16 } else { RELATIVE_UTF16 };
        locators.push((code, windows.encode_utf16().flat_map(u16::to_le_bytes).collect()));
    }
    let mut url = b"file://".to_vec();
    for &byte in text::to_bytes(&from_here).iter() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            url.push(byte);
        } else {
            url.extend(format!("%{byte:02X}").bytes());
        }
    }
    locators.push((FILE_URL, url));
    if locators.iter().any(|(_, bytes)| bytes.len() > MAX_NAME_BYTES as usize) {
        return Err(Error::Invalid("the name of the backing file is too long".to_owned()));
    }
    let mut parent_name = [0; 512];
    let last = name.rsplit('/').next().unwrap_or_default();
    for (pair, unit) in parent_name.as_chunks_mut::<2>().0.iter_mut().zip(last.encode_utf16()) {
        *pair = unit.to_be_bytes();
    }
    Ok(Recorded { locators, parent_name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_paths_become_host_names() {
        for (windows, host) in [
            (r".\parent.vhd", &["parent.vhd"][..]),
            (r"..\base\parent.vhd", &["../base/parent.vhd"]),
            (r"parent.vhd", &["parent.vhd"]),
            (r"C:\VMs\parent.vhd", &["parent.vhd"]),
            (r"C:parent.vhd", &["parent.vhd"]),
            (r"\\server\share\parent.vhd", &["parent.vhd"]),
            (r"\home\me\parent.vhd", &["/home/me/parent.vhd", "parent.vhd"]),
            ("/home/me/parent.vhd", &["/home/me/parent.vhd", "parent.vhd"]),
            (r"nbd:host:10809", &["./nbd:host:10809"]),
            ("json:{}", &["./json:{}"]),
            (r".\", &[]),
            (r"C:\", &[]),
            ("", &[]),
        ] {
            assert_eq!(from_windows(windows), host, "{windows}");
        }
    }

    #[test]
    fn urls_become_host_names() {
        for (url, host) in [
            ("file:///vm/a%20b.vhd", Some("/vm/a b.vhd")),
            ("file://localhost/vm/a.vhd", Some("/vm/a.vhd")),
            ("file://./a.vhd", Some("a.vhd")),
            ("file://../a%25.vhd", Some("../a%.vhd")),
            ("file:///vm/%", Some("/vm/%")),
            ("http://host/a.vhd", None),
            ("file://host", None),
            ("file:///", None),
        ] {
            assert_eq!(from_url(url.as_bytes()).as_deref(), host, "{url}");
        }
    }

    #[test]
    fn either_order_of_bytes_is_read() {
        let little: Vec<u8> = r".\ä.vhd".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(decode_utf16(&little, Order::Little), r".\ä.vhd");
        let big: Vec<u8> = r".\a.vhd".encode_utf16().flat_map(u16::to_be_bytes).collect();
        assert_eq!(decode_utf16(&big, Order::Little), r".\a.vhd");
        assert_eq!(decode_utf16(&[0, 0xd8, 0x61, 0], Order::Little), "\u{fffd}a");
    }

    #[test]
    fn what_is_recorded_is_found_again() {
        for name in ["p.vhd", "../x/p.vhd", "/abs/p.vhd", "a b%.vhd", "back\\slash.vhd", "\u{10FFFF}.vhd"] {
            let recorded = record(name).unwrap();
            let found = recorded.locators.iter().flat_map(|(code, bytes)| match *code {
                FILE_URL => from_url(bytes).into_iter().collect(),
                _ => from_windows(&decode_utf16(bytes, Order::Little)),
            });
            let found: Vec<String> = found.collect();
            assert_eq!(found.first().map(String::as_str), Some(name), "{found:?}");
        }
    }
}
