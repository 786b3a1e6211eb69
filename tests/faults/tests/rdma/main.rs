//! Nodes over RDMA whose cable breaks, or whose peer's process is killed or stopped: every room ends once on each side, by
//! its deadline and typed; delivered bytes are right; pages come home, and nobody writes into them then. Once all is well
//! again, rooms are delivered without anybody's help.

mod network;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossdock::{DownCause, End, Ended, Failure, Peer, PortConfig, SessionEnd};
use crossdock_faults::{Bench, Plan, Side, Worker, WorkerOptions, is_typed};
use rustix::process::{Pid, Signal, kill_process};

use network::Network;

/// For what has to happen in the end, on a machine that has too much to do.
const SOON: Duration = Duration::from_secs(60);
/// Rooms beside each other.
const LANES: u64 = 4;

/// There is one cable.
static CABLE: Mutex<()> = Mutex::new(());

#[test]
fn a_link_that_goes_down_is_told_and_comes_back() {
    let _cable = CABLE.lock().unwrap_or_else(|poison| poison.into_inner());
    for network in Network::all() {
        let ports = [0, 1].map(|device| vec![network.impatient_port(device)]);
        let pair = Pair::open(ports, 2);
        let told = pair.rooms(short, |rooms| {
            rooms.wait_for_delivered(4);
            network.set_link(false);
            std::thread::sleep(Duration::from_secs(2));
            network.set_link(true);
        });
        // Whoever had sent hears it of the device.
        assert!(told.devices > 0, "no end names what the device said: {:?}", told.ends);
        println!("link down for 2 s, {}: {}", network.name(), told.in_words());
        pair.recovers();
        pair.parts();
    }
}

#[test]
fn packets_that_are_lost_are_sent_again() {
    let _cable = CABLE.lock().unwrap_or_else(|poison| poison.into_inner());
    for network in Network::all() {
        for percent in [1, 5, 20] {
            let pair = Pair::open([vec![network.port(0)], vec![network.port(1)]], 1);
            let told = pair.rooms(long, |rooms| {
                network.set_loss(percent);
                rooms.wait_for_ended(6);
            });
            println!("{percent} % of packets lost, {}: {}", network.name(), told.in_words());
            network.set_loss(0);
            pair.recovers();
            pair.parts();
        }
    }
}

/// What is pushed into memory whose key is wrong is refused by the owner's device, again and again: no such room is delivered,
/// each ends, and every page comes home. Pulls out of memory whose key is right go on in between.
#[test]
fn a_wrong_key_is_named_and_costs_no_page() {
    let _cable = CABLE.lock().unwrap_or_else(|poison| poison.into_inner());
    for network in Network::all() {
        let pair = Pair::open([vec![network.impatient_port(0)], vec![network.wrong_port(1)]], 1);
        let push = |room| Plan { is_pull: false, ..short(room) };
        let told = pair.rooms(push, |rooms| rooms.wait_for_ended(LANES));
        println!("a wrong key, {}: {}", network.name(), told.in_words());
        assert!(told.ends.keys().all(|(_, word)| *word != "delivered"), "{:?}", told.ends);
        let first = told.first.expect("an end names what the device said");
        // Of the poster's device or of the owner's: both say it.
        let said = ["IBV_WC_REM_ACCESS_ERR", "IBV_EVENT_QP_ACCESS_ERR", "IBV_WC_WR_FLUSH_ERR"];
        assert!(said.iter().any(|word| first.contains(word)) && first.contains("for queue pair"), "{first}");
        pair.parts();
    }
}

/// Queue pairs that end up in error while rooms are under way. Of real devices only the port can do that to its own: its tests do.
#[test]
fn queue_pairs_that_are_pushed_into_error_are_replaced() {
    let network = Network::fabric();
    let pair = Pair::open([0, 1].map(|device| vec![network.impatient_port(device)]), 2);
    let told = pair.rooms(short, |rooms| {
        for _ in 0..3 {
            rooms.wait_for_delivered(2);
            network.break_queue_pairs();
        }
    });
    println!("queue pairs in error, {}: {}", network.name(), told.in_words());
    assert!(told.devices > 0, "no end names what the device said: {:?}", told.ends);
    pair.recovers();
    pair.parts();
}

