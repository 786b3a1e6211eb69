//! Where the peers are: the registry's server and its client. Workers are told as JSON, as in `docs/bootstrap.md`.

use std::ffi::c_char;
use std::sync::Arc;
use std::time::Duration;

use crossdock::bootstrap::{
    Client, ClientConfig, Counted, Error, GroupId, NotRegistered, Query, Registration, Server, ServerConfig,
    Status, Token, WaitError, Worker,
};
use parking_lot::Mutex;

use crate::arguments::{LONGEST, not_null, optional_text, put, text, text_out};
use crate::handles::Table;
use crate::status::{
    CROSSDOCK_INTERNAL, CROSSDOCK_NETWORK, CROSSDOCK_OS, CROSSDOCK_REGISTRY, CROSSDOCK_TIMED_OUT, Fault,
    call, crossdock_status,
};

/// A registry's server. 0 is none.
pub type crossdock_registry = u64;

/// A registry's client. 0 is none.
pub type crossdock_registry_client = u64;

/// A worker that is kept registered. 0 is none.
pub type crossdock_registration = u64;

static SERVERS: Table<Mutex<Option<Server>>> = Table::new(8, "registry");
static CLIENTS: Table<Client> = Table::new(9, "registry client");
static REGISTRATIONS: Table<Mutex<Option<Arc<Registration>>>> = Table::new(10, "registration");

/// Starts a registry at `bind` (`"ip:port"`; port 0 takes any free one). With a token, callers must present it.
///
/// # Safety
/// `bind` ends with a NUL, and so does `token`, or is NULL; `registry` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_registry_start(
    bind: *const c_char,
    token: *const c_char,
    registry: *mut crossdock_registry,
) -> crossdock_status {
    call(|| {
        not_null("registry", registry)?;
        // SAFETY: as the caller promises, here and below.
        let bind = unsafe { text("bind", bind) }?;
        let listen =
            bind.parse().map_err(|_| Fault::argument(format!("bind {bind:?} is not \"ip:port\"")))?;
        let mut config = ServerConfig::on(listen);
        // SAFETY: as above.
        config.token = unsafe { token_of(token) }?;
        let server = Server::start(config).map_err(|error| {
            Fault::new(CROSSDOCK_NETWORK, error.to_string(), "bind an address and a port that are free")
        })?;
        let handle = SERVERS.insert(|_| Mutex::new(Some(server)).into())?;
        // SAFETY: as above.
        unsafe { put("registry", registry, handle) }
    })
}

/// Where a registry listens, with a NUL; `length` does not count it.
///
/// # Safety
/// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_registry_address(
    registry: crossdock_registry,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    call(|| {
        let slot = SERVERS.get(registry)?;
        let address = slot.lock().as_ref().map(|server| server.address().to_string()).unwrap_or_default();
        // SAFETY: as the caller promises.
        unsafe { text_out(&address, buffer, capacity, length) }
    })
}

/// Stops a registry.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_registry_close(registry: crossdock_registry) -> crossdock_status {
    call(|| {
        let server = SERVERS.remove(registry)?.lock().take();
        drop(server);
        Ok(())
    })
}

/// A client of the registry at `server`: `"host:port"`, or `"etcd://host:port"`. Nothing is sent yet. A call takes at most
/// `call_ms`, 0 for 5 seconds.
///
/// # Safety
/// `server` ends with a NUL, and so does `token`, or is NULL; `client` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_registry_connect(
    server: *const c_char,
    token: *const c_char,
    call_ms: u64,
    client: *mut crossdock_registry_client,
) -> crossdock_status {
    call(|| {
        not_null("client", client)?;
        // SAFETY: as the caller promises, here and below.
        let mut config = ClientConfig::to(unsafe { text("server", server) }?);
        // SAFETY: as above.
        config.token = unsafe { token_of(token) }?;
        config.call_time = crate::arguments::milliseconds(call_ms, config.call_time);
        let made = Client::new(config).map_err(|error| Fault::argument(error.to_string()))?;
        let handle = CLIENTS.insert(|_| made.into())?;
        // SAFETY: as above.
        unsafe { put("client", client, handle) }
    })
}

/// Keeps a worker registered, from a thread of its own, and returns at once. `worker` is JSON:
/// `{"node": "decode-0", "incarnation": "5eed", "role": "decode", "address": "10.0.0.7:7000", "ttl_ms": 10000}` and what
/// else `docs/bootstrap.md` names.
///
/// # Safety
/// `worker` ends with a NUL; `registration` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_registry_register(
    client: crossdock_registry_client,
    worker: *const c_char,
    registration: *mut crossdock_registration,
) -> crossdock_status {
    call(|| {
        not_null("registration", registration)?;
        let client = CLIENTS.get(client)?;
        // SAFETY: as the caller promises, here and below.
        let worker: Worker = serde_json::from_str(unsafe { text("worker", worker) }?)
            .map_err(|error| Fault::argument(format!("worker: {error}")))?;
        let started = Registration::start(Client::clone(&client), worker)
            .map_err(|error| Fault::new(CROSSDOCK_OS, error.to_string(), "raise the limit of threads"))?;
        let handle = REGISTRATIONS.insert(|_| Mutex::new(Some(Arc::new(started))).into())?;
        // SAFETY: as above.
        unsafe { put("registration", registration, handle) }
    })
}

