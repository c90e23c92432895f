//! The descriptor: the text that says what a disk is made of ("Virtual Disk Format 5.0", "The Descriptor File").
//!
//! It is kept as it was found. The only change ever made to it is another content id, digit by digit in its
//! place: comments, unknown keys and the disk data base stay, and no crash can leave half a descriptor.

use std::{ops::Range, path::Path};

use super::header::SECTOR_BYTES;
use crate::{Error, Result, text};

/// `parentCID` of a disk without parent.
pub(super) const NO_PARENT: u32 = u32::MAX;

/// Descriptors are read up to here (the reference's limit).
pub(super) const MAX_BYTES: u64 = (1 << 20) - 1;

/// Extents that a descriptor may name: each is an open file.
const MAX_EXTENTS: usize = 8192;

/// The longest name of a parent (the reference's limit).
const MAX_HINT_BYTES: usize = 1023;

/// How much a guest may do to an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// `RW`
    ReadWrite,
    /// `RDONLY`
    ReadOnly,
}

/// What an extent's file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtentKind {
    /// `FLAT`, `VMFS`: guest bytes as they are.
    Flat,
    /// `SPARSE`: a hosted sparse extent.
    Sparse,
    /// `VMFSSPARSE`: a COWD extent.
    VmfsSparse,
    /// `SESPARSE`.
    SeSparse,
    /// `ZERO`: no file, reads as zeroes.
    Zero,
}

/// One line of the extent description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) access: Access,
    pub(super) sectors: u64,
    pub(super) kind: ExtentKind,
    /// The type as the line has it.
    pub(super) type_name: String,
    /// Empty for [`ExtentKind::Zero`].
    pub(super) file_name: String,
    /// Where in the file a flat extent begins.
    pub(super) offset_sectors: u64,
}

/// A parsed descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) cid: u32,
    /// Where the digits of the content id stand, counted from the start of the descriptor.
    pub(super) cid_digits: Range<u64>,
    pub(super) parent_cid: u32,
    pub(super) create_type: String,
    pub(super) parent_hint: Option<String>,
}

/// Whether a file that starts with `head` is a descriptor: comments and empty lines, then `version=`.
pub(super) fn is_descriptor(head: &[u8]) -> bool {
    for line in head.split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.starts_with(b"#") || line.iter().all(|byte| *byte == b' ') {
            continue;
        }
        return matches!(line, b"version=1" | b"version=2" | b"version=3");
    }
    false
}

impl Descriptor {
    /// Parses the text up to its first NUL. `file` and `at` say where it stands.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the line that breaks the rules, or the key that is missing.
    pub(super) fn parse(bytes: &[u8], file: &Path, at: u64) -> Result<Self> {
        let corrupt = |offset: usize, structure: &'static str, expected: &str, found: &[u8]| {
            corrupt_line(file, structure, at + offset as u64, expected, found)
        };
        let (mut cid, mut parent_cid, mut create_type, mut parent_hint) = (None, None, None, None);
        for (start, whole, line) in lines(bytes) {
            if let Some((key, value)) = key_and_value(line) {
                match key {
                    b"CID" if cid.is_none() => {
                        let value = value.trim_ascii();
                        let Some(number) = hexadecimal(value) else {
                            return Err(corrupt(start, "descriptor.CID", "a hexadecimal number", line));
                        };
                        let from = start + (value.as_ptr().addr() - whole.as_ptr().addr());
                        cid = Some((number, from as u64..(from + value.len()) as u64));
                    }
                    b"parentCID" if parent_cid.is_none() => {
                        let number = hexadecimal(value.trim_ascii());
                        parent_cid = Some(number.ok_or_else(|| {
                            corrupt(start, "descriptor.parentCID", "a hexadecimal number", line)
                        })?);
                    }
                    b"createType" if create_type.is_none() => {
                        let name = quoted(value.trim_ascii());
                        create_type = Some(text::from_bytes(name.ok_or_else(|| {
                            corrupt(start, "descriptor.createType", "a name in quotation marks", line)
                        })?));
                    }
                    b"parentFileNameHint" if parent_hint.is_none() => {
                        let name = quoted(value.trim_ascii()).filter(|name| name.len() <= MAX_HINT_BYTES);
                        parent_hint = Some(text::from_bytes(name.ok_or_else(|| {
                            let expected = "a name of at most 1023 bytes in quotation marks";
                            corrupt(start, "descriptor.parentFileNameHint", expected, line)
                        })?));
                    }
                    _ => {}
                }
            }
        }
        let (cid, cid_digits) = cid.ok_or_else(|| corrupt(0, "descriptor", "a line 'CID='", b"none"))?;
        Ok(Self {
            cid,
            cid_digits,
            parent_cid: parent_cid.unwrap_or(NO_PARENT),
            create_type: create_type
                .ok_or_else(|| corrupt(0, "descriptor", "a line 'createType='", b"none"))?,
            parent_hint: parent_hint.filter(|name| !name.is_empty()),
        })
    }

    /// Another content id of as many digits, made from `random`, and its text.
    pub(super) fn new_cid(&self, random: u32) -> (u32, String) {
        let digits = usize::try_from(self.cid_digits.end - self.cid_digits.start).expect("a short number");
        let mask = if digits >= 8 { u32::MAX } else { (1 << (4 * digits)) - 1 };
        // The highest value is left out: with eight digits it means "no parent".
        let mut cid = random & mask;
        while cid == self.cid || cid == mask {
            cid = cid.wrapping_add(1) & mask;
        }
        (cid, format!("{cid:0digits$x}"))
    }
}

