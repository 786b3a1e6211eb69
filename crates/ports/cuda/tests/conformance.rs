//! The suite that every port passes, on a GPU or on a driver without one: memory that crossdock allocated there, `cudaMalloc`'s, and
//! the host's; with everything coming back short, and by copy engines.

mod machine;

use crossdock_cuda::{CopyEngines, CudaOptions, CudaPort, Gpu, Limits};
use crossdock_host::HostOptions;
use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::conformance::{self, Child, ProcessChild, Rig, Streamer};
use crossdock_transport::{Fence, Port};
use machine::options;

#[test]
fn memory_of_crossdock() {
    conformance::run(&mut CudaRig::new(Kind::Allocated, options()));
}

#[test]
fn memory_of_cuda_malloc() {
    conformance::run(&mut CudaRig::new(Kind::Malloc, options()));
}

#[test]
fn memory_of_the_host() {
    conformance::run(&mut CudaRig::new(Kind::Host, options()));
}

/// Everything comes back short all the time.
#[test]
fn small_limits() {
    let limits = Limits { staging_bytes: 64 << 10, launches: 1, ..Limits::default() };
    let lanes = HostOptions { immediates_per_lane: 4, ..options().lanes };
    conformance::run(&mut CudaRig::new(Kind::Allocated, CudaOptions { limits, lanes, ..options() }));
}

/// Every stretch goes by a copy engine.
#[test]
fn copy_engines() {
    let copy_engines = CopyEngines { host_from_bytes: 0, gpu_from_bytes: 0 };
    conformance::run(&mut CudaRig::new(Kind::Allocated, CudaOptions { copy_engines, ..options() }));
}

/// What [`ProcessChild`] runs.
#[test]
fn child() {
    let Some(kind) = conformance::requested_child() else { return };
    let mut rig = CudaRig::new(Kind::named(&kind), options());
    let port = rig.ports(1).remove(0);
    let memory = rig.memory(256 << 10);
    conformance::serve(Streamer::new(port, memory));
}

struct CudaRig {
    kind: Kind,
    options: CudaOptions,
    gpu: Gpu,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Allocated,
    Malloc,
    Host,
}

impl Kind {
    fn named(name: &str) -> Self {
        match name {
            "Allocated" => Self::Allocated,
            "Malloc" => Self::Malloc,
            "Host" => Self::Host,
            _ => panic!("no kind of memory is named {name}"),
        }
    }
}

impl CudaRig {
    fn new(kind: Kind, options: CudaOptions) -> Self {
        Self { kind, options, gpu: machine::gpu() }
    }
}

impl Rig for CudaRig {
    fn name(&self) -> String {
        let CudaOptions { limits, copy_engines, .. } = &self.options;
        format!("cuda, {:?} memory, {} launches, {copy_engines:?}", self.kind, limits.launches)
    }

    fn ports(&mut self, count: usize) -> Vec<Box<dyn Port>> {
        let port = || CudaPort::open(&self.gpu, self.options.clone()).expect("a port can be opened");
        (0..count).map(|_| Box::new(port()) as Box<dyn Port>).collect()
    }

    fn memory(&mut self, bytes: usize) -> Memory {
        match self.kind {
            Kind::Allocated => self.gpu.allocate(bytes).expect("memory"),
            Kind::Malloc => {
                // An offset that is not even, as an engine's tensors may have. It is never freed.
                let allocated = self.gpu.context().malloc(bytes + 64).expect("memory");
                let address = allocated.base() + 48;
                std::mem::forget(allocated);
                // SAFETY: it is never freed.
                unsafe { self.gpu.adopt(address, bytes) }.expect("cudaMalloc's can be shared")
            }
            Kind::Host => Memory::allocate(bytes, &AllocateOptions::default()).expect("memory"),
        }
    }

    fn pass(&mut self) {
        std::thread::yield_now();
    }

    fn fence(&self) -> Fence {
        Fence::WhenDown
    }

    fn checks(&self) -> bool {
        false
    }

    fn child(&mut self) -> Option<Box<dyn Child>> {
        Some(Box::new(ProcessChild::spawn("child", &format!("{:?}", self.kind))))
    }
}
