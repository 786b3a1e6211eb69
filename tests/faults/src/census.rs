//! What a process holds of the system, as `/proc` tells.

use std::fs;
use std::path::PathBuf;

/// Counts of one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Census {
    /// Open file descriptors.
    pub descriptors: u64,
    /// Those that are sockets: listeners, control streams, lanes, heartbeats.
    pub sockets: u64,
    /// Threads.
    pub threads: u64,
    /// Mappings of memory.
    pub mappings: u64,
    /// Those of regions and rings, this process's own and its peers'.
    pub regions: u64,
    /// Memory that is resident, in bytes.
    pub resident_bytes: u64,
    /// Child processes, dead ones that nobody has waited for included.
    pub children: u64,
}

impl Census {
    /// Counts what this process holds now.
    pub fn of_this_process() -> Self {
        let status = fs::read_to_string("/proc/self/status").expect("Linux tells a process of itself");
        let number = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        let maps = fs::read_to_string("/proc/self/maps").expect("Linux tells a process of itself");
        let tasks = fs::read_dir("/proc/self/task").expect("Linux tells a process of itself");
        let children: usize = tasks
            .flatten()
            .map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default())
            .map(|ids| ids.split_whitespace().count())
            .sum();
        let (descriptors, sockets) = descriptors();
        Self {
            descriptors,
            sockets,
            threads: number("Threads:"),
            mappings: maps.lines().count() as u64,
            regions: maps.lines().filter(|line| line.contains("/memfd:")).count() as u64,
            resident_bytes: number("VmRSS:") << 10,
            children: children as u64,
        }
    }
}

/// How many descriptors are open, without the one that looks; and how many of them are sockets.
fn descriptors() -> (u64, u64) {
    let open: Vec<_> =
        fs::read_dir("/proc/self/fd").expect("Linux tells a process of itself").flatten().collect();
    let is_socket =
        |path: PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
    let sockets = open.iter().filter(|entry| is_socket(entry.path())).count();
    (open.len() as u64 - 1, sockets as u64)
}
