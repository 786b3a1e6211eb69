//! From a request to its answer: a thin layer of HTTP over the registry.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request as HttpRequest, Response, StatusCode};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Semaphore, watch};

use crate::backoff::random;
use crate::group::{Counted, Group, GroupId};
use crate::lists::Lists;
use crate::metrics::{self, Metrics, Present, Request};
use crate::problem::{ErrorCode, Problem};
use crate::query::{self, Mark, Query, QueryFault, Until, Wait};
use crate::registry::{Registered, Registry};
use crate::rooms::{DpRank, ROOMS_PER_CALL_MAX, RoomRefusal};
use crate::server::ServerConfig;
use crate::token::Token;
use crate::wire::{AskRooms, Changed, Groups, Health, RenewBody, Room, RoomRanks, TellRooms, Workers};
use crate::worker::{NodeId, Worker};

/// What all connections of one server share.
pub(crate) struct Service {
    registry: Mutex<Registry>,
    started: Instant,
    token: Option<Token>,
    body_bytes: usize,
    body_time: Duration,
    longest_wait: Duration,
    /// A place for each request that may be kept waiting.
    waits: Semaphore,
    waits_most: usize,
    /// Told whenever a worker came, changed or was taken out, so that requests which wait for workers look again.
    changes: watch::Sender<()>,
    /// The same for rooms, which are told far more often than workers change.
    told: watch::Sender<()>,
    lists: Lists,
    /// Tells the marks of this start of the server from those of an earlier one.
    epoch: u64,
    metrics: Metrics,
    stopping: watch::Receiver<bool>,
}

/// What a URL names.
enum Route {
    Health,
    Metrics,
    Workers,
    Worker(NodeId),
    Renew(NodeId),
    Groups,
    Group(GroupId),
    Rooms(GroupId),
    AskRooms(GroupId),
}

/// What a request that is kept waiting waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    Workers,
    Rooms,
}

type Answer = Response<Full<Bytes>>;

impl Service {
    pub(crate) fn new(config: &ServerConfig, stopping: watch::Receiver<bool>) -> Service {
        Service {
            registry: Mutex::new(Registry::new(config.limits.clone())),
            started: Instant::now(),
            token: config.token.clone(),
            body_bytes: config.body_bytes,
            body_time: config.body_time,
            longest_wait: config.longest_wait,
            waits: Semaphore::new(config.waits),
            waits_most: config.waits,
            changes: watch::Sender::new(()),
            told: watch::Sender::new(()),
            lists: Lists::new(LIST_BYTES_MAX),
            epoch: random(),
            metrics: Metrics::default(),
            stopping,
        }
    }

