//! Two devices with a link between them that can be broken.

use std::process::Command;
use std::time::Duration;

use crossdock_verbs::fake::{Fabric, FabricOptions, Pace};
use crossdock_verbs::{VerbsOptions, VerbsPort};

/// Where cases run.
pub trait Network {
    /// Opens a port on the first (0) or the second device.
    fn open(&mut self, device: usize, options: VerbsOptions) -> VerbsPort;

    /// Takes or gives a device its link.
    fn set_link(&mut self, device: usize, is_up: bool);

    /// Loses so many of a hundred packets.
    fn set_loss(&mut self, percent: u32);

    /// How long a wait lasts before it fails.
    fn patience(&self) -> Duration;
}

/// In this process.
pub struct SoftwareFabric(pub Fabric);

impl SoftwareFabric {
    pub fn new() -> Self {
        Self(Fabric::new(FabricOptions { pace: Pace::Stepped { most: 20 }, ..FabricOptions::default() }))
    }
}

impl Network for SoftwareFabric {
    fn open(&mut self, device: usize, mut options: VerbsOptions) -> VerbsPort {
        options.verbs = Some(self.0.verbs());
        options.device = Some(format!("fake{device}"));
        VerbsPort::open(options).expect("a port can be opened")
    }

    fn set_link(&mut self, device: usize, is_up: bool) {
        self.0.set_link(device, is_up);
    }

    fn set_loss(&mut self, percent: u32) {
        self.0.set_loss(100_u32.checked_div(percent).unwrap_or(0));
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(20)
    }
}

/// Those of the VM.
pub struct Devices {
    names: Vec<String>,
}

impl Devices {
    /// `None`, with a printed reason, where there are none.
    pub fn new() -> Option<Self> {
        let Ok(names) = std::env::var("CROSSDOCK_VERBS_DEVICES") else {
            eprintln!("skipped: CROSSDOCK_VERBS_DEVICES names no RDMA device (run this in tests/rdma-vm)");
            return None;
        };
        let names: Vec<String> = names.split(',').map(str::to_owned).collect();
        assert_eq!(names.len(), 2, "the cases need two devices");
        Some(Self { names })
    }

    /// Whatever a case has broken.
    pub fn mend(&mut self) {
        self.set_loss(0);
        self.set_link(1, true);
    }

    fn cable(&self, arguments: &[&str]) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/rdma-vm-net");
        let status = Command::new(script).args(arguments).status().expect("the script is there");
        assert!(status.success(), "{script} {arguments:?}: {status}");
    }
}

impl Network for Devices {
    fn open(&mut self, device: usize, mut options: VerbsOptions) -> VerbsPort {
        options.device = Some(self.names[device].clone());
        VerbsPort::open(options).expect("a port can be opened")
    }

    fn set_link(&mut self, device: usize, is_up: bool) {
        let (word, device) = (if is_up { "up" } else { "down" }, format!("a{device}"));
        self.cable(&[word, &device]);
    }

    fn set_loss(&mut self, percent: u32) {
        for device in ["a0", "a1"] {
            match percent {
                0 => self.cable(&["clear", device]),
                _ => self.cable(&["loss", &percent.to_string(), device]),
            }
        }
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(60)
    }
}