/// The extents that the text names. Those of an image that is an extent itself are history: nobody reads them.
///
/// # Errors
/// [`Error::Corrupt`] naming the line that breaks the rules.
pub(super) fn extents(bytes: &[u8], file: &Path, at: u64) -> Result<Vec<ExtentLine>> {
    let mut extents = Vec::new();
    for (start, _, line) in lines(bytes) {
        if key_and_value(line).is_some() {
            continue;
        }
        let wrong =
            |expected| Err(corrupt_line(file, "descriptor extent line", at + start as u64, expected, line));
        match extent_line(line) {
            Ok(None) => {}
            Ok(Some(_)) if extents.len() == MAX_EXTENTS => return wrong("at most 8192 extents"),
            Ok(Some(extent)) => extents.push(extent),
            Err(expected) => return wrong(expected),
        }
    }
    Ok(extents)
}

/// A change of the text that lies in one sector of its file: a power cut leaves the old text or the new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LineEdit {
    /// In the file.
    pub(super) at_bytes: u64,
    pub(super) bytes: Vec<u8>,
}

impl LineEdit {
    /// Gives the last extent of `text`, which stands at byte `at` and may grow to `room_bytes`, so many sectors.
    /// A longer number moves what follows; where that would reach into the next sector, a comment near by is
    /// shortened instead. `None` where there is no extent, or no way within one sector.
    pub(super) fn new(text: &[u8], at: u64, room_bytes: u64, sectors: u64) -> Option<Self> {
        let place = last_sectors(text)?;
        let digits = format!("{sectors:>width$}", width = place.len()).into_bytes();
        let longer = digits.len() - place.len();
        let len = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        let room = usize::try_from(room_bytes).ok()?;
        // The bytes that change, and what they become.
        let mut candidates = Vec::new();
        if longer == 0 {
            candidates.push((place.clone(), digits.clone()));
        } else if len + longer <= room {
            candidates.push((place.start..len, [&digits, &text[place.end..len]].concat()));
        }
        for comment in comments(&text[..len]).filter(|comment| comment.len() > longer && comment.start > 0) {
            if comment.start > place.end {
                let kept = &text[place.end..comment.end - longer];
                candidates.push((place.start..comment.end, [&digits, kept].concat()));
            } else if comment.end <= place.start {
                let kept = &text[comment.end..place.start];
                candidates.push((comment.end - longer..place.end, [kept, &digits].concat()));
            }
        }
        let is_in_one_sector = |(changed, bytes): &(Range<usize>, Vec<u8>)| {
            let start = at + changed.start as u64;
            start / SECTOR_BYTES == (start + bytes.len().max(changed.len()) as u64 - 1) / SECTOR_BYTES
        };
        let (changed, bytes) = candidates.into_iter().find(is_in_one_sector)?;
        Some(Self { at_bytes: at + changed.start as u64, bytes })
    }
}

