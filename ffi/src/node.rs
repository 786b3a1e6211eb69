//! One worker: memory with a cache layout, ports to reach others, and one progress loop.

use std::ffi::c_char;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytemuck::Zeroable;
use crossdock::{
    Authentication, Config, FolderOptions, Handle, Near, Node, PortConfig, Progress, ShmOptions, Turn, Verbs,
    VerbsOptions, Verify,
};
use parking_lot::Mutex;

use crate::arguments::{LONGEST, deadline, list, milliseconds, not_null, optional_text, put, text, text_out};
use crate::events::{Events, crossdock_event};
use crate::handles::Table;
use crate::layout::{crossdock_layout, layout_of};
use crate::memory::{crossdock_memory, memory_of};
use crate::sized::{self, Sized as _};
use crate::status::{
    CROSSDOCK_OS, CROSSDOCK_STOPPED, CROSSDOCK_TIMED_OUT, CROSSDOCK_WRONG_KIND, Fault, call, crossdock_status,
};

/// One worker. 0 is none.
pub type crossdock_node = u64;

/// Both sides prove that they know `key`.
pub const CROSSDOCK_AUTHENTICATION_KEY: u32 = 1;
/// Anybody who can reach the node may connect, and be granted what it grants its peers.
pub const CROSSDOCK_AUTHENTICATION_OFF: u32 = 2;

/// A thread of the node's own makes progress.
pub const CROSSDOCK_PROGRESS_THREAD: u32 = 0;
/// The caller does, by `crossdock_node_progress`.
pub const CROSSDOCK_PROGRESS_CALLER: u32 = 1;

/// For `spin_us`: do not spin at all.
pub const CROSSDOCK_NO_SPIN: u64 = u64::MAX;

/// How a node is opened. What is zero is as usual; what has no usual value is said to be required.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_node_options {
    /// `sizeof(crossdock_node_options)`.
    pub size: usize,
    /// The node's name for people; required.
    pub name: *const c_char,
    /// The node's number, the same over restarts; 0 chooses one at random.
    pub number: u64,
    /// What this node keeps; required.
    pub layout: crossdock_layout,
    /// The memory of the regions that the layout names, in their order; required.
    pub memory: *const crossdock_memory,
    /// How many they are.
    pub memory_count: usize,
    /// `CROSSDOCK_AUTHENTICATION_KEY` or `CROSSDOCK_AUTHENTICATION_OFF`; required: a node that lets anybody in was told to.
    pub authentication: u32,
    /// `CROSSDOCK_PROGRESS_THREAD` or `CROSSDOCK_PROGRESS_CALLER`.
    pub progress: u32,
    /// The key that all nodes share, at least 16 bytes, better 32 random ones.
    pub key: *const u8,
    /// How long it is.
    pub key_bytes: usize,
    /// Where peers dial, as `"ip:port"`; NULL for `"127.0.0.1:0"`. Port 0 takes any free one.
    pub bind: *const c_char,
    /// The address that peers are told, if it is another.
    pub advertise: *const c_char,
    /// The ports to open, in the order of preference: `"shm"`, `"tcp"`, `"verbs"` (every usable RDMA device) or
    /// `"verbs:DEVICE"`, with commas between. NULL for `"shm,tcp"`.
    pub ports: *const c_char,
    /// Where the flight recorder writes when a room fails or a session is lost; NULL for nowhere.
    pub flight_folder: *const c_char,
    /// Which rooms this node's decode side verifies by checksums: 0 none, 1 every one, n one in n.
    pub verify_one_in: u32,
    /// Lanes for each rail and peer.
    pub lanes_per_rail: u32,
    /// How long the progress thread spins after something has happened; `CROSSDOCK_NO_SPIN` for not at all.
    pub spin_us: u64,
    /// How often peers tell this node that they live.
    pub heartbeat_ms: u64,
    /// For how long after the beginning of a session silence is not counted.
    pub warm_up_grace_ms: u64,
    /// For a whole handshake.
    pub handshake_timeout_ms: u64,
    /// For what is still at a lane of a room that has ended.
    pub drain_timeout_ms: u64,
    /// How many heartbeats may be missing before a peer is lost.
    pub heartbeats_missed: u32,
    /// Threads that copy, of the shared-memory port.
    pub copy_threads: u32,
    /// Sessions at once.
    pub max_sessions: u32,
    /// Rooms at once.
    pub max_rooms: u32,
    /// Grants at once.
    pub max_grants: u32,
    /// Calls that may wait for the progress loop.
    pub max_commands: u32,
    /// The longest control message; a list of pages takes 4 bytes each. The same on all nodes that talk to each other.
    pub max_frame_bytes: u64,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_node_options {
    const FIRST_BYTES: usize = 184;
}

