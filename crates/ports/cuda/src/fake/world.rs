//! What there is: memory by address, streams, and what was done to them.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Once};

use parking_lot::{Condvar, Mutex, MutexGuard};
use rustix::mm::{MapFlags, ProtFlags};

use super::work::{Work, run};
use super::{Alive, MODELS, Origin, Pace};

/// The driver's numbers for whatever it makes.
pub type Id = u64;

pub struct World {
    next: Id,
    pub physical: HashMap<Id, Physical>,
    /// By where they begin.
    pub reserved: BTreeMap<u64, Reserved>,
    pub allocations: BTreeMap<u64, Allocation>,
    pub pinned: BTreeMap<u64, Pinned>,
    pub streams: BTreeMap<Id, Stream>,
    pub events: HashMap<Id, Event>,
    /// Functions by number: how long their words are.
    pub functions: HashMap<Id, u64>,
    pub paused: BTreeSet<i32>,
    pub pace: Pace,
    pub failures: HashMap<(i32, &'static str), i32>,
    pub spoiled: HashMap<i32, i32>,
    pub launches: HashMap<i32, u64>,
}

pub struct Physical {
    pub fd: Arc<OwnedFd>,
    pub bytes: usize,
    pub device: i32,
    pub handles: u32,
    pub for_rdma: bool,
    pub references: usize,
}

pub struct Reserved {
    pub bytes: usize,
    pub mapped: Option<(Id, usize)>,
    /// Devices that may access it.
    pub access: BTreeSet<i32>,
    device: i32,
}

pub struct Allocation {
    pub bytes: usize,
    pub device: i32,
    pub fd: Arc<OwnedFd>,
    pub origin: Origin,
    /// It is another process's.
    pub is_opened: bool,
}

pub struct Pinned {
    pub bytes: usize,
    pub device: i32,
}

pub struct Stream {
    pub device: i32,
    pub queue: VecDeque<Work>,
    pub enqueued: u64,
    pub done: u64,
}

/// A point in a stream; `None`: nothing was recorded, so it is reached.
pub struct Event {
    pub device: i32,
    pub at: Option<(Id, u64)>,
}

/// Memory at an address.
pub struct Found {
    pub start: u64,
    pub bytes: usize,
    pub device: i32,
    pub fd: Option<Arc<OwnedFd>>,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Virtual { physical: Id, mapped_bytes: usize, handles: u32, for_rdma: bool },
    Plain(Origin),
    Pinned,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);
static WAKE: Condvar = Condvar::new();
static STARTED: Once = Once::new();

/// The world, locked. A test that panics leaves it as it is.
pub struct Locked(MutexGuard<'static, Option<World>>);

pub fn world() -> Locked {
    let mut locked = WORLD.lock();
    locked.get_or_insert_with(World::new);
    STARTED.call_once(|| {
        std::thread::Builder::new().name("fake-gpu".into()).spawn(work_for_ever).expect("a thread starts");
    });
    Locked(locked)
}

impl std::ops::Deref for Locked {
    type Target = World;
    fn deref(&self) -> &World {
        self.0.as_ref().expect("made with the lock")
    }
}

impl std::ops::DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut World {
        self.0.as_mut().expect("made with the lock")
    }
}

fn work_for_ever() {
    let mut locked = WORLD.lock();
    loop {
        let pace = locked.as_ref().map(|world| world.pace).unwrap_or_default();
        if locked.as_mut().is_some_and(run) {
            MutexGuard::unlocked(&mut locked, || match pace.pause.is_zero() {
                true => std::thread::yield_now(),
                false => std::thread::sleep(pace.pause),
            });
        } else {
            WAKE.wait(&mut locked);
        }
    }
}

impl World {
    fn new() -> World {
        World {
            next: 1,
            physical: HashMap::new(),
            reserved: BTreeMap::new(),
            allocations: BTreeMap::new(),
            pinned: BTreeMap::new(),
            streams: BTreeMap::new(),
            events: HashMap::new(),
            functions: HashMap::new(),
            paused: BTreeSet::new(),
            pace: Pace::default(),
            failures: HashMap::new(),
            spoiled: HashMap::new(),
            launches: HashMap::new(),
        }
    }

