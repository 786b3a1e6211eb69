//! Writes and reads between registered memories, by address, without rooms.

use std::ffi::c_char;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytemuck::Zeroable;
use crossdock::Abandoned;
use crossdock::xfer::{
    Block, Direction, Endpoint, EndpointConfig, Handle, RegisterError, Transfer, TransferError, Transferring,
};
use parking_lot::Mutex;

use crate::arguments::{LONGEST, deadline, list, milliseconds, not_null, optional_text, put, text, text_out};
use crate::bell::Bell;
use crate::handles::Table;
use crate::memory::{crossdock_memory, memory_of};
use crate::node::{CROSSDOCK_NO_SPIN, authentication_of, parsed, ports_of, unknown};
use crate::sized::{self, Sized as _};
use crate::status::{CROSSDOCK_PENDING, CROSSDOCK_TIMED_OUT, Fault, call, crossdock_status};

/// One process's end of transfers by address. 0 is none.
pub type crossdock_endpoint = u64;

/// A transfer that was begun. 0 is none.
pub type crossdock_transfer = u64;

/// From here to the peer.
pub const CROSSDOCK_WRITE: u32 = 0;
/// From the peer to here.
pub const CROSSDOCK_READ: u32 = 1;

/// How an endpoint is opened. Zeros are what is usual.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_endpoint_options {
    /// `sizeof(crossdock_endpoint_options)`.
    pub size: usize,
    /// For people, in logs and errors; required.
    pub name: *const c_char,
    /// `CROSSDOCK_AUTHENTICATION_KEY` or `CROSSDOCK_AUTHENTICATION_OFF`; required.
    pub authentication: u32,
    /// Lanes for each rail and peer.
    pub lanes_per_rail: u32,
    /// The key that all endpoints share.
    pub key: *const u8,
    /// How long it is.
    pub key_bytes: usize,
    /// Where peers dial, as `"ip:port"`; NULL for `"127.0.0.1:0"`. Port 0 takes any free one.
    pub bind: *const c_char,
    /// The address that peers are told, if it is another.
    pub advertise: *const c_char,
    /// As of a node; NULL for `"shm,tcp"`.
    pub ports: *const c_char,
    /// How long the progress thread spins after something has happened; `CROSSDOCK_NO_SPIN` for not at all.
    pub spin_us: u64,
    /// How often peers tell this endpoint that they live.
    pub heartbeat_ms: u64,
    /// How many heartbeats may be missing before a peer is lost.
    pub heartbeats_missed: u32,
    /// Threads that copy, of the shared-memory port.
    pub copy_threads: u32,
    /// Sessions at once.
    pub max_sessions: u32,
    /// Transfers at once.
    pub max_transfers: u32,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_endpoint_options {
    const FIRST_BYTES: usize = 96;
}

/// What is to be moved: `count` blocks, of which three lists say where each begins here, where at the peer, and how long it
/// is. Each block lies in one memory that is registered, on both sides.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_transfer_options {
    /// `sizeof(crossdock_transfer_options)`.
    pub size: usize,
    /// The peer's address, `"ip:port"`. It is dialed if there is no session with it.
    pub peer: *const c_char,
    /// `[count]` addresses in this process.
    pub local: *const u64,
    /// `[count]` addresses in the peer's.
    pub remote: *const u64,
    /// `[count]` lengths in bytes.
    pub bytes: *const u64,
    /// How many blocks; none at all is a probe.
    pub count: usize,
    /// From this call; 0 for 30 seconds.
    pub deadline_ms: u64,
    /// `CROSSDOCK_WRITE` or `CROSSDOCK_READ`.
    pub direction: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_transfer_options {
    const FIRST_BYTES: usize = 64;
}

struct Open {
    handle: Handle,
    address: String,
    /// `None` once it is closed.
    endpoint: Mutex<Option<Endpoint>>,
}

struct Moving {
    bell: Bell,
    state: Mutex<State>,
}

struct State {
    /// `None` when the handle is closed.
    moving: Option<Transferring>,
    end: Option<Result<(), TransferError>>,
    is_quiet: bool,
    /// The endpoint was closed.
    is_abandoned: bool,
}

