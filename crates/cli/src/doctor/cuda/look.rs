//! Asks both libraries. What is about to be done is told before, so that it is known where a driver hangs.

use std::sync::Arc;

use crossdock_cuda::driver::{self, Context, CudaError, HandleTypes};
use crossdock_cuda::nvml;
use crossdock_verbs::topology::PciAddress;

use super::{
    Answer, Claims, Device, Driver, Fabric, FabricState, Nvml, Outcome, Reason, Tried, WritesOrdering,
};

/// The place of these GPUs in the NVLink fabric.
pub fn nvml(addresses: &[String]) -> Answer<Nvml> {
    let library = match nvml::Nvml::load() {
        Ok(library) => library,
        Err(error) => return Answer::Refused(Reason::new(&error, error.advice())),
    };
    let ask = |address: &String| {
        let answer = match library.fabric(address) {
            Ok(told) => Answer::Told(fabric(&told)),
            Err(error) => Answer::Refused(Reason::new(&error, "look at what nvidia-smi -q says of it")),
        };
        (address.clone(), answer)
    };
    Answer::Told(Nvml { fabrics: addresses.iter().map(ask).collect() })
}

/// The CUDA driver, and its devices.
pub fn driver(doing: &mut dyn FnMut(String)) -> Answer<Driver> {
    doing("the start of the CUDA driver".into());
    let driver = match driver::Driver::load() {
        Ok(driver) => driver,
        Err(error) => return Answer::Refused(Reason::new(&error, error.advice())),
    };
    match driver.devices().and_then(|all| devices(&all, doing)) {
        Ok(devices) => Answer::Told(Driver { version: driver.version(), devices }),
        Err(error) => Answer::Refused(Reason::new(&error, error.advice())),
    }
}

/// These devices, and which of them reach each other.
pub fn devices(these: &[driver::Device], doing: &mut dyn FnMut(String)) -> Result<Vec<Device>, CudaError> {
    these.iter().map(|one| device(one, these, doing)).collect()
}

fn device(
    device: &driver::Device,
    these: &[driver::Device],
    doing: &mut dyn FnMut(String),
) -> Result<Device, CudaError> {
    doing(format!("{device}"));
    let facts = device.facts()?;
    let mut reaches = Vec::new();
    for other in these.iter().filter(|other| *other != device) {
        if device.reaches(other)? {
            reaches.push(other.ordinal());
        }
    }
    let address = facts.pci_address.parse::<PciAddress>();
    let pci_address = address.map_or(facts.pci_address.clone(), |address| address.to_string());
    let tried = tried(device, &facts, &mut |what| doing(format!("{device} ({pci_address}): {what}")));
    Ok(Device {
        ordinal: device.ordinal(),
        uuid: uuid(&facts.uuid),
        pci_address,
        memory_bytes: facts.memory_bytes,
        compute_capability: format!("{}.{}", facts.architecture.major, facts.architecture.minor),
        multiprocessors: facts.multiprocessors,
        has_virtual_memory: facts.has_virtual_memory,
        claims: Claims {
            posix_fd: facts.handles.posix_fd,
            fabric: facts.handles.fabric,
            dma_buf: facts.has_dma_buf,
        },
        has_gpu_direct_rdma: facts.has_gpu_direct_rdma,
        has_gpu_direct_rdma_with_vmm: facts.has_gpu_direct_rdma_with_vmm,
        writes_ordering: match facts.writes_ordering {
            driver::WritesOrdering::None => WritesOrdering::None,
            driver::WritesOrdering::Owner => WritesOrdering::Owner,
            driver::WritesOrdering::AllDevices => WritesOrdering::AllDevices,
        },
        can_flush_writes: facts.can_flush_writes,
        has_multicast: facts.has_multicast,
        reaches_pageable_memory: facts.reaches_pageable_memory,
        numa_node: facts.numa_node,
        reaches,
        tried,
        name: facts.name,
    })
}

