//! A proxy between two nodes that breaks what goes through it, and never changes a byte.
//!
//! It listens at another loopback address than the node behind it, at the same port: so a node that advertises that
//! address is reached through the proxy by everybody, its lanes included.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::Chance;

/// What becomes of a connection. Numbers of bytes are those that pass before, in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing.
    Pass,
    /// Every piece that is passed on waits so long.
    Delay {
        /// How long.
        ms: u64,
    },
    /// Hardly anything passes from here on.
    Trickle {
        /// How much every 10 ms.
        bytes: u64,
        /// Where it begins.
        after: u64,
    },
    /// Nothing passes any more, and nobody hears of it.
    Stall {
        /// Where it begins.
        after: u64,
    },
    /// Both ends hear of a reset; what was under way is lost.
    Reset {
        /// Where.
        after: u64,
    },
    /// One direction ends, the other goes on.
    HalfClose {
        /// Where.
        after: u64,
    },
    /// Both directions end, mostly in the middle of a frame.
    Cut {
        /// Where.
        after: u64,
    },
}

/// How many connections have had which fate, those that were cut or stopped from outside included.
pub type ProxyCounts = BTreeMap<&'static str, u64>;

impl Fate {
    fn draw(chance: &mut Chance) -> Self {
        // From the first byte of a handshake to the middle of the bulk.
        let after = chance.draw(0..1 << chance.clone().draw(1..23));
        match chance.draw(0..14) {
            0 => Fate::Delay { ms: chance.draw(1..60) },
            1 => Fate::Trickle { bytes: chance.draw(1..2000), after },
            2 | 3 => Fate::Stall { after },
            4 | 5 => Fate::Reset { after },
            6 => Fate::HalfClose { after },
            7 => Fate::Cut { after },
            _ => Fate::Pass,
        }
    }

    /// All names.
    pub const NAMES: [&'static str; 7] = ["pass", "delay", "trickle", "stall", "reset", "half-close", "cut"];

    fn name(self) -> &'static str {
        let at = match self {
            Fate::Pass => 0,
            Fate::Delay { .. } => 1,
            Fate::Trickle { .. } => 2,
            Fate::Stall { .. } => 3,
            Fate::Reset { .. } => 4,
            Fate::HalfClose { .. } => 5,
            Fate::Cut { .. } => 6,
        };
        Self::NAMES[at]
    }

    /// How many bytes pass before it strikes.
    fn strikes_after(self) -> u64 {
        match self {
            Fate::Pass | Fate::Delay { .. } => u64::MAX,
            Fate::Trickle { after, .. }
            | Fate::Stall { after }
            | Fate::Reset { after }
            | Fate::HalfClose { after }
            | Fate::Cut { after } => after,
        }
    }
}

/// One port of a node, seen through a network that breaks. Dropping it ends its connections and its threads.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    port: u16,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    begin: Instant,
    /// Milliseconds from `begin` on; nothing passes before.
    frozen_until_ms: AtomicU64,
    is_storm: AtomicBool,
    is_over: AtomicBool,
    connections: Mutex<Vec<Arc<Connection>>>,
    counts: Mutex<ProxyCounts>,
}

#[derive(Debug)]
struct Connection {
    client: TcpStream,
    server: TcpStream,
    fate: Fate,
    is_over: AtomicBool,
    /// Directions that have ended.
    ended: AtomicU8,
}

impl Proxy {
    /// Where the proxies listen.
    pub const FRONT: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 1, 0, 1));
    /// Where the nodes behind them do.
    pub const BACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    /// Listens at a port that nobody has, for TCP and UDP, and for a node that listens, or will, at the same port of
    /// [`BACK`](Proxy::BACK). Each connection's fate comes from the seed.
    pub fn start(seed: u64) -> io::Result<Self> {
        let listener = TcpListener::bind((Self::FRONT, 0))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let datagrams = UdpSocket::bind((Self::FRONT, port))?;
        datagrams.set_read_timeout(Some(LOOK))?;
        let back = SocketAddr::new(Self::BACK, port);
        let shared = Arc::new(Shared {
            begin: Instant::now(),
            frozen_until_ms: AtomicU64::new(0),
            is_storm: AtomicBool::new(true),
            is_over: AtomicBool::new(false),
            connections: Mutex::default(),
            counts: Mutex::default(),
        });
        let (accepting, passing) = (shared.clone(), shared.clone());
        let threads = vec![
            std::thread::spawn(move || accepting.accept(&listener, back, Chance::new(seed, u64::from(port)))),
            std::thread::spawn(move || passing.pass_datagrams(&datagrams, back)),
        ];
        Ok(Self { shared, port, threads })
    }

    /// The port, on both sides.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether connections that come break, as they do at first, or pass.
    pub fn set_storm(&self, is_storm: bool) {
        self.shared.is_storm.store(is_storm, Ordering::Relaxed);
    }

    /// Whether connections that come break.
    pub fn is_storm(&self) -> bool {
        self.shared.is_storm.load(Ordering::Relaxed)
    }

    /// From now on nothing breaks; what is breaking ends.
    pub fn calm(&self) {
        self.set_storm(false);
        self.shared.frozen_until_ms.store(0, Ordering::Relaxed);
        self.shared.each(|connection| {
            if connection.fate != Fate::Pass {
                connection.end(true);
            }
        });
    }

    /// Resets every connection.
    pub fn reset_all(&self) {
        self.shared.each(|connection| connection.end(true));
    }

    /// Lets nothing pass for so long, in both directions, heartbeats included.
    pub fn freeze(&self, time: Duration) {
        let until = self.shared.begin.elapsed() + time;
        self.shared.frozen_until_ms.store(until.as_millis() as u64, Ordering::Relaxed);
    }

    /// What connections have met.
    pub fn counts(&self) -> ProxyCounts {
        self.shared.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic has been printed.
            let _ = thread.join();
        }
    }
}