static ENDPOINTS: Table<Open> = Table::new(14, "endpoint");
static TRANSFERS: Table<Moving> = Table::new(15, "transfer");

impl State {
    fn look(&mut self) {
        let Some(moving) = &mut self.moving else { return };
        if self.end.is_none() {
            match moving.end.poll() {
                Ok(end) => self.end = end,
                Err(Abandoned) => self.is_abandoned = true,
            }
        }
        if !self.is_quiet {
            match moving.quiet.poll() {
                Ok(quiet) => self.is_quiet = quiet.is_some(),
                Err(Abandoned) => self.is_abandoned = true,
            }
        }
    }

    fn end(&mut self) -> Option<Result<(), Fault>> {
        self.look();
        match &self.end {
            Some(end) => Some(end.clone().map_err(Fault::from)),
            None if self.moving.is_none() => Some(Err(closed())),
            None if self.is_abandoned => Some(Err(Abandoned.into())),
            None => None,
        }
    }
}

impl Wake for Moving {
    fn wake(self: Arc<Self>) {
        self.bell.ring();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.bell.ring();
    }
}

/// Opens the ports, begins to listen, and starts the progress thread.
///
/// # Safety
/// `options` points to a structure that says its size, and what it points to can be read; `endpoint` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_endpoint_open(
    options: *const crossdock_endpoint_options,
    endpoint: *mut crossdock_endpoint,
) -> crossdock_status {
    call(|| {
        not_null("endpoint", endpoint)?;
        // SAFETY: as the caller promises, here and below.
        let options = unsafe { crossdock_endpoint_options::read(options) }?;
        // SAFETY: as above.
        let authentication =
            unsafe { authentication_of(options.authentication, options.key, options.key_bytes) }?;
        // SAFETY: as above.
        let mut config = EndpointConfig::new(unsafe { text("name", options.name) }?, authentication);
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
        if options.lanes_per_rail != 0 {
            config.lanes_per_rail = u8::try_from(options.lanes_per_rail)
                .map_err(|_| Fault::argument(format!("lanes_per_rail is {}", options.lanes_per_rail)))?;
        }
        config.spin = match options.spin_us {
            0 => config.spin,
            CROSSDOCK_NO_SPIN => Duration::ZERO,
            spin_us => Duration::from_micros(spin_us).min(LONGEST),
        };
        config.heartbeat = milliseconds(options.heartbeat_ms, config.heartbeat);
        if options.heartbeats_missed != 0 {
            config.heartbeats_missed = options.heartbeats_missed;
        }
        if options.max_sessions != 0 {
            config.max_sessions = options.max_sessions;
        }
        if options.max_transfers != 0 {
            config.worker.max_transfers = options.max_transfers as usize;
        }
        let opened = Endpoint::open(config)?;
        let open = Open {
            handle: opened.handle().clone(),
            address: opened.address().to_owned(),
            endpoint: Mutex::new(Some(opened)),
        };
        let handle = ENDPOINTS.insert(|_| open.into())?;
        // SAFETY: as above.
        unsafe { put("endpoint", endpoint, handle) }
    })
}

/// What peers dial, `"ip:port"`, with a NUL; `length` does not count it.
///
/// # Safety
/// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_endpoint_address(
    endpoint: crossdock_endpoint,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { text_out(&ENDPOINTS.get(endpoint)?.address, buffer, capacity, length) })
}

/// Registers a memory: peers that connect from now on may write and read all of it for as long as they are connected, and
/// transfers may name its addresses. With `CROSSDOCK_TIMED_OUT` it is registered later.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_endpoint_register(
    endpoint: crossdock_endpoint,
    memory: crossdock_memory,
    timeout_ms: u64,
) -> crossdock_status {
    call(|| {
        let open = ENDPOINTS.get(endpoint)?;
        let mut told = open.handle.register(memory_of(memory)?)?;
        Ok(told.wait_until(deadline(timeout_ms))??)
    })
}