fn tried(device: &driver::Device, facts: &driver::Facts, doing: &mut dyn FnMut(&str)) -> Tried {
    let nothing = Tried {
        context: Outcome::NotTried,
        posix_fd: Outcome::NotTried,
        fabric: Outcome::NotTried,
        dma_buf: Outcome::NotTried,
    };
    doing("its context");
    let context = match device.context() {
        Ok(context) => context,
        Err(error) => return Tried { context: Outcome::Refused(error.into()), ..nothing },
    };
    let mut attempt = |is_claimed: bool, what: &str, attempt: &dyn Fn() -> Result<(), CudaError>| {
        if !is_claimed || !facts.has_virtual_memory {
            return Outcome::NotTried;
        }
        doing(what);
        attempt().map_or_else(|error| Outcome::Refused(error.into()), |()| Outcome::Works)
    };
    let (posix_fd, fabric) = (HandleTypes::POSIX_FD, HandleTypes::FABRIC);
    Tried {
        context: Outcome::Works,
        posix_fd: attempt(facts.handles.posix_fd, "export by descriptor", &|| context.try_sharing(posix_fd)),
        fabric: attempt(facts.handles.fabric, "export by fabric handle", &|| context.try_sharing(fabric)),
        dma_buf: attempt(facts.has_dma_buf, "export as dma-buf", &|| dma_buf(&context, facts)),
    }
}

/// Exports the smallest piece of memory, allocated as crossdock allocates it.
fn dma_buf(context: &Context, facts: &driver::Facts) -> Result<(), CudaError> {
    let handles = HandleTypes { fabric: false, ..facts.handles };
    let bytes = context.granularity_bytes(handles)?;
    let piece = context.allocate_physical(bytes, handles, facts.has_gpu_direct_rdma_with_vmm)?;
    let mapped = Arc::new(piece).map(&[])?;
    // A driver that is too old for it does not claim it.
    context.dma_buf(mapped.base(), bytes).map(|_| ())
}

fn fabric(told: &nvml::Fabric) -> Fabric {
    let health = told.health;
    let complaints = [
        (health.has_degraded_bandwidth, "its bandwidth is degraded"),
        (health.recovers_route, "a route is being recovered"),
        (health.has_unhealthy_route, "a route is unhealthy"),
        (health.recovers_from_timeout, "accesses have timed out and are being recovered"),
    ];
    let said = complaints.into_iter().filter(|(is, _)| *is).map(|(_, what)| what.to_owned());
    let misconfigured = health.misconfiguration.map(|number| match number {
        2 => "it is configured wrongly: the GUID of its system".to_owned(),
        3 => "it is configured wrongly: the serial number of its chassis".to_owned(),
        4 => "it is configured wrongly: no partition".to_owned(),
        5 => "it is configured wrongly: too few NVLinks".to_owned(),
        other => format!("it is configured wrongly: NVML's number {other}"),
    });
    Fabric {
        state: match told.state {
            nvml::FabricState::NotSupported => FabricState::NotSupported,
            nvml::FabricState::NotStarted => FabricState::NotStarted,
            nvml::FabricState::InProgress => FabricState::InProgress,
            nvml::FabricState::Completed => FabricState::Completed,
            nvml::FabricState::Other(number) => FabricState::Unknown(number),
        },
        status: told.status,
        clique: told.clique,
        cluster: (told.cluster != [0; 16]).then(|| uuid(&told.cluster)),
        complaints: said.chain(misconfigured).collect(),
    }
}

