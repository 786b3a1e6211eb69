//! What a test of whole nodes runs over: each kind of port, or only RDMA devices where some are named.

use crossdock::cuda::{CudaOptions, Gpu, Kernels, fake};
use crossdock::{AllocateOptions, Config, Memory, PortConfig, ShmOptions, VerbsOptions};
use crossdock_verbs::fake::{Fabric, FabricOptions, Pace};
use tracing_subscriber::filter::LevelFilter;

/// What carries the bytes between the nodes of a test.
#[derive(Clone)]
pub enum Carrier {
    Shm,
    Tcp,
    /// A GPU that is software of this process; pages are in its memory.
    Gpu(Gpu),
    /// RDMA between two devices that are software of this process.
    Fabric(Fabric),
    /// RDMA between devices of this machine, which may be software of its kernel (`tests/rdma-vm` has two).
    Devices(Vec<String>),
}

impl Carrier {
    /// All that there are here. Where `CROSSDOCK_VERBS_DEVICES` names devices, it is only these: the others need none, and
    /// where devices are software, time is another.
    pub fn all() -> Vec<Carrier> {
        if let Some(devices) = devices() {
            // What a test that fails has seen on the way, in its output. Elsewhere nobody writes there from many threads:
            // ThreadSanitizer cannot see how the test harness keeps them apart.
            let log = tracing_subscriber::fmt()
                .with_max_level(LevelFilter::INFO)
                .with_ansi(false)
                .with_test_writer();
            let _ = log.try_init();
            return vec![Carrier::Devices(devices)];
        }
        eprintln!("SKIPPED: RDMA devices: CROSSDOCK_VERBS_DEVICES names none (tests/rdma-vm has some)");
        let fabric = Fabric::new(FabricOptions { pace: Pace::Thread, ..FabricOptions::default() });
        let gpu = Gpu::open(&fake::driver(), 0).expect("a GPU of software");
        vec![Carrier::Shm, Carrier::Tcp, Carrier::Gpu(gpu), Carrier::Fabric(fabric)]
    }

    /// The port of one of several nodes: devices are taken by turns, so that neighbours are not on the same.
    pub fn port(&self, node: usize) -> PortConfig {
        let mut options = VerbsOptions::default();
        match self {
            Carrier::Shm => return PortConfig::Shm(ShmOptions::default()),
            Carrier::Tcp => return PortConfig::Tcp(None),
            Carrier::Gpu(gpu) => {
                // Its kernels are carried out by their definition.
                let options = CudaOptions { kernels: Kernels::Given(vec![1]), ..CudaOptions::default() };
                return PortConfig::Cuda { gpu: gpu.clone(), options };
            }
            Carrier::Fabric(fabric) => {
                options.verbs = Some(fabric.verbs());
                options.device = Some(format!("fake{}", node % 2));
            }
            Carrier::Devices(devices) => options.device = Some(devices[node % devices.len()].clone()),
        }
        PortConfig::Verbs(options)
    }
}

impl Carrier {
    /// Memory of the kind that it carries.
    #[allow(dead_code, reason = "not every test that has carriers allocates memory of its own")]
    pub fn memory(&self, bytes: usize) -> Memory {
        match self {
            Carrier::Gpu(gpu) => gpu.allocate(bytes).expect("memory on a GPU of software"),
            _ => Memory::allocate(bytes, &AllocateOptions::default()).expect("memory"),
        }
    }

    /// Gives one of several nodes its port, and memory of the kind that it carries.
    #[allow(dead_code, reason = "not every test that has carriers has nodes")]
    pub fn equip(&self, config: &mut Config, node: usize) {
        config.ports = vec![self.port(node)];
        if let Carrier::Gpu(_) = self {
            config.memory = config.memory.iter().map(|memory| self.memory(memory.bytes())).collect();
        }
    }
}

impl std::fmt::Debug for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Carrier::Shm => f.write_str("shm"),
            Carrier::Tcp => f.write_str("tcp"),
            Carrier::Gpu(_) => f.write_str("a GPU of software"),
            Carrier::Fabric(_) => f.write_str("verbs in this process"),
            Carrier::Devices(devices) => write!(f, "verbs over {}", devices.join(" and ")),
        }
    }
}

/// The RDMA devices that tests may use.
fn devices() -> Option<Vec<String>> {
    let devices = std::env::var("CROSSDOCK_VERBS_DEVICES").ok()?;
    Some(devices.split(',').map(str::to_owned).collect())
}
