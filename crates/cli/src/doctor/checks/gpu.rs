//! GPUs: whether they are there for this process, whether RDMA devices can reach their memory, and how near they are.

use std::collections::BTreeSet;

use crossdock_verbs::topology::{Distance, Gpu, RdmaDevice, Topology};

use super::{Check, count, cuda};
use crate::doctor::cuda::{Cuda, Device, Outcome, WritesOrdering};
use crate::doctor::facts::Facts;

pub fn checks(facts: &Facts) -> Vec<Check> {
    let gpus = &facts.topology.gpus;
    let devices = facts.cuda.as_ref().map_or(&[][..], Cuda::devices);
    if gpus.is_empty() && devices.is_empty() {
        return vec![Check::note("gpu", "no NVIDIA GPU: pages are in the memory of the host")];
    }
    let mut checks = vec![present(facts)];
    let given: Vec<&Gpu> = gpus.iter().filter(|gpu| gpu.model.is_some()).collect();
    checks.extend(given.iter().filter_map(|gpu| file(facts, gpu)));
    if given.is_empty() && devices.is_empty() {
        return checks;
    }
    let addresses: BTreeSet<String> = given.iter().map(|gpu| gpu.pci.address.to_string()).collect();
    checks.extend(cuda::checks(facts, &addresses));
    if facts.topology.devices.iter().any(|device| !device.is_software()) {
        match devices {
            [] => checks.push(memory(facts)),
            devices => checks.extend(devices.iter().map(|device| memory_of(facts, device))),
        }
        checks.extend(given.iter().filter_map(|gpu| distance(&facts.topology, gpu)));
    }
    // Where the driver has told of devices, what is missing of the fabric is said with its channels.
    if devices.is_empty() {
        checks.extend(imex(facts, &given));
    }
    checks
}

/// The nearest RDMA devices of a GPU, and how near they are.
fn nearest<'a>(topology: &'a Topology, gpu: &Gpu) -> Option<(Distance, Vec<&'a RdmaDevice>)> {
    let near = topology.near_gpu(gpu);
    let distance = topology.distance(&gpu.pci, near.first()?.pci.as_ref()?);
    Some((distance, near))
}

fn present(facts: &Facts) -> Check {
    let gpus = &facts.topology.gpus;
    if gpus.is_empty() {
        return Check::note(
            "gpu",
            "the PCI bus shows no NVIDIA GPU, and the CUDA driver finds some: a sandbox",
        );
    }
    let given = gpus.iter().filter(|gpu| gpu.model.is_some()).count();
    let how_many = count(gpus.len(), "GPU", "GPUs");
    let Some(driver) = &facts.nvidia else {
        let elsewhere =
            gpus.iter().all(|gpu| gpu.pci.driver.as_deref().is_some_and(|driver| driver != "nvidia"));
        return match elsewhere {
            true => {
                Check::note("gpu", format!("{how_many}, given to another driver, as for a virtual machine"))
            }
            false => Check::degraded(
                "gpu",
                format!("{how_many} on the PCI bus, and NVIDIA's driver is not loaded"),
                "install the driver and modprobe nvidia; see dmesg if that fails",
            ),
        };
    };
    let version = driver.version.as_deref().unwrap_or("without a version");
    let kind = if driver.is_open { "open" } else { "proprietary" };
    let models = gpus.iter().find_map(|gpu| gpu.model.as_deref()).unwrap_or("none of them for this process");
    let says = match given == gpus.len() {
        true => format!("{how_many}, {models}; driver {version}, {kind} kernel modules"),
        false => format!(
            "{given} of {how_many} given to this process, {models}; driver {version}, {kind} kernel modules"
        ),
    };
    match given == gpus.len() {
        true => Check::good("gpu", says),
        false => Check::note("gpu", says).advice("if more are wanted in this container: docker --gpus all"),
    }
}

fn file(facts: &Facts, gpu: &Gpu) -> Option<Check> {
    let minor = gpu.minor?;
    let address = gpu.pci.address.to_string();
    let says = format!("/dev/nvidia{minor} is not there, so no program can use this GPU");
    let advice = "nvidia-modprobe -u -c 0 on a host; docker --gpus all for a container";
    let is_there = facts.gpu_files.contains(&minor);
    (!is_there).then(|| Check::degraded("gpu-file", says, advice).of(address))
}

/// Either way that lets a NIC read and write GPU memory, as far as it is known without asking the driver.
fn memory(facts: &Facts) -> Check {
    let name = "gpu-memory";
    if let Some(module) = peer_memory(facts) {
        return Check::good(name, format!("RDMA devices can reach GPU memory by {module}"));
    }
    let is_open = facts.nvidia.as_ref().is_some_and(|driver| driver.is_open);
    let driver = (!is_open).then(|| "NVIDIA's open kernel modules".to_owned());
    let missing = missing_for_dma_buf(facts, driver);
    match missing.is_empty() {
        true => Check::good(
            name,
            "RDMA devices can reach GPU memory by dma-bufs: kernel, driver and library have them",
        ),
        false => Check::degraded(name, out_of_reach(&missing), REACH_REMEDY),
    }
}

