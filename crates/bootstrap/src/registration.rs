//! Staying registered: a thread that renews, and comes back when the server has forgotten.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::backoff::random;
use crate::client::Client;
use crate::error::{Error, Stage};
use crate::exchange::Deadline;
use crate::renewal::{Call, Renewal};
use crate::worker::Worker;

/// Keeps a worker registered from a thread of its own until it is dropped, which takes the worker out. It renews
/// in the last part of each third of the time to live. A server that is away, full or refuses is asked again and
/// again with growing pauses: the registry may be lost at any time without harm to workers that run.
///
/// A worker that has asked for time to warm up says with [`Registration::ready`] when that is over.
#[derive(Debug)]
pub struct Registration {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    client: Client,
}

/// How a registration stands.
#[derive(Clone, Debug)]
pub enum Status {
    /// The server has not taken the worker yet, or has forgotten it in a restart.
    Joining {
        /// How many attempts have failed.
        attempts: u32,
        /// Why the last one did.
        last: Option<Arc<Error>>,
    },
    /// The server had the worker when it was asked last.
    Registered {
        /// When that request was sent.
        renewed: Instant,
    },
    /// The server had the worker, and the last attempts to renew have failed. Peers may find the worker until
    /// its time to live has passed since `renewed`.
    Retrying {
        /// When the last request that succeeded was sent.
        renewed: Instant,
        /// How many attempts have failed since.
        attempts: u32,
        /// Why the last one did.
        last: Arc<Error>,
    },
    /// Another incarnation holds the node's name. This is the end: nothing is sent any more.
    Replaced {
        /// What the server said.
        last: Arc<Error>,
    },
}

/// The worker is not registered.
#[derive(Clone, Debug, thiserror::Error)]
#[error("not registered{}", because(.status))]
pub struct NotRegistered {
    /// How the registration stands.
    pub status: Status,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Told at each change of the state.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    status: Status,
    /// The worker warms up no longer, and the thread has not heard of it yet.
    ready: bool,
    leaving: bool,
    /// What taking the worker out gave, when the thread has come to its end.
    left: Option<Result<(), Error>>,
}

impl Registration {
    /// Starts to keep a worker registered and returns at once; [`Registration::wait`] waits for the server to
    /// take it. It fails only when the system gives no thread.
    pub fn start(client: Client, worker: Worker) -> io::Result<Registration> {
        let status = Status::Joining { attempts: 0, last: None };
        let state = Mutex::new(State { status, ready: false, leaving: false, left: None });
        let shared = Arc::new(Shared { state, changed: Condvar::new() });
        let thread = std::thread::Builder::new().name("crossdock-registration".to_owned()).spawn({
            let (shared, client) = (Arc::clone(&shared), client.clone());
            move || keep(&shared, &client, worker)
        })?;
        Ok(Registration { shared, thread: Some(thread), client })
    }

    /// Says that the worker has warmed up, and returns at once: the thread tells the registry. More than the first call
    /// changes nothing.
    pub fn ready(&self) {
        self.shared.state.lock().ready = true;
        self.shared.changed.notify_all();
    }

    /// How the registration stands.
    pub fn status(&self) -> Status {
        self.shared.state.lock().status.clone()
    }

    /// Waits until the server has taken the worker. It ends early where time does not help: the server refuses,
    /// or another incarnation holds the node's name.
    pub fn wait(&self, time: Duration) -> Result<(), NotRegistered> {
        let deadline = Deadline::after(time);
        let mut state = self.shared.state.lock();
        loop {
            let over = match &state.status {
                Status::Registered { .. } => return Ok(()),
                Status::Replaced { .. } => true,
                Status::Joining { last: Some(last), .. } | Status::Retrying { last, .. } => {
                    !last.retry_helps()
                }
                Status::Joining { last: None, .. } => false,
            };
            if over || self.shared.changed.wait_until(&mut state, deadline.end()).timed_out() {
                return Err(NotRegistered { status: state.status.clone() });
            }
        }
    }

