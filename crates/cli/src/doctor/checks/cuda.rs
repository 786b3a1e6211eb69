//! What the CUDA driver says of the GPUs: what can be allocated on them, who can share it, and who reaches it.

use std::collections::BTreeSet;

use super::{Check, count};
use crate::doctor::cuda::{Answer, Cuda, Device, Driver, Fabric, FabricState, Outcome, Reason};
use crate::doctor::facts::Facts;

/// `given` are the addresses of the GPUs that the kernel's driver gives to this process.
pub fn checks(facts: &Facts, given: &BTreeSet<String>) -> Vec<Check> {
    let Some(cuda) = &facts.cuda else {
        return vec![Check::note(
            "gpu-fabric",
            "NVLink's and the NVSwitches' state was not looked at: only that machine's own driver tells it",
        )];
    };
    let mut checks = vec![driver(&cuda.driver, given)];
    for device in cuda.devices() {
        match &device.tried.context {
            Outcome::Refused(Reason { says, advice }) => checks.push(
                Check::degraded(
                    "gpu-driver",
                    format!("there is no context on it, so no page: {says}"),
                    advice,
                )
                .of(&device.pci_address),
            ),
            Outcome::Works | Outcome::NotTried => checks.extend([virtual_memory(device), share(device)]),
        }
    }
    checks.extend(peers(cuda.devices()));
    checks.extend(fabrics(facts, cuda, given));
    checks
}

fn driver(answer: &Answer<Driver>, given: &BTreeSet<String>) -> Check {
    let name = "gpu-driver";
    match answer {
        Answer::Told(driver) if driver.version < NEEDED => Check::degraded(
            name,
            format!(
                "the driver serves CUDA {}, and crossdock needs {}: pages stay in the memory of the host",
                version(driver.version),
                version(NEEDED)
            ),
            "update the driver: 525 or newer",
        ),
        Answer::Told(driver) => {
            let devices = count(driver.devices.len(), "device", "devices");
            let says = format!(
                "CUDA {}, of which {} is needed; {devices} for this process",
                version(driver.version),
                version(NEEDED)
            );
            let known: Vec<&str> = driver.devices.iter().map(|device| device.pci_address.as_str()).collect();
            let hidden: Vec<&str> =
                given.iter().map(String::as_str).filter(|address| !known.contains(address)).collect();
            match hidden.is_empty() {
                true => Check::good(name, says),
                false => Check::note(name, format!("{says}, without {}", hidden.join(", ")))
                    .advice("if more are wanted: CUDA_VISIBLE_DEVICES, and MIG, leave GPUs out"),
            }
        }
        Answer::Refused(Reason { says, advice }) => {
            Check::degraded(name, format!("no page can be in GPU memory: {says}"), advice)
        }
        Answer::Lost(how) => Check::degraded(
            name,
            format!("no page can be in GPU memory: the process that asked the driver {how}"),
            "see whether nvidia-smi hangs too, and the kernel log (dmesg | grep -i -e NVRM -e Xid); reset that GPU, or \
             restart the machine",
        ),
    }
}

fn virtual_memory(device: &Device) -> Check {
    let name = "gpu-vmm";
    let check = match device.has_virtual_memory {
        true => Check::good(name, "crossdock can allocate on it what others can map"),
        false => Check::degraded(
            name,
            "the driver does not map memory apart (no VMM): crossdock allocates nothing on it, and takes what \
             cudaMalloc gave",
            "a virtual GPU may need a profile with unified memory",
        ),
    };
    check.of(&device.pci_address)
}

/// By what the processes of this host share its memory.
fn share(device: &Device) -> Check {
    let name = "gpu-share";
    let has_fabric = device.tried.fabric == Outcome::Works;
    let check = match &device.tried.posix_fd {
        Outcome::Works => Check::good(
            name,
            match has_fabric {
                true => "other processes of this host map its memory by file descriptor, or by fabric handle",
                false => "other processes of this host map its memory by file descriptor",
            },
        ),
        Outcome::Refused(Reason { says, advice }) => Check::degraded(
            name,
            format!(
                "the driver claims to export memory by file descriptor, and does not ({says}): other processes of this \
                 host map {}",
                if has_fabric { "it by fabric handle" } else { "only what cudaMalloc gave, by CUDA IPC" }
            ),
            advice,
        ),
        Outcome::NotTried if has_fabric => {
            Check::good(name, "other processes of this host map its memory by fabric handle alone")
        }
        Outcome::NotTried => Check::note(
            name,
            "the driver exports no memory of it: other processes of this host map only what cudaMalloc gave, where \
             the driver has CUDA IPC",
        ),
    };
    check.of(&device.pci_address)
}