/// What a node has done and what it holds.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_node_stats {
    /// `sizeof(crossdock_node_stats)`, set by the caller.
    pub size: usize,
    /// Rooms that are not over in every respect.
    pub rooms: u64,
    /// Grants given to peers that are not quiescent.
    pub grants: u64,
    /// Sessions that are not over in every respect.
    pub sessions: u64,
    /// Rooms that were delivered since the node was opened.
    pub delivered: u64,
    /// Rooms that ended otherwise.
    pub undelivered: u64,
    /// Batches that have landed here.
    pub arrivals: u64,
    /// Sessions that have begun.
    pub sessions_begun: u64,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_node_stats {
    const FIRST_BYTES: usize = 64;
}

/// What rooms and peers need of their node.
pub(crate) struct Shared {
    pub handle: Handle,
    pub events: Events,
    address: String,
    number: u64,
    incarnation: u64,
    rails: String,
    /// Of its layout.
    pools: usize,
    /// `None` once it is closed.
    node: Mutex<Option<Node>>,
    is_driven_by_caller: bool,
}

static NODES: Table<Shared> = Table::new(5, "node");

pub(crate) fn shared_of(node: crossdock_node) -> Result<Arc<Shared>, Fault> {
    NODES.get(node)
}

/// Opens the ports, registers the memory, begins to listen and starts to make progress.
///
/// # Safety
/// `options` points to a structure that says its size, and what it points to can be read; `node` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_open(
    options: *const crossdock_node_options,
    node: *mut crossdock_node,
) -> crossdock_status {
    call(|| {
        not_null("node", node)?;
        // SAFETY: as the caller promises.
        let config = unsafe { config(&crossdock_node_options::read(options)?) }?;
        let pools = config.layout.pools().len();
        let is_driven_by_caller = config.progress == Progress::Caller;
        let events = Events::new().map_err(|error| Fault::new(CROSSDOCK_OS, error.to_string(), ""))?;
        let opened = Node::open(config)?;
        let rails: Vec<&str> = opened.ports().iter().map(|port| port.kind).collect();
        let identity = opened.identity();
        let shared = Shared {
            handle: opened.handle().clone(),
            events,
            address: opened.address().to_owned(),
            number: identity.node,
            incarnation: identity.incarnation,
            rails: rails.join(","),
            pools,
            node: Mutex::new(Some(opened)),
            is_driven_by_caller,
        };
        let handle = NODES.insert(|_| shared.into())?;
        // SAFETY: as the caller promises.
        unsafe { put("node", node, handle) }
    })
}