/// Waits until the registry has taken the worker.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_registration_wait(
    registration: crossdock_registration,
    timeout_ms: u64,
) -> crossdock_status {
    call(|| {
        registration_of(registration)?.wait(time(timeout_ms)).map_err(|NotRegistered { status }| {
            let cause = match &status {
                Status::Joining { last, .. } => last.as_deref(),
                Status::Retrying { last, .. } | Status::Replaced { last } => Some(&**last),
                Status::Registered { .. } => None,
            };
            match cause {
                Some(error) => registry_fault(error),
                None => Fault::quiet(CROSSDOCK_TIMED_OUT),
            }
        })
    })
}

/// Says that the worker has warmed up, and returns at once.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_registration_ready(registration: crossdock_registration) -> crossdock_status {
    call(|| {
        registration_of(registration)?.ready();
        Ok(())
    })
}

/// Takes the worker out of the registry. The handle is closed in any case: where the registry cannot be asked, the worker is
/// listed until its time to live is over.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_registration_close(registration: crossdock_registration) -> crossdock_status {
    call(|| {
        let held = REGISTRATIONS.remove(registration)?.lock().take();
        match held.map(Arc::try_unwrap) {
            // Whoever waits for it right now takes it out when they drop it.
            None | Some(Err(_)) => Ok(()),
            Some(Ok(registration)) => registration.deregister().map_err(|error| registry_fault(&error)),
        }
    })
}

/// The workers that match, as a JSON array, with a NUL; `length` does not count it. `query` is as in the URL of a list:
/// `"role=decode&tp_rank=0"`, or NULL for all. With a `count`, waits until so many match, for at most `timeout_ms`; then
/// `CROSSDOCK_REGISTRY`, retryable, says how many there were.
///
/// # Safety
/// `query` ends with a NUL or is NULL; `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_registry_find(
    client: crossdock_registry_client,
    query: *const c_char,
    count: usize,
    timeout_ms: u64,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    call(|| {
        let client = CLIENTS.get(client)?;
        // SAFETY: as the caller promises, here and below.
        let query = unsafe { optional_text("query", query) }?.unwrap_or_default();
        let query: Query = query.parse().map_err(|error| Fault::argument(format!("query: {error}")))?;
        let found = match count {
            0 => client.find(&query).map_err(|error| registry_fault(&error))?,
            count => client.wait_for(&query, count, time(timeout_ms)).map_err(wait_fault)?,
        };
        // SAFETY: as above.
        unsafe { text_out(&json(&found)?, buffer, capacity, length) }
    })
}

/// Waits until all ranks of a group are there and ready, and tells the group as JSON, with a NUL; its members are found by
/// `crossdock_registry_find` with `"group=NAME"`.
///
/// # Safety
/// `group` ends with a NUL; the rest as for `crossdock_registry_find`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_registry_wait_for_group(
    client: crossdock_registry_client,
    group: *const c_char,
    timeout_ms: u64,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    call(|| {
        let client = CLIENTS.get(client)?;
        // SAFETY: as the caller promises, here and below.
        let group = GroupId::new(unsafe { text("group", group) }?)
            .map_err(|error| Fault::argument(format!("group: {error}")))?;
        let found = client.wait_for_group(&group, Counted::Ready, time(timeout_ms)).map_err(wait_fault)?;
        // SAFETY: as above.
        unsafe { text_out(&json(&found)?, buffer, capacity, length) }
    })
}

/// Lets a client go. Registrations that were started with it go on.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_registry_disconnect(client: crossdock_registry_client) -> crossdock_status {
    call(|| CLIENTS.remove(client).map(drop))
}

fn registration_of(handle: crossdock_registration) -> Result<Arc<Registration>, Fault> {
    let slot = REGISTRATIONS.get(handle)?;
    let held = slot.lock().clone();
    held.ok_or_else(|| Fault::argument("the registration is being closed"))
}

fn time(timeout_ms: u64) -> Duration {
    Duration::from_millis(timeout_ms).min(LONGEST)
}

/// # Safety
/// `token` ends with a NUL or is NULL.
unsafe fn token_of(token: *const c_char) -> Result<Option<Token>, Fault> {
    // SAFETY: as the caller promises.
    let token = unsafe { optional_text("token", token) }?;
    token.map(|token| Token::new(token).map_err(|error| Fault::argument(error.to_string()))).transpose()
}

fn json(value: &impl serde::Serialize) -> Result<String, Fault> {
    serde_json::to_string(value)
        .map_err(|error| Fault::new(CROSSDOCK_INTERNAL, error.to_string(), "report it"))
}

fn registry_fault(error: &Error) -> Fault {
    let advice = match error {
        Error::Unreachable { .. } => "check that the registry runs, and its address",
        Error::Deadline { .. } => "allow more time, or see what keeps the registry busy",
        // The registry's own advice is in its message.
        Error::Refused { .. } => "",
        _ => "check the registry's address",
    };
    Fault::new(CROSSDOCK_REGISTRY, with_sources(error), advice).retryable(error.retry_helps())
}

/// An error with what it comes from.
fn with_sources(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |source| source.source());
    sources.fold(error.to_string(), |words, source| format!("{words}: {source}"))
}

fn wait_fault(error: WaitError) -> Fault {
    match &error {
        WaitError::TooFew { .. } | WaitError::Incomplete { .. } => {
            let advice = "start what is missing, or allow more time";
            Fault::new(CROSSDOCK_REGISTRY, error.to_string(), advice).retryable(true)
        }
        _ => Fault::new(CROSSDOCK_REGISTRY, error.to_string(), "see what the registry says"),
    }
}