    /// Answers one request, whatever it holds.
    pub(crate) async fn answer<B: Body<Data = Bytes>>(&self, request: HttpRequest<B>) -> Answer {
        let began = Instant::now();
        let mut asked = Request::Other;
        let routed = self.routed(request, &mut asked).await;
        self.metrics.answered(asked, began.elapsed());
        routed.unwrap_or_else(|problem| {
            self.metrics.refused(problem.error);
            let mut answer = json(status(problem.error), &problem);
            if problem.error == ErrorCode::WrongToken {
                answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            answer
        })
    }

    /// Says in `asked` what the request is as soon as that is known.
    async fn routed<B: Body<Data = Bytes>>(
        &self,
        request: HttpRequest<B>,
        asked: &mut Request,
    ) -> Result<Answer, Problem> {
        let route = Route::of(request.uri().path());
        // Anyone may ask whether the server is well; that tells a stranger no more than a number.
        if !matches!(route, Ok(Route::Health)) {
            self.admit(&request)?;
        }
        let route = route?;
        let parameters = request.uri().query().unwrap_or("").to_owned();
        match (&route, request.method()) {
            (Route::Health, &(Method::GET | Method::HEAD)) => {
                *asked = Request::Health;
                Ok(json(StatusCode::OK, &self.health()))
            }
            (Route::Metrics, &(Method::GET | Method::HEAD)) => {
                *asked = Request::Metrics;
                Ok(answer(StatusCode::OK, metrics::CONTENT_TYPE, self.metrics_text()))
            }
            (Route::Workers, &(Method::GET | Method::HEAD)) => {
                *asked = Request::Workers;
                let (query, wait) = query::read(&parameters)?;
                Ok(self.find(&query, wait, asked).await)
            }
            (Route::Worker(node), &(Method::GET | Method::HEAD)) => {
                *asked = Request::Worker;
                self.one(node)
            }
            (Route::Worker(node), &Method::PUT) => {
                *asked = Request::Register;
                self.register(node, self.body(request).await?)
            }
            (Route::Worker(node), &Method::DELETE) => {
                *asked = Request::Deregister;
                let incarnation = query::read_incarnation(&parameters)?;
                self.registry.lock().deregister(self.now(), node, incarnation)?;
                self.metrics.deregistered();
                self.changes.send_replace(());
                Ok(json(StatusCode::OK, &Changed { outcome: "deregistered" }))
            }
            (Route::Renew(node), &Method::POST) => {
                *asked = Request::Renew;
                let RenewBody { incarnation } = self.body(request).await?;
                self.registry.lock().renew(self.now(), node, incarnation)?;
                self.metrics.registered(Registered::Renewed);
                Ok(json(StatusCode::OK, &Changed { outcome: Registered::Renewed }))
            }
            (Route::Groups, &(Method::GET | Method::HEAD)) => {
                *asked = Request::Groups;
                let (counted, wait) = query::read_group(&parameters)?;
                if !wait.is_zero() {
                    return Err(QueryFault::Name { name: "wait_ms".to_owned() }.into());
                }
                let groups = self.registry.lock().groups(self.now(), counted);
                Ok(json(StatusCode::OK, &Groups { groups }))
            }
            (Route::Group(group), &(Method::GET | Method::HEAD)) => {
                *asked = Request::Group;
                let (counted, wait) = query::read_group(&parameters)?;
                Ok(json(StatusCode::OK, &self.group(group, counted, wait, asked).await?))
            }
            (Route::Rooms(group), &Method::POST) => {
                *asked = Request::TellRooms;
                self.tell_rooms(group, self.body(request).await?)
            }
            (Route::AskRooms(group), &Method::POST) => {
                *asked = Request::AskRooms;
                let ask = self.body(request).await?;
                Ok(json(StatusCode::OK, &self.ask_rooms(group, ask, asked).await?))
            }
            (_, method) => {
                let message = format!("{} takes no {method}", request.uri().path());
                let problem = Problem::new(ErrorCode::MethodNotAllowed, message);
                self.metrics.refused(problem.error);
                let mut answer = json(status(problem.error), &problem);
                answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(route.methods()));
                Ok(answer)
            }
        }
    }