    pub fn wake() {
        WAKE.notify_all();
    }

    pub fn id(&mut self) -> Id {
        self.next += 1;
        self.next
    }

    /// A device of a kind reaches another of the same kind: they are of one server.
    pub fn reaches(from: i32, to: i32) -> bool {
        MODELS[from as usize] == MODELS[to as usize]
    }

    pub fn allocate(&mut self, origin: Origin, device: i32, bytes: usize) -> u64 {
        let fd = Arc::new(file(bytes).expect("a memfd"));
        let base = map(&fd, bytes).expect("it can be mapped");
        self.allocations.insert(base, Allocation { bytes, device, fd, origin, is_opened: false });
        base
    }

    /// Maps what another process has allocated.
    pub fn open(&mut self, fd: OwnedFd, bytes: usize, device: i32) -> Option<u64> {
        let base = map(&fd, bytes)?;
        let fd = Arc::new(fd);
        let opened = Allocation { bytes, device, fd, origin: Origin::Malloc, is_opened: true };
        self.allocations.insert(base, opened);
        Some(base)
    }

    pub fn free(&mut self, address: u64) {
        let allocation = self.allocations.remove(&address).expect("it was allocated");
        unmap(address, allocation.bytes);
    }

    pub fn reserve(&mut self, bytes: usize, device: i32) -> Option<u64> {
        // SAFETY: the kernel chooses a free place.
        let base = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE)
        };
        let base = base.ok()?.expose_provenance() as u64;
        self.reserved.insert(base, Reserved { bytes, mapped: None, access: BTreeSet::new(), device });
        Some(base)
    }

    pub fn add_physical(&mut self, physical: Physical) -> Id {
        let id = self.id();
        self.physical.insert(id, physical);
        id
    }

    /// Lets one reference go. What is mapped stays.
    pub fn release(&mut self, id: Id) -> bool {
        let Some(physical) = self.physical.get_mut(&id) else { return false };
        if physical.references == 0 {
            return false;
        }
        physical.references -= 1;
        self.bury(id);
        true
    }

    /// Forgets a piece that nobody holds and that is mapped nowhere.
    fn bury(&mut self, id: Id) {
        let is_mapped =
            self.reserved.values().any(|range| range.mapped.is_some_and(|(piece, _)| piece == id));
        if !is_mapped && self.physical.get(&id).is_some_and(|piece| piece.references == 0) {
            self.physical.remove(&id);
        }
    }

    pub fn map(&mut self, base: u64, bytes: usize, id: Id) -> bool {
        let Some(physical) = self.physical.get(&id) else { return false };
        let Some(range) = self.reserved.get_mut(&base) else { return false };
        if range.mapped.is_some() || bytes > range.bytes || bytes > physical.bytes {
            return false;
        }
        if map_at(base, &physical.fd, bytes).is_none() {
            return false;
        }
        range.mapped = Some((id, bytes));
        true
    }

    pub fn unmap(&mut self, base: u64) -> bool {
        let Some(range) = self.reserved.get_mut(&base) else { return false };
        let Some((id, _)) = range.mapped.take() else { return false };
        range.access.clear();
        let bytes = range.bytes;
        // SAFETY: the range is this world's; whoever still works there finds nothing, as on a GPU.
        let emptied = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::with_exposed_provenance_mut(base as usize),
                bytes,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::FIXED,
            )
        };
        self.bury(id);
        emptied.is_ok()
    }

    pub fn unreserve(&mut self, base: u64) -> bool {
        match self.reserved.get(&base) {
            Some(Reserved { mapped: None, .. }) => {}
            _ => return false,
        }
        let range = self.reserved.remove(&base).expect("found above");
        unmap(base, range.bytes);
        true
    }

    /// What is at an address, for whoever asks.
    pub fn find(&self, address: u64) -> Option<Found> {
        let below = |bytes: usize, start: u64| address - start < bytes as u64;
        if let Some((&start, range)) = self.reserved.range(..=address).next_back()
            && below(range.bytes, start)
        {
            let (id, mapped_bytes) = range.mapped.filter(|&(_, bytes)| below(bytes, start))?;
            let physical = &self.physical[&id];
            let (handles, for_rdma) = (physical.handles, physical.for_rdma);
            let kind = Kind::Virtual { physical: id, mapped_bytes, handles, for_rdma };
            let fd = Some(physical.fd.clone());
            return Some(Found { start, bytes: range.bytes, device: physical.device, fd, kind });
        }
        if let Some((&start, one)) = self.allocations.range(..=address).next_back()
            && below(one.bytes, start)
        {
            let (bytes, device, fd) = (one.bytes, one.device, Some(one.fd.clone()));
            return Some(Found { start, bytes, device, fd, kind: Kind::Plain(one.origin) });
        }
        let (&start, pinned) = self.pinned.range(..=address).next_back()?;
        below(pinned.bytes, start).then_some(Found {
            start,
            bytes: pinned.bytes,
            device: pinned.device,
            fd: None,
            kind: Kind::Pinned,
        })
    }

    /// Whether a device may access these bytes.
    pub fn is_accessible(&self, device: i32, address: u64, bytes: usize) -> bool {
        let Some(found) = self.find(address) else { return false };
        let inside = |bytes_there: usize| address - found.start + bytes as u64 <= bytes_there as u64;
        match found.kind {
            Kind::Virtual { mapped_bytes, .. } => {
                inside(mapped_bytes) && self.reserved[&found.start].access.contains(&device)
            }
            Kind::Plain(Origin::Host) | Kind::Pinned => inside(found.bytes),
            Kind::Plain(_) => inside(found.bytes) && World::reaches(device, found.device),
        }
    }

    pub fn alive(&self, device: i32) -> Alive {
        let of = |other: i32| other == device;
        Alive {
            physical: self.physical.values().filter(|one| of(one.device)).count(),
            reserved: self.reserved.values().filter(|one| of(one.device)).count(),
            allocated: self.allocations.values().filter(|one| of(one.device)).count(),
            pinned: self.pinned.values().filter(|one| of(one.device)).count(),
            queues: self.streams.values().filter(|one| of(one.device)).count()
                + self.events.values().filter(|one| of(one.device)).count(),
        }
    }
}

