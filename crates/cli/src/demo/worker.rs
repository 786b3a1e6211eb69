//! The demo's workers: a prefill process and a decode process.

use std::error::Error;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use crossdock::{
    Authentication, CacheLayout, Config, FolderOptions, Handle, Memory, Node, PagePool, PageSet, Peer,
    PortConfig, ReceiveRequest, SendRequest, ServeRequest, ShmOptions, now_ns,
};
use crossdock_bootstrap::{
    Address, Client, ClientConfig, GroupId, Incarnation, Labels, Member, NodeId, Query, Ranks, Registration,
    Role, Tag, Topology,
};

use crossdock_flight::Folder;

use super::content::Content;
use super::talk::{Bye, Ended, Said, Tell};
use super::{OpName, PAGE_TOKENS, PortName};

#[derive(Args)]
pub struct WorkerOptions {
    #[arg(long)]
    role: RoleName,
    /// Tells workers of one role apart
    #[arg(long, default_value_t = 0)]
    number: u32,
    #[arg(long)]
    port: PortName,
    #[arg(long)]
    registry: String,
    #[arg(long)]
    pages: u32,
    #[arg(long)]
    deadline_s: u64,
    #[arg(long)]
    in_flight: usize,
    #[arg(long)]
    op: OpName,
    #[arg(long)]
    flight_dir: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum RoleName {
    Prefill,
    Decode,
}

/// What each of the worker's threads works with.
#[derive(Clone)]
struct Bench {
    handle: Handle,
    layout: CacheLayout,
    memory: Memory,
    pool: PagePool,
    peer: Option<Peer>,
    deadline: Duration,
    op: OpName,
}

pub fn work(options: &WorkerOptions) -> Result<ExitCode, Box<dyn Error>> {
    super::end_with_parent()?;
    say(&Said::Started);
    let layout = CacheLayout::deepseek_r1(PAGE_TOKENS, options.pages)?;
    let (memory, pool) = crossdock::allocate(&layout)?;
    let (role, role_name) = match options.role {
        RoleName::Prefill => (Role::Prefill, "prefill"),
        RoleName::Decode => (Role::Decode, "decode"),
    };
    let name = format!("{role_name}-{}", options.number);
    let mut config = Config::new(&name, layout.clone(), memory.clone(), key()?);
    config.ports = vec![match options.port {
        PortName::Shm => PortConfig::Shm(ShmOptions::default()),
        PortName::Tcp => PortConfig::Tcp(None),
    }];
    config.flight_folder = options.flight_dir.as_ref().map(FolderOptions::new);
    let node = Node::open(config)?;
    let mut registry = ClientConfig::to(&options.registry);
    // A registry that is stopped must not keep a worker that wants to leave.
    registry.call_time = Duration::from_secs(2);
    let client = Client::new(registry)?;
    let registration = Registration::start(
        client.clone(),
        crossdock_bootstrap::Worker {
            node: NodeId::new(&name)?,
            incarnation: Incarnation::new(node.identity().incarnation),
            role,
            address: Address::new(node.address().parse()?)?,
            ttl_ms: 3_000,
            warm_up_ms: 0,
            member: Some(Member::new(GroupId::new(&name)?, topology()?, Ranks::default())?),
            labels: Labels::none().with("port", options.port.name())?,
        },
    )?;
    registration.wait(Duration::from_secs(10))?;
    let peer = match options.role {
        RoleName::Prefill => None,
        RoleName::Decode => {
            let query = Query::all().role(Role::Prefill).label("port", options.port.name())?;
            let found = client.wait_for(&query, 1, Duration::from_secs(20))?;
            let address = found[0].worker.address.socket().to_string();
            let (peer, mut up) = node.handle().connect(address)?;
            up.wait_until(Instant::now() + Duration::from_secs(20))??;
            Some(peer)
        }
    };
    say(&Said::Ready);
    let bench = Bench {
        handle: node.handle().clone(),
        layout,
        memory: memory[0].clone(),
        pool: pool.clone(),
        peer,
        deadline: Duration::from_secs(options.deadline_s),
        op: options.op,
    };
    serve(options, &bench)?;
    say(&Said::Bye(farewell(&bench)));
    if let Some(folder) = &options.flight_dir {
        let dump = node.handle().flight()?.wait_until(Instant::now() + GRACE)?;
        Folder::open(FolderOptions::new(folder))?.put(dump);
    }
    drop(node);
    // The registry may be gone by now; what it still lists ends with its time to live.
    let _ = registration.deregister();
    Ok(ExitCode::SUCCESS)
}

/// One rank that holds all of the cache.
fn topology() -> Result<Topology, crossdock_bootstrap::Invalid> {
    Ok(Topology::single(Tag::new("deepseek-r1")?, Tag::new("bf16")?, PAGE_TOKENS))
}

/// What the parent says first.
fn key() -> Result<Authentication, Box<dyn Error>> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    match serde_json::from_str(&line) {
        Ok(Tell::Key { key }) => Ok(Authentication::PreSharedKey(key.to_vec())),
        Ok(_) | Err(_) => Err("the parent did not begin with the key".into()),
    }
}

