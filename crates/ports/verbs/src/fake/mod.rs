//! A network of RDMA devices in this process: libibverbs' functions, in software, as strict as the specification.
//!
//! A [`Fabric`] is the network. The table of functions that it makes works as the manual pages and the InfiniBand
//! specification say, wherever those leave a choice the unkind way: numbers of queue pairs come again at once, fields of
//! failed completions that mean nothing are rubbish, a slot of a send queue is free only when a completion at or behind it
//! was polled, packets of a queue pair that was destroyed still arrive. Its clock counts steps, and [`Pace`] says who makes
//! them. Through the fabric faults are made, and what it counted is read.
//!
//! What breaks the library's own rules, such as the use of a destroyed object, is noted, and the last handle of the fabric
//! panics when it is dropped.
//!
//! What is not modelled: time in seconds (timeouts count steps), more than one port a device, atomics, unreliable
//! transports, memory windows, partitions, congestion.

mod options;
mod pair;
mod random;
mod raw;
mod registry;
mod stub;
mod table;
#[cfg(test)]
mod tests;
mod wire;
mod world;

use std::fmt;
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, Thread};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use self::raw::RawDevice;
use self::wire::Step;
use self::world::World;
use crate::Verbs;
use crate::ibverbs::library::Library;
use crate::ibverbs::sys::*;

pub use self::options::{DeviceOptions, FabricOptions, Failure, Faults, Function, Limits, Pace};
pub use self::world::Counters;

/// A network of devices. A clone is another handle to the same one.
#[derive(Clone)]
pub struct Fabric {
    handle: Arc<Handle>,
}

/// Dropped with the last handle of the fabric's owner; contexts that are open keep what is behind it.
struct Handle {
    shared: Arc<Shared>,
    library: Arc<Library>,
}

/// What handles, open contexts and lists of devices keep.
struct Shared {
    world: Mutex<World>,
    /// An event was acknowledged.
    acknowledged: Condvar,
    devices: Box<[RawDevice]>,
    thread: OnceLock<Thread>,
}

/// A context that is open: what one process has of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextView {
    /// Its number, in the order of opening.
    pub id: u32,
    /// Its device.
    pub device: usize,
    /// How many queue pairs it has.
    pub queue_pairs: usize,
    /// How many regions it has.
    pub regions: usize,
}

/// A queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePairView {
    /// The context that it is of.
    pub context: u32,
    /// Its device.
    pub device: usize,
    /// Its number there.
    pub number: u32,
    /// `IBV_QPS_*`.
    pub state: u32,
    /// The number that it sends to.
    pub peer: u32,
    /// Requests that are not done.
    pub outstanding: usize,
    /// The place of its address in the port's table.
    pub gid_index: u8,
    /// The place of its partition key.
    pub partition_key_index: u16,
    /// The largest packet in bytes.
    pub mtu_bytes: u32,
    /// The service level.
    pub service_level: u8,
    /// The traffic class.
    pub traffic_class: u8,
    /// Through how many routers its packets go.
    pub hop_limit: u8,
}

/// A region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionView {
    /// The context that it is of.
    pub context: u32,
    /// How long it is.
    pub bytes: u64,
    /// `IBV_ACCESS_*`.
    pub access: u32,
}

impl Fabric {
    /// A fabric in which nothing is open yet.
    pub fn new(options: FabricOptions) -> Self {
        let (pace, is_old) = (options.pace, options.old_library);
        let iwarp: Vec<bool> = options.devices.iter().map(|device| device.iwarp).collect();
        let world = World::new(options);
        let shared = Arc::new_cyclic(|fabric: &Weak<Shared>| Shared {
            world: Mutex::new(world),
            acknowledged: Condvar::new(),
            devices: (0..)
                .zip(&iwarp)
                .map(|(index, &iwarp)| {
                    let head = table::device_struct(index, iwarp);
                    RawDevice { head, fabric: fabric.clone(), index }
                })
                .collect(),
            thread: OnceLock::new(),
        });
        if pace == Pace::Thread {
            let fabric = Arc::downgrade(&shared);
            let thread = thread::Builder::new().name("fake-fabric".into()).spawn(move || run(&fabric));
            let thread = thread.expect("a thread can be started").thread().clone();
            shared.thread.set(thread).expect("it is set once");
        }
        let library = registry::register(&shared, |get_device_list| library(get_device_list, is_old));
        Self { handle: Arc::new(Handle { shared, library }) }
    }

