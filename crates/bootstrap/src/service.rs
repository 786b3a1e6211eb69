//! From a request to its answer: a thin layer of HTTP over the registry.

use std::pin::pin;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes};
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};

use crate::problem::{ErrorCode, Problem};
use crate::query::{self, Query, Wait};
use crate::registry::{Registered, Registry};
use crate::server::ServerConfig;
use crate::token::Token;
use crate::worker::{Incarnation, Listed, NodeId, Worker};

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
    /// Told whenever a worker came or changed, so that waiting requests look again. Nobody waits for a worker
    /// to leave.
    changes: watch::Sender<()>,
    stopping: watch::Receiver<bool>,
}

/// What `GET /health` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `"ok"`: a server that can answer is well.
    pub status: String,
    /// How many workers are registered.
    pub workers: usize,
    /// How long the server has been running.
    pub uptime_ms: u64,
    /// The server's version.
    pub version: String,
}

/// What `GET /v1/workers` answers.
#[derive(Serialize, Deserialize)]
pub(crate) struct Workers {
    pub(crate) workers: Vec<Listed>,
}

/// The body of `POST /v1/workers/{node}/renew`.
#[derive(Serialize, Deserialize)]
pub(crate) struct RenewBody {
    pub(crate) incarnation: Incarnation,
}

/// What a change to one worker answers.
#[derive(Serialize, Deserialize)]
pub(crate) struct Changed<O> {
    pub(crate) outcome: O,
}

/// What a URL names.
enum Route {
    Health,
    Workers,
    Worker(NodeId),
    Renew(NodeId),
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
            changes: watch::Sender::new(()),
            stopping,
        }
    }

    /// Answers one request, whatever it holds.
    pub(crate) async fn answer<B: Body<Data = Bytes>>(&self, request: Request<B>) -> Answer {
        self.routed(request).await.unwrap_or_else(|problem| {
            let mut answer = json(problem.error.status(), &problem);
            if problem.error == ErrorCode::WrongToken {
                answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            answer
        })
    }

    async fn routed<B: Body<Data = Bytes>>(&self, request: Request<B>) -> Result<Answer, Problem> {
        let route = Route::of(request.uri().path());
        // Anyone may ask whether the server is well; that tells a stranger no more than a number.
        if !matches!(route, Ok(Route::Health)) {
            self.admit(&request)?;
        }
        let route = route?;
        let parameters = request.uri().query().unwrap_or("");
        match (&route, request.method()) {
            (Route::Health, &(Method::GET | Method::HEAD)) => Ok(json(StatusCode::OK, &self.health())),
            (Route::Workers, &(Method::GET | Method::HEAD)) => {
                let (query, wait) = query::read(parameters)?;
                let workers = self.find(&query, wait).await;
                Ok(json(StatusCode::OK, &Workers { workers }))
            }
            (Route::Worker(node), &(Method::GET | Method::HEAD)) => self.one(node),
            (Route::Worker(node), &Method::PUT) => {
                let node = node.clone();
                self.register(&node, self.body(request).await?)
            }
            (Route::Worker(node), &Method::DELETE) => {
                let incarnation = query::read_incarnation(parameters)?;
                self.registry.lock().deregister(self.started.elapsed(), node, incarnation)?;
                Ok(json(StatusCode::OK, &Changed { outcome: "deregistered" }))
            }
            (Route::Renew(node), &Method::POST) => {
                let node = node.clone();
                let RenewBody { incarnation } = self.body(request).await?;
                self.registry.lock().renew(self.started.elapsed(), &node, incarnation)?;
                Ok(json(StatusCode::OK, &Changed { outcome: Registered::Renewed }))
            }
            (_, method) => {
                let message = format!("{} takes no {method}", request.uri().path());
                let problem = Problem::new(ErrorCode::MethodNotAllowed, message);
                let mut answer = json(problem.error.status(), &problem);
                answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(route.methods()));
                Ok(answer)
            }
        }
    }

    fn admit<B>(&self, request: &Request<B>) -> Result<(), Problem> {
        let Some(token) = &self.token else { return Ok(()) };
        match request.headers().get(header::AUTHORIZATION) {
            None => Err(Problem::new(ErrorCode::WrongToken, "this server wants a token")),
            Some(given) if token.admits(given.as_bytes()) => Ok(()),
            Some(_) => Err(Problem::new(ErrorCode::WrongToken, "the token is not this server's")),
        }
    }

    fn health(&self) -> Health {
        let uptime = self.started.elapsed();
        Health {
            status: "ok".to_owned(),
            workers: self.registry.lock().count(uptime, &Query::all()),
            uptime_ms: u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn one(&self, node: &NodeId) -> Result<Answer, Problem> {
        let listed = self.registry.lock().worker(self.started.elapsed(), node);
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
        let outcome = self.registry.lock().register(self.started.elapsed(), worker)?;
        if outcome != Registered::Renewed {
            tracing::info!(%node, %incarnation, %address, ?outcome, "a worker registered");
            self.changes.send_replace(());
        }
        let status = if outcome == Registered::Created { StatusCode::CREATED } else { StatusCode::OK };
        Ok(json(status, &Changed { outcome }))
    }

    async fn find(&self, query: &Query, wait: Option<Wait>) -> Vec<Listed> {
        // Where no place is left the caller is answered at once and may ask again: waiting requests must not
        // take the connections that renewals need.
        if let Some(Wait { count, time }) = wait
            && let Ok(_place) = self.waits.try_acquire()
        {
            let mut over = pin!(tokio::time::sleep(time.min(self.longest_wait)));
            let mut stopping = self.stopping.clone();
            // Subscribed before the first look, so that no worker can come unseen in between.
            let mut changes = self.changes.subscribe();
            while self.registry.lock().count(self.started.elapsed(), query) < count {
                tokio::select! {
                    _ = changes.changed() => {}
                    _ = stopping.wait_for(|stopping| *stopping) => break,
                    () = &mut over => break,
                }
            }
        }
        self.registry.lock().find(self.started.elapsed(), query)
    }

    /// Takes in a body within its limits of bytes and time.
    async fn body<B: Body<Data = Bytes>, T: DeserializeOwned>(
        &self,
        request: Request<B>,
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
        if path == "/health" {
            return Ok(Route::Health);
        }
        let no_such_path = || {
            let shown: String = path.chars().take(128).collect();
            Problem::new(ErrorCode::NoSuchPath, format!("there is nothing at {shown}"))
        };
        let below = path.strip_prefix("/v1/workers").ok_or_else(no_such_path)?;
        if below.is_empty() {
            return Ok(Route::Workers);
        }
        let below = below.strip_prefix('/').ok_or_else(no_such_path)?;
        let (node, last) = below.split_once('/').map_or((below, None), |(node, last)| (node, Some(last)));
        let node = NodeId::new(&query::percent_decode(node)?)
            .map_err(|invalid| Problem::new(ErrorCode::InvalidUrl, invalid))?;
        match last {
            None => Ok(Route::Worker(node)),
            Some("renew") => Ok(Route::Renew(node)),
            Some(_) => Err(no_such_path()),
        }
    }

    fn methods(&self) -> &'static str {
        match self {
            Route::Health | Route::Workers => "GET, HEAD",
            Route::Worker(_) => "GET, HEAD, PUT, DELETE",
            Route::Renew(_) => "POST",
        }
    }
}

fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    let bytes = serde_json::to_vec(body).expect("every key is a string and every value has a JSON form");
    let mut answer = Response::new(Full::new(Bytes::from(bytes)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// How much of a body that is too large is still read.
const DISCARD_BYTES: usize = 256 * 1024;
