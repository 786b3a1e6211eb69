//! What is said of GPUs: on a machine of paper, whose devices are those of the driver that needs no GPU.

#[path = "../../../../ports/verbs/tests/machine/mod.rs"]
mod machine;

use std::collections::BTreeMap;

use machine::{Carrier, Machine};

use super::{Check, State, gpu};
use crate::doctor::cuda::{
    Answer, Cuda, Device, Driver, Fabric, FabricState, Nvml, Outcome, Reason, WritesOrdering, devices,
};
use crate::doctor::facts::Facts;
use crate::doctor::report::Report;

/// A machine with these devices of the driver, which are boards of this name, and with one RDMA device.
fn facts(ordinals: &[u32], model: &str) -> Facts {
    let machine = Machine::bare();
    machine.file(
        "/proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module  570.86.15  Release\n",
    );
    machine.libibverbs("1.14.50.0");
    for &ordinal in ordinals {
        let bus = ordinal + 1;
        let path = format!("pci0000:00/0000:00:{bus:02x}.0/0000:{bus:02x}:00.0");
        machine.gpu(&path, 0, model, ordinal);
    }
    let adapter = "pci0000:20/0000:20:01.0/0000:21:00.0";
    machine.adapter(adapter, 0);
    machine.rdma("mlx5_0", adapter, 0, Carrier::InfiniBand);
    let driver = crossdock_cuda::fake::driver();
    let those: Vec<_> =
        ordinals.iter().map(|&ordinal| driver.device(ordinal).expect("it is there")).collect();
    let devices = devices(&those, &mut |_| ()).expect("the driver answers");
    let cuda = Cuda {
        driver: Answer::Told(Driver { version: driver.version(), devices }),
        nvml: Answer::Refused(reason("libnvidia-ml.so.1 cannot be loaded", "ask for the utility capability")),
    };
    Facts { cuda: Some(cuda), ..Facts::read(machine.root()).expect("it can be read") }
}

fn reason(says: &str, advice: &str) -> Reason {
    Reason { says: says.into(), advice: advice.into() }
}

const CLUSTER: &str = "c0ffee00-0000-0000-0000-000000000001";

/// A fabric that is up and ends with the machine.
fn up() -> Fabric {
    Fabric { state: FabricState::Completed, status: 0, clique: 0, cluster: None, complaints: Vec::new() }
}

/// One that is up and goes on to other machines.
fn rack() -> Fabric {
    Fabric { clique: 3, cluster: Some(CLUSTER.into()), ..up() }
}

fn of_no_fabric() -> Fabric {
    Fabric { state: FabricState::NotSupported, ..up() }
}

impl Facts {
    /// NVML says this of every GPU.
    fn in_fabric(mut self, fabric: &Fabric) -> Self {
        let of = |address: String| (address, Answer::Told(fabric.clone()));
        let fabrics: BTreeMap<_, _> =
            self.topology.gpus.iter().map(|gpu| of(gpu.pci.address.to_string())).collect();
        self.cuda.as_mut().expect("it was asked").nvml = Answer::Told(Nvml { fabrics });
        self
    }

    fn with_channel(mut self) -> Self {
        self.imex_channels = vec!["channel0".into()];
        self
    }

    fn with_driver(mut self, driver: Answer<Driver>) -> Self {
        self.cuda.as_mut().expect("it was asked").driver = driver;
        self
    }

    fn changed(mut self, change: impl Fn(&mut Device)) -> Self {
        match &mut self.cuda.as_mut().expect("it was asked").driver {
            Answer::Told(driver) => driver.devices.iter_mut().for_each(change),
            other => panic!("{other:?}"),
        }
        self
    }
}

/// Every check of GPUs, by `name of`.
struct Rows(BTreeMap<String, Check>);

fn rows(facts: &Facts) -> Rows {
    let mut rows = BTreeMap::new();
    for check in gpu::checks(facts) {
        let key = match &check.of {
            Some(of) => format!("{} {of}", check.name),
            None => check.name.to_owned(),
        };
        let is_bad = check.state >= State::Degraded;
        assert!(!is_bad || check.advice.is_some(), "no advice: {check:?}");
        assert!(rows.insert(key, check).is_none(), "said twice");
    }
    Rows(rows)
}

