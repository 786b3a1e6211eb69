//! The demo's workers: a prefill process and a decode process.

use std::error::Error;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use crossdock::{
    Authentication, CacheLayout, Config, FolderOptions, Handle, Memory, Node, PagePool, PageSet, Peer,
    PortConfig, ReceiveRequest, SendRequest, ServeRequest, ShmOptions, VerbsOptions, now_ns,
};
use crossdock_bootstrap::{
    Address, Client, ClientConfig, GroupId, Incarnation, Labels, Member, NodeId, Query, Ranks, Registration,
    Role, Tag, Topology,
};
use crossdock_replay::{Admitted, Handover, Lease, Next, watermarks};

use crossdock_flight::Folder;

use super::content::Content;
use super::queue::{Order, Queue};
use super::talk::{Bye, Computed, Ended, Said, Tell};
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
    /// Of this worker: rails joined by +
    #[arg(long)]
    devices: Option<String>,
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
    queue: Arc<Queue>,
    peer: Option<Peer>,
    deadline: Duration,
    op: OpName,
}

pub fn work(options: &WorkerOptions) -> Result<ExitCode, Box<dyn Error>> {
    super::end_with_parent()?;
    say(&Said::Started);
    let layout = CacheLayout::deepseek_r1(PAGE_TOKENS, options.pages)?;
    let (memory, _) = crossdock::allocate(&layout)?;
    // Prefixes stay in it until it comes under pressure.
    let pool = PagePool::new(layout.pages(), watermarks(layout.pages()));
    let (role, role_name) = match options.role {
        RoleName::Prefill => (Role::Prefill, "prefill"),
        RoleName::Decode => (Role::Decode, "decode"),
    };
    let name = format!("{role_name}-{}", options.number);
    let mut config = Config::new(&name, layout.clone(), memory.clone(), key()?);
    config.ports = match options.port {
        PortName::Shm => vec![PortConfig::Shm(ShmOptions::default())],
        PortName::Tcp => vec![PortConfig::Tcp(None)],
        PortName::Verbs => rails(options.devices.as_deref()).into_iter().map(PortConfig::Verbs).collect(),
    };
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
        queue: Arc::new(Queue::new(pool, QUEUE)),
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

/// A port for each device; without any, the first that is found.
pub fn rails(devices: Option<&str>) -> Vec<VerbsOptions> {
    devices.map_or_else(|| vec![VerbsOptions::default()], VerbsOptions::of_devices)
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

/// Works on what the parent tells, on as many threads as requests may move at once, until it tells the end or is gone.
fn serve(options: &WorkerOptions, bench: &Bench) -> Result<(), Box<dyn Error>> {
    let role = options.role;
    let threads = (0..options.in_flight)
        .map(|_| {
            let bench = bench.clone();
            std::thread::Builder::new().name("request".into()).spawn(move || {
                while let Some(next) = bench.queue.next() {
                    say(&Said::Ended(bench.work(role, next)));
                }
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    for line in std::io::stdin().lock().lines() {
        match serde_json::from_str(&line?) {
            Ok(Tell::Go { room, arrival }) => {
                let begin = Instant::now();
                let pages = bench.layout.pages_for(arrival.tokens);
                let until_ns = now_ns() + bench.deadline.as_nanos() as u64;
                if let Err(error) = bench.queue.arrive(Order { room, arrival, begin }, pages, until_ns) {
                    say(&Said::Ended(failed(room, &error.to_string(), begin)));
                }
            }
            Ok(Tell::End) => break,
            Ok(Tell::Key { .. }) => return Err("the parent tells a second key".into()),
            Err(error) => return Err(format!("the parent cannot be understood: {error}").into()),
        }
    }
    bench.queue.close();
    for thread in threads {
        thread.join().map_err(|_| "a request's thread panicked")?;
    }
    Ok(())
}

impl Bench {
    fn work(&self, role: RoleName, next: Next<Order>) -> Ended {
        let admitted_ns = now_ns();
        match next {
            Next::Admitted(Admitted { tag: order, mut lease, pages, .. }) => {
                let ended = match role {
                    RoleName::Prefill => self.prefill(&order, &mut lease, pages, admitted_ns),
                    RoleName::Decode => self.decode(&order, &mut lease, pages, admitted_ns),
                };
                let ended = ended.unwrap_or_else(|error| failed(order.room, &error.to_string(), order.begin));
                match (role, ended.delivered) {
                    // The output is made now, and reads the pages.
                    (RoleName::Decode, true) => {
                        self.queue.release_at(lease, now_ns() + order.arrival.decode_ns);
                    }
                    _ => self.queue.release(lease),
                }
                ended
            }
            Next::Expired { tag: Order { room, begin, .. }, wanted, free } => {
                let how = format!("{wanted} pages wanted, {free} free when the deadline passed in the queue");
                failed(room, &how, begin)
            }
        }
    }

    fn prefill(
        &self,
        order: &Order,
        lease: &mut Lease,
        pages: PageSet,
        admitted_ns: u64,
    ) -> Result<Ended, Box<dyn Error>> {
        let Order { room, arrival, begin } = order;
        let (room, until) = (*room, *begin + self.deadline);
        let (held, count) = (lease.held_pages(), pages.len() as u64);
        let content = Content::new(&self.layout, &self.memory, room, arrival);
        self.layout.layers().for_each(|layer| content.fill(layer, held, pages.ids()));
        self.queue.keep(lease, pages);
        let pages = lease.pages().ok_or("a request has no pages")?;
        let held_tokens = held * self.layout.page_tokens();
        let ready_ns = now_ns();
        let aux = serde_json::to_vec(&Computed { admitted_ns, ready_ns, held_tokens })?;
        let deadline = until.saturating_duration_since(Instant::now());
        let tokens = arrival.tokens;
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
        Ok(Ended {
            room,
            delivered: ended.is_delivered(),
            how: ended.to_string(),
            pages: count,
            bytes: 0,
            handover: Handover::default(),
            after_ms: begin.elapsed().as_millis() as u64,
            right: true,
        })
    }

    fn decode(
        &self,
        order: &Order,
        lease: &mut Lease,
        pages: PageSet,
        granted_ns: u64,
    ) -> Result<Ended, Box<dyn Error>> {
        let Order { room, arrival, begin } = order;
        let (room, tokens, until) = (*room, arrival.tokens, *begin + self.deadline);
        let (held, count) = (lease.held_pages(), pages.len() as u64);
        let skip_tokens = held * self.layout.page_tokens();
        let deadline = until.saturating_duration_since(Instant::now());
        let peer = self.peer.ok_or("a prefill worker does not decode")?;
        let request = ReceiveRequest { peer, room, use_count: 0, tokens, skip_tokens, pages, deadline };
        let mut receiving = match self.op {
            OpName::Write => self.handle.receive(request)?,
            OpName::Read => self.handle.fetch(request)?,
        };
        let received = receiving.end.wait_until(until + GRACE)?;
        let (end_ns, after_ms) = (now_ns(), begin.elapsed().as_millis() as u64);
        let mut ended = Ended {
            room,
            delivered: received.ended.is_delivered(),
            how: received.ended.to_string(),
            pages: count,
            bytes: u64::from(tokens - skip_tokens)
                * self.layout.token_bytes()
                * self.layout.layers().len() as u64,
            handover: Handover::default(),
            after_ms,
            right: true,
        };
        if ended.delivered {
            let home = receiving.pages.wait_until(until + GRACE)?;
            let content = Content::new(&self.layout, &self.memory, room, arrival);
            // What was here is checked as what has come: nobody else may have written there.
            let (here, home_ids) = (lease.ids(), home.ids());
            ended.right = self
                .layout
                .layers()
                .all(|layer| content.is_right(layer, 0, &here) && content.is_right(layer, held, home_ids));
            self.queue.keep(lease, home);
            let computed: Computed = serde_json::from_slice(&received.aux)?;
            ended.handover = Handover {
                arrived_ns: arrival.at_ns,
                admitted_ns: computed.admitted_ns,
                ready_ns: computed.ready_ns,
                granted_ns,
                end_ns,
                tokens,
                decode_held_tokens: skip_tokens,
                prefill_held_tokens: computed.held_tokens,
            };
        }
        Ok(ended)
    }
}

/// Requests that wait at a worker: more than the parent tells of at once.
const QUEUE: usize = 4096;

/// How much longer than a room's deadline its end may take to be told on a machine that has too much to do.
pub const GRACE: Duration = Duration::from_secs(5);

/// What is still held, once what is on its way home has had the time to come.
fn farewell(bench: &Bench) -> Bye {
    let until = Instant::now() + GRACE;
    let (pool, dock) = (bench.queue.pool(), bench.queue.stats());
    loop {
        bench.queue.clear();
        let quarantine = pool.quarantine(now_ns());
        let pool = pool.stats();
        let asked = Instant::now() + GRACE;
        let Some(stats) = bench.handle.stats().ok().and_then(|mut told| told.wait_until(asked).ok()) else {
            // A progress loop that does not answer holds everything.
            return Bye { pages: u64::from(pool.pages), dock, ..Bye::default() };
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
            dock: dock.clone(),
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
    let handover = Handover::default();
    Ended { room, delivered: false, how, pages: 0, bytes: 0, handover, after_ms, right: true }
}

fn say(what: &Said) {
    if let Ok(line) = serde_json::to_string(what) {
        // A parent that is gone ends this process by the end of its input.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}