/// # Safety
/// What the options point to can be read.
unsafe fn config(options: &crossdock_node_options) -> Result<Config, Fault> {
    // SAFETY: as the caller promises, here and below.
    let authentication =
        unsafe { authentication_of(options.authentication, options.key, options.key_bytes) }?;
    // SAFETY: as above.
    let memory = unsafe { list("memory", options.memory, options.memory_count) }?;
    let memory = memory.iter().map(|&memory| memory_of(memory)).collect::<Result<_, _>>()?;
    // SAFETY: as above.
    let name = unsafe { text("name", options.name) }?;
    let mut config = Config::new(name, layout_of(options.layout)?, memory, authentication);
    config.node = (options.number != 0).then_some(options.number);
    // SAFETY: as above.
    if let Some(bind) = unsafe { optional_text("bind", options.bind) }? {
        config.bind = parsed::<SocketAddr>("bind", bind, "\"ip:port\"")?;
    }
    // SAFETY: as above.
    if let Some(advertise) = unsafe { optional_text("advertise", options.advertise) }? {
        config.advertise = Some(parsed::<IpAddr>("advertise", advertise, "an IP address")?);
    }
    // SAFETY: as above.
    let ports = unsafe { optional_text("ports", options.ports) }?.unwrap_or("shm,tcp");
    config.ports = ports_of(ports, options.copy_threads)?;
    // SAFETY: as above.
    if let Some(folder) = unsafe { optional_text("flight_folder", options.flight_folder) }? {
        config.flight_folder = Some(FolderOptions::new(folder));
    }
    config.progress = match options.progress {
        CROSSDOCK_PROGRESS_THREAD => match options.spin_us {
            0 => config.progress,
            CROSSDOCK_NO_SPIN => Progress::Thread { spin: Duration::ZERO },
            spin_us => Progress::Thread { spin: Duration::from_micros(spin_us).min(LONGEST) },
        },
        CROSSDOCK_PROGRESS_CALLER => Progress::Caller,
        other => return Err(unknown("progress", other)),
    };
    config.verify = match NonZeroU32::new(options.verify_one_in) {
        None => Verify::Off,
        Some(NonZeroU32::MIN) => Verify::All,
        Some(rooms) => Verify::OneIn(rooms),
    };
    if options.lanes_per_rail != 0 {
        config.lanes_per_rail = u8::try_from(options.lanes_per_rail)
            .map_err(|_| Fault::argument(format!("lanes_per_rail is {}", options.lanes_per_rail)))?;
    }
    config.heartbeat = milliseconds(options.heartbeat_ms, config.heartbeat);
    config.warm_up_grace = milliseconds(options.warm_up_grace_ms, config.warm_up_grace);
    config.handshake_timeout = milliseconds(options.handshake_timeout_ms, config.handshake_timeout);
    config.drain_timeout = milliseconds(options.drain_timeout_ms, config.drain_timeout);
    let limit = |given: u32, usual: u32| if given == 0 { usual } else { given };
    config.heartbeats_missed = limit(options.heartbeats_missed, config.heartbeats_missed);
    config.max_sessions = limit(options.max_sessions, config.max_sessions);
    config.max_rooms = limit(options.max_rooms, config.max_rooms);
    config.max_grants = limit(options.max_grants, config.max_grants);
    if options.max_commands != 0 {
        config.max_commands = options.max_commands as usize;
    }
    if options.max_frame_bytes != 0 {
        config.max_frame_bytes = usize::try_from(options.max_frame_bytes).unwrap_or(usize::MAX);
    }
    Ok(config)
}

/// # Safety
/// The key can be read.
pub(crate) unsafe fn authentication_of(
    authentication: u32,
    key: *const u8,
    key_bytes: usize,
) -> Result<Authentication, Fault> {
    match authentication {
        CROSSDOCK_AUTHENTICATION_KEY => {
            // SAFETY: as the caller promises.
            Ok(Authentication::PreSharedKey(unsafe { list("key", key, key_bytes) }?.to_vec()))
        }
        CROSSDOCK_AUTHENTICATION_OFF => Ok(Authentication::Off),
        0 => Err(Fault::argument("authentication is not chosen: a key, or off")),
        other => Err(unknown("authentication", other)),
    }
}

pub(crate) fn ports_of(ports: &str, copy_threads: u32) -> Result<Vec<PortConfig>, Fault> {
    let mut made = Vec::new();
    for port in ports.split(',').map(str::trim) {
        match port.split_once(':').unwrap_or((port, "")) {
            ("shm", "") => {
                let mut options = ShmOptions::default();
                if copy_threads != 0 {
                    options.copy_threads = copy_threads as usize;
                }
                made.push(PortConfig::Shm(options));
            }
            ("tcp", "") => made.push(PortConfig::Tcp(None)),
            ("verbs", "") => {
                let verbs =
                    Some(Verbs::load().map_err(|error| crossdock::Error::Port { port: "verbs", error })?);
                let mut like = VerbsOptions::default();
                like.verbs = verbs;
                made.extend(PortConfig::rdma_near(Near::Anything, &like));
            }
            ("verbs", device) => {
                let mut options = VerbsOptions::default();
                options.device = Some(device.to_owned());
                made.push(PortConfig::Verbs(options));
            }
            _ => {
                return Err(Fault::argument(format!(
                    "port {port:?}: there are \"shm\", \"tcp\", \"verbs\" and \"verbs:DEVICE\""
                )));
            }
        }
    }
    Ok(made)
}