    /// Takes the worker out and tells whether the server knows. Peers that found it keep what they have; where
    /// this fails, the worker is listed until its time to live is over.
    pub fn deregister(mut self) -> Result<(), Error> {
        // The call that may be under way and the one that takes the worker out.
        let deadline = Deadline::after(self.client.call_time().saturating_mul(2));
        self.leave(deadline).unwrap_or_else(|| Err(self.client.late(Stage::Receive, deadline)))
    }

    /// Tells the thread to take the worker out and waits for that. A thread that needs longer is left to end by
    /// itself, which it does by its own deadlines.
    fn leave(&mut self, deadline: Deadline) -> Option<Result<(), Error>> {
        let thread = self.thread.take()?;
        let mut state = self.shared.state.lock();
        state.leaving = true;
        self.shared.changed.notify_all();
        while state.left.is_none() {
            if self.shared.changed.wait_until(&mut state, deadline.end()).timed_out() {
                return None;
            }
        }
        let left = state.left.take();
        drop(state);
        // The thread has nothing left to do but to return.
        let _ = thread.join();
        left
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.leave(Deadline::after(self.client.call_time().min(DROP_TIME_MAX)));
    }
}

/// The registration's thread.
fn keep(shared: &Shared, client: &Client, mut worker: Worker) {
    let mut renewal = Renewal::new(Duration::from_millis(worker.ttl_ms));
    // A registry that has forgotten the worker is asked for what is left of its time to warm up.
    let warm = Instant::now() + Duration::from_millis(worker.warm_up_ms);
    let mut state = shared.state.lock();
    while !state.leaving {
        if std::mem::take(&mut state.ready) && worker.warm_up_ms > 0 {
            worker.warm_up_ms = 0;
            renewal.changes();
        }
        let sent = Instant::now();
        let result = MutexGuard::unlocked(&mut state, || {
            let deadline = Deadline::after(renewal.call_time().min(client.call_time()));
            match renewal.call() {
                Call::Register => {
                    let left = warm.saturating_duration_since(sent).as_millis();
                    worker.warm_up_ms = worker.warm_up_ms.min(u64::try_from(left).unwrap_or(u64::MAX));
                    client.register_by(&worker, deadline).map(drop)
                }
                Call::Renew => client.renew_by(&worker.node, worker.incarnation, deadline),
            }
        });
        let (status, next) = renewal.done(sent, Instant::now(), result, random());
        log(&worker, &state.status, &status);
        state.status = status;
        let Some(next) = next else {
            state.left = Some(Ok(()));
            shared.changed.notify_all();
            return;
        };
        shared.changed.notify_all();
        let mut over = false;
        while !state.leaving && !state.ready && !over {
            over = shared.changed.wait_until(&mut state, next).timed_out();
        }
    }
    let left = MutexGuard::unlocked(&mut state, || {
        client.deregister_by(&worker.node, worker.incarnation, Deadline::after(client.call_time()))
    });
    state.left = Some(left);
    shared.changed.notify_all();
}

/// Says once when a registration begins to hold and once when it fails, not at each attempt.
fn log(worker: &Worker, before: &Status, after: &Status) {
    let node = &worker.node;
    match (before, after) {
        (Status::Registered { .. }, Status::Registered { .. }) => {}
        (_, Status::Registered { .. }) => tracing::info!(%node, "registered"),
        (_, Status::Replaced { last }) => {
            tracing::error!(%node, %last, "another process holds this node's name")
        }
        (
            _,
            Status::Joining { attempts: 1, last: Some(last) } | Status::Retrying { attempts: 1, last, .. },
        ) => {
            tracing::warn!(%node, %last, "cannot register; trying again");
        }
        _ => {}
    }
}

fn because(status: &Status) -> String {
    match status {
        Status::Joining { last: Some(last), .. }
        | Status::Retrying { last, .. }
        | Status::Replaced { last } => {
            format!(": {last}")
        }
        Status::Joining { last: None, .. } | Status::Registered { .. } => String::new(),
    }
}

/// Dropping a registration takes no longer than this, whatever the server does.
const DROP_TIME_MAX: Duration = Duration::from_secs(1);
