//! Cylinders, heads and sectors: the size of a disk as the BIOS of a guest sees it ("Disk Geometry", and
//! "Appendix: CHS Calculation").

/// Guest disks are whole sectors; all structures of the file stand on multiples of them.
pub(super) const SECTOR_BYTES: u64 = 512;

/// The largest disk: 2040 GiB. Tables count in sectors of 32 bits.
pub(super) const MAX_SECTORS: u64 = 0xff00_0000;

/// A geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chs {
    pub(super) cylinders: u16,
    pub(super) heads: u8,
    /// In a track.
    pub(super) sectors: u8,
}

impl Chs {
    /// The largest one, which also stands for "look at the size instead".
    pub(super) const MAX: Self = Self { cylinders: 65535, heads: 16, sectors: 255 };

    /// Sectors that it spans.
    pub(super) fn span_sectors(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors) // below 2^32
    }

    /// The geometry that the specification gives a disk of `sectors`; it may span fewer.
    pub(super) fn nearest(sectors: u64) -> Self {
        let sectors = sectors.min(Self::MAX.span_sectors());
        // Tracks of 63 sectors end at 65535 × 16 × 63.
        if sectors > 65535 * 16 * 63 {
            return Self::of(sectors, 16, 255);
        }
        let tracks = sectors / 17;
        let heads = tracks.div_ceil(1024).max(4);
        if tracks < heads * 1024 && heads <= 16 {
            return Self::of(sectors, heads, 17);
        }
        if sectors / 31 < 16 * 1024 {
            return Self::of(sectors, 16, 31);
        }
        Self::of(sectors, 16, 63)
    }

    /// The smallest geometry that the specification gives some disk and that holds `sectors`, as far as any
    /// does: the reference never makes a disk smaller than what was asked for.
    pub(super) fn holding(sectors: u64) -> Self {
        let sectors = sectors.min(Self::MAX.span_sectors());
        if sectors == 0 {
            return Self { cylinders: 0, heads: 0, sectors: 0 };
        }
        let mut asked = sectors;
        loop {
            let chs = Self::nearest(asked);
            if chs.span_sectors() >= sectors {
                return chs;
            }
            // Ends at the latest where a cylinder more is asked for: 16 × 255 steps.
            asked += 1;
        }
    }

    /// `heads` is at most 16, `track` at most 255, and the cylinders fit for every disk that fits [`Self::MAX`].
    fn of(sectors: u64, heads: u64, track: u8) -> Self {
        let cylinders = sectors / u64::from(track) / heads;
        Self {
            cylinders: u16::try_from(cylinders).unwrap_or(u16::MAX),
            heads: u8::try_from(heads).expect("at most 16"),
            sectors: track,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What holds a disk is not much larger than it.
        #[test]
        fn a_geometry_holds_the_disk(sectors in 0..=Chs::MAX.span_sectors()) {
            let chs = Chs::holding(sectors);
            prop_assert!(chs.span_sectors() >= sectors);
            prop_assert!(chs.span_sectors() - sectors <= 16 * 255, "{chs:?}");
        }
    }

    #[test]
    fn known_disks_have_their_geometry() {
        // What the reference writes into the footer of a disk of that many MiB.
        for (mib, word) in [
            (1, 0x001f_0411),
            (7, 0x00d3_0411),
            (8, 0x00f1_0411),
            (50, 0x03ec_0611),
            (100, 0x03ec_0c11),
            (250, 0x01fc_103f),
            (503, 0x03fe_103f),
            (1 << 10, 0x0821_103f),
            (31 << 10, 0xfbf0_103f),
            (32 << 10, 0x4041_10ff),
            (127 << 10, 0xfeff_10ff),
            (128 << 10, 0xffff_10ff),
        ] {
            let chs = Chs::holding(mib << 11);
            let found = u32::from(chs.cylinders) << 16 | u32::from(chs.heads) << 8 | u32::from(chs.sectors);
            assert_eq!(found, word, "{mib} MiB: {found:#010x}");
        }
        assert_eq!(Chs::holding(1).span_sectors(), 68);
        assert_eq!(Chs::holding(0).span_sectors(), 0);
        assert_eq!(Chs::holding(u64::MAX), Chs::MAX);
    }
}