/// A file that stands for a piece of memory.
pub fn file(bytes: usize) -> Option<OwnedFd> {
    let fd = rustix::fs::memfd_create("fake-gpu", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
    rustix::fs::ftruncate(&fd, bytes as u64).ok()?;
    Some(fd)
}

/// Another process's file, by what names it there.
pub fn file_of(process: u32, fd: i32) -> Option<OwnedFd> {
    let path = format!("/proc/{process}/fd/{fd}");
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).ok()?;
    Some(file.into())
}

pub fn number_of(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}

fn map(fd: &impl AsFd, bytes: usize) -> Option<u64> {
    // SAFETY: the kernel chooses a free place.
    let base = unsafe { mmap(std::ptr::null_mut(), fd.as_fd(), bytes, MapFlags::SHARED) };
    Some(base?.expose_provenance() as u64)
}

fn map_at(base: u64, fd: &impl AsFd, bytes: usize) -> Option<()> {
    let place = std::ptr::with_exposed_provenance_mut(base as usize);
    // SAFETY: the range was reserved by this world for this.
    unsafe { mmap(place, fd.as_fd(), bytes, MapFlags::SHARED | MapFlags::FIXED) }.map(|_| ())
}

/// # Safety
/// As [`rustix::mm::mmap`].
unsafe fn mmap(
    place: *mut std::ffi::c_void,
    fd: BorrowedFd<'_>,
    bytes: usize,
    flags: MapFlags,
) -> Option<*mut std::ffi::c_void> {
    // SAFETY: as the caller promises.
    unsafe { rustix::mm::mmap(place, bytes, ProtFlags::READ | ProtFlags::WRITE, flags, fd, 0) }.ok()
}

fn unmap(base: u64, bytes: usize) {
    // SAFETY: the range is this world's, and it has just forgotten it.
    let unmapped = unsafe { rustix::mm::munmap(std::ptr::with_exposed_provenance_mut(base as usize), bytes) };
    assert_eq!(unmapped, Ok(()), "a mapping of one's own can be unmapped");
}
