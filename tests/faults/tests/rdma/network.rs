//! Two RDMA devices with a cable between them that can be broken.

use std::process::Command;
use std::time::Duration;

use crossdock::{PortConfig, VerbsOptions};
use crossdock_verbs::fake::{Fabric, FabricOptions, Pace};

/// The devices of a test.
pub enum Network {
    /// Software of this process.
    Fabric(Fabric),
    /// Those of the guest of `tests/rdma-vm`, on the ends of a cable that `tests/rdma-vm-net` breaks.
    Guest([String; 2]),
}

impl Network {
    /// All that there are here; where the guest's devices are named, only those.
    pub fn all() -> Vec<Network> {
        match Network::guest() {
            Some(guest) => vec![guest],
            None => vec![Network::fabric()],
        }
    }

    pub fn fabric() -> Network {
        let options = FabricOptions { pace: Pace::Thread, ..FabricOptions::default() };
        Network::Fabric(Fabric::new(options))
    }

    /// The guest's devices; where there are none, a reason is printed.
    pub fn guest() -> Option<Network> {
        let names = std::env::var(DEVICES).unwrap_or_default();
        let names: Vec<String> = names.split(',').map(str::to_owned).collect();
        let names = <[String; 2]>::try_from(names).ok().filter(|names| names[..] == ["rxe0", "rxe1"]);
        if names.is_none() {
            eprintln!("SKIPPED: a real cable: {DEVICES} does not name rxe0,rxe1 (run this in tests/rdma-vm)");
        }
        names.map(Network::Guest)
    }

    /// A port of the first (0) or the second (1) device.
    pub fn port(&self, device: usize) -> PortConfig {
        PortConfig::Verbs(self.options(device))
    }

    /// The same, which finds out in 0.3 s that nothing is answered.
    pub fn impatient_port(&self, device: usize) -> PortConfig {
        let mut options = self.options(device);
        options.retries = 3;
        PortConfig::Verbs(options)
    }

    /// The same, which says keys that its device does not know.
    pub fn wrong_port(&self, device: usize) -> PortConfig {
        let mut options = self.options(device);
        options.wrong_keys = true;
        PortConfig::Verbs(options)
    }

    /// Pushes every queue pair of the second device into error.
    pub fn break_queue_pairs(&self) {
        let Network::Fabric(fabric) = self else { panic!("of real devices only their owner can do that") };
        for pair in fabric.queue_pairs().iter().filter(|pair| pair.device == 1) {
            fabric.break_queue_pair(pair.device, pair.number, None);
        }
    }

    fn options(&self, device: usize) -> VerbsOptions {
        let mut options = VerbsOptions::default();
        match self {
            Network::Fabric(fabric) => {
                options.verbs = Some(fabric.verbs());
                options.device = Some(format!("fake{device}"));
            }
            Network::Guest(names) => options.device = Some(names[device].clone()),
        }
        options.connect_timeout = Duration::from_secs(2);
        options
    }

    pub fn set_link(&self, is_up: bool) {
        match self {
            Network::Fabric(fabric) => fabric.set_link(1, is_up),
            Network::Guest(_) => cable(&[if is_up { "up" } else { "down" }, "a1"]),
        }
    }

    /// Loses so many of a hundred packets, in both directions.
    pub fn set_loss(&self, percent: u32) {
        match self {
            Network::Fabric(fabric) => fabric.set_loss(100_u32.checked_div(percent).unwrap_or(0)),
            Network::Guest(_) => {
                for device in ["a0", "a1"] {
                    match percent {
                        0 => cable(&["clear", device]),
                        _ => cable(&["loss", &percent.to_string(), device]),
                    }
                }
            }
        }
    }

    pub fn name(&self) -> String {
        match self {
            Network::Fabric(_) => "in this process".to_owned(),
            Network::Guest(names) => names.join(" and "),
        }
    }
}

impl Drop for Network {
    /// A test that fails leaves the cable to the next one.
    fn drop(&mut self) {
        if let Network::Guest(_) = self {
            self.set_loss(0);
            self.set_link(true);
        }
    }
}

fn cable(arguments: &[&str]) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../rdma-vm-net");
    let status = Command::new(script).args(arguments).status().expect("the script is there");
    assert!(status.success(), "{script} {arguments:?}: {status}");
}

const DEVICES: &str = "CROSSDOCK_VERBS_DEVICES";
