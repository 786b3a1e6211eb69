//! GPUs: whether they are there for this process, whether RDMA devices can reach their memory, and how near they are.

use crossdock_verbs::topology::{Distance, Gpu, RdmaDevice, Topology};

use super::{Check, count};
use crate::doctor::facts::Facts;

pub fn checks(facts: &Facts) -> Vec<Check> {
    let gpus = &facts.topology.gpus;
    if gpus.is_empty() {
        return vec![Check::note("gpu", "no NVIDIA GPU: pages are in the memory of the host")];
    }
    let mut checks = vec![present(facts)];
    let given: Vec<&Gpu> = gpus.iter().filter(|gpu| gpu.model.is_some()).collect();
    checks.extend(given.iter().filter_map(|gpu| file(facts, gpu)));
    if given.is_empty() {
        return checks;
    }
    if facts.topology.devices.iter().any(|device| !device.is_software()) {
        checks.push(memory(facts));
        checks.extend(given.iter().filter_map(|gpu| distance(&facts.topology, gpu)));
    }
    checks.extend(imex(facts, &given));
    checks.push(Check::note(
        "gpu-fabric",
        "NVLink's and the NVSwitches' state was not looked at: only NVML tells it",
    ));
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

/// Either way that lets a NIC read and write GPU memory.
fn memory(facts: &Facts) -> Check {
    let name = "gpu-memory";
    if let Some(module) =
        ["nvidia_peermem", "nv_peer_mem"].into_iter().find(|module| facts.has_module(module))
    {
        return Check::good(name, format!("RDMA devices can reach GPU memory by {module}"));
    }
    let missing = [
        (!facts.kernel_is_at_least(5, 12), "a kernel of 5.12 or later"),
        (!facts.nvidia.as_ref().is_some_and(|driver| driver.is_open), "NVIDIA's open kernel modules"),
        (
            facts
                .libibverbs
                .as_ref()
                .and_then(|library| library.minor)
                .is_some_and(|minor| minor < DMA_BUF_MINOR),
            "rdma-core 34 or later",
        ),
    ];
    let missing: Vec<&str> = missing.into_iter().filter(|(is, _)| *is).map(|(_, what)| what).collect();
    match missing.is_empty() {
        true => Check::good(
            name,
            "RDMA devices can reach GPU memory by dma-bufs: kernel, driver and library have them",
        ),
        false => Check::degraded(
            name,
            format!(
                "RDMA devices cannot reach GPU memory: nvidia_peermem is not loaded, and dma-bufs lack {}",
                missing.join(" and ")
            ),
            "modprobe nvidia_peermem, or NVIDIA's open kernel modules with a kernel of 5.12 or later",
        ),
    }
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
    let has_domain =
        |gpu: &&Gpu| MULTI_NODE.iter().any(|name| gpu.model.as_deref().unwrap_or_default().contains(name));
    let channels = facts.imex_channels.len();
    match (channels, gpus.iter().any(has_domain)) {
        (0, false) => None,
        (0, true) => Some(Check::degraded(
            "gpu-imex",
            "no IMEX channel: memory cannot be shared with the other machines of the NVLink domain",
            "run nvidia-imex on all of them and load the driver with NVreg_CreateImexChannel0=1; in a cluster, a \
             ComputeDomain of NVIDIA's DRA driver",
        )),
        _ => Some(Check::good("gpu-imex", count(channels, "IMEX channel", "IMEX channels"))),
    }
}

/// Boards whose NVLink goes from machine to machine.
const MULTI_NODE: &[&str] = &["GB200", "GB300"];
/// The first libibverbs with `ibv_reg_dmabuf_mr`.
const DMA_BUF_MINOR: u32 = 12;