/// Which GPUs reach each other's memory.
fn peers(devices: &[Device]) -> Option<Check> {
    let name = "gpu-p2p";
    let reaches = |one: &Device, other: &Device| one.reaches.contains(&other.ordinal);
    let pairs: Vec<(&Device, &Device)> = devices
        .iter()
        .enumerate()
        .flat_map(|(at, one)| devices[at + 1..].iter().map(move |other| (one, other)))
        .collect();
    if pairs.is_empty() {
        return None;
    }
    let apart = pairs.iter().filter(|(one, other)| !reaches(one, other) || !reaches(other, one));
    let apart: Vec<&(&Device, &Device)> = apart.collect();
    if apart.is_empty() {
        return Some(Check::good(
            name,
            format!(
                "each of the {} GPUs reaches the others' memory: pages can go between them directly",
                devices.len()
            ),
        ));
    }
    let says = if apart.len() == pairs.len() && devices.iter().all(|device| device.reaches.is_empty()) {
        format!("none of {} reaches another's memory", count(devices.len(), "GPU", "GPUs"))
    } else if let Some(groups) = groups(devices) {
        let names = groups.iter().map(|group| group.join(" "));
        format!("GPUs reach each other's memory within {}", names.collect::<Vec<_>>().join(" | "))
    } else {
        let named = apart.iter().take(PAIRS_NAMED).map(|(one, other)| {
            let (from, to) = (one.ordinal, other.ordinal);
            match (reaches(one, other), reaches(other, one)) {
                (true, _) => format!("cuda:{to} to cuda:{from}"),
                (_, true) => format!("cuda:{from} to cuda:{to}"),
                _ => format!("cuda:{from} and cuda:{to}"),
            }
        });
        let named: Vec<String> = named.collect();
        let more = apart.len() - named.len();
        let more = if more > 0 { format!(", and {more} more") } else { String::new() };
        format!("GPUs reach each other's memory, but not {}{more}", named.join(", "))
    };
    Some(Check::note(name, format!("{says}: other pages go through the memory of the host")).advice(
        "nvidia-smi topo -p2p r says why; the IOMMU, a virtual machine and boards without NVLink stand in the way",
    ))
}

/// The devices by groups that reach each other and nobody else, if they are so; a GPU alone is a group.
fn groups(devices: &[Device]) -> Option<Vec<Vec<String>>> {
    let with_itself =
        |device: &Device| device.reaches.iter().copied().chain([device.ordinal]).collect::<BTreeSet<u32>>();
    let sets: BTreeSet<BTreeSet<u32>> = devices.iter().map(with_itself).collect();
    // Every device is in its own set: so sets that have as many members together as there are devices share none.
    let members: usize = sets.iter().map(BTreeSet::len).sum();
    let named = |set: &BTreeSet<u32>| set.iter().map(|ordinal| format!("cuda:{ordinal}")).collect();
    (members == devices.len()).then(|| sets.iter().map(named).collect())
}

/// NVLink's fabric: of each GPU that is in one, and once why nothing is known of it.
fn fabrics(facts: &Facts, cuda: &Cuda, given: &BTreeSet<String>) -> Vec<Check> {
    let mut checks = Vec::new();
    if let Answer::Refused(Reason { says, advice }) = &cuda.nvml {
        let says = format!("whether an NVLink fabric is up is not known: {says}");
        checks.push(Check::note("gpu-fabric", says).advice(advice));
    }
    let known = cuda.devices().iter().map(|device| &device.pci_address);
    let addresses: BTreeSet<&String> = known.chain(given).collect();
    checks.extend(addresses.into_iter().filter_map(|address| fabric(facts, cuda, address)));
    checks
}

