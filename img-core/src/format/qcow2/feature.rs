//! Feature bits of version 3 headers, and the table that names them ("Feature name table").

/// "incompatible_features": a reader that does not know a set bit must not open the image.
pub(super) mod incompatible {
    /// Reference counts may be wrong; repaired when opened for writing.
    pub(in super::super) const DIRTY: u64 = 1 << 0;
    /// Metadata may be damaged; not written except for repair.
    pub(in super::super) const CORRUPT: u64 = 1 << 1;
    /// Guest data stands in another file.
    pub(in super::super) const DATA_FILE: u64 = 1 << 2;
    /// Compressed clusters are not zlib.
    pub(in super::super) const COMPRESSION: u64 = 1 << 3;
    /// L2 entries of 16 bytes with 32 subclusters.
    pub(in super::super) const EXTENDED_L2: u64 = 1 << 4;
    /// All of the above.
    pub(in super::super) const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// "compatible_features": unknown bits are ignored and kept.
pub(super) mod compatible {
    /// Reference counts may be written late, under the dirty bit.
    pub(in super::super) const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// "autoclear_features": unknown bits are cleared by whoever writes to the image.
pub(super) mod autoclear {
    /// The bitmaps extension is consistent with the guest data.
    pub(in super::super) const BITMAPS: u64 = 1 << 0;
    /// The external data file can be read as a raw image.
    pub(in super::super) const RAW_DATA: u64 = 1 << 1;
    /// All of the above.
    pub(in super::super) const KNOWN: u64 = BITMAPS | RAW_DATA;
}

/// Which of the three fields a name belongs to: byte 0 of a table entry.
pub(super) const INCOMPATIBLE: u8 = 0;
/// See [`INCOMPATIBLE`].
pub(super) const COMPATIBLE: u8 = 1;
/// See [`INCOMPATIBLE`].
pub(super) const AUTOCLEAR: u8 = 2;

/// Bytes of a table entry: field, bit, and 46 bytes of name padded with zeroes.
pub(super) const ENTRY_BYTES: usize = 48;
const NAME_BYTES: usize = ENTRY_BYTES - 2;

/// The names written into new images, in the reference's order.
const NAMES: &[(u8, u8, &str)] = &[
    (INCOMPATIBLE, 0, "dirty bit"),
    (INCOMPATIBLE, 1, "corrupt bit"),
    (INCOMPATIBLE, 2, "external data file"),
    (INCOMPATIBLE, 3, "compression type"),
    (INCOMPATIBLE, 4, "extended L2 entries"),
    (COMPATIBLE, 0, "lazy refcounts"),
    (AUTOCLEAR, 0, "bitmaps"),
    (AUTOCLEAR, 1, "raw external data"),
];

/// A name that an image gives to one of its feature bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FeatureName {
    /// [`INCOMPATIBLE`], [`COMPATIBLE`] or [`AUTOCLEAR`]; others are possible and mean nothing.
    pub(super) field: u8,
    /// Number of the bit.
    pub(super) bit: u8,
    /// As it stands in the table, padding included.
    name: [u8; NAME_BYTES],
}

impl FeatureName {
    /// The name for people: without padding, and without what a terminal would obey.
    pub(super) fn text(&self) -> String {
        let end = self.name.iter().position(|&byte| byte == 0).unwrap_or(NAME_BYTES);
        let text = String::from_utf8_lossy(&self.name[..end]);
        text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
    }
}

/// The names in an image's table. An entry without a name ends the table.
pub(super) fn parse_names(table: &[u8]) -> Vec<FeatureName> {
    let entry = |bytes: &[u8]| {
        // The last one may be cut off where its name ends.
        let mut entry = [0; ENTRY_BYTES];
        entry[..bytes.len()].copy_from_slice(bytes);
        let [field, bit, name @ ..] = entry;
        FeatureName { field, bit, name }
    };
    table.chunks(ENTRY_BYTES).map(entry).take_while(|entry| entry.name[0] != 0).collect()
}

/// The table for an image whose own table held `names`: ours, and behind it theirs for bits unknown to us.
pub(super) fn encode_names(names: &[FeatureName]) -> Vec<u8> {
    let mut table = Vec::with_capacity((NAMES.len() + names.len()) * ENTRY_BYTES);
    for &(field, bit, text) in NAMES {
        table.extend([field, bit]);
        table.extend(text.as_bytes());
        table.resize(table.len() + NAME_BYTES - text.len(), 0);
    }
    for foreign in names {
        if !NAMES.iter().any(|&(field, bit, _)| (field, bit) == (foreign.field, foreign.bit)) {
            table.extend([foreign.field, foreign.bit]);
            table.extend(foreign.name);
        }
    }
    table
}

/// The reference's words for incompatible bits that this build does not know, by the names in the image.
pub(super) fn unsupported(names: &[FeatureName], mut bits: u64) -> String {
    let mut words = Vec::new();
    for name in names.iter().filter(|name| name.field == INCOMPATIBLE && name.bit < 64) {
        let bit = 1 << name.bit;
        if bits & bit != 0 {
            words.push(name.text());
            bits &= !bit;
        }
    }
    if bits != 0 {
        words.push(format!("Unknown incompatible feature: {bits:x}"));
    }
    format!("Unsupported qcow2 feature(s): {}", words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_table_survives_and_foreign_names_are_kept() {
        let ours = encode_names(&[]);
        assert_eq!(ours.len(), 8 * ENTRY_BYTES);
        let mut table = ours.clone();
        table.extend([COMPATIBLE, 9]);
        table.extend([b'x'; NAME_BYTES]);
        let names = parse_names(&table);
        assert_eq!(names.len(), 9);
        assert_eq!(encode_names(&names), table);
        assert_eq!(names[8].text(), "x".repeat(46), "a full-length name has no terminator");
    }

    #[test]
    fn unknown_bits_are_called_by_their_names() {
        let mut table = vec![INCOMPATIBLE, 40];
        table.extend(b"time \x1btravel");
        table.resize(ENTRY_BYTES, 0);
        let names = parse_names(&table);
        assert_eq!(unsupported(&names, 1 << 40), "Unsupported qcow2 feature(s): time ?travel");
        let cut_off = parse_names(&table[..2 + "time".len()]);
        assert_eq!(unsupported(&cut_off, 1 << 40), "Unsupported qcow2 feature(s): time");
        assert_eq!(
            unsupported(&names, 1 << 40 | 0x60),
            "Unsupported qcow2 feature(s): time ?travel, Unknown incompatible feature: 60"
        );
    }

    #[test]
    fn a_name_for_bit_64_and_above_names_nothing() {
        let mut table = vec![INCOMPATIBLE, 200];
        table.resize(ENTRY_BYTES, b'n');
        assert_eq!(
            unsupported(&parse_names(&table), 1 << 8),
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 100"
        );
    }
}
