//! The server: one thread, its limits, its start and its end.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::registry::Limits;
use crate::service::Service;
use crate::stream::TimedWrite;
use crate::token::Token;

/// A running bootstrap server on a thread of its own. It stops when it is dropped.
///
/// ```
/// use crossdock_bootstrap::{Server, ServerConfig};
///
/// let server = Server::start(ServerConfig::on("127.0.0.1:0".parse()?))?;
/// println!("workers register at {}", server.address());
/// server.shutdown();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    /// Dropped to tell the server to stop.
    running: Option<oneshot::Sender<Infallible>>,
    thread: Option<JoinHandle<()>>,
}

/// Where a server listens and what it allows. Every wait and every table has its limit here.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where to listen; port 0 takes a free one, which [`Server::address`] tells.
    pub listen: SocketAddr,
    /// What callers must present, except for `/health`; `None` lets everyone in.
    pub token: Option<Token>,
    /// The registry's limits.
    pub limits: Limits,
    /// How many connections are open at once; further ones wait in the kernel's queue.
    pub connections: usize,
    /// How many requests may wait for workers at once; it must be below `connections`, so that renewals find a
    /// place.
    pub waits: usize,
    /// The longest that one request may wait for workers.
    pub longest_wait: Duration,
    /// The size of a request's head.
    pub head_bytes: usize,
    /// How many header lines a request has.
    pub head_lines: usize,
    /// The size of a request's body.
    pub body_bytes: usize,
    /// How long a request's head may take to arrive; a connection without a request is closed after it.
    pub head_time: Duration,
    /// How long a request's body may take to arrive.
    pub body_time: Duration,
    /// How long a peer may take to read an answer.
    pub answer_time: Duration,
    /// How long a stopping server lets the requests that it has begun come to their end.
    pub drain_time: Duration,
}

impl ServerConfig {
    /// The default limits and no token.
    pub fn on(listen: SocketAddr) -> ServerConfig {
        ServerConfig {
            listen,
            token: None,
            limits: Limits::default(),
            connections: 1024,
            waits: 512,
            longest_wait: Duration::from_secs(30),
            head_bytes: 16 * 1024,
            head_lines: 64,
            body_bytes: 64 * 1024,
            head_time: Duration::from_secs(10),
            body_time: Duration::from_secs(5),
            answer_time: Duration::from_secs(10),
            drain_time: Duration::from_secs(1),
        }
    }

    fn check(&self) -> Result<(), ConfigFault> {
        if self.waits >= self.connections {
            return Err(ConfigFault::Waits { waits: self.waits, connections: self.connections });
        }
        if self.limits.workers == 0 {
            return Err(ConfigFault::NoWorkers);
        }
        if self.limits.ttl_ms.is_empty() || *self.limits.ttl_ms.start() == 0 {
            let (least_ms, most_ms) = (*self.limits.ttl_ms.start(), *self.limits.ttl_ms.end());
            return Err(ConfigFault::Ttl { least_ms, most_ms });
        }
        Ok(())
    }
}

impl Default for ServerConfig {
    /// Listens on this host alone, on the usual port.
    fn default() -> ServerConfig {
        ServerConfig::on((Ipv4Addr::LOCALHOST, DEFAULT_PORT).into())
    }
}

/// Why a server did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The limits contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigFault),
    /// The address cannot be listened on: taken by another process, or not this host's.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The system gave no thread or no event queue.
    #[error("cannot start the server's thread")]
    Thread(#[source] io::Error),
}

/// Which limits contradict each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigFault {
    /// Requests that wait could take every connection.
    #[error("{waits} waits are not below {connections} connections, so renewals could find no place")]
    Waits {
        /// The limit of waiting requests.
        waits: usize,
        /// The limit of connections.
        connections: usize,
    },
    /// No worker could register.
    #[error("a limit of 0 workers lets nobody register")]
    NoWorkers,
    /// No time to live is allowed, or one of 0 is.
    #[error("times to live from {least_ms} to {most_ms} ms allow none, or one of 0")]
    Ttl {
        /// The shortest.
        least_ms: u64,
        /// The longest.
        most_ms: u64,
    },
}

