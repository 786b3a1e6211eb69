//! Regions of both sides, as the GPU reaches them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crossdock_host::{Attaching, MappedMemfd, PeerDescriptor};
use crossdock_memory::{Memory, MemoryKind};
use crossdock_transport::{Error, MappedBytes, Mapping, Result};

use crate::driver::{CudaError, HostRegistration, Residence};
use crate::gpu::{Export, Gpu};
use crate::offers::Place;
use crate::sharing::Within;

/// A registered memory, beside the memory itself.
#[derive(Debug)]
pub(crate) struct Region {
    /// Where the GPU finds it.
    pub address: u64,
    /// What peers are told.
    pub place: Place,
    /// With it, where that has one of its own.
    descriptor: Option<OwnedFd>,
    /// What keeps the host's memory pinned.
    _pinned: Option<HostRegistration>,
}

/// A peer's region that has been heard of.
#[derive(Debug)]
pub(crate) struct Offered {
    pub place: Place,
    pub descriptor: Option<PeerDescriptor>,
}

/// A peer's region that ops can use.
pub(crate) struct Remote {
    /// Where this side's GPU finds it.
    pub address: u64,
    /// The host's memory, which the CPU reaches, too.
    host: Option<Arc<HostMapping>>,
    /// What maps a GPU's, and behind it what lets the lane end: they are dropped in this order.
    _kept: Option<Box<dyn Send>>,
}

/// A peer's memory of the host, mapped here and pinned, which ends first.
#[derive(Debug)]
struct HostMapping {
    registration: HostRegistration,
    mapped: MappedMemfd,
}

impl MappedBytes for HostMapping {
    fn base(&self) -> *mut u8 {
        self.mapped.base()
    }

    fn bytes(&self) -> usize {
        self.mapped.bytes()
    }
}

impl Region {
    pub fn of(gpu: &Gpu, memory: &Memory) -> Result<Region> {
        match memory.kind() {
            MemoryKind::Shared => {
                let pinned = gpu.context().register_host(memory).map_err(of_driver)?;
                let (address, place) = (pinned.address(), Place::Host);
                Ok(Region { address, place, descriptor: None, _pinned: Some(pinned) })
            }
            MemoryKind::Device => Region::of_gpu(gpu, memory),
            _ => Err(Error::Unsupported {
                what: "registration of the host's memory that crossdock did not allocate with a GPU's port",
                advice: "allocate it with crossdock: no peer's GPU can map any other memory of a host's",
            }),
        }
    }

    fn of_gpu(gpu: &Gpu, memory: &Memory) -> Result<Region> {
        let unsupported = |what, advice| Err(Error::Unsupported { what, advice });
        let Some(held) = Gpu::memory_of(memory) else {
            return unsupported(
                "registration of a device's memory that is no GPU's",
                "allocate with crossdock, or adopt what the CUDA driver knows",
            );
        };
        if held.gpu().context().device() != gpu.context().device() {
            return unsupported(
                "registration of another GPU's memory",
                "register it with the port of the GPU that it is on",
            );
        }
        let (place, descriptor) = match held.export().map_err(of_driver)? {
            Export::Descriptor(fd, within) => (Place::Piece(within), Some(fd)),
            Export::Fabric(handle, within) => (Place::Fabric(handle, within), None),
            Export::Ipc(token, within) => {
                (Place::Ipc { token, within, address: held.base() - within.offset }, None)
            }
        };
        Ok(Region { address: held.base(), place, descriptor, _pinned: None })
    }

    /// The descriptor that goes with what peers are told.
    pub fn descriptor<'a>(&'a self, memory: &'a Memory) -> Option<BorrowedFd<'a>> {
        match self.place {
            Place::Host => memory.fd(),
            _ => self.descriptor.as_ref().map(AsFd::as_fd),
        }
    }
}

