//! What tests of several jobs need.

/// Bytes that do not shrink, the same for the same seed: the high bytes of a linear congruential generator ("Numerical
/// Recipes", §7.1).
pub(super) fn noise(seed: u32, len_bytes: usize) -> Vec<u8> {
    let step = |state: &u32| Some(state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::iter::successors(Some(seed), step)
        .skip(1)
        .take(len_bytes)
        .map(|state| state.to_be_bytes()[0])
        .collect()
}