impl Server {
    /// Starts a server; when this returns it accepts connections.
    pub fn start(config: ServerConfig) -> Result<Server, StartError> {
        config.check()?;
        let (running, stopped) = oneshot::channel::<Infallible>();
        let (report, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("crossdock-bootstrap".to_owned())
            .spawn(move || run(config, stopped, &report))
            .map_err(StartError::Thread)?;
        // Building a runtime and binding a socket do not block, and a thread that dies drops its end.
        let gone = || StartError::Thread(io::ErrorKind::BrokenPipe.into());
        let address = started.recv().map_err(|_| gone())??;
        Ok(Server { address, running: Some(running), thread: Some(thread) })
    }

    /// Where the server listens, with the port that it took.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops the server: no new connection is accepted, requests that have begun are answered within the drain
    /// time, and when this returns the port is free.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.running = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the server's thread was printed when it happened; there is nothing left to stop.
            let _ = thread.join();
        }
    }
}

/// Serves until `stop` is ready, for programs that have a tokio runtime (with its I/O and time drivers).
/// [`Server::start`] is the same on a thread of its own. `config.listen` is not used: the listener decides.
pub async fn serve(
    listener: TcpListener,
    config: ServerConfig,
    stop: impl Future<Output = ()>,
) -> Result<(), ConfigFault> {
    config.check()?;
    let (stopping_sender, stopping) = watch::channel(false);
    let service = Arc::new(Service::new(&config, stopping.clone()));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(config.head_time)
        .max_headers(config.head_lines)
        .max_header_size(config.head_bytes)
        .max_buf_size(config.head_bytes.max(HYPER_BUFFER_BYTES_MIN));
    let mut connections = JoinSet::new();
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "a connection's task failed");
                }
            }
            accepted = listener.accept(), if connections.len() < config.connections => match accepted {
                Ok((stream, peer)) => {
                    let (http, service) = (http.clone(), Arc::clone(&service));
                    let (answer_time, stopping) = (config.answer_time, stopping.clone());
                    connections.spawn(async move {
                        if let Err(error) = connection(&http, service, stream, answer_time, stopping).await {
                            tracing::debug!(%peer, %error, "a connection ended early");
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors, as a rule: a pause lets connections end, where a loop would spin.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    stopping_sender.send_replace(true);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(config.drain_time, drained).await.is_err() {
        connections.shutdown().await;
    }
    Ok(())
}

/// The server's thread.
fn run(
    config: ServerConfig,
    stopped: oneshot::Receiver<Infallible>,
    report: &mpsc::SyncSender<Result<SocketAddr, StartError>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build() {
        Ok(runtime) => runtime,
        Err(error) => return drop(report.send(Err(StartError::Thread(error)))),
    };
    runtime.block_on(async {
        let address = config.listen;
        let bound = listen(address);
        match bound.and_then(|listener| Ok((listener.local_addr()?, listener))) {
            Ok((address, listener)) => {
                let _ = report.send(Ok(address));
                tracing::info!(%address, "the bootstrap server listens");
                let served = serve(listener, config, async { drop(stopped.await) }).await;
                debug_assert!(served.is_ok(), "the limits were checked before the thread began");
                tracing::info!(%address, "the bootstrap server has stopped");
            }
            Err(source) => drop(report.send(Err(StartError::Listen { address, source }))),
        }
    });
}

/// Listens with a long queue: all workers of a deployment start in the same moment, and a connection that finds
/// the queue full tries again after a second.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A server that starts again takes its port back from connections that are not quite over.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(ACCEPT_QUEUE)
}

async fn connection(
    http: &http1::Builder,
    service: Arc<Service>,
    stream: TcpStream,
    answer_time: Duration,
    mut stopping: watch::Receiver<bool>,
) -> hyper::Result<()> {
    // An answer is one write, so Nagle's algorithm could only delay it; without it nothing else is lost.
    let _ = stream.set_nodelay(true);
    let stream = TimedWrite::new(TokioIo::new(stream), answer_time);
    let answer = service_fn(|request| {
        let service = Arc::clone(&service);
        async move { Ok::<_, Infallible>(service.answer(request).await) }
    });
    let mut connection = pin!(http.serve_connection(stream, answer));
    tokio::select! {
        ended = connection.as_mut() => return ended,
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
    connection.as_mut().graceful_shutdown();
    connection.await
}

/// The port that workers try and servers take unless told otherwise.
pub const DEFAULT_PORT: u16 = 8997;

/// hyper panics on a smaller buffer; a head is held to its own limit, whichever the buffer has.
const HYPER_BUFFER_BYTES_MIN: usize = 8192;
/// The kernel shortens this to its own limit.
const ACCEPT_QUEUE: u32 = 4096;
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