pub(crate) fn parsed<T: std::str::FromStr>(name: &str, given: &str, wanted: &str) -> Result<T, Fault> {
    given.parse().map_err(|_| Fault::argument(format!("{name} {given:?} is not {wanted}")))
}

pub(crate) fn unknown(name: &str, value: u32) -> Fault {
    Fault::argument(format!("{name} is {value}, which this library has not"))
}

/// Says goodbye to all peers and ends the node's rooms, each with `CROSSDOCK_PEER_LOST`; waits for the progress thread.
/// Rooms and peers keep their handles until those are closed.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_node_close(node: crossdock_node) -> crossdock_status {
    call(|| {
        let shared = NODES.remove(node)?;
        if shared.is_driven_by_caller {
            // Whoever is parked there is woken: the lock is free then. Where the queue is full, so is the loop awake.
            let _ = shared.handle.stop();
        }
        // Dropped outside of the lock: who asks meanwhile is told that it has stopped.
        let opened = shared.node.lock().take();
        drop(opened);
        shared.events.close();
        Ok(())
    })
}

/// What peers dial, `"ip:port"`, with a NUL; `length` does not count it.
///
/// # Safety
/// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_address(
    node: crossdock_node,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { text_out(&shared_of(node)?.address, buffer, capacity, length) })
}

/// The kinds of the ports that were opened, in their order, as `"shm,tcp"`, with a NUL.
///
/// # Safety
/// As [`crossdock_node_address`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_ports(
    node: crossdock_node,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { text_out(&shared_of(node)?.rails, buffer, capacity, length) })
}

/// The node's number, and which start of it this is.
///
/// # Safety
/// Both are NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_identity(
    node: crossdock_node,
    number: *mut u64,
    incarnation: *mut u64,
) -> crossdock_status {
    call(|| {
        let shared = shared_of(node)?;
        for (to, value) in [(number, shared.number), (incarnation, shared.incarnation)] {
            if !to.is_null() {
                // SAFETY: as the caller promises.
                unsafe { to.write_unaligned(value) };
            }
        }
        Ok(())
    })
}

/// The node's one event descriptor, for poll or epoll: readable while `crossdock_node_poll` would tell something, and
/// now and then though it would not. It belongs to the node: do not read from it, nor close it.
///
/// # Safety
/// `fd` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_event_fd(node: crossdock_node, fd: *mut i32) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { put("fd", fd, shared_of(node)?.events.watch()) })
}

/// Takes what has happened since it was asked last, oldest first; `count` tells how many events were written, 0 if nothing
/// has happened. Each end is told once.
///
/// # Safety
/// So many events can be written; `count` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_poll(
    node: crossdock_node,
    events: *mut crossdock_event,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        let shared = shared_of(node)?;
        // SAFETY: as the caller promises.
        unsafe { hand_out(events, capacity, count, |into, most| shared.events.take(into, most)) }
    })
}

/// As `crossdock_node_poll`, and waits for the first event; `CROSSDOCK_TIMED_OUT` if there is none, `CROSSDOCK_STOPPED` when the
/// node is closed meanwhile.
///
/// # Safety
/// As [`crossdock_node_poll`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_wait(
    node: crossdock_node,
    timeout_ms: u64,
    events: *mut crossdock_event,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        let (shared, deadline) = (shared_of(node)?, deadline(timeout_ms));
        let wait = |into: &mut Vec<_>, most| shared.events.wait(into, most, deadline);
        // SAFETY: as the caller promises.
        unsafe { hand_out(events, capacity, count, wait) }?;
        // SAFETY: it was written just now.
        match unsafe { count.read_unaligned() } {
            0 if shared.events.is_closed() => {
                Err(Fault::new(CROSSDOCK_STOPPED, "the node was closed", "open a new node"))
            }
            0 => Err(Fault::quiet(CROSSDOCK_TIMED_OUT)),
            _ => Ok(()),
        }
    })
}