/// How often a thread looks whether something has ended.
const LOOK: Duration = Duration::from_millis(20);

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener, back: SocketAddr, mut chance: Chance) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        while !self.is_over.load(Ordering::Relaxed) {
            threads.retain(|thread| !thread.is_finished());
            let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
            connections.retain(|connection| !connection.is_over.load(Ordering::Relaxed));
            drop(connections);
            let Ok((client, _)) = listener.accept() else {
                std::thread::sleep(LOOK / 10);
                continue;
            };
            let fate = match self.is_storm.load(Ordering::Relaxed) {
                true => Fate::draw(&mut chance),
                false => Fate::Pass,
            };
            *self.counts.lock().unwrap_or_else(PoisonError::into_inner).entry(fate.name()).or_default() += 1;
            // Where nobody listens behind, whoever has dialed hears of it by the end of the connection.
            if let Ok(connection) = Connection::new(client, back, fate) {
                let connection = Arc::new(connection);
                self.connections.lock().unwrap_or_else(PoisonError::into_inner).push(connection.clone());
                // The fate is that of one direction, and where both must end, of both.
                let strikes_client = chance.hits(1, 2);
                for from_client in [true, false] {
                    let (shared, connection) = (self.clone(), connection.clone());
                    let fate = if from_client == strikes_client { fate } else { Fate::Pass };
                    threads.push(std::thread::spawn(move || {
                        shared.pump(&connection, from_client, fate);
                        if connection.ended.fetch_add(1, Ordering::Relaxed) == 1 {
                            connection.is_over.store(true, Ordering::Relaxed);
                        }
                    }));
                }
            }
        }
        self.each(|connection| connection.end(false));
        threads.into_iter().for_each(|thread| drop(thread.join()));
    }

    fn each(&self, what: impl FnMut(&Arc<Connection>)) {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(what);
    }

    fn is_frozen(&self) -> bool {
        let until_ms = self.frozen_until_ms.load(Ordering::Relaxed);
        until_ms > 0 && (self.begin.elapsed().as_millis() as u64) < until_ms
    }

    fn pass_datagrams(&self, socket: &UdpSocket, back: SocketAddr) {
        let mut bytes = [0; 2048];
        while !self.is_over.load(Ordering::Relaxed) {
            if let Ok((length, _)) = socket.recv_from(&mut bytes)
                && !self.is_frozen()
            {
                // Datagrams may be lost.
                let _ = socket.send_to(&bytes[..length], back);
            }
        }
    }

    /// Passes one direction on, until it ends or its fate strikes.
    fn pump(&self, connection: &Connection, from_client: bool, fate: Fate) {
        let Connection { client, server, .. } = connection;
        let (from, to) = if from_client { (client, server) } else { (server, client) };
        let mut bytes = vec![0; 64 << 10];
        let mut passed = 0;
        while !connection.is_over.load(Ordering::Relaxed) {
            if self.is_frozen() {
                std::thread::sleep(LOOK / 4);
                continue;
            }
            let left = fate.strikes_after().saturating_sub(passed);
            let has_struck = left == 0;
            let mut most = left.clamp(1, bytes.len() as u64) as usize;
            match fate {
                Fate::Reset { .. } if has_struck => return connection.end(true),
                Fate::Cut { .. } if has_struck => return connection.end(false),
                Fate::HalfClose { .. } if has_struck => {
                    // The other direction ends when its sender does.
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
                Fate::Stall { .. } if has_struck => {
                    std::thread::sleep(LOOK);
                    continue;
                }
                Fate::Trickle { bytes, .. } if has_struck => {
                    std::thread::sleep(Duration::from_millis(10));
                    most = bytes as usize;
                }
                Fate::Delay { ms } => std::thread::sleep(Duration::from_millis(ms)),
                _ => {}
            }
            match (&mut &*from).read(&mut bytes[..most]) {
                Ok(0) => {
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
                Ok(length) => {
                    passed += length as u64;
                    if connection.pass_on(to, &bytes[..length]).is_err() {
                        return connection.end(true);
                    }
                }
                Err(error) if is_nothing(&error) => {}
                Err(_) => return connection.end(true),
            }
        }
    }
}

impl Connection {
    fn new(client: TcpStream, back: SocketAddr, fate: Fate) -> io::Result<Self> {
        let server = TcpStream::connect_timeout(&back, Duration::from_secs(1))?;
        for stream in [&client, &server] {
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(LOOK))?;
            stream.set_write_timeout(Some(LOOK))?;
        }
        Ok(Self { client, server, fate, is_over: AtomicBool::new(false), ended: AtomicU8::new(0) })
    }

    fn pass_on(&self, mut to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() && !self.is_over.load(Ordering::Relaxed) {
            match to.write(bytes) {
                Ok(taken) => bytes = &bytes[taken..],
                Err(error) if is_nothing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Ends both directions, by a reset, or in order but wherever they stand.
    fn end(&self, by_reset: bool) {
        if self.is_over.swap(true, Ordering::Relaxed) {
            return;
        }
        for stream in [&self.client, &self.server] {
            match by_reset {
                // It takes effect when the last of the pumps lets go of the connection, which is soon.
                true => drop(rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO))),
                false => drop(stream.shutdown(Shutdown::Both)),
            }
        }
    }
}

fn is_nothing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