impl Rows {
    #[track_caller]
    fn expect(&self, key: &str, state: State, says: &str, advice: &str) {
        let check = self.0.get(key).unwrap_or_else(|| panic!("no {key}: {:#?}", self.0));
        assert_eq!(check.state, state, "{check:?}");
        assert!(check.says.contains(says), "{check:?}");
        assert!(check.advice.as_deref().unwrap_or_default().contains(advice), "{check:?}");
    }

    /// Those in a state.
    #[track_caller]
    fn are(&self, state: State, keys: &[&str]) {
        let found = self.0.iter().filter(|(_, check)| check.state == state).map(|(key, _)| key.as_str());
        assert_eq!(found.collect::<Vec<_>>(), keys, "{:#?}", self.0);
    }
}

#[test]
fn a_server_is_good() {
    let server = facts(&[0, 1], "NVIDIA H200").in_fabric(&up());
    let rows = rows(&server);
    rows.are(State::Degraded, &[]);
    rows.are(State::Note, &[]);
    rows.expect("gpu-driver", State::Good, "CUDA 12.8, of which 12.0 is needed; 2 devices", "");
    rows.expect("gpu-p2p", State::Good, "each of the 2 GPUs reaches the others' memory", "");
    for of in ["0000:01:00.0", "0000:02:00.0"] {
        rows.expect(&format!("gpu-vmm {of}"), State::Good, "can allocate on it", "");
        rows.expect(&format!("gpu-share {of}"), State::Good, "by file descriptor", "");
        rows.expect(&format!("gpu-fabric {of}"), State::Good, "ends with this machine", "");
        let says = "by dma-buf, of which one was exported; its kernels see what was written without a flush";
        rows.expect(&format!("gpu-memory {of}"), State::Good, says, "");
    }
    let page = Report::of(&server).to_string();
    assert!(page.contains("GPU                 model  node    CUDA  mlx5_0"), "{page}");
    assert!(page.contains("0000:02:00.0  NVIDIA H200     0  cuda:1    NODE"), "{page}");
}

#[test]
fn a_board_of_no_fabric_has_no_row_of_one() {
    let server = rows(&facts(&[0], "NVIDIA L40S").in_fabric(&of_no_fabric()));
    assert!(!server.0.keys().any(|key| key.starts_with("gpu-fabric")), "{:#?}", server.0);
    assert!(!server.0.contains_key("gpu-p2p"), "one GPU has no peer: {:#?}", server.0);
    let unknown = rows(&facts(&[0], "NVIDIA L40S"));
    unknown.are(State::Note, &["gpu-fabric"]);
    unknown.expect("gpu-fabric", State::Note, "libnvidia-ml.so.1 cannot be loaded", "utility");
}

#[test]
fn a_rack_shares_with_its_other_machines() {
    let rows = rows(&facts(&[2, 3], "NVIDIA GB200").in_fabric(&rack()).with_channel());
    rows.are(State::Degraded, &[]);
    rows.expect("gpu-share 0000:03:00.0", State::Good, "by file descriptor, or by fabric handle", "");
    let says = format!("clique 3 of cluster {CLUSTER}; fabric handles are exported");
    rows.expect("gpu-fabric 0000:04:00.0", State::Good, &says, "");
}