/// # Safety
/// So many events can be written; `count` is NULL or can be written.
unsafe fn hand_out(
    events: *mut crossdock_event,
    capacity: usize,
    count: *mut usize,
    take: impl FnOnce(&mut Vec<crossdock_event>, usize),
) -> Result<(), Fault> {
    not_null("count", count)?;
    not_null("events", events)?;
    if capacity == 0 {
        return Err(Fault::argument("there is room for no event"));
    }
    let mut taken = Vec::new();
    take(&mut taken, capacity);
    // SAFETY: as the caller promises; byte by byte, since C may have placed them anywhere.
    unsafe {
        events.cast::<u8>().copy_from_nonoverlapping(taken.as_ptr().cast(), size_of_val(&*taken));
        count.write_unaligned(taken.len());
    }
    Ok(())
}

/// With `CROSSDOCK_PROGRESS_CALLER`: makes progress, and never blocks. `is_active`, which may be NULL, tells whether
/// something happened, so that more may be waiting.
///
/// # Safety
/// `is_active` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_progress(
    node: crossdock_node,
    is_active: *mut u32,
) -> crossdock_status {
    call(|| {
        let turn = shared_of(node)?.driven(|node| Ok(node.progress()))?;
        if !is_active.is_null() {
            // SAFETY: as the caller promises.
            unsafe { is_active.write_unaligned((turn == Turn::Active).into()) };
        }
        Ok(())
    })
}

/// With `CROSSDOCK_PROGRESS_CALLER`: sleeps until there is progress to make, for no longer than this.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_node_park(node: crossdock_node, longest_ms: u64) -> crossdock_status {
    call(|| {
        let longest = Duration::from_millis(longest_ms).min(LONGEST);
        shared_of(node)?.driven(|node| Ok(node.park(longest)?))
    })
}

impl Shared {
    /// A room has a list of pages for each pool.
    pub fn check_lists(&self, lists: usize) -> Result<(), Fault> {
        match lists == self.pools {
            true => Ok(()),
            false => {
                let words = format!("{lists} lists of pages for {} pools of the layout", self.pools);
                Err(Fault::argument(words))
            }
        }
    }

    fn driven<T>(&self, drive: impl FnOnce(&mut Node) -> Result<T, Fault>) -> Result<T, Fault> {
        if !self.is_driven_by_caller {
            let words = "a thread of this node's own makes progress";
            return Err(Fault::new(CROSSDOCK_WRONG_KIND, words, "open it with CROSSDOCK_PROGRESS_CALLER"));
        }
        match &mut *self.node.lock() {
            Some(node) => drive(node),
            None => Err(Fault::new(CROSSDOCK_STOPPED, "the node is closed", "open a new node")),
        }
    }
}

/// Tells what a node has done and what it holds. The progress loop is asked: whoever drives it is not to wait here.
///
/// # Safety
/// `stats` points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_get_stats(
    node: crossdock_node,
    timeout_ms: u64,
    stats: *mut crossdock_node_stats,
) -> crossdock_status {
    call(|| {
        let mut asked = shared_of(node)?.handle.stats()?;
        let found = asked.wait_until(deadline(timeout_ms))?;
        let told = crossdock_node_stats {
            size: 0,
            rooms: found.rooms as u64,
            grants: found.grants as u64,
            sessions: found.sessions as u64,
            delivered: found.counters.delivered,
            undelivered: found.counters.undelivered,
            arrivals: found.counters.arrivals,
            sessions_begun: found.counters.sessions,
        };
        // SAFETY: as the caller promises.
        unsafe { crossdock_node_stats::write(stats, told) }
    })
}

/// Writes down what the flight recorder holds, as a file for `crossdock timeline`.
///
/// # Safety
/// `path` ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_node_write_flight(
    node: crossdock_node,
    path: *const c_char,
    timeout_ms: u64,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises.
        let path = unsafe { text("path", path) }?;
        let mut asked = shared_of(node)?.handle.flight()?;
        let dump = asked.wait_until(deadline(timeout_ms))?;
        std::fs::write(Path::new(path), dump.text()).map_err(|error| {
            Fault::new(CROSSDOCK_OS, format!("{path}: {error}"), "give a path that can be written")
        })
    })
}
