//! Guest data that tells where it came from.

/// A small, fast generator of repeatable numbers (SplitMix64). Not for secrets.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator whose numbers follow from `seed` alone.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// `len` bytes that do not compress.
#[must_use]
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Random::new(seed).fill(&mut bytes);
    bytes
}

/// Panics with the first differing byte and its surroundings when two disks differ.
///
/// # Panics
/// When they do.
#[track_caller]
pub fn assert_same(ours: &[u8], theirs: &[u8], what: &str) {
    if let Some(text) = difference(ours, theirs) {
        panic!("{what}: {text}");
    }
}

/// Where two disks differ first, in words; `None` where they do not.
#[must_use]
pub fn difference(ours: &[u8], theirs: &[u8]) -> Option<String> {
    if ours == theirs {
        return None;
    }
    if ours.len() != theirs.len() {
        return Some(format!("ours has {} bytes, theirs {}", ours.len(), theirs.len()));
    }
    let at = ours.iter().zip(theirs).position(|(our, their)| our != their)?;
    let count = ours.iter().zip(theirs).filter(|(our, their)| our != their).count();
    let shown = at..(at + 16).min(ours.len());
    Some(format!(
        "{count} bytes differ, first at {at:#x}: ours {:02x?}, theirs {:02x?}",
        &ours[shown.clone()],
        &theirs[shown]
    ))
}