    /// The registry's clock.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn admit<B>(&self, request: &HttpRequest<B>) -> Result<(), Problem> {
        let Some(token) = &self.token else { return Ok(()) };
        match request.headers().get(header::AUTHORIZATION) {
            None => Err(Problem::new(ErrorCode::WrongToken, "this server wants a token")),
            Some(given) if token.admits(given.as_bytes()) => Ok(()),
            Some(_) => Err(Problem::new(ErrorCode::WrongToken, "the token is not this server's")),
        }
    }

    fn health(&self) -> Health {
        let uptime = self.now();
        Health {
            status: "ok".to_owned(),
            workers: self.registry.lock().count(uptime, &Query::all()),
            uptime_ms: Some(u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX)),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn metrics_text(&self) -> String {
        let uptime = self.now();
        let mut registry = self.registry.lock();
        let workers = registry.find(uptime, &Query::all());
        let groups = registry.groups(uptime, Counted::Ready);
        let (tally, rooms) = registry.tally(uptime);
        drop(registry);
        let workers: Vec<_> = workers.into_iter().map(|listed| (listed.worker.role, listed.state)).collect();
        let groups_complete = groups.iter().filter(|group| group.complete).count();
        self.metrics.text(&Present {
            workers: &workers,
            groups_complete,
            groups_incomplete: groups.len() - groups_complete,
            rooms,
            waiting: self.waits_most - self.waits.available_permits(),
            tally,
            uptime,
        })
    }

    fn one(&self, node: &NodeId) -> Result<Answer, Problem> {
        let listed = self.registry.lock().worker(self.now(), node);
        let message = || format!("node {node} is not registered");
        let listed = listed.ok_or_else(|| Problem::new(ErrorCode::UnknownWorker, message()))?;
        Ok(json(StatusCode::OK, &listed))
    }

    fn register(&self, node: &NodeId, worker: Worker) -> Result<Answer, Problem> {
        if worker.node != *node {
            let message = format!("the URL names node {node}, the body names node {}", worker.node);
            return Err(Problem::new(ErrorCode::InvalidUrl, message));
        }
        let (incarnation, address) = (worker.incarnation, worker.address);
        let outcome = self.registry.lock().register(self.now(), worker)?;
        self.metrics.registered(outcome);
        if outcome != Registered::Renewed {
            tracing::info!(%node, %incarnation, %address, ?outcome, "a worker registered");
            self.changes.send_replace(());
        }
        let status = if outcome == Registered::Created { StatusCode::CREATED } else { StatusCode::OK };
        Ok(json(status, &Changed { outcome }))
    }

    async fn find(&self, query: &Query, wait: Option<Wait>, asked: &mut Request) -> Answer {
        if let Some(Wait { until, time }) = wait {
            let look = |registry: &mut Registry, now, last| {
                let enough = match &until {
                    Until::Count(count) => registry.count(now, query) >= *count,
                    Until::Changed(seen) => *seen != self.mark(registry, now),
                };
                (last || enough).then_some(())
            };
            self.look_until(time, Awaited::Workers, asked, look).await;
        }
        self.lists.room().await;
        let (workers, mark, now) = {
            let mut registry = self.registry.lock();
            let now = self.now();
            let mark = self.mark(&mut registry, now);
            if let Some(body) = self.lists.shared(query, mark.revision, now) {
                return answer(StatusCode::OK, JSON, body);
            }
            (registry.find(now, query), mark, now)
        };
        let revision = mark.revision;
        let body = self.lists.share(query, revision, now, to_json(&Workers { workers, mark }));
        answer(StatusCode::OK, JSON, body)
    }

    fn mark(&self, registry: &mut Registry, now: Duration) -> Mark {
        Mark { epoch: self.epoch, revision: registry.revision(now) }
    }

    async fn group(
        &self,
        group: &GroupId,
        counted: Counted,
        wait: Duration,
        asked: &mut Request,
    ) -> Result<Group, Problem> {
        let look = |registry: &mut Registry, now, last| {
            let group = registry.group(now, group, counted);
            (last || group.as_ref().is_some_and(|group| group.complete)).then_some(group)
        };
        let found = self.look_until(wait, Awaited::Workers, asked, look).await;
        found.ok_or_else(|| RoomRefusal::UnknownGroup { group: group.clone() }.into())
    }

    fn tell_rooms(
        &self,
        group: &GroupId,
        TellRooms { rooms, keep_ms }: TellRooms,
    ) -> Result<Answer, Problem> {
        check_rooms(rooms.len())?;
        let rooms: Vec<(u64, u32)> = rooms.into_iter().map(|(Room(room), rank)| (room, rank)).collect();
        let keep = Duration::from_millis(keep_ms);
        self.registry.lock().tell_rooms(self.now(), group, &rooms, keep)?;
        self.told.send_replace(());
        Ok(json(StatusCode::OK, &Changed { outcome: "told" }))
    }

    async fn ask_rooms(
        &self,
        group: &GroupId,
        AskRooms { rooms, wait_ms }: AskRooms,
        asked: &mut Request,
    ) -> Result<RoomRanks, Problem> {
        check_rooms(rooms.len())?;
        let numbers: Vec<u64> = rooms.iter().map(|Room(room)| *room).collect();
        let look = |registry: &mut Registry, now, last| {
            let ranks = registry.dp_ranks(now, group, &numbers);
            let known = |ranks: &Vec<DpRank>| !ranks.contains(&DpRank::NotYet);
            (last || ranks.as_ref().is_ok_and(known)).then_some(ranks)
        };
        let ranks = self.look_until(Duration::from_millis(wait_ms), Awaited::Rooms, asked, look).await?;
        let (mut dp_ranks, mut not_yet) = (BTreeMap::new(), Vec::new());
        for (room, rank) in rooms.into_iter().zip(ranks) {
            match rank {
                DpRank::Known(rank) => drop(dp_ranks.insert(room, rank)),
                DpRank::NotYet => not_yet.push(room),
            }
        }
        Ok(RoomRanks { dp_ranks, not_yet })
    }

    /// Looks again and again until `look` finds what it is there for or the time is over; the last look takes what
    /// there is.
    async fn look_until<T>(
        &self,
        time: Duration,
        awaited: Awaited,
        asked: &mut Request,
        mut look: impl FnMut(&mut Registry, Duration, bool) -> Option<T>,
    ) -> T {
        // Where no place is left the caller is answered at once and may ask again: waiting requests must not
        // take the connections that renewals need.
        if !time.is_zero()
            && let Ok(_place) = self.waits.try_acquire()
        {
            *asked = Request::Wait;
            let mut over = pin!(tokio::time::sleep(time.min(self.longest_wait)));
            let mut stopping = self.stopping.clone();
            // Subscribed before the first look, so that nothing can come unseen in between.
            let mut changes = self.changes.subscribe();
            let mut told = (awaited == Awaited::Rooms).then(|| self.told.subscribe());
            loop {
                changes.mark_unchanged();
                told.iter_mut().for_each(|told| told.mark_unchanged());
                let next = {
                    let mut registry = self.registry.lock();
                    if let Some(found) = look(&mut registry, self.now(), false) {
                        return found;
                    }
                    registry.next_change()
                };
                let next = next.map_or(self.longest_wait, |next| next.saturating_sub(self.now()));
                // Rooms that are told of are asked for by requests under way: these are answered at once.
                tokio::select! {
                    () = next_word(&mut told) => continue,
                    _ = changes.changed() => {}
                    _ = stopping.wait_for(|stopping| *stopping) => break,
                    () = &mut over => break,
                    () = tokio::time::sleep(next) => {}
                }
                tokio::select! {
                    () = next_word(&mut told) => {}
                    () = tokio::time::sleep(LULL) => {}
                    () = &mut over => break,
                }
            }
        }
        let mut registry = self.registry.lock();
        look(&mut registry, self.now(), true).expect("the last look takes what there is")
    }

    /// Takes in a body within its limits of bytes and time.
    async fn body<B: Body<Data = Bytes>, T: DeserializeOwned>(
        &self,
        request: HttpRequest<B>,
    ) -> Result<T, Problem> {
        let too_large = || {
            let message = format!("the body has more than {} bytes", self.body_bytes);
            Problem::new(ErrorCode::BodyTooLarge, message)
        };
        let announced = request.body().size_hint().lower();
        if request.headers().contains_key(header::EXPECT) && announced > self.body_bytes as u64 {
            // The client has not begun to send: it waits for this answer.
            return Err(too_large());
        }
        let collect = async {
            let mut body = pin!(request.into_body());
            let (mut bytes, mut seen) = (Vec::new(), 0usize);
            while let Some(frame) = body.frame().await {
                let broken = |_| Problem::new(ErrorCode::InvalidBody, "the body broke off");
                let Ok(data) = frame.map_err(broken)?.into_data() else {
                    continue;
                };
                seen += data.len();
                if seen <= self.body_bytes {
                    bytes.extend_from_slice(&data);
                } else if seen > self.body_bytes + DISCARD_BYTES {
                    return Err(too_large());
                }
            }
            // A body that is a little too large is read to its end: closing a connection on unread bytes
            // resets it, and the client would lose the answer that says why.
            if seen > self.body_bytes { Err(too_large()) } else { Ok(bytes) }
        };
        let bytes = tokio::time::timeout(self.body_time, collect).await.map_err(|_| {
            let message = format!("the body did not come within {} ms", self.body_time.as_millis());
            Problem::new(ErrorCode::BodyTimeout, message)
        })??;
        serde_json::from_slice(&bytes).map_err(|error| Problem::new(ErrorCode::InvalidBody, error))
    }
}