/// Takes memory back, by the address at which it begins, and waits until nobody can reach it through this endpoint any more.
/// Sessions of peers that were told of it end, and begin anew without it. With `CROSSDOCK_TIMED_OUT`, and with `CROSSDOCK_BUSY`,
/// which says that a peer can still reach it after 30 seconds, it goes on leaving: asking again waits for that.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_endpoint_unregister(
    endpoint: crossdock_endpoint,
    address: u64,
    timeout_ms: u64,
) -> crossdock_status {
    call(|| {
        let open = ENDPOINTS.get(endpoint)?;
        let mut told = open.handle.unregister(address)?;
        Ok(told.wait_until(deadline(timeout_ms))??)
    })
}

/// Says goodbye to all peers and waits for the progress thread. Transfers that are under way end with
/// `CROSSDOCK_ABANDONED`.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_endpoint_close(endpoint: crossdock_endpoint) -> crossdock_status {
    call(|| {
        let open = ENDPOINTS.remove(endpoint)?;
        let opened = open.endpoint.lock().take();
        drop(opened);
        Ok(())
    })
}

/// Begins to move blocks, and returns at once.
///
/// # Safety
/// `options` points to a structure that says its size, and what it points to can be read; `transfer` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_transfer_begin(
    endpoint: crossdock_endpoint,
    options: *const crossdock_transfer_options,
    transfer: *mut crossdock_transfer,
) -> crossdock_status {
    call(|| {
        not_null("transfer", transfer)?;
        let open = ENDPOINTS.get(endpoint)?;
        // SAFETY: as the caller promises, here and below.
        let options = unsafe { crossdock_transfer_options::read(options) }?;
        // SAFETY: as above.
        let (local, remote, bytes) = unsafe {
            (
                list("local", options.local, options.count)?,
                list("remote", options.remote, options.count)?,
                list("bytes", options.bytes, options.count)?,
            )
        };
        let block = |((&local, &remote), &bytes): ((&u64, &u64), &u64)| Block { local, remote, bytes };
        let moving = open.handle.transfer(Transfer {
            // SAFETY: as above.
            peer: unsafe { text("peer", options.peer) }?.to_owned(),
            direction: match options.direction {
                CROSSDOCK_WRITE => Direction::Write,
                CROSSDOCK_READ => Direction::Read,
                other => return Err(unknown("direction", other)),
            },
            blocks: local.iter().zip(remote).zip(bytes).map(block).collect(),
            deadline: milliseconds(options.deadline_ms, USUAL_DEADLINE),
        })?;
        let state = State { moving: Some(moving), end: None, is_quiet: false, is_abandoned: false };
        let made = Arc::new(Moving { bell: Bell::new(), state: Mutex::new(state) });
        let handle = TRANSFERS.insert(|_| made.clone())?;
        made.listen();
        // SAFETY: as above.
        unsafe { put("transfer", transfer, handle) }
    })
}

impl Moving {
    /// Leaves a waker with both tickets, and takes what they tell at once.
    fn listen(self: &Arc<Self>) {
        let waker = Waker::from(self.clone());
        let mut context = Context::from_waker(&waker);
        let mut state = self.state.lock();
        let State { moving: Some(moving), end, is_quiet, is_abandoned } = &mut *state else { return };
        match Pin::new(&mut moving.end).poll(&mut context) {
            Poll::Ready(Ok(told)) => *end = Some(told),
            Poll::Ready(Err(Abandoned)) => *is_abandoned = true,
            Poll::Pending => {}
        }
        match Pin::new(&mut moving.quiet).poll(&mut context) {
            Poll::Ready(Ok(())) => *is_quiet = true,
            Poll::Ready(Err(Abandoned)) => *is_abandoned = true,
            Poll::Pending => {}
        }
    }
}

/// Whether a transfer has ended: `CROSSDOCK_PENDING`, `CROSSDOCK_OK` when all bytes are there, or why not:
/// `CROSSDOCK_UNKNOWN_ADDRESS`, `CROSSDOCK_LATE`, `CROSSDOCK_LOST`, `CROSSDOCK_REFUSED` and others. It may be asked again.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_transfer_poll(transfer: crossdock_transfer) -> crossdock_status {
    call(|| TRANSFERS.get(transfer)?.state.lock().end().ok_or(Fault::quiet(CROSSDOCK_PENDING))?)
}

