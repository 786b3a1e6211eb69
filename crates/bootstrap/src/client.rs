//! The client: blocking calls, each over by its deadline.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::backoff::{Backoff, random};
use crate::error::{Error, ForeignAnswer, InvalidServer, Stage, WaitError};
use crate::exchange::{Answer, Deadline, exchange};
use crate::lookup::Lookup;
use crate::problem::{ErrorCode, Problem};
use crate::query::{self, Query, Wait};
use crate::registry::Registered;
use crate::service::{Changed, Health, RenewBody, Workers};
use crate::token::Token;
use crate::worker::{Incarnation, Listed, NodeId, Worker};

/// Talks to a bootstrap server. Calls block the thread that makes them, each until its deadline at the latest;
/// any number of threads may call at once. A clone is the same client.
///
/// To stay registered, use a [`Registration`](crate::Registration); to find peers, [`Client::wait_for`] or
/// [`Client::find`].
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    server: Lookup,
    token: Option<Token>,
    call_time: Duration,
    answer_bytes: usize,
}

/// Which server a client talks to, and its limits.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// `HOST`, `HOST:PORT` or `http://HOST:PORT`. A name is looked up at each call.
    pub server: String,
    /// The server's token, if it wants one.
    pub token: Option<Token>,
    /// How long one call may take, from the look-up to the answer's last byte.
    pub call_time: Duration,
    /// The largest answer that is taken. The default holds every list that a server with default limits gives.
    pub answer_bytes: usize,
}

impl ClientConfig {
    /// The default limits and no token.
    pub fn to(server: &str) -> ClientConfig {
        ClientConfig {
            server: server.to_owned(),
            token: None,
            call_time: Duration::from_secs(5),
            answer_bytes: 64 * 1024 * 1024,
        }
    }
}

impl Client {
    /// A client of this server. Nothing is sent yet.
    pub fn new(config: ClientConfig) -> Result<Client, InvalidServer> {
        let ClientConfig { server, token, call_time, answer_bytes } = config;
        let server = Lookup::new(&server)?;
        Ok(Client { inner: Arc::new(Inner { server, token, call_time, answer_bytes }) })
    }

    /// Whether the server is well, and how many workers it knows. It needs no token.
    pub fn health(&self) -> Result<Health, Error> {
        self.call("GET", "/health", None::<&()>, self.deadline())
    }

    /// Registers a worker once; the registration holds for the worker's time to live. To stay registered, use a
    /// [`Registration`](crate::Registration).
    pub fn register(&self, worker: &Worker) -> Result<Registered, Error> {
        self.register_by(worker, self.deadline())
    }

    /// Starts a worker's time to live again.
    pub fn renew(&self, node: &NodeId, incarnation: Incarnation) -> Result<(), Error> {
        self.renew_by(node, incarnation, self.deadline())
    }

    /// Takes a worker out. It is no error if it is not there.
    pub fn deregister(&self, node: &NodeId, incarnation: Incarnation) -> Result<(), Error> {
        self.deregister_by(node, incarnation, self.deadline())
    }

    /// One worker, if it is registered.
    pub fn worker(&self, node: &NodeId) -> Result<Option<Listed>, Error> {
        let found = self.call("GET", &format!("/v1/workers/{node}"), None::<&()>, self.deadline());
        match found {
            Err(error) if error.code() == Some(ErrorCode::UnknownWorker) => Ok(None),
            found => found.map(Some),
        }
    }

    /// The workers that match, ordered by node.
    pub fn find(&self, query: &Query) -> Result<Vec<Listed>, Error> {
        self.find_by(query, None, self.deadline())
    }