#[test]
fn each_missing_piece_of_a_rack_has_its_remedy() {
    let gpu = "gpu-fabric 0000:05:00.0";
    let no_channel = facts(&[4], "NVIDIA GB200").in_fabric(&rack());
    let told = rows(&no_channel);
    told.are(State::Degraded, &[gpu]);
    told.expect(gpu, State::Degraded, "no IMEX channel", "run nvidia-imex");
    told.expect(
        gpu,
        State::Degraded,
        "a fabric handle is not exported (cuMemCreate answers",
        "run nvidia-imex",
    );
    told.expect("gpu-share 0000:05:00.0", State::Good, "by file descriptor", "");
    // The channel is there, and its service or the right to open it is not.
    let refused = rows(&no_channel.clone().with_channel());
    refused.expect(gpu, State::Degraded, "CUDA_ERROR_NOT_PERMITTED", "nvidia-imex-ctl -N");
    // A driver that is older than the handles.
    let old = no_channel.clone().with_channel().changed(|device| {
        device.claims.fabric = false;
        device.tried.fabric = Outcome::NotTried;
    });
    rows(&old).expect(gpu, State::Degraded, "the driver has no fabric handles", "550");
    // The board tells where NVML does not.
    let unknown = rows(&facts(&[4], "NVIDIA GB200"));
    unknown.are(State::Degraded, &[gpu]);
    unknown.are(State::Note, &["gpu-fabric"]);
    for (fabric, says) in [
        (Fabric { state: FabricState::NotStarted, ..up() }, "has not started"),
        (Fabric { state: FabricState::InProgress, ..up() }, "is in progress"),
        (Fabric { state: FabricState::Unknown(9), ..up() }, "unknown state 9"),
        (Fabric { status: 999, ..up() }, "NVML's status 999"),
        (Fabric { complaints: vec!["a route is unhealthy".into()], ..rack() }, "a route is unhealthy"),
        (of_no_fabric(), "knows of no NVLink fabric"),
    ] {
        let told = rows(&facts(&[2], "NVIDIA GB200").in_fabric(&fabric).with_channel());
        told.are(State::Degraded, &["gpu-fabric 0000:03:00.0"]);
        told.expect("gpu-fabric 0000:03:00.0", State::Degraded, says, "the");
    }
}

/// Boards of a server claim fabric handles although NVLink ends with it: nothing is missing.
#[test]
fn a_fabric_handle_is_missed_only_where_nvlink_goes_on() {
    let gpu = "gpu-fabric 0000:05:00.0";
    rows(&facts(&[4], "NVIDIA B200").in_fabric(&up())).expect(
        gpu,
        State::Good,
        "no IMEX channel is needed",
        "",
    );
    rows(&facts(&[4], "NVIDIA B200")).expect(gpu, State::Note, "well where NVLink leads to none", "");
}

/// Without its switches' manager the driver does not start: NVML says why.
#[test]
fn a_driver_that_waits_for_its_switches_is_explained() {
    let why = reason("cuInit answers CUDA_ERROR_SYSTEM_NOT_READY (802)", "nvidia-fabricmanager");
    let waiting = facts(&[0, 1], "NVIDIA H200")
        .in_fabric(&Fabric { state: FabricState::InProgress, ..up() })
        .with_driver(Answer::Refused(why));
    let rows = rows(&waiting);
    rows.are(State::Degraded, &["gpu-driver", "gpu-fabric 0000:01:00.0", "gpu-fabric 0000:02:00.0"]);
    rows.expect(
        "gpu-driver",
        State::Degraded,
        "no page can be in GPU memory: cuInit",
        "nvidia-fabricmanager",
    );
    let says = "GPUs do not reach each other by NVLink";
    rows.expect("gpu-fabric 0000:01:00.0", State::Degraded, says, "restart nvidia-fabricmanager");
    rows.expect("gpu-memory", State::Good, "dma-bufs", "");
}

#[test]
fn a_virtual_gpu_is_told_for_what_it_is() {
    let rows = rows(&facts(&[5], "NVIDIA A40-8Q").in_fabric(&of_no_fabric()));
    rows.are(State::Degraded, &["gpu-vmm 0000:06:00.0"]);
    rows.expect("gpu-vmm 0000:06:00.0", State::Degraded, "allocates nothing on it", "unified memory");
    rows.expect("gpu-share 0000:06:00.0", State::Note, "only what cudaMalloc gave", "");
    rows.expect("gpu-memory 0000:06:00.0", State::Note, "no GPUDirect RDMA", "passed through whole");
}

