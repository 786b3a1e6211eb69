//! NUMA nodes.

use std::path::Path;

use super::files::{below, names, text};

/// A NUMA node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NumaNode {
    /// Its number.
    pub number: u32,
    /// The processors that belong to it; none where it is memory alone.
    pub cpus: Vec<u32>,
    /// What the firmware says of the distance to each node, in the order of their numbers; 10 is here.
    pub distances: Vec<u32>,
}

pub fn read(root: &Path) -> Vec<NumaNode> {
    let nodes = below(root, "/sys/devices/system/node");
    let numbered =
        names(&nodes).into_iter().filter_map(|name| Some((name.strip_prefix("node")?.parse().ok()?, name)));
    numbered
        .map(|(number, name)| {
            let node = nodes.join(name);
            let distances = text(&node.join("distance")).unwrap_or_default();
            NumaNode {
                number,
                cpus: numbers_of_list(&text(&node.join("cpulist")).unwrap_or_default()),
                distances: distances.split_whitespace().filter_map(|one| one.parse().ok()).collect(),
            }
        })
        .collect()
}

/// The numbers of a list as the kernel writes it, `0-3,8`. What is no list has none.
pub fn numbers_of_list(list: &str) -> Vec<u32> {
    let mut numbers = Vec::new();
    for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) else { continue };
        numbers.extend((first..=last).take(MOST_IN_A_RANGE));
    }
    numbers
}

/// More processors than the kernel can be built for.
const MOST_IN_A_RANGE: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_those_of_the_kernel() {
        assert_eq!(numbers_of_list("0-3,8"), [0, 1, 2, 3, 8]);
        assert_eq!(numbers_of_list("5"), [5]);
        assert_eq!(numbers_of_list("0-1,,x,4-x,9"), [0, 1, 9]);
        assert!(numbers_of_list("").is_empty());
        assert_eq!(numbers_of_list("0-4294967295").len(), MOST_IN_A_RANGE);
    }
}