impl Offered {
    pub fn attach(&self, gpu: &Gpu, attaching: &Attaching<'_>) -> Result<Remote> {
        let context = gpu.context();
        match (&self.place, &self.descriptor) {
            (Place::Host, Some(descriptor)) => {
                let mapped = attaching.map(descriptor)?;
                let registration = context.register_host(mapped.memory()).map_err(of_driver)?;
                let mapping = HostMapping { registration, mapped };
                let address = mapping.registration.address();
                Ok(Remote { address, host: Some(Arc::new(mapping)), _kept: None })
            }
            (Place::Piece(within), Some(descriptor)) => {
                let piece = context.import_fd(descriptor.as_fd(), within.whole_bytes as usize);
                let mapped = Arc::new(piece.map_err(of_peer)?).map(&[]).map_err(of_peer)?;
                let address = mapped.base() + within.offset;
                Ok(Remote::on_gpu(address, (mapped, descriptor.share(), attaching.tether())))
            }
            (Place::Fabric(handle, within), _) => {
                let piece = context.import_fabric(handle, within.whole_bytes as usize);
                let mapped = Arc::new(piece.map_err(of_peer)?).map(&[]).map_err(of_peer)?;
                let address = mapped.base() + within.offset;
                Ok(Remote::on_gpu(address, (mapped, attaching.tether())))
            }
            (Place::Ipc { within, address, .. }, _) if attaching.peer.pid() == rustix::process::getpid() => {
                check_allocation(gpu, *address, *within, true)?;
                Ok(Remote::on_gpu(address + within.offset, attaching.tether()))
            }
            (Place::Ipc { token, within, .. }, _) => {
                let opened = context.open_ipc(token).map_err(of_peer)?;
                check_allocation(gpu, opened.base(), *within, false)?;
                let address = opened.base() + within.offset;
                Ok(Remote::on_gpu(address, (opened, attaching.tether())))
            }
            (Place::Host | Place::Piece(_), None) => {
                unreachable!("the form says that a descriptor comes with it")
            }
        }
    }
}

impl Remote {
    fn on_gpu(address: u64, kept: impl Send + 'static) -> Remote {
        Remote { address, host: None, _kept: Some(Box::new(kept)) }
    }

    /// The region in this process's address space, where it is the host's memory.
    pub fn mapping(&self) -> Option<Mapping> {
        self.host.as_ref().map(|mapping| Mapping::new(mapping.clone()))
    }

    /// Whether it is the host's memory.
    pub fn is_of_host(&self) -> bool {
        self.host.is_some()
    }
}

/// Whether an allocation is as long as the peer says; one of this process's own has to be the GPU's: another one's would have to
/// be made reachable first, which opening does for other processes'.
fn check_allocation(gpu: &Gpu, base: u64, within: Within, is_own: bool) -> Result<()> {
    let facts = gpu.context().facts_of(base).map_err(of_driver)?;
    match facts.residence {
        Residence::Device { ordinal } if is_own && ordinal != gpu.context().device().ordinal() => {
            return Err(Error::Unsupported {
                what: "mapping of another GPU's cudaMalloc",
                advice: "let crossdock allocate there: what it allocates is mapped for every GPU that reaches it",
            });
        }
        Residence::Device { .. } => {}
        _ => return Err(Error::BadKey { reason: "its allocation is not in a GPU's memory" }),
    }
    match facts.allocation.holds(base, within.whole_bytes) {
        true => Ok(()),
        false => Err(Error::BadKey { reason: "its allocation is shorter than the peer says" }),
    }
}

/// What the driver says of this side's memory.
pub(crate) fn of_driver(error: CudaError) -> Error {
    Error::Driver { call: error.call, code: error.code }
}

/// What the driver says of what a peer has named: where it cannot be mapped, that is no failure of the device.
fn of_peer(error: CudaError) -> Error {
    if error.is_sticky() || error.is_out_of_memory() {
        return of_driver(error);
    }
    Error::Unsupported { what: "mapping of the peer's GPU memory", advice: error.advice() }
}