#[test]
fn pairs_that_do_not_reach_each_other_are_named() {
    let said = |ordinals: &[u32]| rows(&facts(ordinals, "NVIDIA H200"));
    let host = "other pages go through the memory of the host";
    said(&[0, 1, 2, 3]).expect("gpu-p2p", State::Note, "within cuda:0 cuda:1 | cuda:2 cuda:3", "topo -p2p");
    said(&[0, 1, 4]).expect("gpu-p2p", State::Note, "within cuda:0 cuda:1 | cuda:4", "topo -p2p");
    said(&[0, 2]).expect("gpu-p2p", State::Note, "none of 2 GPUs reaches another's memory", "topo -p2p");
    said(&[0, 2]).expect("gpu-p2p", State::Note, host, "topo -p2p");
    // One direction alone, and a chain.
    let of_three = |reaches: [&'static [u32]; 3]| {
        let facts = facts(&[0, 1, 2], "NVIDIA H200");
        rows(&facts.changed(|device| device.reaches = reaches[device.ordinal as usize].to_vec()))
    };
    let one_way = of_three([&[1, 2], &[0, 2], &[0]]);
    one_way.expect("gpu-p2p", State::Note, "but not cuda:2 to cuda:1:", "");
    let chain = of_three([&[1], &[0, 2], &[1]]);
    chain.expect("gpu-p2p", State::Note, "but not cuda:0 and cuda:2:", "");
}

#[test]
fn a_driver_that_did_not_live_to_tell_is_bad() {
    let how = "said nothing for 20s and was killed, at cuda:1 (0000:02:00.0): its context";
    let mut lost = facts(&[0, 1], "NVIDIA H200").with_driver(Answer::Lost(how.into()));
    lost.cuda.as_mut().expect("it was asked").nvml = Answer::Lost(how.into());
    let rows = rows(&lost);
    rows.are(State::Degraded, &["gpu-driver"]);
    rows.expect("gpu-driver", State::Degraded, how, "nvidia-smi hangs too");
    assert!(!rows.0.keys().any(|key| key.starts_with("gpu-fabric")), "{:#?}", rows.0);
}

#[test]
fn what_the_driver_lacks_is_said() {
    let old = facts(&[0], "NVIDIA H200").in_fabric(&up());
    let devices = old.cuda.as_ref().expect("it was asked").devices().to_vec();
    let old = old.with_driver(Answer::Told(Driver { version: 11_080, devices: devices.clone() }));
    rows(&old).expect("gpu-driver", State::Degraded, "serves CUDA 11.8, and crossdock needs 12.0", "525");
    // A GPU that CUDA_VISIBLE_DEVICES leaves out.
    let hidden = facts(&[0, 1], "NVIDIA H200")
        .in_fabric(&up())
        .with_driver(Answer::Told(Driver { version: 12_080, devices }));
    let says = "1 device for this process, without 0000:02:00.0";
    rows(&hidden).expect("gpu-driver", State::Note, says, "CUDA_VISIBLE_DEVICES");
    // A GPU that another process has for itself alone.
    let taken = facts(&[0], "NVIDIA H200").in_fabric(&up()).changed(|device| {
        device.tried.context = Outcome::Refused(reason("CUDA_ERROR_DEVICE_UNAVAILABLE (46)", "nvidia-smi"));
    });
    let told = rows(&taken);
    told.expect("gpu-driver 0000:01:00.0", State::Degraded, "no context on it", "nvidia-smi");
    assert!(!told.0.contains_key("gpu-share 0000:01:00.0"), "{:#?}", told.0);
    // Descriptors that are claimed and do not work.
    let refused = |posix_fd: Outcome, fabric: Outcome| {
        rows(&facts(&[2], "NVIDIA H200").in_fabric(&up()).changed(|device| {
            device.tried.posix_fd = posix_fd.clone();
            device.tried.fabric = fabric.clone();
        }))
    };
    let share = "gpu-share 0000:03:00.0";
    let no = Outcome::Refused(reason("CUDA_ERROR_NOT_SUPPORTED (801)", "this device cannot"));
    refused(no.clone(), Outcome::Works).expect(share, State::Degraded, "it by fabric handle", "cannot");
    refused(no.clone(), no).expect(
        share,
        State::Degraded,
        "only what cudaMalloc gave, by CUDA IPC",
        "cannot",
    );
    refused(Outcome::NotTried, Outcome::Works).expect(share, State::Good, "by fabric handle alone", "");
}

