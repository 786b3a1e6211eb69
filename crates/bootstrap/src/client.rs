//! The client: blocking calls, each over by its deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::backoff::{Backoff, random};
use crate::error::{Error, InvalidServer, Stage, WaitError};
use crate::etcd::Etcd;
use crate::exchange::Deadline;
use crate::group::{Counted, Group, GroupId};
use crate::http::Http;
use crate::lookup::Lookup;
use crate::problem::{ErrorCode, Problem};
use crate::query::{Query, Until, Wait};
use crate::registry::{Limits, Registered};
use crate::rooms::{DpRank, ROOMS_PER_CALL_MAX};
use crate::token::Token;
use crate::watch::Watch;
use crate::wire::{Health, Workers};
use crate::worker::{Incarnation, Listed, NodeId, Worker};

/// A registry's client, the same whether crossdock's own server or etcd keeps the registry. Calls block the thread
/// that makes them, each until its deadline at the latest; any number of threads may call at once. A clone is the same
/// client.
///
/// To stay registered, use a [`Registration`](crate::Registration); to find peers, [`Client::wait_for`],
/// [`Client::wait_for_group`] or [`Client::find`]; to hear of those that come, move and leave, [`Client::watch`].
#[derive(Clone, Debug)]
pub struct Client {
    backend: Arc<dyn Backend>,
    call_time: Duration,
}

/// Which registry a client talks to, and its limits.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// `HOST`, `HOST:PORT` or `http://HOST:PORT` for a bootstrap server. `etcd://HOST:PORT,HOST:PORT/PREFIX` for the
    /// members of an etcd cluster, in which all keys then begin with `PREFIX/`: `crossdock/` if it is left out. A name
    /// is looked up at each call.
    pub server: String,
    /// The server's token, if it wants one; for etcd a token of its own authentication.
    pub token: Option<Token>,
    /// How long one call may take, from the look-up to the answer's last byte.
    pub call_time: Duration,
    /// The largest answer that is taken. The default holds every list that a server with default limits gives.
    pub answer_bytes: usize,
    /// With etcd: what a worker may ask for, and how much is remembered. A bootstrap server has limits of its own.
    pub limits: Limits,
}

impl ClientConfig {
    /// The default limits and no token.
    pub fn to(server: &str) -> ClientConfig {
        ClientConfig {
            server: server.to_owned(),
            token: None,
            call_time: Duration::from_secs(5),
            answer_bytes: 64 * 1024 * 1024,
            limits: Limits::default(),
        }
    }
}

impl Client {
    /// A client of this registry. Nothing is sent yet.
    pub fn new(config: ClientConfig) -> Result<Client, InvalidServer> {
        let call_time = config.call_time;
        let backend: Arc<dyn Backend> = if config.server.starts_with("etcd://") {
            Arc::new(Etcd::new(config)?)
        } else {
            let ClientConfig { server, token, answer_bytes, .. } = config;
            Arc::new(Http { server: Lookup::new(&server)?, token, answer_bytes })
        };
        Ok(Client { backend, call_time })
    }

    /// Whether the registry is well, and how many workers it knows. A bootstrap server needs no token for this.
    pub fn health(&self) -> Result<Health, Error> {
        self.backend.health(self.deadline())
    }

    /// Registers a worker once; the registration holds for the worker's time to live. To stay registered, use a
    /// [`Registration`](crate::Registration).
    pub fn register(&self, worker: &Worker) -> Result<Registered, Error> {
        self.backend.register(worker, self.deadline())
    }

    /// Starts a worker's time to live again.
    pub fn renew(&self, node: &NodeId, incarnation: Incarnation) -> Result<(), Error> {
        self.backend.renew(node, incarnation, self.deadline())
    }

    /// Takes a worker out. It is no error if it is not there.
    pub fn deregister(&self, node: &NodeId, incarnation: Incarnation) -> Result<(), Error> {
        self.deregister_by(node, incarnation, self.deadline())
    }

    /// One worker, if it is registered.
    pub fn worker(&self, node: &NodeId) -> Result<Option<Listed>, Error> {
        self.backend.worker(node, self.deadline())
    }

    /// The workers that match, ordered by node.
    pub fn find(&self, query: &Query) -> Result<Vec<Listed>, Error> {
        Ok(self.find_by(query, None, self.deadline())?.workers)
    }