impl Route {
    fn of(path: &str) -> Result<Route, Problem> {
        let no_such_path = || {
            let shown: String = path.chars().take(128).collect();
            Problem::new(ErrorCode::NoSuchPath, format!("there is nothing at {shown}"))
        };
        match path {
            "/health" => return Ok(Route::Health),
            "/metrics" => return Ok(Route::Metrics),
            "/v1/workers" => return Ok(Route::Workers),
            "/v1/groups" => return Ok(Route::Groups),
            _ => {}
        }
        let below = path.strip_prefix("/v1/").and_then(|below| below.split_once('/'));
        let (kind, below) = below.ok_or_else(no_such_path)?;
        let (name, last) = below.split_once('/').map_or((below, None), |(name, last)| (name, Some(last)));
        let name = query::percent_decode(name);
        let invalid = |invalid| Problem::new(ErrorCode::InvalidUrl, invalid);
        match (kind, last) {
            ("workers", None) => Ok(Route::Worker(NodeId::new(&name?).map_err(invalid)?)),
            ("workers", Some("renew")) => Ok(Route::Renew(NodeId::new(&name?).map_err(invalid)?)),
            ("groups", None) => Ok(Route::Group(GroupId::new(&name?).map_err(invalid)?)),
            ("groups", Some("rooms")) => Ok(Route::Rooms(GroupId::new(&name?).map_err(invalid)?)),
            ("groups", Some("rooms/query")) => Ok(Route::AskRooms(GroupId::new(&name?).map_err(invalid)?)),
            _ => Err(no_such_path()),
        }
    }