    /// The library that has this fabric's devices. It lists none once the fabric is gone.
    pub fn verbs(&self) -> Verbs {
        Verbs::of(self.library())
    }

    pub(crate) fn library(&self) -> Arc<Library> {
        self.handle.library.clone()
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.handle.shared.world.lock()
    }

    fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let mut world = self.world();
        world.is_idle = false;
        let result = change(&mut world);
        drop(world);
        self.handle.shared.more_to_do();
        result
    }

    /// Makes up to so many steps; says how many until nothing was left to do.
    pub fn step(&self, steps: u64) -> u64 {
        let mut world = self.world();
        (0..steps).take_while(|_| world.step() != Step::Idle).count() as u64
    }

    /// Takes or gives a device its link, and reports it. Packets to and from a device without are lost.
    pub fn set_link(&self, device: usize, is_up: bool) {
        self.change(|world| {
            if std::mem::replace(&mut world.devices[device].link_up, is_up) != is_up {
                let kind = if is_up { IBV_EVENT_PORT_ACTIVE } else { IBV_EVENT_PORT_ERR };
                world.report_to_all(device, kind);
            }
        });
    }

    /// Gives a device's port other addresses: of the earlier ones nobody answers, except on queue pairs that know them.
    pub fn readdress(&self, device: usize) {
        self.change(|world| {
            world.devices[device].moves += 1;
            world.report_to_all(device, IBV_EVENT_GID_CHANGE);
        });
    }

    /// From now on one packet of so many is lost; 0: none.
    pub fn set_loss(&self, one_in: u32) {
        self.change(|world| world.options.faults.lost_one_in = one_in);
    }

    /// For so many steps a device sends and takes nothing; packets to it wait. 0 lets it go on.
    pub fn freeze(&self, device: usize, steps: u64) {
        self.change(|world| world.devices[device].frozen_until = world.now.saturating_add(steps));
    }

    /// A device fails for good: its queue pairs are in error, and only what ends objects works.
    pub fn fail_device(&self, device: usize) {
        self.change(|world| {
            world.devices[device].is_fatal = true;
            world.report_to_all(device, IBV_EVENT_DEVICE_FATAL);
            let pairs: Vec<u32> =
                world.pairs.iter().filter(|(_, pair)| pair.device == device).map(|(&id, _)| id).collect();
            for id in pairs {
                if world.pairs[&id].state != IBV_QPS_RESET {
                    world.fail(id, None);
                }
            }
        });
    }

    /// Everything that was opened through a context vanishes, as when its process dies. What the process would still
    /// call does nothing: calls that destroy say that they did, others fail.
    pub fn kill(&self, context: u32) {
        self.change(|world| {
            let Some(found) = world.contexts.get_mut(&context) else { return };
            (found.is_dead, found.events) = (true, Default::default());
            let device = found.device;
            let pairs: Vec<u32> =
                world.pairs.iter().filter(|(_, pair)| pair.context == context).map(|(&id, _)| id).collect();
            for id in pairs {
                world.leave_network(id);
                world.pairs.get_mut(&id).expect("just listed").state = IBV_QPS_RESET;
            }
            let regions = &world.regions;
            world.devices[device].keys.retain(|_, id| regions[id].context != context);
        });
    }

    /// A queue pair goes into the error state by itself: its device found something, and reports it as `event`,
    /// `IBV_EVENT_QP_FATAL` for example.
    ///
    /// # Panics
    /// If there is no such queue pair.
    pub fn break_queue_pair(&self, device: usize, number: u32, event: Option<u32>) {
        self.change(|world| {
            let id = *world.devices[device].numbers.get(&number).expect("a queue pair that there is");
            world.fail(id, event);
        });
    }

    /// Has calls fail.
    pub fn fail(&self, failure: Failure) {
        self.world().failures.push(failure);
    }

    /// Calls that were still to fail work.
    pub fn stop_failing(&self) {
        self.world().failures.clear();
    }

    /// Contexts that are open.
    pub fn contexts(&self) -> Vec<ContextView> {
        let world = self.world();
        let views = world.contexts.iter().filter(|(_, context)| !context.is_dead).map(|(&id, context)| {
            let queue_pairs = world.pairs.values().filter(|pair| pair.context == id).count();
            let regions = world.regions.values().filter(|region| region.context == id).count();
            ContextView { id, device: context.device, queue_pairs, regions }
        });
        views.collect()
    }

    /// Queue pairs that exist, of processes that live.
    pub fn queue_pairs(&self) -> Vec<QueuePairView> {
        let world = self.world();
        let alive = world.pairs.values().filter(|pair| !world.is_dead(pair.context));
        let views = alive.map(|pair| QueuePairView {
            context: pair.context,
            device: pair.device,
            number: pair.number,
            state: pair.state,
            peer: pair.attributes.dest_qp_num,
            outstanding: pair.works.len(),
            gid_index: pair.attributes.ah_attr.grh.sgid_index,
            partition_key_index: pair.attributes.pkey_index,
            mtu_bytes: 128 << pair.attributes.path_mtu,
            service_level: pair.attributes.ah_attr.sl,
            traffic_class: pair.attributes.ah_attr.grh.traffic_class,
            hop_limit: pair.attributes.ah_attr.grh.hop_limit,
        });
        views.collect()
    }

    /// Regions that are registered.
    pub fn regions(&self) -> Vec<RegionView> {
        let world = self.world();
        let view = |region: &world::Region| RegionView {
            context: region.context,
            bytes: region.bytes,
            access: region.access,
        };
        world.regions.values().map(view).collect()
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        self.world().counters.clone()
    }

    /// Objects that exist, in words; nothing once all is destroyed and closed.
    pub fn leaks(&self) -> Vec<String> {
        self.world().leaks()
    }

    /// The rules of the library that its users broke. Whoever asks has them forgotten.
    pub fn take_violations(&self) -> Vec<String> {
        std::mem::take(&mut self.world().violations)
    }
}

