//! What two workers must have in common before the first byte moves, and how they differ if they do not.

use std::fmt;

/// What the planner cannot bridge, as named values: model, layers, dtype, … Compared in the handshake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint(Vec<(String, String)>);

/// One value that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which value.
    pub key: String,
    /// Its value on this side; `None` if this side does not state it.
    pub ours: Option<String>,
    /// Its value on the peer's side.
    pub theirs: Option<String>,
}

impl Fingerprint {
    /// The most values that a handshake carries.
    pub const MAX_VALUES: usize = 128;

    /// Sorts the values by key; the last value of a repeated key counts.
    ///
    /// # Panics
    /// If there are more than [`MAX_VALUES`](Self::MAX_VALUES): what is not compared could differ.
    pub fn new(values: impl IntoIterator<Item = (String, String)>) -> Self {
        let map: std::collections::BTreeMap<_, _> = values.into_iter().collect();
        assert!(map.len() <= Self::MAX_VALUES, "a fingerprint of {} values", map.len());
        Self(map.into_iter().collect())
    }

    /// Takes a peer's values, which have but one form: sorted by key, each key once.
    pub(crate) fn from_wire(values: Vec<(String, String)>) -> Option<Self> {
        let is_sorted = values.is_sorted_by(|(a, _), (b, _)| a < b);
        (is_sorted && values.len() <= Self::MAX_VALUES).then_some(Self(values))
    }

    /// The values, sorted by key.
    pub fn values(&self) -> &[(String, String)] {
        &self.0
    }

    /// Where the other side differs. A side that states nothing at all fits any other: it moves bytes without
    /// a cache of its own (a test, a benchmark, a store).
    pub fn differences(&self, theirs: &Fingerprint) -> Vec<Difference> {
        if self.0.is_empty() || theirs.0.is_empty() {
            return Vec::new();
        }
        let find = |list: &[(String, String)], key: &str| {
            list.iter().find(|(k, _)| k == key).map(|(_, value)| value.clone())
        };
        let mut keys: Vec<&str> = self.0.iter().chain(&theirs.0).map(|(key, _)| key.as_str()).collect();
        keys.sort_unstable();
        keys.dedup();
        keys.into_iter()
            .map(|key| Difference { key: key.into(), ours: find(&self.0, key), theirs: find(&theirs.0, key) })
            .filter(|difference| difference.ours != difference.theirs)
            .collect()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = |value: &Option<String>| value.clone().unwrap_or_else(|| "nothing".into());
        write!(f, "{} {} here, {} there", self.key, side(&self.ours), side(&self.theirs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(values: &[(&str, &str)]) -> Fingerprint {
        Fingerprint::new(values.iter().map(|(k, v)| (k.to_string(), v.to_string())))
    }

    #[test]
    fn names_what_differs_in_words() {
        let ours = print(&[("dtype", "bf16"), ("layers", "61")]);
        let theirs = print(&[("layers", "61"), ("dtype", "fp8_e4m3")]);
        let found = ours.differences(&theirs);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].to_string(), "dtype bf16 here, fp8_e4m3 there");
    }

    #[test]
    fn a_missing_value_is_a_difference() {
        let found = print(&[("a", "1"), ("b", "2")]).differences(&print(&[("a", "1")]));
        assert_eq!(found[0].to_string(), "b 2 here, nothing there");
    }

    #[test]
    fn a_side_without_a_cache_fits_any() {
        assert!(print(&[("a", "1")]).differences(&Fingerprint::default()).is_empty());
    }
}