    fn methods(&self) -> &'static str {
        match self {
            Route::Health | Route::Metrics | Route::Workers | Route::Groups | Route::Group(_) => "GET, HEAD",
            Route::Worker(_) => "GET, HEAD, PUT, DELETE",
            Route::Renew(_) | Route::Rooms(_) | Route::AskRooms(_) => "POST",
        }
    }
}

fn check_rooms(count: usize) -> Result<(), Problem> {
    if count <= ROOMS_PER_CALL_MAX {
        return Ok(());
    }
    let message = format!("{count} rooms are more than the {ROOMS_PER_CALL_MAX} of one request");
    Err(Problem::new(ErrorCode::InvalidBody, message))
}

fn status(code: ErrorCode) -> StatusCode {
    StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    answer(status, JSON, to_json(body))
}

fn to_json(body: &impl Serialize) -> String {
    serde_json::to_string(body).expect("every key is a string and every value has a JSON form")
}

fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}

/// The next time that rooms are told of, for those who wait for rooms.
async fn next_word(told: &mut Option<watch::Receiver<()>>) {
    match told {
        // The sender lives as long as the service.
        Some(told) => _ = told.changed().await,
        None => std::future::pending().await,
    }
}

const JSON: &str = "application/json";
/// Workers start and leave together: those who wait for them look once for as many as come in this time.
const LULL: Duration = Duration::from_millis(20);
/// Of the lists that are under way. More than a hundred of a full registry whose workers say no more than usual.
const LIST_BYTES_MAX: usize = 256 * 1024 * 1024;
/// How much of a body that is too large is still read.
const DISCARD_BYTES: usize = 256 * 1024;
