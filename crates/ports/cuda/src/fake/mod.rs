//! A driver without a GPU: its table of functions over memfds and a thread, for tests.
//!
//! It keeps to what the driver's documentation promises and to nothing more: work is done by a thread of its own, in small steps,
//! streams side by side; memory is unmapped and pieces vanish at once; an access outside of what is mapped for the device spoils
//! the context for good. Physical memory is a memfd, so that a descriptor that was exported can be imported in another process;
//! kernels are not compiled, but carried out by their definition in [`moves`](crate::moves).
//!
//! There is one world a process, as there is one driver. Tests that spoil it, or pause it, take a device of their own.
#![allow(unsafe_code)]

mod calls;
mod work;
mod world;

use std::time::Duration;

use crate::driver::Driver;
use world::{World, world};

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Model {
    /// It allocates and maps apart.
    pub has_virtual_memory: bool,
    /// It shares by descriptors.
    pub posix_fd: bool,
    /// It says that it shares by fabric handles.
    pub fabric: bool,
    /// And does: an IMEX channel is there, and the fabric is up.
    pub fabric_works: bool,
    /// RDMA devices can reach it.
    pub gpu_direct_rdma: bool,
    /// Its memory can be exported as dma-buf.
    pub dma_buf: bool,
}

impl Model {
    /// A GPU of a rack with multi-node NVLink.
    pub const RACK: Model = Model {
        has_virtual_memory: true,
        posix_fd: true,
        fabric: true,
        fabric_works: true,
        gpu_direct_rdma: true,
        dma_buf: true,
    };
    /// A GPU of an ordinary server.
    pub const SERVER: Model = Model { fabric: false, fabric_works: false, ..Self::RACK };
    /// A GPU of a rack in a container that was given no IMEX channel.
    pub const NO_CHANNEL: Model = Model { fabric_works: false, ..Self::RACK };
    /// A virtual GPU that maps nothing apart.
    pub const VIRTUAL: Model = Model {
        has_virtual_memory: false,
        posix_fd: false,
        fabric: false,
        fabric_works: false,
        gpu_direct_rdma: false,
        dma_buf: false,
    };
}

/// The devices that there are, by their places; tests that spoil one take one of the last.
pub const MODELS: [Model; 12] = [
    Model::SERVER,
    Model::SERVER,
    Model::RACK,
    Model::RACK,
    Model::NO_CHANNEL,
    Model::VIRTUAL,
    Model::SERVER,
    Model::SERVER,
    Model::SERVER,
    Model::SERVER,
    Model::SERVER,
    Model::SERVER,
];

/// Which allocator memory comes from that crossdock did not allocate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `cudaMalloc`.
    Malloc,
    /// `cudaMallocManaged`.
    Managed,
    /// `cudaMallocAsync`.
    Pool,
    /// `cudaHostAlloc`.
    Host,
}

/// How the world behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Bytes that one step of a kernel or a copy moves.
    pub step_bytes: usize,
    /// What the thread sleeps between steps.
    pub pause: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { step_bytes: 64 << 10, pause: Duration::ZERO }
    }
}

/// What is alive, to be compared before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alive {
    /// Pieces of physical memory that are held.
    pub physical: usize,
    /// Ranges of addresses that are reserved.
    pub reserved: usize,
    /// Allocations, and those of other processes that are open.
    pub allocated: usize,
    /// Memory of the host that is pinned.
    pub pinned: usize,
    /// Streams and events.
    pub queues: usize,
}

/// The driver.
pub fn driver() -> Driver {
    Driver::with_table(calls::table()).expect("the table is whole")
}

/// Memory of a device that an engine allocated in another way.
pub fn allocate(origin: Origin, device: u32, bytes: usize) -> u64 {
    world().allocate(origin, device as i32, bytes)
}

/// Frees what [`allocate`] gave.
pub fn free(address: u64) {
    world().free(address);
}

/// Holds a device's work back, until `false` is said.
pub fn pause(device: u32, is_paused: bool) {
    let mut world = world();
    match is_paused {
        true => world.paused.insert(device as i32),
        false => world.paused.remove(&(device as i32)),
    };
    World::wake();
}

/// How fast work is done from now on.
pub fn set_pace(pace: Pace) {
    world().pace = pace;
}

/// The next call of this name that concerns a device answers with `code`.
pub fn fail_next(device: u32, call: &'static str, code: i32) {
    world().failures.insert((device as i32, call), code);
}

/// All work of a device fails from now on, for good.
pub fn spoil(device: u32, code: i32) {
    world().spoiled.insert(device as i32, code);
    World::wake();
}

/// What is alive of one device.
pub fn alive(device: u32) -> Alive {
    world().alive(device as i32)
}

/// How many kernels a device has begun.
pub fn launches(device: u32) -> u64 {
    world().launches.get(&(device as i32)).copied().unwrap_or(0)
}