    /// Waits until at least `count` workers match, and gives all that do. While the registry is away, this goes
    /// on asking; it ends early only for a reason that time does not cure, like a wrong token.
    pub fn wait_for(&self, query: &Query, count: usize, time: Duration) -> Result<Vec<Listed>, WaitError> {
        let ask = |wait, by| {
            let wait = Wait { until: Until::Count(count), time: wait };
            Ok(self.find_by(query, Some(&wait), by)?.workers)
        };
        let waited = self.wait(time, ask, |workers| workers.len() >= count)?;
        waited.map_err(|Unmet { seen, last, waited_ms }| WaitError::TooFew {
            wanted: count,
            found: seen.unwrap_or_default(),
            waited_ms,
            last,
        })
    }

    /// Hears of the workers that match: those that are there now, and from then on those that come, move and leave.
    pub fn watch(&self, query: Query) -> Watch {
        Watch::new(self.clone(), query)
    }

    /// A group: its topology, whether it is complete, and what is missing. One of which no worker is registered is
    /// refused with [`ErrorCode::UnknownGroup`].
    pub fn group(&self, group: &GroupId, counted: Counted) -> Result<Group, Error> {
        self.backend.group(group, counted, Duration::ZERO, self.deadline())
    }

    /// All groups of which any worker is registered, ordered by name.
    pub fn groups(&self, counted: Counted) -> Result<Vec<Group>, Error> {
        self.backend.groups(counted, self.deadline())
    }

    /// Waits until every rank of a group is there.
    pub fn wait_for_group(
        &self,
        group: &GroupId,
        counted: Counted,
        time: Duration,
    ) -> Result<Group, WaitError> {
        let waited =
            self.wait(time, |wait, by| self.backend.group(group, counted, wait, by), |seen| seen.complete)?;
        waited.map_err(|Unmet { seen, last, waited_ms }| WaitError::Incomplete {
            group: group.clone(),
            seen: seen.map(Box::new),
            waited_ms,
            last: last.filter(|error| error.code() != Some(ErrorCode::UnknownGroup)),
        })
    }

    /// Says which data-parallel ranks of a group serve these rooms, for the time `keep`. For groups that registered
    /// with [`RoomPolicy::Told`](crate::RoomPolicy::Told); others refuse it. At most [`ROOMS_PER_CALL_MAX`] rooms.
    pub fn tell_rooms(&self, group: &GroupId, rooms: &[(u64, u32)], keep: Duration) -> Result<(), Error> {
        self.check_rooms(rooms.len())?;
        self.backend.tell_rooms(group, rooms, keep, self.deadline())
    }

    /// Which data-parallel rank of a group serves each of these rooms, in their order. At most
    /// [`ROOMS_PER_CALL_MAX`] rooms.
    pub fn dp_ranks(&self, group: &GroupId, rooms: &[u64]) -> Result<Vec<DpRank>, Error> {
        self.check_rooms(rooms.len())?;
        self.backend.dp_ranks(group, rooms, Duration::ZERO, self.deadline())
    }

    /// Waits until all of these rooms have a data-parallel rank, and gives those in their order.
    pub fn wait_for_dp_ranks(
        &self,
        group: &GroupId,
        rooms: &[u64],
        time: Duration,
    ) -> Result<Vec<u32>, WaitError> {
        self.check_rooms(rooms.len())?;
        let ask = |wait, by| self.backend.dp_ranks(group, rooms, wait, by);
        let waited = self.wait(time, ask, |ranks| !ranks.contains(&DpRank::NotYet))?;
        let unmet = match waited {
            Ok(ranks) => return Ok(ranks.into_iter().filter_map(DpRank::known).collect()),
            Err(unmet) => unmet,
        };
        let seen = unmet.seen.unwrap_or_else(|| vec![DpRank::NotYet; rooms.len()]);
        let missing = rooms.iter().zip(seen).filter(|(_, rank)| rank.known().is_none());
        let not_yet = missing.map(|(room, _)| *room).collect();
        let (waited_ms, last) = (unmet.waited_ms, unmet.last);
        Err(WaitError::RoomsNotYet { group: group.clone(), not_yet, waited_ms, last })
    }

    pub(crate) fn call_time(&self) -> Duration {
        self.call_time
    }

    /// The error of a call that has used up its time.
    pub(crate) fn late(&self, stage: Stage, deadline: Deadline) -> Error {
        Error::Deadline { server: self.backend.name().to_owned(), stage, time_ms: deadline.time_ms() }
    }

    pub(crate) fn register_by(&self, worker: &Worker, deadline: Deadline) -> Result<Registered, Error> {
        self.backend.register(worker, deadline)
    }

    pub(crate) fn renew_by(
        &self,
        node: &NodeId,
        incarnation: Incarnation,
        deadline: Deadline,
    ) -> Result<(), Error> {
        self.backend.renew(node, incarnation, deadline)
    }