    /// Waits until at least `count` workers match, and gives all that do. While the server is away, this goes
    /// on asking; it ends early only for a reason that time does not cure, like a wrong token.
    pub fn wait_for(&self, query: &Query, count: usize, time: Duration) -> Result<Vec<Listed>, WaitError> {
        let deadline = Deadline::after(time);
        let mut backoff = Backoff::new(POLL_PAUSE_MIN, POLL_PAUSE_MAX);
        let (mut found, mut last) = (Vec::new(), None);
        while let Some(left) = deadline.remaining() {
            let asked = Instant::now();
            // The server answers a little before the time is over, so that its last word arrives in time.
            let wait = (left - (left / 4).min(ANSWER_TRAVEL)).min(POLL_WAIT_MAX);
            let call = Deadline::after(left.min(wait + self.inner.call_time));
            match self.find_by(query, Some(Wait { count, time: wait }), call) {
                Ok(workers) if workers.len() >= count => return Ok(workers),
                Ok(workers) => (found, last) = (workers, None),
                Err(error) if error.retry_helps() => last = Some(Box::new(error)),
                Err(error) => return Err(error.into()),
            }
            if asked.elapsed() < wait / 2 {
                // The server is away, or has no place left for requests that wait.
                let pause = backoff.pause(random());
                std::thread::sleep(deadline.remaining().map_or(Duration::ZERO, |left| pause.min(left)));
            } else {
                backoff.reset();
            }
        }
        Err(WaitError::TooFew { wanted: count, found, waited_ms: deadline.time_ms(), last })
    }

    pub(crate) fn call_time(&self) -> Duration {
        self.inner.call_time
    }

    /// The error of a call that has used up its time.
    pub(crate) fn late(&self, stage: Stage, deadline: Deadline) -> Error {
        Error::Deadline { server: self.inner.server.name().to_owned(), stage, time_ms: deadline.time_ms() }
    }

    pub(crate) fn register_by(&self, worker: &Worker, deadline: Deadline) -> Result<Registered, Error> {
        let path = format!("/v1/workers/{}", worker.node);
        let changed: Changed<Registered> = self.call("PUT", &path, Some(worker), deadline)?;
        Ok(changed.outcome)
    }

    pub(crate) fn renew_by(
        &self,
        node: &NodeId,
        incarnation: Incarnation,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let path = format!("/v1/workers/{node}/renew");
        let _: Changed<Registered> = self.call("POST", &path, Some(&RenewBody { incarnation }), deadline)?;
        Ok(())
    }

    pub(crate) fn deregister_by(
        &self,
        node: &NodeId,
        incarnation: Incarnation,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let path = format!("/v1/workers/{node}?incarnation={incarnation}");
        let changed: Result<Changed<String>, Error> = self.call("DELETE", &path, None::<&()>, deadline);
        match changed {
            Err(error) if error.code() != Some(ErrorCode::UnknownWorker) => Err(error),
            _ => Ok(()),
        }
    }

    fn find_by(&self, query: &Query, wait: Option<Wait>, deadline: Deadline) -> Result<Vec<Listed>, Error> {
        let path = format!("/v1/workers{}", query::write(query, wait));
        let found: Workers = self.call("GET", &path, None::<&()>, deadline)?;
        Ok(found.workers)
    }

    fn deadline(&self) -> Deadline {
        Deadline::after(self.inner.call_time)
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
        deadline: Deadline,
    ) -> Result<T, Error> {
        let Inner { server, token, answer_bytes, .. } = &*self.inner;
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\n{HEADERS}", server.name());
        if let Some(token) = token {
            let _ = write!(request, "Authorization: Bearer {}\r\n", token.secret());
        }
        if let Some(body) = body {
            let body = serde_json::to_string(body).expect("every key is a string");
            let length = body.len();
            let _ =
                write!(request, "Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}");
        } else {
            request.push_str("\r\n");
        }
        let Answer { status, body } = exchange(server, request.as_bytes(), *answer_bytes, deadline)?;
        let foreign = |source| Error::Foreign { server: server.name().to_owned(), source };
        if (200..300).contains(&status) {
            return serde_json::from_slice(&body).map_err(|error| foreign(ForeignAnswer::Json(error)));
        }
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Err(Error::Refused { server: server.name().to_owned(), status, problem }),
            Err(_) => Err(foreign(ForeignAnswer::Status { status })),
        }
    }
}

const HEADERS: &str = concat!(
    "Connection: close\r\nAccept: application/json\r\nUser-Agent: crossdock/",
    env!("CARGO_PKG_VERSION"),
    "\r\n"
);
const POLL_PAUSE_MIN: Duration = Duration::from_millis(20);
const POLL_PAUSE_MAX: Duration = Duration::from_secs(1);
const POLL_WAIT_MAX: Duration = Duration::from_secs(20);
const ANSWER_TRAVEL: Duration = Duration::from_millis(200);
