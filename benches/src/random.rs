//! Page lists that jump through a pool.

/// The first `count` entries of a random permutation of `0..slots`: no slot appears twice, neighbours are far apart.
///
/// # Panics
/// If there are fewer slots than are asked for.
pub fn scattered(slots: u32, count: u32, seed: u64) -> Vec<u32> {
    assert!(count <= slots, "{count} different slots of {slots}");
    let mut state = seed;
    let mut random = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    };
    let mut index: Vec<u32> = (0..slots).collect();
    for at in 0..count {
        // The remainder's bias is far below what a benchmark could see.
        index.swap(at as usize, at as usize + (random() % u64::from(slots - at)) as usize);
    }
    index.truncate(count as usize);
    index
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_appears_once_and_seeds_differ() {
        let mut all = scattered(1000, 1000, 1);
        assert_ne!(all, scattered(1000, 1000, 2));
        assert_eq!(all[..10], scattered(1000, 10, 1));
        let neighbours = all.windows(2).filter(|pair| pair[1] == pair[0] + 1).count();
        assert!(neighbours < 10, "{neighbours} neighbours in a random order of 1000");
        all.sort_unstable();
        assert!(all.iter().copied().eq(0..1000));
    }
}