/// As `crossdock_transfer_poll`, and waits for the end.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_transfer_wait(transfer: crossdock_transfer, timeout_ms: u64) -> crossdock_status {
    call(|| {
        let moving = TRANSFERS.get(transfer)?;
        let told = moving.bell.wait(deadline(timeout_ms), || moving.state.lock().end());
        told.ok_or(Fault::quiet(CROSSDOCK_TIMED_OUT))?
    })
}

/// Waits until no op of a transfer can touch this process's memory any more: with its end, if that was good; after a fault
/// later.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_transfer_wait_quiet(
    transfer: crossdock_transfer,
    timeout_ms: u64,
) -> crossdock_status {
    call(|| {
        let moving = TRANSFERS.get(transfer)?;
        let told = moving.bell.wait(deadline(timeout_ms), || {
            let mut state = moving.state.lock();
            state.look();
            match (state.is_quiet, state.is_abandoned) {
                (true, _) => Some(Ok(())),
                (false, _) if state.moving.is_none() => Some(Err(closed())),
                (false, true) => Some(Err(Fault::from(Abandoned))),
                (false, false) => None,
            }
        });
        told.ok_or(Fault::quiet(CROSSDOCK_TIMED_OUT))?
    })
}

/// Forgets a transfer, which goes on to its end.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_transfer_close(transfer: crossdock_transfer) -> crossdock_status {
    call(|| {
        let moving = TRANSFERS.remove(transfer)?;
        // The tickets hold on to it until they are told: they are let go here.
        let tickets = moving.state.lock().moving.take();
        moving.bell.ring();
        drop(tickets);
        Ok(())
    })
}

/// Another thread has closed the handle meanwhile.
fn closed() -> Fault {
    let words = "the transfer was closed meanwhile";
    Fault::new(crate::CROSSDOCK_BAD_HANDLE, words, "use a handle only until it is closed")
}

const USUAL_DEADLINE: Duration = Duration::from_secs(30);

impl From<crossdock::xfer::NotTaken> for Fault {
    fn from(error: crossdock::xfer::NotTaken) -> Fault {
        use crossdock::xfer::NotTaken;
        let (status, advice) = match &error {
            NotTaken::Busy => (crate::CROSSDOCK_BUSY, "let some transfers end first"),
            NotTaken::Stopped => (crate::CROSSDOCK_STOPPED, "open a new endpoint"),
            _ => (crate::CROSSDOCK_BAD_ARGUMENT, "give the peer's IP address and port; resolve names before"),
        };
        Fault::new(status, error.to_string(), advice).retryable(matches!(error, NotTaken::Busy))
    }
}

impl From<RegisterError> for Fault {
    fn from(error: RegisterError) -> Fault {
        let (status, advice) = match &error {
            RegisterError::Port(_) => (crate::CROSSDOCK_PORT, "look at what the port says of the memory"),
            RegisterError::InUse => (crate::CROSSDOCK_BUSY, "close the endpoint, or ask again"),
            RegisterError::TooMany(_) => (crate::CROSSDOCK_BAD_ARGUMENT, "register fewer, larger memories"),
            RegisterError::Unknown { .. } => {
                (crate::CROSSDOCK_BAD_ARGUMENT, "name the first byte of a memory that is registered")
            }
            _ => (crate::CROSSDOCK_BAD_ARGUMENT, "register each byte once"),
        };
        Fault::new(status, error.to_string(), advice).retryable(matches!(error, RegisterError::InUse))
    }
}

impl From<TransferError> for Fault {
    fn from(error: TransferError) -> Fault {
        let status = match &error {
            TransferError::UnknownLocal { .. } | TransferError::UnknownRemote { .. } => {
                crate::CROSSDOCK_UNKNOWN_ADDRESS
            }
            TransferError::Expired { .. } => crate::CROSSDOCK_LATE,
            TransferError::PeerLost { cause } if cause.is_retryable() => crate::CROSSDOCK_LOST,
            TransferError::PeerLost { .. } => crate::CROSSDOCK_REFUSED,
            TransferError::Port(_) => crate::CROSSDOCK_PORT,
            TransferError::Busy => crate::CROSSDOCK_BUSY,
            _ => crate::CROSSDOCK_INTERNAL,
        };
        Fault::new(status, error.to_string(), error.advice()).retryable(error.is_retryable())
    }
}