/// Where the number of sectors of the last extent stands.
fn last_sectors(text: &[u8]) -> Option<Range<usize>> {
    let is_extent = |line: &[u8]| key_and_value(line).is_none() && matches!(extent_line(line), Ok(Some(_)));
    let (_, _, line) = lines(text).filter(|(_, _, line)| is_extent(line)).last()?;
    let (_, behind_access) = word(line);
    let (number, _) = word(behind_access);
    let start = number.as_ptr().addr() - text.as_ptr().addr();
    Some(start..start + number.len())
}

/// The comments of a text, without the ends of their lines.
fn comments(text: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut offset = 0;
    text.split_inclusive(|byte| *byte == b'\n').filter_map(move |whole| {
        let start = offset;
        offset += whole.len();
        whole.starts_with(b"#").then(|| start..start + whole.trim_ascii_end().len())
    })
}

/// The lines up to the first NUL that are neither empty nor comments: where each begins, all of it, and what is
/// left of it without white space around.
fn lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8], &[u8])> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let mut offset = 0;
    text.split_inclusive(|byte| *byte == b'\n')
        .map(move |whole| {
            let start = offset;
            offset += whole.len();
            (start, whole, whole.trim_ascii())
        })
        .filter(|(_, _, line)| !line.is_empty() && !line.starts_with(b"#"))
}

fn corrupt_line(file: &Path, structure: &'static str, at: u64, expected: &str, found: &[u8]) -> Error {
    let found = String::from_utf8_lossy(&found[..found.len().min(80)]);
    Error::corrupt(file, structure, at, expected, format_args!("'{found}'"))
}

/// `key = value`, for lines whose first word is followed by an equals sign.
fn key_and_value(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let equals = line.iter().position(|byte| *byte == b'=')?;
    let key = line[..equals].trim_ascii();
    let is_key = !key.is_empty() && key.iter().all(|byte| !byte.is_ascii_whitespace() && *byte != b'"');
    is_key.then_some((key, &line[equals + 1..]))
}

/// A hexadecimal number of at most 8 digits that mean something, and at most 16 in all.
fn hexadecimal(value: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(value).ok()?;
    let are_digits =
        !digits.is_empty() && digits.len() <= 16 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if are_digits { u32::from_str_radix(digits, 16).ok() } else { None }
}

/// What stands between two quotation marks.
fn quoted(value: &[u8]) -> Option<&[u8]> {
    let rest = value.strip_prefix(b"\"")?;
    let end = rest.iter().position(|byte| *byte == b'"')?;
    Some(&rest[..end])
}

/// The next word, and what follows it.
fn word(line: &[u8]) -> (&[u8], &[u8]) {
    let line = line.trim_ascii_start();
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    line.split_at(end)
}

