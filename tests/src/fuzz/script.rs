//! From fuzzer bytes to a broken image: a base, then patches.
//!
//! One byte chooses the base image; then each patch is a byte for its kind, two for its place, one for the way
//! its value is made, and up to eight for the value. Bytes that run out read as zero.

use crate::craft::{
    CLUSTER, COMPRESSED, COPIED, Crafted, DATA, DISK, L1, L2, REFCOUNT_BLOCK, REFCOUNT_TABLE, header, qed,
    vhd,
};

/// Fuzzer bytes, read from the front.
pub(super) struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub(super) fn new(input: &'a [u8]) -> Self {
        Self(input)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A number of the kind that parsers trip over: small, a power of two, at a cluster, close to the largest.
    pub(super) fn tricky(&mut self) -> u64 {
        match self.byte() % 8 {
            0 => u64::from(self.byte()),
            1 => 1 << (self.byte() % 64),
            2 => u64::from(self.byte() % 16) * CLUSTER as u64,
            3 => (u64::from(self.byte() % 16) * CLUSTER as u64) | COPIED,
            4 => u64::MAX - u64::from(self.byte()),
            5 => COMPRESSED | u64::from(self.byte()) << 54 | DATA as u64,
            6 => u64::from(u32::MAX) - u64::from(self.byte()),
            _ => self.number(),
        }
    }

    /// The image that the script describes; the rest of the bytes is left for the target.
    pub(super) fn image(&mut self) -> Crafted {
        let mut image = base(self.byte());
        for _ in 0..self.byte() % 12 {
            image = self.patch(image);
        }
        image
    }

    fn patch(&mut self, image: Crafted) -> Crafted {
        match &image.bytes {
            bytes if bytes.starts_with(b"QED\0") => self.patch_qed(image),
            bytes if bytes.starts_with(b"conectix") => self.patch_vhd(image),
            _ => self.patch_qcow2(image),
        }
    }

    /// Most patches leave right sums behind: what follows a wrong one is refused before it is read.
    fn patch_vhd(&mut self, image: Crafted) -> Crafted {
        use vhd::place::{BITMAP, HEADER, NAME, TABLE};
        const FIELDS: [(usize, usize); 16] = [
            (8, 4),
            (12, 4),
            (16, 8),
            (28, 4),
            (48, 8),
            (56, 4),
            (60, 4),
            (HEADER + 16, 8),
            (HEADER + 24, 4),
            (HEADER + 28, 4),
            (HEADER + 32, 4),
            (HEADER + 64, 4),
            (HEADER + 576, 4),
            (HEADER + 584, 4),
            (HEADER + 592, 8),
            (HEADER + 36, 4),
        ];
        let (kind, place) = (self.byte(), usize::from(self.u16()));
        let value = self.tricky();
        let (at, len) = match kind % 8 {
            0..=2 => FIELDS[place % FIELDS.len()],
            3 | 4 => (TABLE + place % 4 * 4, 4),
            5 => (BITMAP, 1),
            6 => (NAME + place % 16, 1),
            _ => {
                let mut cut = image;
                let len = place % (cut.bytes.len() + 1);
                cut.bytes.truncate(len.max(vhd::SECTOR));
                return cut;
            }
        };
        let patched = image.put(at, &value.to_be_bytes()[8 - len..]);
        if kind & 0x80 == 0 { vhd::summed(patched) } else { patched }
    }

    fn patch_qed(&mut self, image: Crafted) -> Crafted {
        use qed::{L1, L2, header::*};
        const FIELDS: [(usize, usize); 10] = [
            (CLUSTER_SIZE, 4),
            (TABLE_SIZE, 4),
            (HEADER_SIZE, 4),
            (FEATURES, 8),
            (COMPAT_FEATURES, 8),
            (AUTOCLEAR_FEATURES, 8),
            (L1_OFFSET, 8),
            (IMAGE_SIZE, 8),
            (BACKING_OFFSET, 4),
            (BACKING_SIZE, 4),
        ];
        let (kind, place) = (self.byte(), usize::from(self.u16()));
        let value = self.tricky();
        let (at, len) = match kind % 8 {
            0 | 1 => FIELDS[place % FIELDS.len()],
            2..=4 => (L2 + place % 32 * 8, 8),
            5 | 6 => (L1 + place % 4 * 8, 8),
            _ => {
                let mut cut = image;
                let len = place % (cut.bytes.len() + 1);
                cut.bytes.truncate(len.max(HEADER_LEN));
                return cut;
            }
        };
        image.put(at, &value.to_le_bytes()[..len])
    }

    fn patch_qcow2(&mut self, image: Crafted) -> Crafted {
        const FIELDS: [(usize, usize); 20] = [
            (header::VERSION, 4),
            (header::BACKING_OFFSET, 8),
            (header::BACKING_SIZE, 4),
            (header::CLUSTER_BITS, 4),
            (header::SIZE, 8),
            (header::CRYPT_METHOD, 4),
            (header::L1_SIZE, 4),
            (header::L1_OFFSET, 8),
            (header::REFCOUNT_TABLE_OFFSET, 8),
            (header::REFCOUNT_TABLE_CLUSTERS, 4),
            (header::SNAPSHOT_COUNT, 4),
            (header::SNAPSHOTS_OFFSET, 8),
            (header::INCOMPATIBLE, 8),
            (header::COMPATIBLE, 8),
            (header::AUTOCLEAR, 8),
            (header::REFCOUNT_ORDER, 4),
            (header::HEADER_LENGTH, 4),
            (header::COMPRESSION_TYPE, 1),
            (header::EXTENSIONS, 4),
            (header::EXTENSIONS + 4, 4),
        ];
        let (kind, place) = (self.byte(), usize::from(self.u16()));
        let value = self.tricky();
        let eight = |at: usize| (at, 8);
        let (at, len) = match kind % 8 {
            0 | 1 => FIELDS[place % FIELDS.len()],
            2 => eight(L2 + place % 32 * 8),
            3 => eight(L1 + place % 4 * 8),
            4 => eight(REFCOUNT_TABLE + place % 4 * 8),
            5 => (REFCOUNT_BLOCK + place % 16 * 2, 2),
            6 => (6 * CLUSTER + place % 128, 4),
            _ => {
                let mut cut = image;
                let len = place % (cut.bytes.len() + 1);
                cut.bytes.truncate(len.max(header::EXTENSIONS));
                return cut;
            }
        };
        image.put(at, &value.to_be_bytes()[8 - len..])
    }
}

