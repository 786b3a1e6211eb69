//! Which RDMA devices a process uses.

use crossdock::{PortConfig, VerbsOptions};

/// The devices of one of several processes, each of which has an entry of its own, or of which several share one: the rails
/// of an entry are joined by `+`. Without any entry, the first device that is found.
pub fn rails(devices: &[String], process: usize) -> Vec<VerbsOptions> {
    match devices.len() {
        0 => vec![VerbsOptions::default()],
        count => VerbsOptions::of_devices(&devices[process % count]),
    }
}

/// The same, as ports of a node.
pub fn rail_ports(devices: &[String], process: usize) -> Vec<PortConfig> {
    rails(devices, process).into_iter().map(PortConfig::Verbs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_take_devices_by_turns() {
        let named = |devices: &[&str], process| -> Vec<Option<String>> {
            let devices: Vec<String> = devices.iter().map(|&name| name.to_owned()).collect();
            rails(&devices, process).into_iter().map(|options| options.device).collect()
        };
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(named(&[], 3), [None]);
        assert_eq!(named(&["rxe0"], 1), [some("rxe0")]);
        assert_eq!(named(&["rxe0+mlx5_1", "rxe1"], 2), [some("rxe0"), some("mlx5_1")]);
        assert_eq!(named(&["rxe0+mlx5_1", "rxe1"], 1), [some("rxe1")]);
    }
}