/// Works on what the parent tells, on as many threads as requests are under way, until it tells the end or is gone.
fn serve(options: &WorkerOptions, bench: &Bench) -> Result<(), Box<dyn Error>> {
    let (orders, taken) = sync_channel::<(u64, u32)>(4096);
    let taken = Arc::new(Mutex::new(taken));
    let role = options.role;
    let threads = (0..options.in_flight)
        .map(|_| {
            let (bench, taken) = (bench.clone(), taken.clone());
            std::thread::Builder::new().name("request".into()).spawn(move || {
                while let Some((room, tokens)) = next(&taken) {
                    let begin = Instant::now();
                    let ended = match role {
                        RoleName::Prefill => bench.prefill(room, tokens, begin),
                        RoleName::Decode => bench.decode(room, tokens, begin),
                    };
                    say(&Said::Ended(ended.unwrap_or_else(|error| failed(room, &error.to_string(), begin))));
                }
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    for line in std::io::stdin().lock().lines() {
        match serde_json::from_str(&line?) {
            Ok(Tell::Go { room, tokens }) => orders.send((room, tokens))?,
            Ok(Tell::End) => break,
            Ok(Tell::Key { .. }) => return Err("the parent tells a second key".into()),
            Err(error) => return Err(format!("the parent cannot be understood: {error}").into()),
        }
    }
    drop(orders);
    for thread in threads {
        thread.join().map_err(|_| "a request's thread panicked")?;
    }
    Ok(())
}

fn next(orders: &Mutex<Receiver<(u64, u32)>>) -> Option<(u64, u32)> {
    orders.lock().ok()?.recv().ok()
}

impl Bench {
    fn prefill(&self, room: u64, tokens: u32, begin: Instant) -> Result<Ended, Box<dyn Error>> {
        let until = begin + self.deadline;
        let pages = self.take(tokens, until)?;
        let ids = pages.ids().to_vec();
        let content = Content { layout: &self.layout, memory: &self.memory, room, tokens };
        self.layout.layers().for_each(|layer| content.fill(layer, &ids));
        let begin_ns = now_ns();
        let pages = pages.share();
        let deadline = until.saturating_duration_since(Instant::now());
        let aux = begin_ns.to_le_bytes().to_vec();
        let ended = match self.op {
            OpName::Write => {
                let request = SendRequest { room, use_count: 0, tokens, pages, deadline };
                let mut sending = self.handle.open(request)?;
                sending.send_layers(self.layout.layers())?;
                sending.finish(aux)?;
                sending.end.wait_until(until + GRACE)?
            }
            OpName::Read => {
                let request = ServeRequest { room, use_count: 0, tokens, pages, aux, deadline };
                self.handle.serve(request)?.end.wait_until(until + GRACE)?
            }
        };
        let after_ms = begin.elapsed().as_millis() as u64;
        Ok(Ended {
            room,
            delivered: ended.is_delivered(),
            how: ended.to_string(),
            pages: ids.len() as u64,
            bytes: u64::from(tokens) * self.layout.token_bytes() * self.layout.layers().len() as u64,
            begin_ns,
            end_ns: now_ns(),
            after_ms,
            right: true,
        })
    }

    fn decode(&self, room: u64, tokens: u32, begin: Instant) -> Result<Ended, Box<dyn Error>> {
        let until = begin + self.deadline;
        let pages = self.take(tokens, until)?;
        let ids = pages.ids().to_vec();
        let deadline = until.saturating_duration_since(Instant::now());
        let peer = self.peer.ok_or("a prefill worker does not decode")?;
        let request = ReceiveRequest { peer, room, use_count: 0, tokens, skip_tokens: 0, pages, deadline };
        let mut receiving = match self.op {
            OpName::Write => self.handle.receive(request)?,
            OpName::Read => self.handle.fetch(request)?,
        };
        let received = receiving.end.wait_until(until + GRACE)?;
        let (end_ns, after_ms) = (now_ns(), begin.elapsed().as_millis() as u64);
        let delivered = received.ended.is_delivered();
        let mut right = true;
        let mut begin_ns = end_ns;
        if delivered {
            let home = receiving.pages.wait_until(until + GRACE)?;
            let content = Content { layout: &self.layout, memory: &self.memory, room, tokens };
            right = self.layout.layers().all(|layer| content.is_right(layer, home.ids()));
            begin_ns = received.aux.try_into().map_or(end_ns, u64::from_le_bytes);
        }
        Ok(Ended {
            room,
            delivered,
            how: received.ended.to_string(),
            pages: ids.len() as u64,
            bytes: u64::from(tokens) * self.layout.token_bytes() * self.layout.layers().len() as u64,
            begin_ns,
            end_ns,
            after_ms,
            right,
        })
    }

    /// Takes pages, waiting for other requests to give some back.
    fn take(&self, tokens: u32, until: Instant) -> Result<PageSet, Box<dyn Error>> {
        let pages = self.layout.pages_for(tokens);
        loop {
            match self.pool.take(pages) {
                Ok(set) => return Ok(set),
                Err(error) if Instant::now() >= until => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// How much longer than a room's deadline its end may take to be told on a machine that has too much to do.
pub const GRACE: Duration = Duration::from_secs(5);

/// What is still held, once what is on its way home has had the time to come.
fn farewell(bench: &Bench) -> Bye {
    let until = Instant::now() + GRACE;
    loop {
        let pool = bench.pool.stats();
        let quarantine = bench.pool.quarantine(now_ns());
        let asked = Instant::now() + GRACE;
        let Some(stats) = bench.handle.stats().ok().and_then(|mut told| told.wait_until(asked).ok()) else {
            // A progress loop that does not answer holds everything.
            return Bye { pages: u64::from(pool.pages), ..Bye::default() };
        };
        // Pages that a peer was granted to read are no quarantine of the pool's: nobody writes them. They stay shared.
        let lends = bench.op == OpName::Read && bench.peer.is_none() && stats.grants > 0;
        let lent = if lends { pool.shared } else { 0 };
        let held_by = match quarantine.first() {
            Some(entry) => entry.peer.to_string(),
            None if lent > 0 => "decode-0".to_owned(),
            None => String::new(),
        };
        let held = !held_by.is_empty();
        let bye = Bye {
            pages: u64::from(pool.pages - pool.free - pool.quarantined - lent),
            // The room and the grant of a held page stay as long as the page does.
            rooms: if held { 0 } else { stats.rooms as u64 },
            grants: if held { 0 } else { stats.grants as u64 },
            quarantined: u64::from(pool.quarantined + lent),
            held_by,
            stale: stats.counters.stale_arrivals,
        };
        if bye.pages + bye.rooms + bye.grants + bye.quarantined == 0 || Instant::now() >= until {
            return bye;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn failed(room: u64, how: &str, begin: Instant) -> Ended {
    let after_ms = begin.elapsed().as_millis() as u64;
    let how = how.to_owned();
    Ended { room, delivered: false, how, pages: 0, bytes: 0, begin_ns: 0, end_ns: 0, after_ms, right: true }
}

fn say(what: &Said) {
    if let Ok(line) = serde_json::to_string(what) {
        // A parent that is gone ends this process by the end of its input.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}