fn fabric(facts: &Facts, cuda: &Cuda, address: &str) -> Option<Check> {
    let name = "gpu-fabric";
    let fabric = match cuda.nvml.told().and_then(|nvml| nvml.fabrics.get(address)) {
        Some(Answer::Told(fabric)) => Some(fabric),
        Some(Answer::Refused(Reason { says, advice })) => {
            let says = format!("whether its NVLink fabric is up is not known: {says}");
            return Some(Check::note(name, says).advice(advice).of(address));
        }
        Some(Answer::Lost(_)) | None => None,
    };
    let device = cuda.devices().iter().find(|device| device.pci_address == address);
    let model = facts.topology.gpus.iter().find(|gpu| gpu.pci.address.to_string() == address);
    let model = model.and_then(|gpu| gpu.model.as_deref()).or(device.map(|device| device.name.as_str()));
    let is_of_rack = model.is_some_and(super::gpu::is_multi_node);
    // Where the fabric is up it tells how far it goes; before, and without NVML, only the board does.
    let leaves_machine = match fabric {
        Some(Fabric { state: FabricState::Completed, status: 0, cluster, .. }) => cluster.is_some(),
        Some(_) | None => is_of_rack,
    };
    let claim = device.map(|device| (device.claims.fabric, &device.tried.fabric));
    if !leaves_machine && fabric.is_none_or(|fabric| fabric.state == FabricState::NotSupported) {
        // Boards that were made for a rack, too, claim fabric handles outside of one.
        let Some((true, Outcome::Refused(Reason { says, .. }))) = claim.filter(|_| fabric.is_none()) else {
            return None;
        };
        let says = format!(
            "the driver claims fabric handles, and does not export one ({says}): memory is shared with no other machine, \
             which is well where NVLink leads to none"
        );
        return Some(Check::note(name, says).of(address));
    }
    let mut pieces: Vec<(String, &str)> = fabric.map(registration).unwrap_or_default();
    if leaves_machine {
        pieces.extend(memory_exchange(facts, claim));
    }
    let check = match (pieces.is_empty(), leaves_machine) {
        (true, true) => Check::good(name, memory_is_exchanged(fabric, claim)),
        (true, false) => {
            Check::good(name, "NVLink's fabric is up and ends with this machine: no IMEX channel is needed")
        }
        (false, _) => {
            let missing: Vec<&str> = pieces.iter().map(|(what, _)| what.as_str()).collect();
            let mut remedies: Vec<&str> = pieces.iter().map(|(_, remedy)| *remedy).collect();
            remedies.dedup();
            let follows = match leaves_machine {
                true => "memory is not shared with the other machines of the NVLink domain as it could be",
                false => "GPUs do not reach each other by NVLink as they could",
            };
            Check::degraded(name, format!("{}: {follows}", missing.join("; ")), remedies.join("; "))
        }
    };
    Some(check.of(address))
}

/// What is missing for a GPU to be a member of the fabric, with its remedy.
fn registration(fabric: &Fabric) -> Vec<(String, &'static str)> {
    let remedy = "NVSwitches of this machine: systemctl restart nvidia-fabricmanager; of a rack: see its NVLink controller \
                  (NMX-C); nvidia-smi -q says more of the fabric";
    let piece = |what: &str| vec![(what.to_owned(), remedy)];
    match fabric.state {
        FabricState::NotSupported => vec![(
            "NVML knows of no NVLink fabric".to_owned(),
            "update the driver: NVML tells the fabric from 525 on; a virtual GPU has none",
        )],
        FabricState::NotStarted => piece("registration with NVLink's fabric has not started"),
        FabricState::InProgress => {
            piece("registration with NVLink's fabric is in progress (the switches' manager has not answered)")
        }
        FabricState::Unknown(number) => piece(&format!("NVLink's fabric is in the unknown state {number}")),
        FabricState::Completed if fabric.status != 0 => piece(&format!(
            "registration with NVLink's fabric has failed with NVML's status {}",
            fabric.status
        )),
        FabricState::Completed => fabric
            .complaints
            .iter()
            .map(|complaint| (format!("the GPU says of NVLink's fabric: {complaint}"), remedy))
            .collect(),
    }
}

/// What is missing for its memory to be shared with other machines. `claim`: whether the driver claims fabric handles, and
/// what came of trying.
fn memory_exchange(facts: &Facts, claim: Option<(bool, &Outcome)>) -> Vec<(String, &'static str)> {
    let has_channel = !facts.imex_channels.is_empty();
    let mut pieces = Vec::new();
    if !has_channel {
        let what = "there is no IMEX channel in /dev/nvidia-caps-imex-channels";
        pieces.push((what.to_owned(), super::gpu::IMEX_REMEDY));
    }
    match claim {
        Some((true, Outcome::Refused(Reason { says, .. }))) => pieces.push((
            format!("a fabric handle is not exported ({says})"),
            match has_channel {
                true => {
                    "let this user open the channel; systemctl status nvidia-imex, and nvidia-imex-ctl -N for all machines"
                }
                false => super::gpu::IMEX_REMEDY,
            },
        )),
        Some((false, _)) => pieces.push((
            "the driver has no fabric handles".to_owned(),
            "update the driver: CUDA 12.4 (550) or newer; a virtual GPU has none",
        )),
        Some((true, Outcome::Works | Outcome::NotTried)) | None => {}
    }
    pieces
}

fn memory_is_exchanged(fabric: Option<&Fabric>, claim: Option<(bool, &Outcome)>) -> String {
    let place = match fabric {
        Some(Fabric { clique, cluster: Some(cluster), .. }) => {
            format!("NVLink's fabric is up: clique {clique} of cluster {cluster}")
        }
        _ => "NVLink leads to other machines".to_owned(),
    };
    match claim {
        Some((true, Outcome::Works)) => {
            format!(
                "{place}; fabric handles are exported, so its memory can be shared with the clique's machines"
            )
        }
        _ => format!("{place}; whether fabric handles are exported was not tried"),
    }
}

/// `12.8`, as 12080.
fn version(number: u32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

/// The first CUDA whose driver has all that crossdock calls.
const NEEDED: u32 = 12_000;
const PAIRS_NAMED: usize = 6;