/// How many there are.
const BASES: u8 = 9;
/// Behind the last field of a QED header.
const HEADER_LEN: usize = 64;

/// A valid image to start from.
fn base(which: u8) -> Crafted {
    let new = Crafted::new();
    match which % BASES {
        0 => new,
        1 => new.u32(header::VERSION, 2).put(header::INCOMPATIBLE, &[0; 40]),
        2 => new
            .snapshot(16, b"1", b"one")
            .u64(L1, L2 as u64)
            .u64(L2, DATA as u64)
            .refcount(3, 2)
            .refcount(4, 2)
            .refcount(5, 2),
        3 => extended(),
        4 => {
            let mut stored = vec![0; CLUSTER];
            let level = libdeflater::CompressionLvl::default();
            let len = libdeflater::Compressor::new(level)
                .deflate_compress(&[7; CLUSTER], &mut stored)
                .expect("a run of one byte gets shorter");
            new.put(DATA, &stored[..len]).u64(L2, COMPRESSED | DATA as u64)
        }
        5 => with_bitmap(),
        6 => Crafted::new_qed(),
        7 => vhd::small(3),
        _ => vhd::small(4),
    }
}

/// One persistent bitmap, all clear: its directory in cluster 5, its table in cluster 6 ("Bitmaps extension").
fn with_bitmap() -> Crafted {
    let table = 6 * CLUSTER;
    let entry = [
        &(table as u64).to_be_bytes()[..],
        &1_u32.to_be_bytes(), // table entries
        &2_u32.to_be_bytes(), // flags: auto
        &[1, 16],             // a dirty-tracking bitmap of 64 KiB granularity
        &4_u16.to_be_bytes(), // name length
        &0_u32.to_be_bytes(), // extra data
        b"bits\0\0\0\0",
    ];
    let extension = [&1_u32.to_be_bytes()[..], &[0; 4], &32_u64.to_be_bytes(), &(DATA as u64).to_be_bytes()];
    Crafted::new()
        .u64(L2, 0)
        .put(DATA, &[0; CLUSTER])
        .put(DATA, &entry.concat())
        .u64(table, 0)
        .refcount(6, 1)
        .extension(0x2385_2875, 24, &extension.concat())
        .u64(header::AUTOCLEAR, 1)
}

/// Extended L2 entries need clusters of 16 KiB: the tables of the small image keep their places by number.
fn extended() -> Crafted {
    let big = 4 * CLUSTER;
    let mut image = Crafted::new()
        .u32(header::CLUSTER_BITS, big.trailing_zeros())
        .u64(header::INCOMPATIBLE, 1 << 4)
        .u64(header::SIZE, 4 * DISK as u64);
    let (tables, data) = (image.bytes[CLUSTER..].to_vec(), image.bytes[DATA]);
    image.bytes.truncate(CLUSTER);
    image.bytes.resize(6 * big, 0);
    image = image.u64(header::REFCOUNT_TABLE_OFFSET, big as u64).u64(header::L1_OFFSET, 3 * big as u64);
    image = image.put(2 * big, &tables[CLUSTER..CLUSTER + 12]).u64(big, 2 * big as u64);
    image = image.u64(3 * big, COPIED | (4 * big as u64)).u64(4 * big, COPIED | (5 * big as u64));
    image.u64(4 * big + 8, 0x0000_00f0_0000_000f).put(5 * big, &[data; CLUSTER])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::qemu_img;

    #[test]
    fn every_base_is_a_clean_image() {
        let folder = tempfile::tempdir().expect("a temporary directory");
        for which in 0..BASES {
            base(which).save(&folder.path().join("base"));
            // The reference has no audit for VHDs, and opens none that it finds fault with.
            let command = if base(which).bytes.starts_with(b"conectix") { "info" } else { "check" };
            let output = qemu_img(folder.path(), [command, "base"]).output();
            assert_eq!(output.code, 0, "base {which}: {output}");
        }
    }
}