/// One of two rails dies: the other carries what is left, until the first comes back. The second one is from a device to itself, which needs no cable.
#[test]
fn a_rail_that_dies_leaves_the_rooms_to_the_other() {
    let _cable = CABLE.lock().unwrap_or_else(|poison| poison.into_inner());
    let Some(network) = Network::guest() else { return };
    let rails = [[0, 0], [1, 0]].map(|devices| devices.map(|device| network.impatient_port(device)).to_vec());
    let pair = Pair::open(rails, 1);
    let mut moved = Vec::new();
    let told = pair.rooms(long, |rooms| {
        rooms.wait_for_delivered(4);
        moved.push(pair.rails());
        network.set_loss(100);
        std::thread::sleep(Duration::from_secs(2));
        moved.push(pair.rails());
        rooms.wait_for_delivered(8);
        moved.push(pair.rails());
        network.set_loss(0);
        let until = Instant::now() + SOON;
        while pair.rails().0 == moved[2].0 {
            assert!(Instant::now() < until, "the first rail does not come back");
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let (words, name) = (told.in_words(), network.name());
    println!("one of two rails loses all, {name}: {words}; bytes of both, and rooms begun again: {moved:?}");
    assert!(told.ends.keys().all(|(_, word)| *word == "delivered"), "{:?}", told.ends);
    let [well, dead, later] = moved[..] else { unreachable!("three looks") };
    assert!(well.0 > 0 && dead.0 == later.0, "the first carries nothing any more");
    assert!(well.1 > 0 && dead.1 < later.1, "and the second does");
    assert!(later.2 > 0, "what was under way on the first began again");
    pair.recovers();
    pair.parts();
}

/// A process that is killed or stopped in the middle: nobody there helps, and the pages come home.
#[test]
fn pages_come_home_from_a_process_that_is_killed_or_stopped() {
    let _cable = CABLE.lock().unwrap_or_else(|poison| poison.into_inner());
    let Some(network) = Network::guest() else { return };
    for signal in [Signal::KILL, Signal::STOP] {
        let decode = open(2, vec![network.port(1)], 1);
        let prefill = Prefill::start();
        let peer = connect(&decode, &prefill.address);
        let rooms = Rooms::new(None, &decode.bench, peer, short);
        let mut taken_ms = 0;
        let told = rooms.run(|rooms| {
            rooms.wait_for_delivered(4);
            prefill.send(signal);
            let begin = Instant::now();
            // Those that were under way, and some that nobody answers.
            rooms.wait_for_ended(LANES + 2);
            rooms.is_over.store(true, Ordering::Relaxed);
            decode.bench.handle.disconnect(peer).unwrap();
            decode.bench.is_empty(0, SOON).expect("all comes home");
            taken_ms = begin.elapsed().as_millis();
        });
        println!("peer {signal:?}, {}: {}; all home {taken_ms} ms later", network.name(), told.in_words());
        let lost = |(_, word): &(Side, &str)| *word != "delivered";
        assert!(told.ends.keys().any(lost), "{:?}", told.ends);
    }
}

/// What [`Prefill`] runs: serves the rooms that its parent asks for, in order, until it is killed.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let network = Network::guest().expect("its parent has one");
    let prefill = open(1, vec![network.port(0)], 1);
    println!("address {}", prefill.node.address());
    // It does not know its peer: whoever asks for a room gets it.
    let nobody = Peer::node(0);
    std::thread::scope(|scope| {
        for lane in 0..LANES {
            let bench = &prefill.bench;
            scope.spawn(move || {
                for number in 0.. {
                    let plan = short(lane << 32 | number);
                    bench.live(&plan, Side::Prefill, nobody).expect("no rule is broken");
                }
            });
        }
    });
}

/// A room that may fail soon.
fn short(room: u64) -> Plan {
    Plan { deadlines: [Duration::from_secs(8); 2], ..Plan::fair(room, room % 2 == 1) }
}

/// A room that may wait for packets to be sent again and again.
fn long(room: u64) -> Plan {
    Plan { deadlines: [SOON; 2], ..Plan::fair(room, room % 2 == 1) }
}

fn open(node: u64, ports: Vec<PortConfig>, lanes_per_rail: u8) -> Worker {
    let options = WorkerOptions {
        name: format!("node-{node}"),
        node,
        pages: 256,
        shm: false,
        tcp: false,
        behind: None,
        second: None,
        verify: true,
        gpu: None,
    };
    let opened = Worker::open_with(&options, |config| {
        config.ports = ports;
        config.lanes_per_rail = lanes_per_rail;
        config.handshake_timeout = Duration::from_secs(10);
    });
    opened.unwrap_or_else(|error| panic!("{}: {error}", options.name))
}

fn connect(decode: &Worker, address: &str) -> Peer {
    let (peer, mut up) = decode.bench.handle.connect(address).unwrap();
    up.wait_until(Instant::now() + SOON).unwrap().unwrap();
    peer
}

/// Two nodes of this process.
struct Pair {
    prefill: Worker,
    decode: Worker,
    peer: Peer,
}

impl Pair {
    fn open([prefill, decode]: [Vec<PortConfig>; 2], lanes_per_rail: u8) -> Self {
        let (prefill, decode) = (open(1, prefill, lanes_per_rail), open(2, decode, lanes_per_rail));
        let peer = connect(&decode, prefill.node.address());
        Self { prefill, decode, peer }
    }

    /// Lives rooms while something happens.
    fn rooms(&self, plan: fn(u64) -> Plan, meanwhile: impl FnOnce(&Rooms<'_>)) -> Told {
        Rooms::new(Some(&self.prefill.bench), &self.decode.bench, self.peer, plan).run(meanwhile)
    }

    /// What each of two rails was given to move, and how many attempts were begun because a lane went down.
    fn rails(&self) -> (u64, u64, u64) {
        let mut sums = (0, 0, 0);
        for worker in [&self.prefill, &self.decode] {
            let stats = worker.bench.stats(SOON).expect("the loop answers");
            let moved = |rail: usize| stats.rails[rail].written_bytes + stats.rails[rail].read_bytes;
            sums = (sums.0 + moved(0), sums.1 + moved(1), sums.2 + stats.counters.further_attempts);
        }
        sums
    }

    /// A push and a pull are delivered before long, and nobody has to do anything for it.
    fn recovers(&self) {
        let (prefill, decode, peer) = (&self.prefill.bench, &self.decode.bench, self.peer);
        for is_pull in [false, true] {
            let until = Instant::now() + SOON;
            for number in 0.. {
                let room = 1 << 60 | u64::from(is_pull) << 50 | number;
                let plan = Plan { is_pull, ..short(room) };
                let [sent, received] = std::thread::scope(|scope| {
                    let sent = scope.spawn(|| prefill.live(&plan, Side::Prefill, peer));
                    let received = decode.live(&plan, Side::Decode, peer);
                    [sent.join().expect("rooms do not panic"), received].map(|heard| heard.unwrap().ended)
                });
                if sent.is_delivered() && received.is_delivered() {
                    break;
                }
                assert!(Instant::now() < until, "nothing is delivered any more: {sent}; {received}");
            }
        }
    }

    /// Nothing is left once they have parted.
    fn parts(&self) {
        self.decode.bench.handle.disconnect(self.peer).unwrap();
        for worker in [&self.prefill, &self.decode] {
            worker.bench.is_empty(0, SOON).unwrap();
        }
    }
}

/// Rooms, one after the other on some threads.
struct Rooms<'a> {
    /// The other side's, where it is in this process.
    prefill: Option<&'a Bench>,
    decode: &'a Bench,
    peer: Peer,
    plan: fn(u64) -> Plan,
    is_over: AtomicBool,
    /// Of each lane, how many rooms are lived: one that a side has begun, the other begins too.
    begun: [Mutex<u64>; LANES as usize],
    ended: AtomicU64,
    delivered: AtomicU64,
}

/// No more rooms are begun once it is gone.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How they ended.
#[derive(Default)]
struct Told {
    ends: BTreeMap<(Side, &'static str), u64>,
    /// Ends that name what a device said, and the first of them.
    devices: u64,
    first: Option<String>,
}

impl<'a> Rooms<'a> {
    fn new(prefill: Option<&'a Bench>, decode: &'a Bench, peer: Peer, plan: fn(u64) -> Plan) -> Self {
        let (is_over, begun, ended, delivered) = Default::default();
        Self { prefill, decode, peer, plan, is_over, begun, ended, delivered }
    }

    fn run(&self, meanwhile: impl FnOnce(&Self)) -> Told {
        std::thread::scope(|scope| {
            let benches =
                [self.prefill.map(|bench| (bench, Side::Prefill)), Some((self.decode, Side::Decode))];
            let sides = benches.into_iter().flatten();
            let lanes = sides.flat_map(|side| (0..LANES).map(move |lane| (lane, side)));
            let threads: Vec<_> = lanes
                .map(|(lane, (bench, side))| scope.spawn(move || self.lane(bench, lane, side)))
                .collect();
            // Also where something fails meanwhile: else the rooms would go on for ever.
            let over = Over(&self.is_over);
            meanwhile(self);
            drop(over);
            let mut told = Told::default();
            threads.into_iter().for_each(|thread| told.add(thread.join().expect("a room's thread")));
            told
        })
    }

    /// Both sides of a lane have the same rooms; whoever ends one first waits for the other in the next.
    fn lane(&self, bench: &Bench, lane: u64, side: Side) -> Told {
        let mut told = Told::default();
        for number in (0..).take_while(|&number| self.begins(lane, number)) {
            let heard = bench.live(&(self.plan)(lane << 32 | number), side, self.peer).unwrap();
            let ended = &heard.ended;
            assert!(is_typed(ended), "{side:?} of room {number} of lane {lane}: {ended:?}");
            *told.ends.entry((side, heard.word())).or_default() += 1;
            if is_of_a_device(ended) {
                told.devices += 1;
                told.first.get_or_insert_with(|| ended.to_string());
            }
            if side == Side::Decode {
                self.ended.fetch_add(1, Ordering::Relaxed);
                self.delivered.fetch_add(ended.is_delivered().into(), Ordering::Relaxed);
            }
        }
        told
    }

    fn begins(&self, lane: u64, number: u64) -> bool {
        let mut begun = self.begun[lane as usize].lock().expect("no side panics here");
        if !self.is_over.load(Ordering::Relaxed) {
            *begun = (*begun).max(number + 1);
        }
        number < *begun
    }

    /// Waits until so many more rooms are delivered.
    fn wait_for_delivered(&self, more: u64) {
        self.wait_for(&self.delivered, more);
    }

    /// Waits until so many more rooms have ended, however they did.
    fn wait_for_ended(&self, more: u64) {
        self.wait_for(&self.ended, more);
    }

    fn wait_for(&self, count: &AtomicU64, more: u64) {
        let (until, from) = (Instant::now() + 2 * SOON, count.load(Ordering::Relaxed));
        while count.load(Ordering::Relaxed) < from + more {
            assert!(Instant::now() < until, "{} of {more} rooms", count.load(Ordering::Relaxed) - from);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Told {
    fn add(&mut self, other: Told) {
        other.ends.into_iter().for_each(|(end, count)| *self.ends.entry(end).or_default() += count);
        self.devices += other.devices;
        self.first = self.first.take().or(other.first);
    }

    fn in_words(&self) -> String {
        let ends = self.ends.iter().map(|((side, word), count)| format!("{side:?} {word} {count}"));
        let first = self.first.as_ref().map_or(String::new(), |first| format!("; {first}"));
        format!("{}{first}", ends.collect::<Vec<_>>().join(", "))
    }
}

fn is_of_a_device(ended: &Ended) -> bool {
    matches!(
        ended.end,
        End::PeerLost { cause: SessionEnd::LanesLost { cause: DownCause::Device(_) } }
            | End::Failed { cause: Failure::Lane(DownCause::Device(_)), .. }
    )
}

/// A prefill node in a process of its own.
struct Prefill {
    process: Child,
    address: String,
}

impl Prefill {
    fn start() -> Self {
        let mut process = Command::new(std::env::current_exe().expect("this program"))
            .args(["child", "--exact", "--nocapture"])
            .env(CHILD, "1")
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let mut lines = BufReader::new(process.stdout.take().expect("a pipe")).lines();
        let address = lines.find_map(|line| Some(line.ok()?.split_once("address ")?.1.to_owned()));
        let address = address.expect("it says where it is");
        // What else it prints is nobody's.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, address }
    }

    fn send(&self, signal: Signal) {
        let pid = Pid::from_raw(self.process.id() as i32).expect("a process");
        kill_process(pid, signal).expect("it runs");
    }
}

impl Drop for Prefill {
    fn drop(&mut self) {
        // Both fail only where the process has ended and has been waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const CHILD: &str = "CROSSDOCK_FAULTS_CHILD";