    pub(crate) fn deregister_by(
        &self,
        node: &NodeId,
        incarnation: Incarnation,
        deadline: Deadline,
    ) -> Result<(), Error> {
        match self.backend.deregister(node, incarnation, deadline) {
            Err(error) if error.code() == Some(ErrorCode::UnknownWorker) => Ok(()),
            done => done,
        }
    }

    pub(crate) fn find_by(
        &self,
        query: &Query,
        wait: Option<&Wait>,
        deadline: Deadline,
    ) -> Result<Workers, Error> {
        self.backend.find(query, wait, deadline)
    }

    /// Asks again and again until the answer is enough or the time is over. It ends early only where time does not
    /// help.
    fn wait<T>(
        &self,
        time: Duration,
        ask: impl Fn(Duration, Deadline) -> Result<T, Error>,
        enough: impl Fn(&T) -> bool,
    ) -> Result<Result<T, Unmet<T>>, Error> {
        let deadline = Deadline::after(time);
        let mut pace = Pace::new();
        let (mut seen, mut last) = (None, None);
        while let Some((wait, by)) = pace.next(deadline, self.call_time) {
            let asked = Instant::now();
            let mut kept = false;
            match ask(wait, by) {
                Ok(answer) if enough(&answer) => return Ok(Ok(answer)),
                Ok(answer) => {
                    kept = asked.elapsed() >= wait / 2;
                    (seen, last) = (Some(answer), None);
                }
                // What was heard before says more.
                Err(error) if (seen.is_some() || last.is_some()) && pace.was_cut_short(by, &error) => {}
                Err(error) if error.retry_helps() => last = Some(Box::new(error)),
                Err(error) => return Err(error),
            }
            pace.pause(deadline, kept);
        }
        Ok(Err(Unmet { seen, last, waited_ms: deadline.time_ms() }))
    }

    fn check_rooms(&self, count: usize) -> Result<(), Error> {
        if count <= ROOMS_PER_CALL_MAX {
            return Ok(());
        }
        let message = format!("{count} rooms are more than the {ROOMS_PER_CALL_MAX} of one call");
        let problem = Problem::new(ErrorCode::InvalidBody, message);
        let status = problem.error.status();
        Err(Error::Refused { server: self.backend.name().to_owned(), status, problem })
    }

    fn deadline(&self) -> Deadline {
        Deadline::after(self.call_time)
    }
}

/// How a wait ended that did not get what it was for.
struct Unmet<T> {
    seen: Option<T>,
    last: Option<Box<Error>>,
    waited_ms: u64,
}

/// The pace of calls that wait at the registry: one after the other while it keeps them, with growing pauses while it
/// does not.
#[derive(Debug)]
pub(crate) struct Pace {
    backoff: Backoff,
}

impl Pace {
    pub(crate) fn new() -> Pace {
        Pace { backoff: Backoff::new(POLL_PAUSE_MIN, POLL_PAUSE_MAX) }
    }

    /// How long the next call may be kept, and when it must be over; `None` when the time is.
    pub(crate) fn next(&self, deadline: Deadline, call_time: Duration) -> Option<(Duration, Deadline)> {
        let left = deadline.remaining()?;
        // The registry answers a little before the time is over, so that its last word arrives in time.
        let wait = (left - (left / 4).min(ANSWER_TRAVEL)).min(POLL_WAIT_MAX);
        Some((wait, Deadline::after(left.min(wait.saturating_add(call_time)))))
    }

    /// Whether a call with this deadline had so little time that its failure says nothing. With several members it may
    /// end before that: each has its share of the time.
    pub(crate) fn was_cut_short(&self, by: Deadline, error: &Error) -> bool {
        by.time() < ANSWER_TRAVEL && error.retry_helps()
    }

    /// Pauses where the registry did not keep the last call: it is away, or has no place left for requests that wait.
    /// A call that failed counts as not kept however long it took, or a slow registry would be asked without a pause.
    pub(crate) fn pause(&mut self, deadline: Deadline, kept: bool) {
        if kept {
            self.backoff.reset();
        } else {
            let pause = self.backoff.pause(random());
            std::thread::sleep(deadline.remaining().map_or(Duration::ZERO, |left| pause.min(left)));
        }
    }
}

const POLL_PAUSE_MIN: Duration = Duration::from_millis(20);
const POLL_PAUSE_MAX: Duration = Duration::from_secs(1);
const POLL_WAIT_MAX: Duration = Duration::from_secs(20);
const ANSWER_TRAVEL: Duration = Duration::from_millis(200);