#[test]
fn how_rdma_devices_reach_a_gpu_is_one_row() {
    let gpu = "gpu-memory 0000:01:00.0";
    let server = || facts(&[0], "NVIDIA H200").in_fabric(&up());
    let no_dma_buf = || {
        server().changed(|device| {
            device.tried.dma_buf = Outcome::Refused(reason("CUDA_ERROR_NOT_SUPPORTED (801)", "none"));
        })
    };
    let says =
        "nvidia_peermem is not loaded, and dma-bufs lack an export that works (CUDA_ERROR_NOT_SUPPORTED";
    rows(&no_dma_buf()).expect(gpu, State::Degraded, says, "modprobe nvidia_peermem");
    let mut by_module = no_dma_buf();
    by_module.modules.insert("nvidia_peermem", true);
    rows(&by_module).expect(gpu, State::Good, "reach its memory by nvidia_peermem; its kernels", "");
    let mut by_both = server();
    by_both.modules.insert("nvidia_peermem", true);
    rows(&by_both).expect(
        gpu,
        State::Good,
        "by dma-buf, of which one was exported, or by nvidia_peermem",
        "",
    );
    // What is exported has to be registered as well.
    let old = Facts { kernel: Some("5.4.0-200-generic".into()), ..server() };
    rows(&old).expect(gpu, State::Degraded, "dma-bufs lack a kernel of 5.12 or later", "modprobe");
    let proprietary = server().changed(|device| {
        device.claims.dma_buf = false;
        device.tried.dma_buf = Outcome::NotTried;
    });
    rows(&proprietary).expect(
        gpu,
        State::Degraded,
        "dma-bufs lack the driver's support",
        "open kernel modules",
    );
    let without_vmm = server().changed(|device| device.has_gpu_direct_rdma_with_vmm = false);
    rows(&without_vmm).expect(gpu, State::Note, "but not what crossdock allocates", "cudaMalloc");
    let flushed = server().changed(|device| device.writes_ordering = WritesOrdering::None);
    rows(&flushed).expect(gpu, State::Note, "only after a flush", "");
    let never = flushed.changed(|device| device.can_flush_writes = false);
    rows(&never).expect(gpu, State::Note, "the CPU cannot flush", "host's memory");
}

/// A machine without a GPU is told as before, whatever its libraries say.
#[test]
fn without_a_gpu_nothing_is_said_of_drivers() {
    let why = reason("libcuda.so.1 is not found", "install NVIDIA's driver");
    let bare = facts(&[], "").with_driver(Answer::Refused(why));
    assert_eq!(rows(&bare).0.keys().collect::<Vec<_>>(), ["gpu"]);
    let lost = bare.with_driver(Answer::Lost("ended early".into()));
    assert_eq!(rows(&lost).0.keys().collect::<Vec<_>>(), ["gpu"]);
    // The bus of a sandbox shows no device, and its driver does.
    let devices = facts(&[0], "").cuda.expect("it was asked").devices().to_vec();
    let sandbox = lost.with_driver(Answer::Told(Driver { version: 12_080, devices }));
    let rows = rows(&sandbox);
    rows.expect("gpu", State::Note, "the PCI bus shows no NVIDIA GPU", "");
    rows.expect("gpu-share 0000:01:00.0", State::Good, "by file descriptor", "");
}

/// The facts travel from one process to another, and into `--json`.
#[test]
fn what_the_driver_says_is_json() {
    let cuda = facts(&[2, 4], "NVIDIA GB200").in_fabric(&rack()).cuda.expect("it was asked");
    let json = serde_json::to_value(&cuda).expect("JSON");
    let devices = &json["driver"]["told"]["devices"];
    assert_eq!(devices[0]["tried"]["fabric"], "works");
    assert!(devices[1]["tried"]["fabric"]["refused"]["advice"].is_string(), "{devices}");
    assert_eq!(devices[0]["writes_ordering"], "owner");
    assert_eq!(devices[0]["uuid"], "03030303-0303-0303-0303-030303030303");
    assert_eq!(json["nvml"]["told"]["fabrics"]["0000:03:00.0"]["told"]["state"], "completed");
    let back: Cuda = serde_json::from_value(json.clone()).expect("it is understood");
    assert_eq!(serde_json::to_value(&back).expect("JSON"), json);
}