/// In the form of `nvidia-smi`.
fn uuid(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

impl Reason {
    fn new(error: &impl ToString, advice: &str) -> Self {
        Self { says: error.to_string(), advice: advice.to_owned() }
    }
}

impl From<CudaError> for Reason {
    fn from(error: CudaError) -> Self {
        Self::new(&error, error.advice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn those<const N: usize>(ordinals: [u32; N]) -> [driver::Device; N] {
        let driver = crossdock_cuda::fake::driver();
        ordinals.map(|ordinal| driver.device(ordinal).expect("it is there"))
    }

    #[test]
    fn every_kind_of_device_is_told_as_it_is() {
        let mut steps = Vec::new();
        let devices = devices(&those([0, 1, 2, 3, 4, 5]), &mut |step| steps.push(step));
        let devices = devices.expect("the driver answers");
        let [server, _, rack, _, no_channel, virtual_one] = &devices[..] else { panic!("{devices:?}") };
        assert_eq!((server.ordinal, server.pci_address.as_str()), (0, "0000:01:00.0"));
        assert_eq!(server.uuid, "01010101-0101-0101-0101-010101010101");
        assert_eq!(server.compute_capability, "9.0");
        assert_eq!(server.claims, Claims { posix_fd: true, fabric: false, dma_buf: true });
        assert_eq!(server.reaches, [1]);
        assert_eq!(server.tried.fabric, Outcome::NotTried);
        for device in [server, rack, no_channel] {
            assert_eq!(device.tried.context, Outcome::Works);
            assert_eq!(device.tried.posix_fd, Outcome::Works);
            assert_eq!(device.tried.dma_buf, Outcome::Works);
        }
        assert_eq!(rack.reaches, [3]);
        assert_eq!(rack.tried.fabric, Outcome::Works);
        let Outcome::Refused(reason) = &no_channel.tried.fabric else { panic!("{no_channel:?}") };
        assert!(reason.says.contains("CUDA_ERROR_NOT_PERMITTED"), "{reason:?}");
        assert!(reason.advice.contains("IMEX channel"), "{reason:?}");
        let nothing = Outcome::NotTried;
        let Tried { posix_fd, fabric, dma_buf, .. } = &virtual_one.tried;
        assert_eq!([posix_fd, fabric, dma_buf], [&nothing; 3]);
        for step in
            ["cuda:2", "cuda:2 (0000:03:00.0): its context", "cuda:2 (0000:03:00.0): export as dma-buf"]
        {
            assert!(steps.iter().any(|told| told == step), "{steps:?}");
        }
    }

    /// No other test takes this device.
    #[test]
    fn what_is_refused_is_told_with_its_reason() {
        crossdock_cuda::fake::fail_next(11, "cuMemGetHandleForAddressRange", 801);
        let devices = devices(&those([11]), &mut |_| ()).expect("the driver answers");
        let Outcome::Refused(reason) = &devices[0].tried.dma_buf else { panic!("{devices:?}") };
        assert!(reason.says.contains("cuMemGetHandleForAddressRange answers"), "{reason:?}");
        assert_eq!(devices[0].tried.posix_fd, Outcome::Works);
        assert_eq!(crossdock_cuda::fake::alive(11).physical, 0, "what was tried was let go");
        assert_eq!(crossdock_cuda::fake::alive(11).reserved, 0, "what was tried was let go");
    }

    #[test]
    fn a_fabric_is_told_in_words() {
        let told = nvml::Fabric {
            state: nvml::FabricState::Completed,
            status: 0,
            clique: 3,
            cluster: [0xab; 16],
            health: nvml::Health {
                has_degraded_bandwidth: true,
                misconfiguration: Some(4),
                ..nvml::Health::default()
            },
        };
        let wanted = Fabric {
            state: FabricState::Completed,
            status: 0,
            clique: 3,
            cluster: Some("abababab-abab-abab-abab-abababababab".into()),
            complaints: vec![
                "its bandwidth is degraded".into(),
                "it is configured wrongly: no partition".into(),
            ],
        };
        assert_eq!(fabric(&told), wanted);
        let alone = nvml::Fabric { cluster: [0; 16], health: nvml::Health::default(), ..told };
        assert_eq!(fabric(&alone), Fabric { cluster: None, complaints: Vec::new(), ..wanted });
    }
}