impl fmt::Debug for Fabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fabric({} devices)", self.handle.shared.devices.len())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let violations = std::mem::take(&mut self.shared.world.lock().violations);
        if !thread::panicking() {
            assert!(violations.is_empty(), "libibverbs was used against its rules: {violations:#?}");
        }
    }
}

impl Shared {
    /// Wakes the fabric's thread, if it has one.
    fn more_to_do(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.more_to_do();
    }
}

impl World {
    /// Steps until nothing is left to do but to wait, or so many.
    fn settle(&mut self, most: u64) {
        for _ in 0..most {
            if self.step() != Step::Moved {
                return;
            }
        }
    }
}

#[allow(unsafe_code)]
fn library(get_device_list: registry::GetDeviceList, is_old: bool) -> Arc<Library> {
    // SAFETY: the functions do what the manual pages say, under one lock, and what they make is laid out as it should be
    // and kept until after it is destroyed.
    Arc::new(unsafe { Library::from_table(table::functions(get_device_list, is_old)) })
}

/// The fabric's thread.
fn run(fabric: &Weak<Shared>) {
    loop {
        let Some(shared) = fabric.upgrade() else { return };
        let mut world = shared.world.lock();
        let mut last = Step::Moved;
        for _ in 0..BATCH_STEPS {
            last = world.step();
            if last != Step::Moved {
                break;
            }
        }
        // Those who wait for the lock have their turn.
        MutexGuard::unlock_fair(world);
        drop(shared);
        match last {
            Step::Moved => {}
            Step::Waited => thread::park_timeout(Duration::from_micros(50)),
            Step::Idle => thread::park_timeout(Duration::from_millis(10)),
        }
    }
}

/// How many steps the thread makes before others have their turn.
const BATCH_STEPS: u32 = 64;
/// How many steps a call makes at most when all happens at once.
const SETTLE_STEPS: u64 = 10_000_000;