/// `ACCESS SECTORS TYPE "NAME" [OFFSET]`; `None` for a line that is no extent.
fn extent_line(line: &[u8]) -> Result<Option<ExtentLine>, &'static str> {
    let (access, rest) = word(line);
    let access = match access {
        b"RW" => Access::ReadWrite,
        b"RDONLY" => Access::ReadOnly,
        b"NOACCESS" => return Err("an extent that may be read"),
        _ => return Ok(None),
    };
    let (sectors, rest) = word(rest);
    let sectors = decimal(sectors)
        .filter(|sectors| (1..=super::header::MAX_CAPACITY_SECTORS).contains(sectors))
        .ok_or("a number of sectors")?;
    let (type_name, rest) = word(rest);
    let kind = match type_name {
        b"FLAT" | b"VMFS" => ExtentKind::Flat,
        b"SPARSE" => ExtentKind::Sparse,
        b"VMFSSPARSE" => ExtentKind::VmfsSparse,
        b"SESPARSE" => ExtentKind::SeSparse,
        b"ZERO" => ExtentKind::Zero,
        _ => return Err("an extent type of FLAT, SPARSE, VMFS, VMFSSPARSE, SESPARSE or ZERO"),
    };
    let rest = rest.trim_ascii_start();
    let (file_name, rest) = match (kind, quoted(rest)) {
        (ExtentKind::Zero, None) if rest.is_empty() => (&b""[..], &b""[..]),
        (ExtentKind::Zero, None) | (_, None) => return Err("a file name in quotation marks"),
        (_, Some(name)) => (name, &rest[name.len() + 2..]),
    };
    if file_name.is_empty() && kind != ExtentKind::Zero {
        return Err("a file name that is not empty");
    }
    let (offset, rest) = word(rest);
    if !rest.trim_ascii().is_empty() && kind != ExtentKind::Flat {
        return Err("nothing behind the file name");
    }
    let is_flat = kind == ExtentKind::Flat;
    let offset_sectors = match offset {
        b"" if is_flat && type_name == b"FLAT" => return Err("an offset behind the file name"),
        b"" => 0,
        number if is_flat => decimal(number)
            .filter(|offset| *offset <= super::header::MAX_CAPACITY_SECTORS)
            .ok_or("an offset in sectors")?,
        _ => return Err("nothing behind the file name"),
    };
    Ok(Some(ExtentLine {
        access,
        sectors,
        kind,
        type_name: text::from_bytes(type_name),
        file_name: text::from_bytes(file_name),
        offset_sectors,
    }))
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\nversion=1\nCID=123abcde\nparentCID=ffffffff\n\
                        createType=\"twoGbMaxExtentSparse\"\nx.unknown = \"kept\"\n\n\
                        RW 4192256 SPARSE \"a b-s001.vmdk\"\nRW 63 ZERO\nRDONLY 10 FLAT \"f\" 7\n\
                        RW 1 VMFS \"v\"\n#DDB\nddb.adapterType = \"ide\"\n";

    fn parse(text: &str) -> Result<Descriptor> {
        Descriptor::parse(text.as_bytes(), Path::new("d"), 512)
    }

    #[test]
    fn the_parts_of_a_descriptor_are_found() {
        let descriptor = parse(TEXT).expect("valid");
        assert_eq!((descriptor.cid, descriptor.parent_cid), (0x123a_bcde, NO_PARENT));
        assert_eq!(descriptor.create_type, "twoGbMaxExtentSparse");
        assert_eq!(descriptor.parent_hint, None);
        let extents = extents(TEXT.as_bytes(), Path::new("d"), 512).expect("valid");
        let found: Vec<_> = extents
            .iter()
            .map(|e| (e.access, e.sectors, e.kind, e.file_name.as_str(), e.offset_sectors))
            .collect();
        assert_eq!(
            found,
            [
                (Access::ReadWrite, 4_192_256, ExtentKind::Sparse, "a b-s001.vmdk", 0),
                (Access::ReadWrite, 63, ExtentKind::Zero, "", 0),
                (Access::ReadOnly, 10, ExtentKind::Flat, "f", 7),
                (Access::ReadWrite, 1, ExtentKind::Flat, "v", 0),
            ]
        );
    }

    #[test]
    fn a_new_content_id_has_as_many_digits_and_is_another() {
        let at = |text: &str| {
            let descriptor = parse(text).expect("valid");
            let digits = descriptor.cid_digits.clone();
            let digits = usize::try_from(digits.start).unwrap()..usize::try_from(digits.end).unwrap();
            (descriptor, text[digits].to_owned())
        };
        let (descriptor, digits) = at(TEXT);
        assert_eq!(digits, "123abcde");
        assert_eq!(descriptor.new_cid(7).1, "00000007");
        assert_eq!(descriptor.new_cid(0x123a_bcde).1, "123abcdf");
        assert_eq!(descriptor.new_cid(u32::MAX).1, "00000000");
        let (descriptor, digits) = at("CID = 1 \r\ncreateType=\"x\"\r\n");
        assert_eq!(digits, "1");
        assert_eq!(descriptor.new_cid(0xff1), (2, "2".to_owned()));
    }

    #[test]
    fn what_breaks_the_rules_is_named() {
        for (text, expected) in [
            ("createType=\"x\"\n", "a line 'CID='"),
            ("CID=1\n", "a line 'createType='"),
            ("CID=xyz\ncreateType=\"x\"\n", "a hexadecimal number"),
            ("CID=123456789\ncreateType=\"x\"\n", "a hexadecimal number"),
            ("CID=1\ncreateType=x\n", "a name in quotation marks"),
            ("CID=1\ncreateType=\"x\"\nRW 0 FLAT \"a\" 0\n", "a number of sectors"),
            ("CID=1\ncreateType=\"x\"\nRW 99999999999999999999 FLAT \"a\" 0\n", "a number of sectors"),
            ("CID=1\ncreateType=\"x\"\nRW 1 FLAT \"a\"\n", "an offset behind the file name"),
            ("CID=1\ncreateType=\"x\"\nRW 1 FLAT \"a\" -1\n", "an offset in sectors"),
            ("CID=1\ncreateType=\"x\"\nRW 1 SPARSE \"a\n", "a file name in quotation marks"),
            ("CID=1\ncreateType=\"x\"\nRW 1 SPARSE \"\"\n", "a file name that is not empty"),
            ("CID=1\ncreateType=\"x\"\nRW 1 VMFSRDM \"a\"\n", "an extent type of"),
            ("CID=1\ncreateType=\"x\"\nNOACCESS 1 ZERO\n", "an extent that may be read"),
            ("CID=1\ncreateType=\"x\"\nparentFileNameHint=\"a\n", "a name of at most 1023 bytes"),
        ] {
            let extents = |_| extents(text.as_bytes(), Path::new("d"), 0);
            let error = parse(text).and_then(extents).expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    /// The text of [`TEXT`]'s kind after an edit, and the edit.
    fn edited(text: &str, at: u64, room_bytes: u64, sectors: u64) -> Option<(String, LineEdit)> {
        let edit = LineEdit::new(text.as_bytes(), at, room_bytes, sectors)?;
        let mut bytes = text.as_bytes().to_vec();
        let start = usize::try_from(edit.at_bytes - at).unwrap();
        bytes.resize(bytes.len().max(start + edit.bytes.len()), 0);
        bytes[start..start + edit.bytes.len()].copy_from_slice(&edit.bytes);
        Some((String::from_utf8(bytes).unwrap(), edit))
    }

    #[test]
    fn the_last_extent_gets_another_number_within_one_sector() {
        let sectors = |text: &str| {
            let extents = extents(text.as_bytes(), Path::new("d"), 0).expect("valid");
            extents.iter().map(|extent| extent.sectors).collect::<Vec<_>>()
        };
        // As long as before, in its place.
        let (text, edit) = edited(TEXT, 512, 1024, 7).expect("possible");
        assert_eq!((sectors(&text), edit.bytes.len()), (vec![4_192_256, 63, 10, 7], 1));
        // Longer: what follows moves.
        let (text, _) = edited(TEXT, 512, 1024, 12_345).expect("possible");
        assert_eq!(sectors(&text), [4_192_256, 63, 10, 12_345]);
        assert!(text.ends_with("RW 12345 VMFS \"v\"\n#DDB\nddb.adapterType = \"ide\"\n"), "{text}");
        // No room: a comment behind or before gives it.
        let long = TEXT.replace("#DDB", "# The disk data base");
        let (text, _) = edited(&long, 512, long.len() as u64, 12_345).expect("possible");
        assert_eq!(text, long.replace("RW 1 VMFS", "RW 12345 VMFS").replace("data base", "data "));
        let before = long
            .replace("\n\nRW 4192256", "\n# Extents are here\nRW 4192256")
            .replace("# The disk data base\n", "");
        let (text, _) = edited(&before, 512, before.len() as u64, 12_345).expect("possible");
        assert_eq!(text, before.replace("RW 1 VMFS", "RW 12345 VMFS").replace("here", ""));
        assert_eq!(edited(TEXT, 512, TEXT.len() as u64, 123_456), None);
        // A change that would reach into the next sector is none.
        let ends_behind = 512 - TEXT.find("VMFS").unwrap() as u64;
        assert_eq!(edited(TEXT, ends_behind, 1024, 123_456), None);
    }

    #[test]
    fn probing_looks_for_the_version_behind_comments() {
        for (head, expected) in [
            (&b"# Disk DescriptorFile\nversion=1\n"[..], true),
            (b"#x\r\n\r\n  \r\nversion=3\r\n", true),
            (b"version=2\n", true),
            (b"version=4\n", false),
            (b"Version=1\n", false),
            (b"# only\n", false),
            (b"", false),
            (b"CID=1\nversion=1\n", false),
        ] {
            assert_eq!(is_descriptor(head), expected, "{}", String::from_utf8_lossy(head));
        }
    }
}