/// The same of one GPU, as the driver tells it and as it was tried.
fn memory_of(facts: &Facts, device: &Device) -> Check {
    let name = "gpu-memory";
    let dma_buf = &device.tried.dma_buf;
    if !device.has_gpu_direct_rdma && *dma_buf != Outcome::Works {
        return Check::note(
            name,
            "the driver lets no RDMA device reach its memory (no GPUDirect RDMA): what goes to other machines goes \
             through the memory of the host",
        )
        .advice("a data center's or a workstation's GPU can; in a virtual machine, one that is passed through whole")
        .of(&device.pci_address);
    }
    let driver = match dma_buf {
        Outcome::Works => None,
        Outcome::Refused(reason) => Some(format!("an export that works ({})", reason.says)),
        Outcome::NotTried if device.claims.dma_buf => Some("memory to try them with".to_owned()),
        Outcome::NotTried => Some("the driver's support (NVIDIA's open kernel modules have it)".to_owned()),
    };
    let missing = missing_for_dma_buf(facts, driver);
    let means = match (missing.is_empty(), peer_memory(facts)) {
        (true, Some(module)) => format!("dma-buf, of which one was exported, or by {module}"),
        (true, None) => "dma-buf, of which one was exported".to_owned(),
        (false, Some(module)) => module.to_owned(),
        (false, None) => {
            return Check::degraded(name, out_of_reach(&missing), REACH_REMEDY).of(&device.pci_address);
        }
    };
    let says = format!("RDMA devices can reach its memory by {means}");
    let has_all = device.has_gpu_direct_rdma_with_vmm || !device.has_virtual_memory;
    let check = match (has_all, device.writes_ordering, device.can_flush_writes) {
        (false, ..) => Check::note(name, format!("{says}, but not what crossdock allocates there (VMM)"))
            .advice("register what cudaMalloc gave"),
        (true, WritesOrdering::Owner | WritesOrdering::AllDevices, _) => {
            Check::good(name, format!("{says}; its kernels see what was written without a flush"))
        }
        (true, WritesOrdering::None, true) => Check::note(
            name,
            format!("{says}; its kernels see what was written only after a flush (cuFlushGPUDirectRDMAWrites)"),
        ),
        (true, WritesOrdering::None, false) => Check::note(
            name,
            format!("{says}; when its kernels see what was written is not known, and the CPU cannot flush it"),
        )
        .advice("read from the GPU what has arrived before a kernel uses it, or keep the pages in the host's memory"),
    };
    check.of(&device.pci_address)
}

/// The module of the GPU's vendor that lets RDMA devices reach its memory.
fn peer_memory(facts: &Facts) -> Option<&'static str> {
    ["nvidia_peermem", "nv_peer_mem"].into_iter().find(|module| facts.has_module(module))
}

/// What keeps dma-bufs from RDMA devices. `driver`: what the GPU's driver lacks for them.
fn missing_for_dma_buf(facts: &Facts, driver: Option<String>) -> Vec<String> {
    let minor = facts.libibverbs.as_ref().and_then(|library| library.minor);
    let kernel = (!facts.kernel_is_at_least(5, 12)).then(|| "a kernel of 5.12 or later".to_owned());
    let library =
        minor.is_some_and(|minor| minor < DMA_BUF_MINOR).then(|| "rdma-core 34 or later".to_owned());
    [kernel, driver, library].into_iter().flatten().collect()
}

fn out_of_reach(missing: &[String]) -> String {
    format!(
        "RDMA devices cannot reach GPU memory: nvidia_peermem is not loaded, and dma-bufs lack {}",
        missing.join(" and ")
    )
}

fn distance(topology: &Topology, gpu: &Gpu) -> Option<Check> {
    let (distance, near) = nearest(topology, gpu)?;
    let names: Vec<&str> = near.iter().map(|device| device.name.as_str()).collect();
    let says = format!("nearest is {} ({distance})", names.join(", "));
    let check = match distance {
        Distance::Sys => Check::note("gpu-distance", format!("{says}: its bytes cross between NUMA nodes"))
            .advice("use a GPU of the devices' node, or devices of its own"),
        _ => Check::good("gpu-distance", says),
    };
    Some(check.of(gpu.pci.address.to_string()))
}

/// Machines that share an NVLink domain with others.
fn imex(facts: &Facts, gpus: &[&Gpu]) -> Option<Check> {
    let has_domain = |gpu: &&Gpu| gpu.model.as_deref().is_some_and(is_multi_node);
    let channels = facts.imex_channels.len();
    match (channels, gpus.iter().any(has_domain)) {
        (0, false) => None,
        (0, true) => Some(Check::degraded(
            "gpu-imex",
            "no IMEX channel: memory cannot be shared with the other machines of the NVLink domain",
            IMEX_REMEDY,
        )),
        _ => Some(Check::good("gpu-imex", count(channels, "IMEX channel", "IMEX channels"))),
    }
}

/// Whether the NVLink of a board of this name goes from machine to machine.
pub fn is_multi_node(model: &str) -> bool {
    MULTI_NODE.iter().any(|name| model.contains(name))
}

/// How a process comes to an IMEX channel.
pub const IMEX_REMEDY: &str = "run nvidia-imex on all machines of the domain and load the driver with \
                               NVreg_CreateImexChannel0=1; give a container the channel; in a cluster, a ComputeDomain of \
                               NVIDIA's DRA driver";
const REACH_REMEDY: &str =
    "modprobe nvidia_peermem, or NVIDIA's open kernel modules with a kernel of 5.12 or later";
/// Boards whose NVLink goes from machine to machine.
const MULTI_NODE: &[&str] = &["GB200", "GB300"];
/// The first libibverbs with `ibv_reg_dmabuf_mr`.
const DMA_BUF_MINOR: u32 = 12;
